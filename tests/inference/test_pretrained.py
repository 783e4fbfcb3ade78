"""Models from checkpoint directories: window lengths, heads, odd weights."""

import collections
import json
import pathlib
import shutil
import string

import numpy as np
import pytest
import safetensors.numpy

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.data import windows
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.runtime import console
from tests.common import weights

LETTERS = string.ascii_lowercase
VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *LETTERS]
VOCAB += [f'[unused{i}]' for i in range(100 - len(VOCAB))]
POSITION_NAME = 'bert.embeddings.position_embeddings.weight'


def write(directory: pathlib.Path, *, positions: int = 40, config=None,
          head: bool = True, **changes: np.ndarray) -> pathlib.Path:
  """Writes the recorded checkpoint with another number of positions.

  `config` overrides fields of config.json and `changes` the tensors of the
  head.
  """
  shutil.copytree(weights.TINY, directory)
  (directory / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n')
  path = directory / 'config.json'
  fields = json.loads(path.read_text()) | {
      'max_position_embeddings': positions} | (config or {})
  path.write_text(json.dumps(fields))
  tensors = safetensors.numpy.load_file(directory / 'model.safetensors')
  rows = np.random.default_rng(0).normal(0, 0.2, (positions, 32))
  tensors[POSITION_NAME] = rows.astype(np.float32)
  tensors |= {f'qa_outputs.{name}': value for name, value in changes.items()}
  safetensors.numpy.save_file(
      {k: v for k, v in tensors.items() if head or 'qa_outputs' not in k},
      directory / 'model.safetensors')
  return directory


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path):
  directory = write(tmp_path / 'checkpoint')  # whose embeddings have 100 rows
  assert pretrained.read_pretrained(str(directory)).tokenizer.vocab
  with (directory / 'vocab.txt').open('a') as f:
    f.write('one_more\n')
  with pytest.raises(errors.UserError, match='has 101 entries, but the embedd'
                     'ings only 100'):
    pretrained.read_pretrained(str(directory))


def test_sizes_far_beyond_the_weights_are_refused(tmp_path):
  """They would be 100 GB of zeros before the shapes are compared."""
  directory = write(tmp_path / 'checkpoint', config={'vocab_size': 10**9})
  with pytest.raises(errors.UserError, match='its sizes ask for 32,000,0'):
    pretrained.read_pretrained(str(directory))


def test_each_file_of_json_is_read_once(tmp_path, monkeypatch):
  directory, counts = write(tmp_path / 'checkpoint'), collections.Counter()
  read = files.read_object

  def counted(path):
    counts[path.name] += 1
    return read(path)

  monkeypatch.setattr(files, 'read_object', counted)
  template = weights.fresh(directory=directory)
  for _ in range(2):  # of all layers, and of the first ones
    counts.clear()
    hugging_face.load_parameters(directory, template)
    assert counts == {'config.json': 1}
    template['encoder'].pop('layer_2', None)
  counts.clear()
  pretrained.read_pretrained(str(directory))
  assert counts['config.json'] == 1 and {*counts.values()} == {1}


# --- windows that fit the positions


@pytest.mark.parametrize('positions', [
    *range(8, 140, 6), 192, 255, 256, 300, 384, 512, 1024])
def test_windows_fit_any_number_of_positions(positions):
  lengths = pretrained.fitting_windows(positions)
  windows.check_lengths(**lengths)  # raises if there is no room for a step
  config_lib.check_config({'data': lengths, 'train': {'num_steps': 1}})
  assert lengths['max_length'] <= positions
  assert lengths['max_question_length'] == min(64, positions // 2)
  if positions >= 256:  # as transformers: min(max_seq_len // 2, 128)
    assert lengths['window_overlap'] == 128


@pytest.mark.parametrize('positions', [64, 100, 128, 192, 250])
def test_windows_overlap_by_a_quarter_to_a_half(positions):
  lengths = pretrained.fitting_windows(positions)
  assert positions // 4 <= lengths['window_overlap'] <= positions // 2


def test_an_encoder_of_the_usual_positions_gets_the_default_lengths():
  data, lengths = config_lib.Data(), pretrained.fitting_windows(512)
  assert lengths == {name: getattr(data, name) for name in lengths}


@pytest.mark.parametrize(('positions', 'context', 'question', 'noted'), [
    (128, 20, 3, False), (128, 300, 3, True), (64, 20, 40, True),
    (64, 20, 3, False), (384, 900, 3, False), (512, 900, 3, False)])
def test_short_windows_and_cut_questions_are_noted_once(
    tmp_path, capsys, positions, context, question, noted):
  console.say_once.cache_clear()
  qa = predict.load(write(tmp_path / 'x', positions=positions))
  capsys.readouterr()  # the note on the biased head
  row = {'question': ' '.join(LETTERS[i % 26] for i in range(question)),
         'context': ' '.join(LETTERS[i * 7 % 26] for i in range(context))}
  qa.answer(**row)
  qa.answer(**row)
  data = qa.config.data
  cut = question > data.max_question_length
  lines = [f'questions cut to data.max_question_length='
           f'{data.max_question_length} tokens: 1'] * cut + [
      f'the checkpoint takes {positions} tokens: a window has {positions} '
      f'tokens, at most {data.max_question_length} of the question, and '
      f'overlaps the next by {data.window_overlap}'] * noted
  assert capsys.readouterr().err.splitlines() == lines


def test_window_lengths_of_the_caller_are_not_noted(tmp_path, capsys):
  console.say_once.cache_clear()
  qa = predict.load(write(tmp_path / 'x'), max_question_length=10,
                    window_overlap=8)
  capsys.readouterr()
  qa.answer(question='a', context=' '.join(LETTERS * 3))
  assert capsys.readouterr().err == ''


def test_window_lengths_of_an_export_are_kept(tmp_path, capsys):
  console.say_once.cache_clear()
  stored = {'max_length': 36, 'window_overlap': 5, 'max_question_length': 12}
  qa = predict.load(write(tmp_path / 'x', config={'qa_jax': {'data': stored}}))
  assert {name: getattr(qa.config.data, name) for name in stored} == stored
  qa.answer(question='a', context=' '.join(LETTERS * 3))
  assert 'positions' not in capsys.readouterr().err


# --- encoders without a span head


@pytest.mark.parametrize(('architectures', 'name'), [
    (['BertForMaskedLM'], 'a BertForMaskedLM'),
    (['BertForTokenClassification'], 'a BertForTokenClassification'),
    (['BertModel'], 'a BertModel'), ([], 'an encoder')])
def test_a_checkpoint_of_another_task_is_refused_by_its_class(
    tmp_path, architectures, name):
  path = write(tmp_path / 'x', head=False,
               config={'architectures': architectures})
  with pytest.raises(errors.UserError) as caught:
    predict.load(path)
  assert str(caught.value).startswith(f'{path} is {name} without a span head')
  assert f'--config.model.init_from={path}' in str(caught.value)
  assert not pretrained.read_pretrained(str(path)).has_head


# --- weights and scores that are not finite


@pytest.mark.parametrize('row', [0, 1])
def test_a_weight_that_is_not_finite_is_one_line(tmp_path, row):
  head = np.zeros((2, 32), np.float32)
  head[row, 3] = np.nan
  path = write(tmp_path / 'x', weight=head)
  with pytest.raises(errors.UserError, match=r'not finite .*: 1 in qa_outputs'):
    predict.load(path)


@pytest.mark.parametrize('row', [0, 1])
def test_scores_that_overflow_are_one_line(tmp_path, row):
  head = np.zeros((2, 32), np.float32)
  head[row] = np.where(np.arange(32) % 2, 3e38, -3e38)  # finite, sums are not
  qa = predict.load(write(tmp_path / 'x', weight=head))
  with pytest.raises(errors.UserError) as caught:
    qa.answer_batch([{'question': 'a', 'context': 'b c d'}] * 2)
  message = str(caught.value)
  assert 'the scores of 2 of 2 windows are not finite' in message
  assert '\n' not in message
