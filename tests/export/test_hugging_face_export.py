"""Tests that conversion to Hugging Face and back is bit for bit equal."""

import dataclasses
import functools
import json
import pathlib
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers
import yaml

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import heads
from qa_jax import input_pipeline
from qa_jax.checkpoints import hugging_face as checkpoints
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer_files
from qa_jax.data.examples import Example
from qa_jax.export import hugging_face
from qa_jax.heads import layers
from qa_jax.heads.independent import Independent
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.models import qa
from qa_jax.models.encoders import bert
from qa_jax.span_scores import SpanScores
from qa_jax.training import trainer
from tests.common import commands
from tests.common import random_model
from tests.common import refusals

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
TINY = GOLDEN / 'tiny_bert'
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS,
         *('##' + c for c in LETTERS), *'.,?[]']
FIELDS = {'data': {'max_length': 40, 'window_overlap': 4,
                   'max_question_length': 9},
          'decode': {'max_answer_length': 5, 'n_best': 3,
                     'null_rule': 'margin', 'null_threshold': 0.25}}


def add_vocabulary(directory: pathlib.Path,
                   target: pathlib.Path) -> pathlib.Path:
  path = shutil.copytree(directory, target)
  (path / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n')
  return path


@pytest.fixture(scope='module')
def theirs(tmp_path_factory) -> pathlib.Path:
  """A checkpoint with a biased head that transformers wrote."""
  return add_vocabulary(TINY, tmp_path_factory.mktemp('hf') / 'tiny')


@pytest.fixture(scope='module')
def run(theirs, tmp_path_factory) -> pathlib.Path:
  """The checkpoint `theirs` as a run directory with metrics and FIELDS."""
  path = tmp_path_factory.mktemp('run') / 'mine'
  hugging_face.write_run_directory(hugging_face.read_source(str(theirs)), path,
                                   ['convert', '--x'])
  fields = RunDirectory(path).read_config().to_dict()
  for group, values in FIELDS.items():
    fields[group] |= values
  files.write_json(path / 'config.json', fields)
  files.write_json(path / 'eval' / 'dev' / 'metrics.json', {
      'exact_match': 61.2345, 'f1': 70, 'total': 1234})
  return path


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('out') / 'exported'
  hugging_face.write_hugging_face(hugging_face.read_source(str(run)), path)
  return path


refusal = functools.partial(refusals.refusal, longest=500)


def source(head: str, directory: pathlib.Path) -> hugging_face.ConversionSource:
  """Returns an untrained model with a head, as source of a conversion."""
  config = config_lib.check_config({
      'model': {'preset': '', 'head': head}, 'train': {'num_steps': 1},
      'data': {'max_length': 40}})
  converted = pretrained.read_pretrained(str(directory))
  model = build.build_model(config, converted.model.config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32),
      jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0))))
  return hugging_face.ConversionSource('runs/other', pretrained.Pretrained(
      model, params, converted.tokenizer, config, True, ()), None)


def test_theirs_to_a_run_to_theirs_is_equal_to_the_bit(exported):
  ours = safetensors.numpy.load_file(exported / 'model.safetensors')
  recorded = safetensors.numpy.load_file(TINY / 'model.safetensors')
  assert ours.keys() == recorded.keys()
  for name, value in recorded.items():
    assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(ours[name], value, err_msg=name)
  with safetensors.safe_open(exported / 'model.safetensors', 'np') as file:
    assert file.metadata() == {'format': 'pt'}


def test_the_null_threshold_of_an_export_is_noted_once_transformers_saved_it(
    exported, tmp_path):
  assert not any('threshold' in note for note in pretrained.read_pretrained(
      str(exported)).notes)
  saved = shutil.copytree(exported, tmp_path / 'saved')
  fields = json.loads((saved / 'config.json').read_text())
  files.write_json(saved / 'config.json', fields | {  # save_pretrained adds it
      'transformers_version': '5.23.0'})
  again = pretrained.read_pretrained(str(saved))
  assert again.config.decode.null_threshold == 0.25
  assert any('the null threshold 0.25 is that of the export' in note
             for note in again.notes)
  fields['qa_jax']['decode']['null_threshold'] = 0.0
  files.write_json(saved / 'config.json', fields | {
      'transformers_version': '5.23.0'})
  assert not any('threshold' in note for note in pretrained.read_pretrained(
      str(saved)).notes)


@pytest.mark.parametrize('head', ['independent', 'biased'])
def test_ours_to_theirs_to_ours_is_equal_to_the_bit(head, theirs, tmp_path):
  ours = source(head, theirs)
  hugging_face.write_hugging_face(ours, tmp_path / 'out')
  back = pretrained.read_pretrained(str(tmp_path / 'out'))
  assert back.config.model.head == head
  assert back.model.config == ours.model.model.config
  jax.tree.map(np.testing.assert_array_equal, back.params, ours.model.params)


def test_without_a_bias_zeros_are_written(theirs, tmp_path):
  hugging_face.write_hugging_face(source('independent', theirs),
                                  tmp_path / 'out')
  bias = safetensors.numpy.load_file(
      tmp_path / 'out' / 'model.safetensors')['qa_outputs.bias']
  assert bias.tolist() == [0, 0] and bias.dtype == np.float32


@pytest.mark.parametrize(
    'head', sorted(heads.HEADS.keys() - {'independent', 'biased'}))
def test_another_head_is_refused_and_nothing_is_written(
    head, theirs, tmp_path):
  message = refusal(hugging_face.write_hugging_face, source(head, theirs),
                    tmp_path / 'out')
  assert repr(head) in message
  assert "'independent' and 'biased'" in message
  assert not list(tmp_path.iterdir())


class Centred(Independent):
  """A head with the parameters of `independent` that computes other scores."""

  @nn.compact
  def __call__(self, inputs):
    x = inputs.hidden - inputs.hidden.mean(axis=1, keepdims=True)
    return SpanScores(layers.project('start', x), layers.project('end', x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(bert.BertConfig):
  """An encoder that is no entry of ENCODERS."""


def test_a_head_or_encoder_of_a_user_with_known_names_is_refused(
    theirs, tmp_path):
  ours = source(f'{__name__}:Centred', theirs)
  message = refusal(hugging_face.write_hugging_face, ours, tmp_path / 'out')
  assert ':Centred' in message and "'independent' and 'biased'" in message
  ours = source('independent', theirs)
  mine = Mine(**dataclasses.asdict(ours.model.model.config))
  ours = dataclasses.replace(ours, model=dataclasses.replace(
      ours.model, model=ours.model.model.clone(config=mine)))
  message = refusal(hugging_face.write_hugging_face, ours, tmp_path / 'out')
  assert f"the encoder '{__name__}:Mine'; only 'bert', " in message
  assert not list(tmp_path.iterdir())


def test_a_head_of_a_user_does_not_start_from_the_head_of_a_checkpoint():
  net = qa.QAModel(checkpoints.read_config(TINY), Centred())
  params, notes = trainer.initial_parameters(net, jax.random.key(0), TINY)
  fresh = qa.init_head(net, jax.random.key(0))['head']
  jax.tree.map(np.testing.assert_array_equal, params['head'], fresh)
  assert len(notes) == 1 and 'dropped' in notes[0] and 'fresh' in notes[0]


def test_config_is_what_transformers_writes(exported):
  written = files.read_object(exported / 'config.json')
  carried = written.pop('qa_jax')
  reference = files.read_object(TINY / 'config.json')
  # Fields of transformers 4, which 5 has dropped with all but these values.
  reference |= {'is_decoder': False, 'position_embedding_type': 'absolute'}
  assert {k: reference[k] for k in written} == written
  assert carried['data'] == FIELDS['data']
  assert carried['decode'] == FIELDS['decode'] | {
      'search': 'two_stage', 'merge': 'none', 'whole_words': False}
  assert (exported / 'model.safetensors').stat().st_mode & 0o044


def test_windows_and_decoding_survive(exported, run):
  back, config = pretrained.read_pretrained(
      str(exported)).config, RunDirectory(run).read_config()
  assert back.decode == config.decode
  for name, value in FIELDS['data'].items():
    assert getattr(back.data, name) == value


@pytest.mark.parametrize('carried', [
    [], {'data': {'train': '/etc/passwd'}}, {'model': {}}, {'decode': 3}])
def test_other_carried_fields_are_refused(carried, exported, tmp_path):
  path = shutil.copytree(exported, tmp_path / 'x')
  files.write_json(path / 'config.json', files.read_object(
      path / 'config.json') | {'qa_jax': carried})
  assert 'qa_jax' in refusal(pretrained.read_pretrained, str(path))


def test_tokenizer_json_gives_our_windows(exported):
  ours = tokenizer_files.read_tokenizer(exported)
  assert (ours.vocab, ours.lowercase) == (tuple(VOCAB), True)
  whole = tokenizers.Tokenizer.from_file(str(exported / 'tokenizer.json'))
  question, context = 'What IS é?', 'ab cde. zz 東 [x] q'
  converted = whole.encode(question, context)
  config = config_lib.check_config({
      'data': {'max_length': 64, 'window_overlap': 8,
               'max_question_length': 32},
      'train': {'num_steps': 1}})
  windows = input_pipeline.make_windows(
      config, [Example('0', question, context)], ours)
  batch = windows.gather(np.zeros(1, int), len(converted.ids))
  assert batch['token_ids'][0].tolist() == converted.ids
  assert batch['token_type_ids'][0].tolist() == converted.type_ids
  about = files.read_object(exported / 'tokenizer_config.json')
  assert about == {
      'do_lower_case': True, 'tokenizer_class': 'BertTokenizer',
      'model_max_length': 40, 'pad_token': '[PAD]', 'unk_token': '[UNK]',
      'cls_token': '[CLS]', 'sep_token': '[SEP]', 'mask_token': '[MASK]'}


def test_a_run_answers_like_its_source(theirs, run):
  expected = pretrained.read_pretrained(str(theirs))
  answering = predict.load(run, null_rule='never')
  assert answering.model == expected.model
  assert answering.tokenizer == expected.tokenizer
  jax.tree.map(np.testing.assert_array_equal, answering.params, expected.params)
  context = 'a b c. d e'
  answer = answering.answer(question='x y', context=context)
  assert answer.text == context[answer.start:answer.end] != ''
  assert files.read_object(run / 'run.json')['argv'] == ['convert', '--x']


@pytest.mark.parametrize('eps', [1e-12, 1e-5])
def test_sizes_are_written_as_they_are(eps):
  sizes = bert.BertConfig(
      vocab_size=9, hidden_size=8, num_layers=3, num_heads=2, mlp_size=20,
      max_position=33, type_vocab_size=4, dropout=0.3, attention_dropout=0.2,
      layer_norm_eps=eps, initializer_range=0.05)
  written = hugging_face.hugging_face_config(sizes, 'BertModel')
  assert {k: written[k] for k in (
      'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
      'intermediate_size', 'max_position_embeddings', 'type_vocab_size',
      'hidden_dropout_prob', 'attention_probs_dropout_prob', 'layer_norm_eps',
      'initializer_range')} == dict(
          vocab_size=9, hidden_size=8, num_hidden_layers=3,
          num_attention_heads=2, intermediate_size=20,
          max_position_embeddings=33, type_vocab_size=4,
          hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2,
          layer_norm_eps=eps, initializer_range=0.05)


def test_the_model_card_has_scores_training_and_use(exported, run):
  _, header, body = (exported / 'README.md').read_text().split('---\n', 2)
  about = yaml.safe_load(header)
  assert about['pipeline_tag'] == 'question-answering'
  (result,) = about['model-index'][0]['results']
  assert result['dataset']['name'] == 'dev'
  assert [(m['type'], m['value']) for m in result['metrics']] == [
      ('exact_match', 61.23), ('f1', 70)]
  assert '| dev | 1234 | 61.23 | 70.00 |' in body
  record = files.read_object(run / 'run.json')
  blocks = [json.loads(b.split('```')[0]) for b in body.split('```json\n')[1:]]
  assert blocks[0]['seed'] == record['seed']
  assert blocks[0]['commit'] == (record['git']['commit'] or 'unknown')
  assert blocks[1] == RunDirectory(run).read_config().to_dict()
  assert 'AutoModelForQuestionAnswering' in body
  assert 'diff' not in body and '--x' not in body  # they may hold private names


def test_the_weights_are_those_of_the_checkpoint_that_is_named(tmp_path):
  best = random_model.random_qa('shared')
  last = dataclasses.replace(best, params=jax.tree.map(
      lambda x: x + 1, best.params))
  path = random_model.write_run(best, tmp_path / 'run', last)
  for name, step, expected in (
      ('best', 0, best), ('last', 1, last), ('1', 1, last)):
    source = hugging_face.read_source(str(path), name)
    assert source.step == step
    jax.tree.map(np.testing.assert_array_equal, source.model.params,
                 expected.params)


def test_the_model_card_has_no_figure_of_a_threshold_chosen_on_its_questions(
    run, tmp_path):
  other = shutil.copytree(run, tmp_path / 'run')
  at_zero = {'at_zero_exact_match': 50.0, 'at_zero_f1': 51.0}
  for folder, chosen, values in (  # without a threshold there is only one F1
      ('dev', True, at_zero), ('test', False, at_zero), ('warm', True, {})):
    files.write_json(other / 'eval' / folder / 'metrics.json', {
        'exact_match': 90.0, 'f1': 91.0, 'total': 12, **values,
        'threshold_chosen_on_these_questions': chosen})
  body = hugging_face.model_card(hugging_face.read_source(str(other)))
  assert '| dev | 12 | 50.00 | 51.00 |' in body
  assert '| test | 12 | 90.00 | 91.00 |' in body
  assert '| warm | 12 | 90.00 | 91.00 |' in body
  _, header, _ = body.split('---\n', 2)
  assert [[m['value'] for m in result['metrics']] for result in yaml.safe_load(
      header)['model-index'][0]['results']] == [
          [50.0, 51.0], [90.0, 91.0], [90.0, 91.0]]


def test_the_model_card_of_the_working_directory_has_its_name(
    run, monkeypatch):
  monkeypatch.chdir(run)
  card = hugging_face.model_card(hugging_face.read_source('.'))
  assert f'\n# {run.name}\n' in card


def test_the_model_card_has_only_evaluations_of_its_weights(
    run, tmp_path, capsys):
  other = shutil.copytree(run, tmp_path / 'run')
  for folder, step in (('test', 0), ('later', 3)):
    files.write_json(other / 'eval' / folder / 'metrics.json', {
        'exact_match': 1.0, 'f1': 2.0, 'total': 12})
    run_directory.record_step(other / 'eval' / folder, step)
  body = hugging_face.model_card(hugging_face.read_source(str(other)))
  assert '| dev |' in body and '| test |' in body and 'later' not in body
  assert (f'{other}/eval/later is the evaluation of step 3, not of step 0: the '
          'model card leaves it out') in capsys.readouterr().err


def test_the_model_card_has_only_evaluations_at_its_null_threshold(
    run, tmp_path, capsys):
  other = shutil.copytree(run, tmp_path / 'run')
  calibration.write_calibration(other, calibration.Calibration(
      -1.5, 2.0, 'held', '', 300, checkpoint=0,
      decode=dataclasses.asdict(RunDirectory(other).read_config().decode)), {})
  files.write_json(other / 'eval' / 'test' / 'metrics.json', {
      'exact_match': 1.0, 'f1': 2.0, 'total': 12, 'held_out_threshold': -1.5})
  for calibrated, kept, left in ((True, 'test', 'dev'), (False, 'dev', 'test')):
    target = tmp_path / f'calibrated-{calibrated}'
    hugging_face.write_hugging_face(hugging_face.read_source(
        str(other), calibrated=calibrated), target)
    card, said = (target / 'README.md').read_text(), capsys.readouterr().err
    assert f'| {kept} |' in card and f'| {left} |' not in card
    assert f'{other}/eval/{left} is an evaluation at the held-out ' in said
    assert ('temperature 2 of calibration.json stays behind' in said
            ) == calibrated


@pytest.mark.parametrize(('decode', 'sentence'), [
    ({'null_rule': 'never'}, 'every question gets one (null rule `never`).'),
    ({'null_rule': 'min_null', 'null_threshold': -1.5},
     'there is none if the score of the null rule `min_null`, that of `[CLS]` '
     'minus that of the best answer, exceeds the null threshold -1.5.'),
    ({'null_rule': 'posterior', 'null_threshold': 0.0},
     'there is none if the score of the null rule `posterior` exceeds the null '
     'threshold 0.')])
def test_the_model_card_says_when_there_is_no_answer(theirs, decode, sentence):
  one = source('independent', theirs)
  config = config_lib.override(one.model.config.to_dict(), {
      f'decode.{name}': value for name, value in decode.items()})
  one = dataclasses.replace(one, model=dataclasses.replace(
      one.model, config=config_lib.check_config(config)))
  assert sentence in hugging_face.model_card(one)


def test_damaged_metrics_are_named_and_nothing_is_written(run, tmp_path):
  broken = shutil.copytree(run, tmp_path / 'run')
  files.write_json(broken / 'eval' / 'dev' / 'metrics.json', {'f1': 'x'})
  converted = hugging_face.read_source(str(run))
  message = refusal(hugging_face.write_hugging_face,
                    hugging_face.ConversionSource('x', converted.model, broken),
                    tmp_path / 'out')
  assert 'eval/dev/metrics.json: total is None' in message
  assert [p.name for p in tmp_path.iterdir()] == ['run']


# --- encoders without a head


def test_a_tensorflow_encoder_becomes_a_bert_model(tmp_path):
  converted = hugging_face.read_source(str(GOLDEN / 'tf2_bert'))
  assert not converted.model.has_head
  hugging_face.write_hugging_face(converted, tmp_path / 'out')
  config = files.read_object(tmp_path / 'out' / 'config.json')
  assert config['architectures'] == ['BertModel']
  names = safetensors.numpy.load_file(
      tmp_path / 'out' / 'model.safetensors').keys()
  recorded = {k.removeprefix('bert.') for k in safetensors.numpy.load_file(
      TINY / 'model.safetensors') if k.startswith('bert.')}
  assert names == {k for k in recorded if '.layer.2.' not in k}
  back = pretrained.read_pretrained(str(tmp_path / 'out'))
  jax.tree.map(np.testing.assert_array_equal,
               back.params['encoder'], converted.model.params['encoder'])


def test_an_encoder_is_no_run(tmp_path):
  assert 'without a span head' in refusal(
      hugging_face.write_run_directory,
      hugging_face.read_source(str(GOLDEN / 'tf2_bert')), tmp_path / 'out', [])


def test_distilbert_leaves_as_a_bert_without_token_types(tmp_path):
  path = shutil.copytree(GOLDEN / 'tiny_distilbert', tmp_path / 'in')
  (path / 'vocab.txt').write_text('\n'.join(VOCAB[:40]) + '\n')
  hugging_face.write_hugging_face(hugging_face.read_source(str(path)),
                                  tmp_path / 'out')
  back = flax.traverse_util.flatten_dict(
      pretrained.read_pretrained(str(tmp_path / 'out')).params, sep='/')
  table = back['encoder/embeddings/token_type/embedding']
  assert table.shape == (2, 16) and not table.any()
  assert files.read_object(tmp_path / 'out/config.json')['model_type'] == 'bert'


def test_more_words_than_embeddings_are_refused(theirs, tmp_path):
  path = shutil.copytree(theirs, tmp_path / 'x')
  (path / 'vocab.txt').write_text('\n'.join(
      VOCAB + [f'w{i}' for i in range(100)]))
  assert f'{len(VOCAB) + 100} entries' in refusal(pretrained.read_pretrained,
                                                  str(path))


def test_a_checkpoint_of_what_is_no_run_is_refused(theirs):
  assert "checkpoint='7' chooses among the checkpoints of a run" in refusal(
      hugging_face.read_source, str(theirs), '7')


# --- the target directory


def test_a_target_that_holds_something_is_left_alone(theirs, run, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  for call in (lambda t: hugging_face.write_run_directory(
      hugging_face.read_source(str(theirs)), t, []), lambda t: hugging_face.
               write_hugging_face(hugging_face.read_source(str(run)), t)):
    assert 'not empty' in refusal(call, tmp_path)
    assert 'not a directory' in refusal(call, tmp_path / 'mine.txt' / 'out')
  assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_an_empty_target_is_taken(run, tmp_path):
  hugging_face.write_hugging_face(hugging_face.read_source(str(run)), tmp_path)
  assert (tmp_path / 'config.json').is_file()


def test_a_failed_write_leaves_no_files(tmp_path):
  def write(directory):
    (directory / 'one').write_text('1')
    raise OSError(28, 'No space left on device')

  assert 'No space left' in refusal(
      files.write_directory, tmp_path / 'a' / 'out', write)
  assert not list((tmp_path / 'a').iterdir())


def test_a_run_is_no_source_of_a_run(run, tmp_path):
  assert 'run already' in refusal(hugging_face.write_run_directory,
                                  hugging_face.read_source(str(run)),
                                  tmp_path / 'out', [])


def test_the_command_converts_with_notes_on_the_checkpoint(tmp_path):
  result = commands.command(
      'convert_weights', f'--source={GOLDEN / "tf1_bert"}', '--format=qa_jax',
      f'--target={tmp_path / "run"}')
  assert result.code == 0, result.err
  assert "the head 'biased'" in result.err and 'not read' in result.err
  assert 'no span head' not in result.err
  assert RunDirectory(tmp_path / 'run').is_run()
  assert RunDirectory(tmp_path / 'run').read_config().model.head == 'biased'


def test_the_command_refuses_an_unknown_format(tmp_path):
  assert "did you mean 'hf'" in commands.refusal(
      'convert_weights', '--source=x', f'--target={tmp_path / "t"}',
      '--format=hff')
