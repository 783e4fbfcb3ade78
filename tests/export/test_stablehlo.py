"""Tests that an exported program answers like its model."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import heads
from qa_jax import input_pipeline
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.export import run as run_lib
from qa_jax.export import stablehlo
from qa_jax.inference import decode
from qa_jax.inference import predict
from qa_jax.metrics import calibration
from qa_jax.models.encoders import bert
from tests.common import random_model

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TOKENIZER = tokenizer_lib.Tokenizer(
    ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS,
     *('##' + c for c in LETTERS), *'.,?[]'), lowercase=True)
SIZES = bert.BertConfig(
    vocab_size=80, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32,
    max_position=64, initializer_range=0.5)
LONG = ' '.join(LETTERS[i * 7 % 26] for i in range(150))
MANY = ' '.join(np.random.default_rng(0).choice([*LETTERS], 1500))
QUESTIONS = [('x y', 'a b: c d e, f g h!'), ('a b', LONG), ('', LONG[:100]),
             ('a b', MANY),  # of more windows than a batch
             ('What?', 'Åb  ç\t(D)\r\nÉF 東x  g\u0301… [SEP] [CLS]'),
             ('z ' * 300, LONG), ('q', ''), ('[SEP]', 'word wordy words')]


def make(head: str = 'independent', **fields) -> predict.QA:
  """Returns an untrained model with windows of at most 48 tokens."""
  config = config_lib.check_config({
      'model': {'preset': '', 'head': head}, 'train': {'num_steps': 1},
      'data': {'max_length': fields.pop('max_length', 48),
               'window_overlap': 8, 'max_question_length': 12},
      'decode': {'max_answer_length': 6, 'n_best': 4, 'null_rule': 'min_null',
                 **fields}})
  return random_model.draw_qa(config, SIZES, TOKENIZER)


@pytest.fixture(scope='module')
def model() -> predict.QA:
  return make()


@pytest.fixture(scope='module')
def directory(model, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('export') / 'out'
  stablehlo.export_run(model, path, ('cpu', 'cuda', 'tpu'))
  return path


@pytest.fixture(scope='module')
def loaded(directory):
  return run_lib.load_program(directory)


@pytest.fixture(scope='module')
def answers(model) -> list[predict.Answer]:
  return model.answer_batch(
      [{'question': q, 'context': c} for q, c in QUESTIONS])


def lowered(model: predict.QA, platforms=('cpu',)):
  params = flax.traverse_util.flatten_dict(model.params, sep='/')
  return stablehlo.lower_program(
      model.model, params, model.config, platforms), params


def windows_of(meta, question, context):
  """Returns the runner's windows of token ids; an answer may start anywhere."""
  everywhere = np.ones(len(context), bool)
  return run_lib.make_windows(meta, question, context, everywhere, everywhere)


def test_attention_of_any_run_is_exported_as_xla(model):
  other = dataclasses.replace(
      model, model=model.model.clone(attention='cudnn'))  # not on a CPU
  ours, reference = (lowered(m)[0][0].mlir_module() for m in (other, model))
  assert ours == reference


def test_the_runner_answers_as_predict(loaded, answers):
  assert {bool(a.text) for a in answers} == {True, False}
  for (question, context), expected in zip(QUESTIONS, answers, strict=True):
    result = run_lib.answer_question(loaded, question, context)
    assert (result['text'], result['start'], result['end']) == (
        expected.text, expected.start, expected.end)
    assert (result['score'] is None) == (expected.score is None)
    np.testing.assert_allclose(
        [result['score'] or 0, result['null_score']],
        [expected.score or 0, expected.null_score], atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(
        [result['probability'], result['null_probability']],
        [expected.probability, expected.null_probability], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('head', ['biased', 'conditional(width=6)'])
def test_whole_words_are_exported(tmp_path, head):
  model = make(head, whole_words=True, null_rule='never')
  stablehlo.export_run(model, tmp_path / 'out', ('cpu',))
  loaded = run_lib.load_program(tmp_path / 'out')
  context = ' '.join(LETTERS[i:i + 2 + i % 5] for i in range(24))
  for question in ('x', 'y z', 'a b c'):
    result = run_lib.answer_question(loaded, question, context)
    expected = model.answer(question, context)
    assert result['text'] == expected.text != ''
    assert result['score'] == pytest.approx(expected.score, abs=1e-5)
    assert result['probability'] == pytest.approx(
        expected.probability, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {'null_rule': 'min_null', 'search': 'beam(width=2)'},
    {'null_rule': 'never'}], ids=str)
def test_a_calibrated_run_is_exported_with_its_probabilities(tmp_path, fields):
  """The calibrated null threshold is in config.decode of a loaded run."""
  model = dataclasses.replace(
      make(null_threshold=1.5, **fields),
      calibration=calibration.Calibration(
          1.5, 2.5, 'held out', '', 9, 1, {}))
  stablehlo.export_run(model, tmp_path / 'out', ('cpu',))
  loaded, plain = run_lib.load_program(tmp_path / 'out'), dataclasses.replace(
      model, calibration=None)
  for question, context in QUESTIONS[:4]:
    result = run_lib.answer_question(loaded, question, context)
    expected, other = (m.answer(question=question, context=context)
                       for m in (model, plain))
    assert result['text'] == expected.text
    for name in ('probability', 'null_probability'):
      assert result[name] == pytest.approx(
          getattr(expected, name), rel=1e-5, abs=1e-6), name
    assert result['probability'] != pytest.approx(other.probability, rel=0.01)


def run(directory: pathlib.Path, question: str, context: str):
  """Runs run.py in a process that cannot import this repository."""
  return subprocess.run(
      [sys.executable, '-I', directory / 'run.py', f'--question={question}',
       f'--context={context}'], cwd=directory.parent, capture_output=True,
      text=True, check=False, env={'JAX_PLATFORMS': 'cpu'})


def test_the_copied_runner_needs_no_qa_jax(directory, answers):
  done = run(directory, *QUESTIONS[1])
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert (result['text'], result['start']) == (
      answers[1].text, answers[1].start)
  assert 'import qa_jax' not in (directory / 'run.py').read_text()
  assert 'from qa_jax' not in (directory / 'run.py').read_text()


def test_the_runner_says_that_a_text_is_no_unicode(directory):
  done = run(directory, 'a', 'b \udcff')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('count', [0, 1, 33, 34, 35, 200])
@pytest.mark.parametrize('query', [0, 3, 12, 40])
def test_windows_of_the_runner_equal_those_of_windows_py(
    model, loaded, count, query):
  meta = loaded[0]
  rng = np.random.default_rng([count, query])
  texts = [' '.join(rng.choice(list(LETTERS), n)) for n in (query, count)]
  ids = [TOKENIZER.encode([text]).ids.tolist() for text in texts]
  token_ids, context, starts, ends, shift = windows_of(meta, *ids)
  ours = input_pipeline.make_windows(model.config, [Example('0', *texts)],
                                     TOKENIZER)
  assert len(token_ids) == len(ours)
  assert token_ids.shape[1] in (32, 48)
  batch = ours.gather(np.arange(len(ours)), token_ids.shape[1])
  np.testing.assert_array_equal(token_ids, batch['token_ids'])
  position = np.arange(token_ids.shape[1])[None]
  begin, end = context.T[..., None]
  for name, mask in (('context_mask', (position >= begin) & (position < end)),
                     ('context_mask', ends), ('start_mask', starts)):
    np.testing.assert_array_equal(mask, batch[name], err_msg=name)
  np.testing.assert_array_equal(shift, ours.begin - ours.context_offset)


@pytest.mark.parametrize('count', [400, 500, 650, 700, 1001])
def test_long_windows_of_the_runner_own_the_tokens_of_windows_py(
    loaded, count):
  """In hundreds of tokens the length of a window decides who owns a token."""
  lengths = {'max_length': 384, 'window_overlap': 128, 'max_question_length': 9}
  context = ' '.join('a' for _ in range(count))
  ids = [TOKENIZER.encode([text]).ids.tolist() for text in ('a', context)]
  _, _, starts, _, shift = windows_of({**loaded[0], **lengths}, *ids)
  ours = windows_lib.make_windows(
      [Example('0', 'a', context)], TOKENIZER, **lengths)
  for row, offset, first, end in zip(
      starts, shift, ours.best_begin, ours.best_end, strict=True):
    assert (np.flatnonzero(row) + offset).tolist() == [*range(first, end)]


def test_null_rules_of_the_runner_equal_those_of_decoding():
  assert run_lib.NULL_RULES.keys() == null_rules.NULL_RULES.keys()
  rng = np.random.default_rng(0)
  for scale in (1, 30, 1000):
    null, best = rng.normal(0, scale, (2, 3))
    scores = null_rules.WindowScores(
        null, best, np.zeros(1, int), normaliser=best + 1)
    for name, rule in null_rules.NULL_RULES.items():
      assert run_lib.NULL_RULES[name](null, best, best + 1) == pytest.approx(
          rule.score(scores)[0], rel=1e-12), name


# --- the program


def test_batch_and_length_are_free_within_their_bounds(model, loaded):
  (exported, shortest), params = lowered(model)
  assert (shortest, exported.platforms) == (32, ('cpu',))
  shape = exported.in_avals[-4].shape
  assert [str(d) for d in shape] == ['b', 'l']
  texts = ['x y', LONG]
  ids = [TOKENIZER.encode([t]).ids.tolist() for t in texts]
  *inputs, _ = windows_of(loaded[0], *ids)
  together = exported.call(params, *inputs)
  assert together['score'].shape == (len(inputs[0]), 4)
  alone = exported.call(params, *(x[1:2] for x in inputs))
  for name, value in alone.items():
    np.testing.assert_allclose(value[0], together[name][1], atol=1e-5)
  for length in (31, 49):
    cut, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    with pytest.raises(ValueError, match='constraint'):
      exported.call(params, cut, inputs[1][:1], mask, mask)


def test_every_platform_is_in_the_program(loaded, directory):
  exported = jax.export.deserialize(
      bytearray((directory / 'program.bin').read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  assert loaded[0]['platforms'] == ['cpu', 'cuda', 'tpu']
  assert 'stablehlo' in exported.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    *({'head': head} for head in heads.HEADS),
    *({'search': name} for name in search.SEARCHES),
    {'null_rule': 'posterior'}, {'max_answer_length': 60, 'max_length': 64},
    {'n_best': 40}, {'max_length': 30}], ids=str)
def test_every_head_search_and_size_is_lowered(fields):
  (exported, shortest), _ = lowered(make(**fields))
  longest = fields.get('max_length', 48)
  assert shortest == min(longest, max(
      32, fields.get('n_best', 4), fields.get('max_answer_length', 6)))
  length = exported.in_avals[-4].shape[1]
  assert str(length) == ('30' if longest == 30 else 'l')


def test_a_count_of_a_nested_head_bounds_the_windows():
  (exported, shortest), _ = lowered(
      make('answerability(base="conditional(beam=40, width=6)")'))
  assert shortest == 40
  assert str(exported.in_avals[-4].shape[1]) == 'l'


def test_spans_and_normaliser_equal_those_of_decode(loaded):
  model = make(null_rule='posterior')
  (exported, _), params = lowered(model)
  ids = [TOKENIZER.encode([t]).ids.tolist() for t in ('x y', LONG)]
  *inputs, _ = windows_of(loaded[0], *ids)
  result = exported.call(params, *inputs)
  expected = decode.score_windows(
      model.model, model.params, input_pipeline.make_windows(
          model.config, [Example('0', 'x y', LONG)], TOKENIZER), model.config)
  for name in ('start', 'end', 'valid'):
    np.testing.assert_array_equal(result[name], getattr(expected, name))
  for name in ('score', 'null', 'normaliser'):
    np.testing.assert_allclose(
        result[name], getattr(expected, name), atol=1e-5, rtol=1e-6)


# --- damage and misuse


@pytest.mark.parametrize('name', [*run_lib.FILES, 'SHA256SUMS'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'gone'])
def test_a_damaged_file_is_refused_in_one_line(
    directory, tmp_path, name, damage):
  path = shutil.copytree(directory, tmp_path / 'out') / name
  whole = path.read_bytes()
  middle = len(whole) // 2
  if damage == 'gone':
    path.unlink()
  else:
    path.write_bytes({
        'flip': whole[:20] + bytes([whole[20] ^ 1]) + whole[21:],
        'cut': whole[:middle], 'empty': b''}[damage])
  with pytest.raises((ValueError, OSError)) as caught:
    run_lib.load_program(path.parent)
  if name != 'SHA256SUMS':
    assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_the_runner_reports_a_damaged_file_in_one_line(directory, tmp_path):
  path = shutil.copytree(directory, tmp_path / 'out')
  (path / 'program.bin').write_bytes(b'x')
  done = run(path, 'a', 'b')
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith('error: ') and 'program.bin' in done.stderr
  assert done.stderr.count('\n') == 1


def test_a_program_for_another_platform_is_refused(model, loaded):
  (exported, _), _ = lowered(model, ('tpu',))
  meta, _, params, tokenizer = loaded
  with pytest.raises(ValueError, match='platforms'):
    run_lib.answer_question(
        (meta, jax.jit(exported.call), params, tokenizer), 'a', 'b')


@pytest.mark.parametrize(('fields', 'platforms', 'message'), [
    ({}, ('gpu',), "unknown platform 'gpu'"),
    ({}, (), 'no platform; choose from cpu, cuda, tpu'),
    ({'merge': 'surface_form'}, ('cpu',), "merge='surface_form'"),
    ({'max_length': 80}, ('cpu',), 'max_length=80 exceeds'),
    ({'max_length': 20}, ('cpu',), 'leaves no step')])
def test_a_model_that_cannot_be_exported_is_refused(
    tmp_path, fields, platforms, message):
  with pytest.raises(errors.UserError, match=message):
    stablehlo.export_run(make(**fields), tmp_path / 'out', platforms)
  assert not list(tmp_path.iterdir())


def test_a_target_that_holds_something_is_left_alone(model, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(errors.UserError, match='not empty'):
    stablehlo.export_run(model, tmp_path, ('cpu',))
  assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']
