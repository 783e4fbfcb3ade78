"""RoBERTa and XLM-R load, answer and leave as transformers has them.

tests/golden/record_roberta.py recorded the checkpoints and the arrays.
"""

import functools
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.export import hugging_face as export_lib
from qa_jax.export import run as run_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.training import trainer as trainer_lib
from tests.common import programs
from tests.common import scripts
from tests.common import weights
from tests.common.refusals import refusal

KINDS = scripts.BEYOND_WORDPIECE
WINDOWS = {'window_overlap': 6, 'max_question_length': 8}
ANY = {'null_rule': 'never', 'max_answer_length': 9, 'n_best': 5}
CONTEXT = ("The café (1901)  isn't far\n\n from Zürich, 東京 or Łódź: "
           'Ålesund-Bergen costs €5.30! ') * 3
QUESTIONS = [('Where is it?', CONTEXT), (' 東京?', '  東京 x '), ('', 'a b'),
             ('</s> <pad>', '<s>word</s> <mask> <pad>words'), ('q', '')]


def directory_of(kind: str) -> pathlib.Path:
  return weights.GOLDEN / f'tiny_{kind}'


@pytest.fixture(scope='module')
def golden():
  with np.load(weights.GOLDEN / 'roberta_golden.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def readers():
  return {kind: tokenizer_files.read_tokenizer(directory_of(kind))
          for kind in KINDS}


def load(kind: str, **fields) -> predict.QA:
  return predict.load(directory_of(kind), **WINDOWS, **{**ANY, **fields})


def answers_of(qa: predict.QA, questions=QUESTIONS) -> list[predict.Answer]:
  return qa.answer_batch([{'question': q, 'context': c} for q, c in questions])


def spans_of(qa: predict.QA, questions=QUESTIONS):
  return [[(c['start'], c['end'], c['score']) for c in answer.n_best]
          for answer in answers_of(qa, questions)]


# --- the encoder


def test_the_head_of_a_language_model_is_skipped(tmp_path):
  directory = shutil.copytree(directory_of('roberta'), tmp_path / 'x')
  path = directory / 'model.safetensors'
  safetensors.numpy.save_file(safetensors.numpy.load_file(path) | {
      name: np.ones(3, np.float32) for name in (
          'lm_head.dense.weight', 'lm_head.layer_norm.bias', 'lm_head.bias',
          'roberta.embeddings.position_ids', 'roberta.pooler.dense.bias')},
                              path)
  checkpoint = hugging_face.read_checkpoint(directory)
  note, = checkpoint.notes
  assert 'lm_head.dense.weight' in note
  assert checkpoint.tensors.keys() == hugging_face.read_checkpoint(
      directory_of('roberta')).tensors.keys()


@pytest.mark.parametrize(('fields', 'message'), [
    ({'pad_token_id': 'x'}, "pad_token_id is 'x'"),
    ({'pad_token_id': None}, 'pad_token_id is None'),
    ({'max_position_embeddings': 2}, 'no position'),
    ({'hidden_act': 'relu'}, 'hidden_act'),
    ({'model_type': 'roberta-prelayernorm'}, "'roberta', 'xlm-roberta'"),
    ({'model_type': 'big_bird'}, "'roberta', 'xlm-roberta', 'camembert'"),
    ({'model_type': 'deberta'}, "'bert', 'roberta'")])
def test_another_encoder_is_refused_with_those_that_load(
    tmp_path, fields, message):
  config = files.read_object(directory_of('roberta') / 'config.json')
  (tmp_path / 'config.json').write_text(json.dumps(config | fields))
  assert message in refusal(hugging_face.read_config, tmp_path)


# --- the tokenizer


@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_offsets_are_those_of_transformers(golden, readers, kind):
  recorded = golden[f'{kind}_checksums']
  texts = scripts.texts()[:len(recorded)]
  rows = readers[kind].encode(texts)
  different = [text for text, a, b, expected in zip(
      texts, rows.ptr[:-1], rows.ptr[1:], recorded, strict=True)
      if scripts.checksum(kind, text, rows.ids[a:b], rows.offsets[a:b])
      != expected]
  assert len(texts) == 400 and not different


@pytest.mark.parametrize('kind', KINDS)
def test_a_window_is_the_pair_of_transformers(golden, readers, kind):
  question, context = (scripts.texts()[i][:20] for i in (0, 12))
  expected = golden[f'{kind}_pair']
  window = windows_lib.make_windows(
      [Example('0', question, context)], readers[kind], max_length=90,
      window_overlap=1, max_question_length=60).gather(
          np.zeros(1, int), len(expected))
  assert window['token_ids'][0].tolist() == expected.tolist()
  assert not window['token_type_ids'].any()
  assert window['attention_mask'].all()


@pytest.mark.parametrize('kind', KINDS)
def test_typed_special_tokens_are_text(readers, kind):
  reader = readers[kind]
  ids = reader.encode([' '.join((*reader.special, *reader.special))
                       + ''.join(reader.special)]).ids.tolist()
  closed = {reader.index[reader.special[i]] for i in (0, 2, 3, 4)}
  assert len(ids) > 10 and not closed.intersection(ids)


@pytest.mark.parametrize('kind', KINDS)
def test_only_spaces_and_marks_between_spaces_are_in_no_token(readers, kind):
  for text in [CONTEXT, *scripts.texts()[:100]]:
    offsets = readers[kind].encode([text]).offsets
    scripts.assert_covered(kind, text, offsets)
    for begin, end in offsets[offsets[:, 0] < offsets[:, 1]]:
      assert text[begin:end] == text[begin:end].strip()


def test_vocab_json_and_merges_txt_are_the_tokenizer(readers, tmp_path):
  model = files.read_object(
      directory_of('roberta') / 'tokenizer.json')['model']
  files.write_json(tmp_path / 'vocab.json', model['vocab'])
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + ''.join(
      ' '.join(pair) + '\n' for pair in model['merges']))
  built, texts = tokenizer_files.read_tokenizer(tmp_path), scripts.texts()[:200]
  ours, expected = built.encode(texts), readers['roberta'].encode(texts)
  np.testing.assert_array_equal(ours.ids, expected.ids)
  np.testing.assert_array_equal(ours.offsets, expected.offsets)
  assert (built.special, built.separators, built.vocab) == (
      readers['roberta'].special, 2, readers['roberta'].vocab)
  (tmp_path / 'merges.txt').write_text('a b c\n')
  assert "line 1 'a b c' is not a pair" in refusal(
      tokenizer_files.read_tokenizer, tmp_path)
  (tmp_path / 'merges.txt').unlink()
  assert 'merges.txt is missing' in refusal(
      tokenizer_files.read_tokenizer, tmp_path)


def test_add_prefix_space_is_that_of_tokenizer_config(readers, tmp_path):
  directory = shutil.copytree(directory_of('roberta'), tmp_path / 'x')
  files.write_json(directory / 'tokenizer_config.json',
                   {'add_prefix_space': True})
  ids = lambda reader, text: reader.encode([text]).ids.tolist()
  spaced = tokenizer_files.read_tokenizer(directory)
  assert ids(spaced, 'a') == ids(readers['roberta'], ' a')
  assert ids(spaced, 'a') != ids(readers['roberta'], 'a')


@pytest.mark.parametrize('kind', [*KINDS, 'modernbert'])
def test_spaces_before_a_question_are_no_tokens(kind):
  """As in run_qa.py of transformers, which gives them to no tokenizer."""
  directory, question = directory_of(kind), ' \n\u3000 who ran ? '
  made = windows_lib.make_windows(
      [Example('0', question, ' a b', ())],
      tokenizer_files.read_tokenizer(directory), max_length=40,
      window_overlap=4, max_question_length=20)
  row = made.gather(np.arange(1), made.total_lengths[0])['token_ids'][0]
  library = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  assert row.tolist() == library.encode(question.lstrip(), ' a b').ids


def change(kind: str, path: pathlib.Path, **parts) -> pathlib.Path:
  """Writes the tokenizer of a kind with other parts of tokenizer.json."""
  whole = files.read_object(directory_of(kind) / 'tokenizer.json')
  model = whole['model'] | parts.pop('model', {})
  files.write_json(path / 'tokenizer.json', whole | {'model': model} | parts)
  return path


@pytest.mark.parametrize(('kind', 'parts', 'message'), [
    ('roberta', {'pre_tokenizer': None}, 'without the pre-tokenizer ByteLevel'),
    ('roberta', {'model': {'dropout': 0.1}}, 'BPE dropout 0.1'),
    ('roberta', {'post_processor': None}, 'no post_processor'),
    ('roberta', {'post_processor': {
        'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
        'use_regex': True}}, 'post_processor makes'),
    ('xlm_roberta', {'model': {'vocab': [['a', 0.0], ['a', 1.0]]}},
     'distinct pieces'),
    ('xlm_roberta', {'model': {'vocab': [['a']]}}, 'distinct pieces'),
    ('xlm_roberta', {'model': {'type': 'WordLevel'}}, "'WordLevel' is not")])
def test_another_tokenizer_is_refused_in_one_line(
    tmp_path, kind, parts, message):
  with pytest.raises(errors.UserError, match=message) as e:
    tokenizer_files.read_tokenizer(change(kind, tmp_path, **parts))
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_a_tokenizer_without_a_pre_tokenizer_may_have_a_prefix_space(tmp_path):
  directory = change('xlm_roberta', tmp_path, pre_tokenizer=None)
  files.write_json(directory / 'tokenizer_config.json',
                   {'add_prefix_space': True})
  assert tokenizer_files.read_tokenizer(directory).vocab


@pytest.mark.parametrize('kind', KINDS)
def test_another_padding_of_the_encoder_is_refused(kind, tmp_path):
  """transformers counts positions without tokens of pad_token_id."""
  directory = shutil.copytree(directory_of(kind), tmp_path / kind)
  path = directory / 'config.json'
  pad = files.read_object(path)['pad_token_id']
  files.write_json(path, files.read_object(path) | {'pad_token_id': pad + 3})
  message = f'pad_token_id is {pad + 3}, but the tokenizer pads with {pad}'
  assert message in refusal(predict.load, directory)
  config = config_lib.check_config({
      'model': {'preset': '', 'init_from': str(directory)},
      'data': {'train': 'synthetic(size=2)', **WINDOWS, 'max_length': 24,
               'lowercase': False},
      'train': {'num_steps': 1}})
  assert message in refusal(trainer_lib.build_parts, config, 1)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path):
  (tmp_path / 'sentencepiece.bpe.model').write_bytes(b'x')
  message = refusal(tokenizer_files.read_tokenizer, tmp_path)
  assert 'sentencepiece.bpe.model is not read' in message
  assert 'save_pretrained' in message


# --- windows and answers


@pytest.mark.parametrize('kind', KINDS)
def test_gold_spans_read_back_as_text(readers, kind):
  rng = random.Random(0)
  examples = []
  for n in range(60):
    context = '  '.join(rng.sample(scripts.texts()[:300], 3))
    if answer := rng.choice(context.split() or ['']):
      start = context.index(answer)
      examples.append(Example(str(n), 'Which?', context,
                              (GoldAnswer(answer, start),)))
  windows = windows_lib.make_windows(
      examples, readers[kind], max_length=60, window_overlap=9,
      max_question_length=20)
  assert windows.total_lengths.max() == 60
  placed = np.flatnonzero(windows.gold_spans[:, 0, 0] > 0)
  exact = 0
  begins, ends = windows.char_spans(
      placed, windows.start_positions[placed], windows.end_positions[placed])
  for window, begin, end in zip(placed, begins, ends, strict=True):
    example = windows.examples[windows.example_of[window]]
    text = example.context[begin:end]
    assert example.answers[0].text in text and text == text.strip()
    exact += text == example.answers[0].text
  assert exact >= len(placed) // 2 > 20


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('length', [30, 40])
def test_windows_hold_four_special_tokens(readers, kind, length):
  windows = windows_lib.make_windows(
      [Example('0', 'Where is it?', CONTEXT)], readers[kind],
      max_length=length, **WINDOWS)
  batch = windows.gather(np.arange(len(windows)), length)
  ids, reader = batch['token_ids'], readers[kind]
  question = reader.encode(['Where is it?']).ids[:8].tolist()
  context = reader.encode([CONTEXT]).ids
  for row, begin, count in zip(ids, windows.begin, windows.length, strict=True):
    assert row[:len(question) + 4 + count].tolist() == [
        reader.cls_id, *question, reader.sep_id, reader.sep_id,
        *context[begin:begin + count], reader.sep_id]
  assert windows.total_lengths.max() == length
  message = refusal(functools.partial(
      windows_lib.make_windows, [], reader, max_length=20, window_overlap=8,
      max_question_length=8))
  assert '- 4 special tokens = 8' in message


@pytest.mark.parametrize('kind', KINDS)
def test_answers_have_no_spaces_at_their_ends(kind):
  for (_, context), answer in zip(QUESTIONS, answers_of(load(
      kind, n_best=4000)), strict=True):
    for candidate in answer.n_best:
      text = context[candidate['start']:candidate['end']]
      assert text == candidate['text'] == text.strip() != ''
    assert bool(answer.text) == bool(context)


@pytest.mark.parametrize('kind', KINDS)
def test_packed_rows_give_equal_answers(kind):
  for plain, packed in zip(
      spans_of(load(kind)), spans_of(load(kind, packing=True)), strict=True):
    assert [s[:2] for s in plain] == [s[:2] for s in packed]
    np.testing.assert_allclose([s[2] for s in plain], [s[2] for s in packed],
                               atol=1e-5)


def at_boundaries(context: str, begin: int, end: int) -> bool:
  """Tells by BERT's pre-tokenizer whether context[begin:end] is whole words."""
  spaced = ''.join(c if c not in '東京' else f' {c} ' for c in context)
  place = np.cumsum([0] + [3 if c in '東京' else 1 for c in context])
  inner = {i for _, (a, b) in tokenizers.pre_tokenizers.BertPreTokenizer()
           .pre_tokenize_str(spaced) for i in range(a + 1, b)}
  joined = [place[i] in inner and context[i] not in '東京'
            for i in (begin, min(end, len(context) - 1))]
  return not joined[0] and (end == len(context) or not joined[1])


@pytest.mark.parametrize('kind', KINDS)
def test_whole_words_are_the_candidates_that_begin_and_end_words(kind):
  # One window each, and no limit of length: tokens that share a character
  # would make both depend on the token at which a span starts.
  questions = [('', CONTEXT[i:i + 16]) for i in range(0, 90, 4)]
  fields = {'n_best': 4000, 'max_answer_length': 40}
  every = spans_of(load(kind, **fields), questions)
  whole = spans_of(load(kind, whole_words=True, **fields), questions)
  shorter = 0
  for (_, context), some, spans in zip(questions, whole, every, strict=True):
    expected = {s[:2] for s in spans if at_boundaries(context, *s[:2])}
    assert {s[:2] for s in some} == expected
    shorter += len(expected) < len({s[:2] for s in spans})
  assert shorter > 10


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('whole_words', [False, True])
def test_an_exported_program_answers_as_its_model(kind, whole_words, tmp_path):
  model = load(kind, whole_words=whole_words)
  programs.assert_answers_as_its_model(model, QUESTIONS, tmp_path)


@pytest.mark.parametrize('kind', KINDS)
def test_the_words_of_the_runner_are_ours(kind, readers):
  reader = readers[kind]
  library = tokenizers.Tokenizer.from_str(reader.closed_json())
  library.encode_special_tokens = True
  meta = {'wordpiece': False, 'whole_words': True}
  for text in [CONTEXT, *scripts.texts()[:200]]:
    row = library.encode(text, add_special_tokens=False)
    starts, ends = run_lib.legal_tokens(meta, text, row)
    ours = reader.encode([text])
    inside = reader.continues_word(text, ours.ids, ours.offsets)
    blank = ours.offsets[:, 0] >= ours.offsets[:, 1]
    assert starts.tolist() == (~inside & ~blank).tolist(), ascii(text)
    assert ends.tolist() == [*~inside[1:], *[True] * bool(len(inside))]


def test_tokens_of_a_page_are_readable():
  tokens = load('roberta').spans('Where?', 'The café').tokens
  assert tokens[0] == '<s>' and tokens.count('</s>') == 3
  assert not any('\u0120' in t for t in tokens)


# --- conversion


@pytest.mark.parametrize('kind', KINDS)
def test_a_checkpoint_becomes_a_run_and_leaves_equal(kind, tmp_path):
  export_lib.write_run_directory(
      export_lib.read_source(str(directory_of(kind))), tmp_path / 'run', [])
  export_lib.write_hugging_face(
      export_lib.read_source(str(tmp_path / 'run')), tmp_path / 'out')
  reference = files.read_object(directory_of(kind) / 'config.json')
  written = files.read_object(tmp_path / 'out' / 'config.json')
  for name in ('architectures', 'model_type', 'max_position_embeddings',
               'type_vocab_size', 'layer_norm_eps', 'vocab_size',
               'pad_token_id', 'bos_token_id', 'eos_token_id'):
    assert written[name] == reference[name], name
  theirs, ours = (safetensors.numpy.load_file(
      path / 'model.safetensors') for path in (
          directory_of(kind), tmp_path / 'out'))
  assert theirs.keys() == ours.keys()
  positions = 'roberta.embeddings.position_embeddings.weight'
  assert not ours[positions][:2].any()  # transformers never uses them
  for name, value in theirs.items():
    rows = slice(2, None) if name == positions else slice(None)
    np.testing.assert_array_equal(
        ours[name][rows], value[rows].astype(np.float32), err_msg=name)
  source, run, out = (predict.load(path, **WINDOWS) for path in (
      directory_of(kind), tmp_path / 'run', tmp_path / 'out'))
  for other in (run, out):
    assert other.tokenizer == source.tokenizer
    assert other.model.config == source.model.config
    jax.tree.map(np.testing.assert_array_equal, other.params, source.params)
  about = files.read_object(tmp_path / 'out' / 'tokenizer_config.json')
  assert about['model_input_names'] == ['input_ids', 'attention_mask']
  assert about['model_max_length'] == 40
  assert 'XLMRoberta' in (tmp_path / 'out' / 'README.md').read_text() or (
      kind == 'roberta')


def test_camembert_is_read_and_written_by_its_name(tmp_path):
  """It computes what XLM-R does; its weights have equal names."""
  directory = shutil.copytree(directory_of('xlm_roberta'), tmp_path / 'x')
  config = files.read_object(directory / 'config.json')
  names = {'model_type': 'camembert',
           'architectures': ['CamembertForQuestionAnswering']}
  files.write_json(directory / 'config.json', config | names)
  source = export_lib.read_source(str(directory))
  jax.tree.map(np.testing.assert_array_equal, source.model.params,
               load('xlm_roberta').params)
  export_lib.write_hugging_face(source, tmp_path / 'out')
  written = files.read_object(tmp_path / 'out' / 'config.json')
  assert {name: written[name] for name in names} == names


def test_the_written_tokenizer_json_lays_out_pairs_as_before(tmp_path):
  for kind in KINDS:
    reader = tokenizer_files.read_tokenizer(directory_of(kind))
    reader.save(tmp_path / kind)
    before, after = (tokenizers.Tokenizer.from_file(str(
        path / 'tokenizer.json')) for path in (
            directory_of(kind), tmp_path / kind))
    for a, b in (('What is it?', CONTEXT), ('', 'x')):
      rows = before.encode(a, b), after.encode(a, b)
      assert rows[0].ids == rows[1].ids
      assert rows[0].type_ids == rows[1].type_ids
      assert rows[0].offsets == rows[1].offsets


@pytest.mark.parametrize(('change', 'message'), [
    ({'num_heads': 3}, 'hidden_size 16 is not divisible by num_heads 3'),
    ({'num_heads': 0}, 'num_heads=0 must be at least 1'),
    ({'mlp_size': -1}, 'mlp_size=-1 must be at least 1'),
    ({'size': 1}, 'size')])
def test_a_damaged_file_of_the_encoder_is_one_line(tmp_path, change, message):
  export_lib.write_run_directory(
      export_lib.read_source(str(directory_of('roberta'))), tmp_path / 'x', [])
  path = tmp_path / 'x' / 'encoder.json'
  files.write_json(path, files.read_object(path) | change)
  with pytest.raises(errors.UserError, match='encoder') as e:
    RunDirectory(tmp_path / 'x').read_encoder_config()
  assert str(e.value).startswith(f'{path}: ') and message in str(e.value)


def test_a_run_without_the_name_of_an_architecture_is_berts(tmp_path):
  export_lib.write_run_directory(
      export_lib.read_source(str(directory_of('roberta'))), tmp_path / 'x', [])
  path = tmp_path / 'x' / 'encoder.json'
  sizes = files.read_object(path)
  assert sizes.pop('architecture') == sizes.pop('encoder') == 'roberta'
  files.write_json(path, sizes)  # as older code wrote it
  assert RunDirectory(
      tmp_path / 'x').read_encoder_config().architecture == 'bert'
