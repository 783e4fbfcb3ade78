"""Tests of a loaded model's answers by brute force on its scores."""

import copy
import dataclasses
import functools
import pathlib
import pickle
import shutil
import string

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import qa_jax
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data.examples import Example
from qa_jax.inference import decode
from qa_jax.inference import predict
from qa_jax.runtime import devices
from tests.common import random_model
from tests.common.refusals import refusal

TINY = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'tiny_bert'
LETTERS = string.ascii_lowercase
VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *LETTERS,
         *('##' + c for c in LETTERS), *string.digits, *'.,!?$-():;\'"/']
VOCAB += [f'[unused{i}]' for i in range(100 - len(VOCAB))]
OPTIONS = {'window_overlap': 8, 'max_question_length': 10, 'n_best': 6,
           'max_answer_length': 5}
SHORT = 'a b: c d e, f g h!'
LONG = ' '.join(LETTERS[i * 7 % 26] for i in range(90))


@pytest.fixture(scope='module')
def directory(tmp_path_factory) -> pathlib.Path:
  """The recorded BertForQuestionAnswering, with a vocabulary of 100 tokens."""
  path = shutil.copytree(TINY, tmp_path_factory.mktemp('hf') / 'tiny')
  (path / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n')
  return path


@pytest.fixture(scope='module')
def qa(directory) -> predict.QA:
  return predict.load(directory, null_rule='never', **OPTIONS)


def brute_force(qa, question, context, longest=5):
  """Returns ([(score, i, j)] best first, null score) of one window.

  The context is a list of one-letter words.
  """
  row = ['[CLS]', *question.split(), '[SEP]', *context, '[SEP]']
  ids = jnp.array([[VOCAB.index(t) for t in row]])
  first = len(question.split()) + 2
  types = (jnp.arange(len(row)) >= first).astype(jnp.int32)[None]
  scores = qa.model.apply({'params': qa.params}, ids, types,
                          jnp.ones_like(ids), types > 0)
  start, end = np.asarray(scores.start)[0], np.asarray(scores.end)[0]
  last = first + len(context)
  spans = [(float(start[i] + end[j]), i - first, j - first)
           for i in range(first, last)
           for j in range(i, min(i + longest, last))]
  return sorted(spans, reverse=True), float(start[0] + end[0])


@pytest.fixture(scope='module')
def expected(qa):
  return brute_force(qa, 'x y', [c for c in SHORT if c != ' '])


@pytest.mark.parametrize('copied', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_used_model_gives_equal_answers(qa, copied):
  answer = qa.answer('x y', SHORT)  # fills the caches
  assert copied(qa).answer('x y', SHORT) == answer
  pipe = qa_jax.pipeline(model=qa)
  result = pipe(question='x y', context=SHORT)
  assert copied(pipe)(question='x y', context=SHORT) == result


def test_numbers_of_numpy_are_those_of_python(directory, qa):
  given = {**OPTIONS, 'max_length': 40, 'null_threshold': 0.25}
  numpy_values = {name: np.array(value)[()] for name, value in given.items()}
  assert {type(value) for value in numpy_values.values()} == {
      np.int64, np.float64}
  assert predict.load(directory, **numpy_values).config == predict.load(
      directory, **given).config
  for n_best in (2, 9):
    assert qa.answer('x y', SHORT, n_best=np.int32(n_best)) == qa.answer(
        'x y', SHORT, n_best=n_best)
  for n_best in (np.True_, np.float32(2), np.int64(0)):
    assert 'an integer of at least 1' in refusal(
        functools.partial(qa.answer, 'x', SHORT, n_best=n_best))


def test_answer_is_the_best_span_in_characters_of_the_context(qa, expected):
  spans, null = expected
  answer = qa.answer(question='x y', context=SHORT)
  place = [n for n, c in enumerate(SHORT) if c != ' ']
  assert len(answer.n_best) == 6
  for candidate, (score, i, j) in zip(answer.n_best, spans, strict=False):
    assert (candidate['start'], candidate['end']) == (place[i], place[j] + 1)
    assert candidate['score'] == pytest.approx(score, abs=1e-5)
  assert {'text': answer.text, 'start': answer.start, 'end': answer.end,
          'score': answer.score,
          'probability': answer.probability} == answer.n_best[0]
  # With the null rule `never`, only spans are among the outcomes.
  assert answer.null_probability == 0
  assert answer.probability == pytest.approx(
      np.exp(spans[0][0]) / np.exp([s for s, _, _ in spans]).sum(), rel=1e-5)
  assert answer.null_score == pytest.approx(null, abs=1e-5)


@pytest.mark.parametrize(('margin', 'silent'), [(-0.01, False), (0.01, True)])
def test_null_above_the_threshold_is_an_empty_answer_at_0(
    directory, expected, margin, silent):
  spans, null = expected
  qa = predict.load(directory, null_threshold=null - spans[0][0] - margin,
                    **OPTIONS)
  answer = qa.answer(question='x y', context=SHORT)
  assert ((answer.text, answer.start, answer.end) == ('', 0, 0)) == silent
  assert answer.score == answer.n_best[0]['score']
  assert answer.n_best[0]['text']
  total = np.exp([null, *(s for s, _, _ in spans)]).sum()
  assert answer.probability == pytest.approx(
      np.exp(null if silent else spans[0][0]) / total, rel=1e-5)


def test_offsets_are_exact_slices_of_the_context(qa):
  context = 'Å\u00a0B  ç\t(D)\r\nÉF 東x  g\u0301… [SEP]'
  answer = qa.answer(question='What?', context=context)
  assert answer.text == context[answer.start:answer.end] != ''
  for candidate in answer.n_best:
    assert context[candidate['start']:candidate['end']] == candidate['text']
    assert candidate['text'] == candidate['text'].strip() != ''


def test_batch_answers_as_one_by_one(qa):
  questions = [{'question': q, 'context': c} for q, c in (
      ('a b', LONG), ('', SHORT), ('x y', SHORT), ('x y', LONG), ('z', ''))]
  batch = qa.answer_batch(iter(questions))
  for question, together in zip(questions, batch, strict=True):
    alone = qa.answer(**question)
    assert [(c['start'], c['end']) for c in together.n_best] == [
        (c['start'], c['end']) for c in alone.n_best]
    np.testing.assert_allclose(
        [together.null_score, *(c['score'] for c in together.n_best)],
        [alone.null_score, *(c['score'] for c in alone.n_best)], atol=1e-5)
  assert (batch[-1].text, batch[-1].n_best) == ('', ())


@pytest.mark.parametrize(('eval_batch_size', 'buckets', 'sharded'), [
    (3, (), False), (7, (16, 24, 32), False), (8, (), True)])
def test_batches_buckets_and_devices_change_scores_by_rounding_alone(
    qa, eval_batch_size, buckets, sharded):
  rows = [Example('l', 'a b', LONG), Example('s', 'x y', SHORT)]

  def answer(mesh=None, **changes):
    values = qa.config.to_dict()
    values['data']['buckets'] = changes.get('buckets', [])
    values['train']['eval_batch_size'] = changes.get('eval_batch_size', 32)
    config = config_lib.check_config(values)
    windows = input_pipeline.make_windows(config, rows, qa.tokenizer)
    return decode.answer_questions(qa.model, qa.params, windows, config,
                                   mesh=mesh)

  one = answer()
  two = answer(devices.data_mesh() if sharded else None, buckets=buckets,
               eval_batch_size=eval_batch_size)
  for name in ('begin', 'end', 'window', 'ptr'):
    np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
  np.testing.assert_allclose(one.score, two.score, atol=1e-5)
  np.testing.assert_allclose(one.null_score, two.null_score, atol=1e-5)


def test_inexact_search_never_beats_the_exact_one_by_rounding(directory):
  rows = [Example(str(n), q, LONG[n:]) for n, q in enumerate('abcdef')]
  for search, always in (('beam(width=40)', True), ('argmax', False)):
    qa = predict.load(directory, search=search, **OPTIONS)
    regret = decode.answer_questions(
        qa.model, qa.params,
        input_pipeline.make_windows(qa.config, rows, qa.tokenizer),
        qa.config).regret
    assert (regret == 0).all() if always else (regret >= 0).all()


def test_scores_depend_on_the_question(qa):
  one, two = (qa.answer(question=q, context=SHORT) for q in ('x y', 'c d'))
  assert one.score != two.score


def test_no_questions_no_answers(qa):
  assert qa.answer_batch([]) == []


@pytest.mark.parametrize(('row', 'message'), [
    ({'question': 'a'}, 'context of row 1 is NoneType'),
    ({'context': 'a'}, 'question of row 1 is NoneType'),
    ({'question': 3, 'context': 'a'}, 'question of row 1 is int'),
    ({'question': 'a', 'context': 'b\ud800'}, 'context of row 1 .*U\\+D800'),
    (('a', 'b'), 'row 1 is tuple, expected a dict'),
    ({'question': 'a', 'contxt': 'b'}, "key 'contxt'; did you mean 'context'"),
    ({'question': 'a', 'context': 'b', 1: 2}, 'row 1 has the unknown key 1')])
def test_bad_question_is_named_by_row(qa, row, message):
  with pytest.raises(errors.UserError, match=message):
    qa.answer_batch([{'question': 'a', 'context': 'b'}, row])


@pytest.mark.parametrize('questions', [
    {'question': 'a', 'context': 'b'}, 'a', 3], ids=repr)
def test_questions_that_are_no_list_are_refused(qa, questions):
  with pytest.raises(errors.UserError, match='expected a list of dicts'):
    qa.answer_batch(questions)


def test_answer_takes_its_texts_by_name_or_place_and_a_number_of_candidates(qa):
  answer = qa.answer(question='x y', context=SHORT)
  assert qa.answer('x y', SHORT) == qa('x y', SHORT) == answer
  assert qa('x y', SHORT, n_best=2).n_best == answer.n_best[:2]
  more = qa('x y', SHORT, n_best=9).n_best  # decode.n_best is 6
  assert (len(more), more[:6]) == (9, answer.n_best)
  assert len(repr(answer)) < 200


def test_a_number_of_candidates_changes_no_answer_also_if_they_are_merged(
    directory):
  """`b` wins if all spans are merged, since it is there most often."""
  rows = [{'question': q, 'context': ' '.join(c)} for q, c in (
      ('x y', 'a b b c b d b e b f'), ('z', 'g h g i g j g k'),
      ('q r', 'm n m n m n o o'))]
  qa, all_spans = (predict.load(
      directory, null_rule='never', merge='surface_form', **{
          **OPTIONS, 'n_best': n_best}) for n_best in (2, 60))
  answers = qa.answer_batch(rows)
  assert [a.text for a in answers] != [
      a.text for a in all_spans.answer_batch(rows)]
  for n_best in (1, 60):
    assert [dataclasses.replace(a, n_best=()) for a in qa.answer_batch(
        rows, n_best=n_best)] == [
            dataclasses.replace(a, n_best=()) for a in answers]
  for answer in all_spans.answer_batch(rows):  # a sum of posteriors
    assert 0 < answer.probability <= 1
    assert all(c['probability'] <= 1 for c in answer.n_best)


@pytest.mark.parametrize('n_best', [0, -1, 2.0, True, '3'])
def test_wrong_number_of_candidates_is_refused(qa, n_best):
  with pytest.raises(errors.UserError, match='expected an integer of at least'):
    qa.answer('x y', SHORT, n_best=n_best)


def test_no_span_has_no_score(qa):
  answer = qa.answer('x y', '')
  assert (answer.text, answer.score, answer.probability) == ('', None, 0)
  assert answer.n_best == ()


def test_spans_outside_the_beam_of_a_conditional_head_are_no_candidates():
  qa = random_model.random_qa('conditional(beam=2, width=4)', n_best=40)
  answer = qa.answer(random_model.QUESTION, random_model.CONTEXT)
  assert 1 <= len({c['start'] for c in answer.n_best}) <= 2
  assert all(c['score'] > -1e3 for c in answer.n_best)


def test_a_model_is_shown_in_one_line(qa):
  assert repr(qa) == (
      "QA(head='biased', layers=3, hidden_size=32, max_length=40, "
      "null_rule='never', calibrated=False)")


# --- span views


def test_spans_show_the_tokens_and_the_band_of_the_outer_sum(qa, expected):
  view = qa.spans('x y', SHORT)
  letters = [c for c in SHORT if c != ' ']
  assert view.tokens == ('[CLS]', 'x', 'y', '[SEP]', *letters, '[SEP]')
  assert view.context_mask.tolist() == [False] * 4 + [True] * 11 + [False]
  assert view.band.shape == (16, 5)
  legal = 0
  for i in range(16):
    for d in range(5):
      if i >= 4 and i + d < 15:
        legal += 1
        assert view.band[i, d] == view.start[i] + view.end[i + d]
      else:
        assert view.band[i, d] == -np.inf
  assert legal == len(expected[0])
  assert view.band.max() == pytest.approx(expected[0][0][0], abs=1e-5)
  assert view.start[0] + view.end[0] == pytest.approx(expected[1], abs=1e-5)


def test_spans_of_a_longer_cap_than_the_window_are_all_spans(directory):
  qa = predict.load(directory, **{**OPTIONS, 'max_answer_length': 400})
  band = qa.spans('x', 'a b c').band
  assert np.isfinite(band).sum() == 6


# --- loading


def test_load_takes_sizes_and_case_from_the_directory(qa):
  assert qa.config.data.max_length == 40  # the encoder's positions
  assert qa.config.data.lowercase and qa.tokenizer.lowercase
  assert qa.config.decode.max_answer_length == 5


@pytest.mark.parametrize(('options', 'message'), [
    ({'n_bst': 3}, "no option 'n_bst'.*'n_best'"),
    *(({name: value}, f"no option '{name}'; it takes .*n_best.* max_length, "
       'window_overlap, max_question_length, buckets, packing, cache')
      for name, value in (
          ('lowercase', False), ('vocab', '/nonexistent'), ('eval', 'x'),
          ('train', 'x.json'), ('vocab_size', 999),
          ('windows_without_answer', 'drop'))),
    ({'n_best': 0}, 'n_best=0 must be in 1 … 1000000'),
    ({'n_best': 10**20}, 'must be in 1 … 1000000'),
    ({'max_answer_length': 10**20}, 'must be in 1 … 1000000'),
    ({'n_best': '3'}, 'expected int'),
    ({'search': 'fast'}, "unknown search 'fast'"),
    ({'merge': 'texts'}, "unknown config.decode.merge 'texts'"),
    ({'null_rule': 'classifier'}, "'classifier' needs a null logit"),
    ({'max_length': 41}, "max_length=41 exceeds the encoder's 40 positions"),
    ({'window_overlap': -1}, 'window_overlap=-1 must be at least 0'),
    ({'max_question_length': 0}, 'max_question_length=0 must be at least 1'),
    ({'window_overlap': 40}, 'window_overlap 40 leaves no step')])
def test_option_that_does_not_fit_is_one_line(directory, options, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    predict.load(directory, **options)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda path: None, 'not a directory'),
    (lambda path: path.mkdir(), 'has no config.json'),
    (lambda path: path.write_text('x'), 'not a directory')],
    ids=['nothing', 'empty', 'file'])
def test_source_that_is_no_model_is_refused(tmp_path, make, message):
  make(tmp_path / 'x')
  with pytest.raises(errors.UserError, match=message):
    predict.load(tmp_path / 'x')


def test_run_without_a_checkpoint_is_refused(tmp_path):
  for name in ('config.json', 'encoder.json'):
    (tmp_path / name).write_text('{}')
  with pytest.raises(errors.UserError, match='no checkpoint; train first'):
    predict.load(tmp_path)


def test_encoder_without_a_span_head_is_refused(directory, tmp_path):
  path = shutil.copytree(directory, tmp_path / 'encoder')
  tensors = safetensors.numpy.load_file(path / 'model.safetensors')
  safetensors.numpy.save_file(
      {k: v for k, v in tensors.items() if not k.startswith('qa_outputs.')},
      path / 'model.safetensors')
  with pytest.raises(errors.UserError, match='without a span head'):
    predict.load(path)


def test_a_biased_head_is_loaded_as_one_with_a_note(directory, capsys):
  qa = predict.load(directory, **OPTIONS)
  assert qa.config.model.head == 'biased'
  assert "the head 'biased'" in capsys.readouterr().err


def test_the_package_has_load_and_refuses_other_names():
  assert qa_jax.load is predict.load
  assert {'load', '__version__'} <= {*dir(qa_jax)}
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    _ = qa_jax.lod


@pytest.mark.parametrize(('options', 'message'), [
    ({'checkpoint': 3}, "checkpoint='3' chooses among.*is no run directory"),
    ({'checkpoint': 3.0}, 'expected best, last or a step'),
    ({'checkpoint': True}, 'expected best, last or a step'),
    ({'calibrated': 'no'}, "calibrated='no', expected bool")], ids=str)
def test_wrong_argument_of_load_is_one_line(directory, options, message):
  with pytest.raises(errors.UserError, match=message):
    predict.load(directory, **options)


def test_a_source_of_another_type_is_refused():
  with pytest.raises(errors.UserError, match='source is NoneType'):
    predict.load(None)


def test_a_checkpoint_is_chosen_by_its_step(tmp_path):
  run = random_model.write_run(random_model.random_qa('shared'), tmp_path)
  scores = {predict.load(run, checkpoint=which)('a', random_model.CONTEXT).score
            for which in (0, '0', 'last', np.int64(0))}
  assert len(scores) == 1
  with pytest.raises(errors.UserError, match='3000'):
    predict.load(run, checkpoint=3000)


# --- files of questions


def test_questions_and_ids_are_read_unchanged(tmp_path):
  path = tmp_path / 'in.jsonl'
  path.write_text('{"question": "a", "context": "", "id": 7, "more": 1}\n\n'
                  '{"question": "\u2028", "context": "b"}', 'utf-8')
  assert predict.read_questions(path) == [
      {'question': 'a', 'context': '', 'id': 7},
      {'question': '\u2028', 'context': 'b'}]


@pytest.mark.parametrize('content', [
    '{"data": []}', '{"version": "2.0",\n "data": []}', '[]',
    '{"title": "T", "paragraphs": []}', '{"context": "c", "qas": []}'])
def test_data_that_are_no_questions_are_for_evaluate(tmp_path, content):
  path = tmp_path / 'dev.json'
  path.write_text(content)
  with pytest.raises(errors.UserError, match=(
      r'dev\.json:1.*; a line is \{"question": ….*evaluate --data')):
    predict.read_questions(path)


@pytest.mark.parametrize(('line', 'message'), [
    ('{"question": "a"', r'in\.jsonl:2: not JSON'),
    ('["a"]', r'in\.jsonl:2: list, expected'),
    ('{"question": "a"}', r"in\.jsonl:2: there is no 'context'"),
    ('{"context": "a"}', r"in\.jsonl:2: there is no 'question'"),
    ('{"context": "a", "question": null}', 'question is NoneType'),
    ('{"question": "a", "context": "\\ud800"}', r'in\.jsonl:2: .*U\+D800')])
def test_bad_line_is_named_by_number(tmp_path, line, message):
  path = tmp_path / 'in.jsonl'
  path.write_text('{"question": "a", "context": "b"}\n' + line)
  with pytest.raises(errors.UserError, match=message):
    predict.read_questions(path)
