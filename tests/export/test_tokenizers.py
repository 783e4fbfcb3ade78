"""Tests that every conversion and export keeps the tokenizer."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.export import hugging_face
from qa_jax.export import run as run_lib
from qa_jax.export import stablehlo
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.models import qa
from qa_jax.models.encoders import bert
from tests.common import scripts

KINDS = ('cased', 'uncased', 'accents', 'stripped', 'chinese', 'joined',
         'added', 'flags', 'sequence')
MARKED = ('e\u0301', 'cafe\u0301', '\u0645\u0651', '\u05e9\u05b8',
          'का\u0902', '❤\ufe0f', 'a\u200d',
          '\ufeffcafe\u0301 \u0301 東\ufe00京e\u0301.')


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  return scripts.write_checkpoints(tmp_path_factory.mktemp('kinds') / 'x')


@pytest.fixture(scope='module')
def kinds(directories):
  return {kind: tokenizer_files.read_tokenizer(directory)
          for kind, directory in directories.items()}


def make(tokenizer: tokenizer_lib.Tokenizer) -> predict.QA:
  """Returns an untrained model with a tokenizer; it always answers."""
  config = config_lib.check_config({
      'model': {'preset': '', 'head': 'independent'}, 'train': {'num_steps': 1},
      'data': {'max_length': 48, 'window_overlap': 8,
               'max_question_length': 12, 'lowercase': tokenizer.lowercase},
      'decode': {'max_answer_length': 6, 'n_best': 4, 'null_rule': 'never'}})
  model = build.build_model(config, bert.BertConfig(
      vocab_size=len(tokenizer.vocab), hidden_size=16, num_layers=1,
      num_heads=2, mlp_size=32, max_position=64))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
      jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0))))
  return predict.QA(model, params, tokenizer, config)


def source_of(model: predict.QA) -> hugging_face.ConversionSource:
  return hugging_face.ConversionSource('runs/x', pretrained.Pretrained(
      model.model, model.params, model.tokenizer, model.config, True, ()), None)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_survives_both_conversions(kinds, kind, tmp_path):
  model = make(kinds[kind])
  hugging_face.write_hugging_face(source_of(model), tmp_path / 'hf')
  hugging_face.write_run_directory(
      hugging_face.read_source(str(tmp_path / 'hf')), tmp_path / 'run', [])
  hugging_face.write_hugging_face(
      hugging_face.read_source(str(tmp_path / 'run')), tmp_path / 'again')
  # The encoder has 64 positions, which bound model_max_length.
  expected = dataclasses.replace(kinds[kind], max_length=64)
  for name in ('hf', 'run/tokenizer', 'again'):
    loaded = tokenizer_files.read_tokenizer(tmp_path / name)
    assert loaded == expected, name
  config = files.read_object(tmp_path / 'again' / 'config.json')
  assert config['pad_token_id'] == kinds[kind].pad_id
  loaded = predict.load(tmp_path / 'run')
  for context in MARKED:
    assert loaded.spans('a', context).tokens == model.spans('a', context).tokens


@pytest.mark.parametrize('kind', KINDS)
def test_a_written_tokenizer_json_gives_our_tokens(kinds, kind, tmp_path):
  hugging_face.write_tokenizer(kinds[kind], 64, tmp_path)
  whole = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  texts = scripts.texts()[:200]
  rows = whole.encode_batch(texts)
  ours = kinds[kind].encode(texts)
  first, last = kinds[kind].cls_id, kinds[kind].sep_id
  for row, a, b in zip(rows, ours.ptr[:-1], ours.ptr[1:], strict=True):
    assert row.ids == [first, *ours.ids[a:b], last]


@pytest.mark.parametrize('kind', KINDS)
def test_the_runner_has_our_tokens_and_characters(kinds, kind):
  library = tokenizers.Tokenizer.from_str(kinds[kind].closed_json())
  library.encode_special_tokens = True  # as load_program does
  texts = [*scripts.texts()[:300], *MARKED, ' '.join(kinds[kind].special)]
  ours = kinds[kind].encode(texts)
  for text, a, b in zip(texts, ours.ptr[:-1], ours.ptr[1:], strict=True):
    row = library.encode(text, add_special_tokens=False)
    assert row.ids == ours.ids[a:b].tolist()
    for i, expected in enumerate(ours.offsets[a:b].tolist()):
      assert [*run_lib.char_range(text, row.offsets, i, i)
              ] == expected, ascii(text)


@pytest.mark.parametrize('kind', ['uncased', 'added', 'sequence'])
def test_an_exported_program_answers_with_the_marks(kinds, kind, tmp_path):
  model = make(kinds[kind])
  stablehlo.export_run(model, tmp_path / 'out', ('cpu',))
  loaded = run_lib.load_program(tmp_path / 'out')
  whole = []
  for context in MARKED:
    answer = run_lib.answer_question(loaded, 'covid-19?', context)
    expected = model.answer(question='covid-19?', context=context)
    assert (answer['text'], answer['start'], answer['end']) == (
        expected.text, expected.start, expected.end)
    if len(model.tokenizer.encode([context]).ids) == 1:
      assert answer['text'] == context  # the only possible answer
      whole.append(context)
  assert len(whole) >= 3


def test_model_max_length_bounds_the_windows(directories, kinds, tmp_path):
  model = make(kinds['uncased'])
  hugging_face.write_hugging_face(source_of(model), tmp_path / 'hf')
  path = tmp_path / 'hf' / 'tokenizer_config.json'
  files.write_json(path, files.read_object(path) | {'model_max_length': 40})
  config = tmp_path / 'hf' / 'config.json'
  files.write_json(config, {k: v for k, v in files.read_object(config).items()
                            if k != 'qa_jax'})
  short = {'window_overlap': 4, 'max_question_length': 9}
  loaded = predict.load(tmp_path / 'hf', **short)
  assert loaded.config.data.max_length == 40
  assert predict.load(tmp_path / 'hf', max_length=30, **short)
  # The bound is exported, too.
  hugging_face.write_hugging_face(source_of(loaded), tmp_path / 'again')
  assert files.read_object(tmp_path / 'again' / 'tokenizer_config.json')[
      'model_max_length'] == 40
  for call in (
      lambda: predict.load(tmp_path / 'hf', max_length=41, **short),
      lambda: input_pipeline.vocabulary_source(
          model.config, tmp_path / 'hf')):
    with pytest.raises(errors.UserError, match='model_max_length'):
      call()


def test_a_settings_file_tells_transformers_the_tokenizer(kinds, tmp_path):
  expected = {
      'accents': {'do_lower_case': True, 'strip_accents': False},
      'stripped': {'do_lower_case': False, 'strip_accents': True},
      'joined': {'tokenize_chinese_chars': False},
      'added': {'cls_token': '<s>', 'additional_special_tokens': ['[E1]']},
      'sequence': {'tokenizer_class': 'PreTrainedTokenizerFast',
                   'model_input_names': ['input_ids', 'token_type_ids',
                                         'attention_mask']}}
  for kind, settings in expected.items():
    hugging_face.write_tokenizer(kinds[kind], 64, tmp_path / kind)
    about = files.read_object(tmp_path / kind / 'tokenizer_config.json')
    assert settings.items() <= about.items(), json.dumps(about)


@pytest.mark.parametrize(('part', 'field', 'value'), [
    ('normalizer', 'clean_text', False),
    ('model', 'max_input_chars_per_word', 10),
    ('model', 'continuing_subword_prefix', '')])
def test_what_a_bert_tokenizer_of_transformers_loses_is_no_bert_tokenizer(
    kinds, tmp_path, part, field, value):
  """transformers 5 builds the class anew, from vocabulary and normalizer."""
  whole = json.loads(kinds['uncased'].to_json())
  for name, changed in (('as_it_is', {}), ('changed', {field: value})):
    files.write_json(tmp_path / name / 'tokenizer.json',
                     {**whole, part: whole[part] | changed})
    hugging_face.write_tokenizer(tokenizer_files.read_tokenizer(
        tmp_path / name), 64, tmp_path / f'{name}_out')
  kind = lambda name: files.read_object(
      tmp_path / f'{name}_out' / 'tokenizer_config.json')['tokenizer_class']
  assert (kind('as_it_is'), kind('changed')) == (
      'BertTokenizer', 'PreTrainedTokenizerFast')
