"""Whole training runs: what they write, refuse and profile."""

import contextlib
import json

import jax
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.training import metrics_log
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import runs
from tests.common import tiny
from tests.common.refusals import refusal


def test_a_run_directory_stands_alone(finished):
  record = files.read_object(finished / 'run.json')
  assert record['seed'] == 3 and record['argv'] == ['train', '--\udcff']
  assert set(record['sha256']) == {'vocabulary', 'train', 'eval'}
  assert record['devices']['count'] == 2 and 'jax' in record['packages']
  assert RunDirectory(finished).read_config() == tiny.config()
  for name in ('encoder.json', 'alignment.json', 'tokenizer/vocab.txt'):
    assert (finished / name).is_file()
  output = finished / 'eval' / run_directory.evaluation_name(
      tiny.config().data.eval)
  for name in ('metrics.json', 'predictions.json', 'nbest.jsonl'):
    assert (output / name).is_file()
  assert list((finished / 'tensorboard').iterdir())


def test_tensorboard_has_histograms_of_norms_and_of_the_valid_mass(finished):
  events, = (finished / 'tensorboard').iterdir()
  for name in (b'train/grad_norm_of_steps', b'eval/valid_mass_of_windows',
               b'eval/start_score_of_windows', b'eval/end_score_of_windows'):
    assert name in events.read_bytes()


def test_a_conditional_head_has_no_histogram_of_the_valid_mass(
    tmp_path, monkeypatch):
  names = []
  monkeypatch.setattr(metrics_log.MetricsLog, 'histogram',
                      lambda self, step, name, values: names.append(name))
  train.train(
      tiny.config(model={'head': 'conditional'}, objective='conditional',
                  train={'num_steps': 1}), tmp_path / 'run')
  assert names == ['train/grad_norm_of_steps']


def test_a_directory_of_something_else_is_refused(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(errors.UserError, match='not empty and not a run'):
    train.train(tiny.config(), tmp_path)
  with pytest.raises(errors.UserError, match='is a file'):
    train.train(tiny.config(), tmp_path / 'notes.txt')
  assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_a_loaded_run_answers_as_its_evaluation_did(finished):
  qa = predict.load(finished, checkpoint='last')
  output = finished / 'eval' / run_directory.evaluation_name(
      qa.config.data.eval)
  rows = [json.loads(line) for line in (
      output / 'nbest.jsonl').read_text().splitlines()]
  examples = sources.load_examples(qa.config.data.eval)
  answers = qa.answer_batch([
      {'question': e.question, 'context': e.context} for e in examples])
  for example, answer, row in zip(examples, answers, rows, strict=True):
    assert row['id'] == example.id
    assert [c['text'] for c in answer.n_best] == [
        c['text'] for c in row['answers']]
    np.testing.assert_allclose([c['score'] for c in answer.n_best],
                               [c['score'] for c in row['answers']], atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(tmp_path):
  config = tiny.config(train={'max_skipped': 0}, optim={
      'learning_rate': 1e30, 'clip_norm': 0.0, 'warmup_fraction': 0.0})
  with pytest.raises(errors.UserError, match='not finite'):
    train.train(config, tmp_path / 'run')
  store = manager.Checkpoints(tmp_path / 'run' / 'checkpoints')
  assert store.latest is None
  store.close()


def test_an_error_of_the_evaluation_is_raised_after_the_checkpoint(
    tmp_path, monkeypatch):
  """The same command then goes on, to the bits of an undisturbed run."""
  config = tiny.config(train={'num_steps': 3, 'eval_every_steps': 2,
                              'checkpoint_every_steps': 10})

  real, fails = evaluator.Evaluator.evaluate, [True, False, True, False]

  def evaluate(*args, **options):  # of steps 2, 2, 3, 3
    if fails.pop(0):
      raise ValueError('in a search')
    return real(*args, **options)

  monkeypatch.setattr(evaluator.Evaluator, 'evaluate', evaluate)
  for step in (2, 3):
    with pytest.raises(ValueError, match='in a search'):
      train.train(config, tmp_path / 'cut')
    with contextlib.closing(manager.Checkpoints(
        tmp_path / 'cut' / 'checkpoints')) as store:
      assert store.latest == step and not store.metrics(step)
  train.train(config, tmp_path / 'cut')
  monkeypatch.undo()
  train.train(config, tmp_path / 'whole')
  ours, whole = (runs.state_of(tmp_path / name, 3) for name in ('cut', 'whole'))
  for name, value in whole.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)
  evaluated = lambda name: [r for r in runs.rows_of(tmp_path / name)
                            if r['split'] == 'eval']
  assert evaluated('cut') == evaluated('whole')


def test_a_folder_that_cannot_be_made_costs_no_step(tmp_path):
  config = tiny.config(train={'num_steps': 1, 'checkpoint_every_steps': 10})
  runs.train_until_killed(config, tmp_path, 1)
  (tmp_path / 'eval').write_text('a file')
  assert 'Not a directory' in refusal(train.train, config, tmp_path)
  with contextlib.closing(manager.Checkpoints(
      tmp_path / 'checkpoints')) as store:
    assert store.latest == 1
  (tmp_path / 'eval').unlink()
  assert train.train(config, tmp_path)


def test_training_overfits_what_it_has_seen(tmp_path):
  """The bound on EM leaves room: 7 of 8 answers for some seeds, 8 for others.
  """
  config = tiny.config(
      model={'hidden_size': 32, 'dropout': 0.0, 'attention_dropout': 0.0},
      data={'train': 'synthetic(size=8)', 'eval': 'synthetic(size=8)'},
      train={'num_steps': 120, 'log_every_steps': 40,
             'checkpoint_every_steps': 120},
      parallel={'num_devices': 1})
  metrics = train.train(config, tmp_path / 'run')
  assert metrics['exact_match'] >= 75.0
  losses = [r['loss'] for r in runs.rows_of(tmp_path / 'run')
            if r['split'] == 'train']
  assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(('changes', 'message'), [
    ({'train': {'batch_size': 9}}, 'batch_size 9 is not divisible by 2'),
    ({'parallel': {'num_devices': 9}},
     'num_devices=9, but there are 8 cpu devices; JAX_NUM_CPU_DEVICES=9 in'),
    ({'parallel': {'mode': 'pmapp'}}, "did you mean 'pmap'"),
    ({'parallel': {'mode': 'jit'}}, "mode='jit' trains on one device"),
    ({'model': {'attention': 'cudn'}}, "did you mean 'cudnn'"),
    ({'parallel': {'mode': 'mesh', 'mesh': {'data': 3}}}, 'does not multiply'),
    *(({'parallel': {'mode': 'mesh', 'mesh': {'data': n, 'fsdp': -1}}},
       'does not multiply') for n in (0, -2)),
    ({'parallel': {'mode': 'mesh', 'mesh': {'model': 2}}}, "no axis 'model'"),
    ({'model': {'head': 'independant'}}, "did you mean 'independent'"),
    ({'model': {'preset': 'bse'}}, "did you mean 'base'"),
    ({'model': {'num_heads': 3}}, 'not divisible by num_heads 3'),
    ({'model': {'num_layers': 0}}, 'num_layers is 0'),
    ({'model': {'init_from': '/no/where'}}, 'nor a hub id'),
    ({'objective': 'cross_entropi'}, "did you mean 'cross_entropy'"),
    ({'objective': 'cross_entropy(domain="al")'}, "did you mean 'all'"),
    ({'objective': 'shared_norm', 'data': {'windows_without_answer': 'drop'}},
     "needs all windows of a question, but config.data.windows_without_answer"),
    ({'objective': 'span_softmax(constrained=False, max_answer_length=9)'},
     'max_answer_length=9 has no effect with constrained=False'),
    ({'objective': 'marginal(over="boundary", max_answer_length=9)'},
     "have no effect with over='boundary'"),
    ({'objective': 'marginal(over="boundary", constrained=False)'},
     "have no effect with over='boundary'"),
    ({'data': {'train': ''}}, 'data.train is empty'),
    ({'data': {'eval': 'synthetik()'}}, "did you mean 'synthetic'"),
    ({'data': {'buckets': (0,)}}, 'data.buckets has 0'),
    ({'data': {'window_overlap': 60}}, 'leaves no step'),
    ({'data': {'windows_without_answer': 'keep'}}, 'choose cls or drop'),
    ({'data': {'vocab': '/no/where'}}, 'is not a directory'),
    ({'data': {'cache': ''}}, "choose 'auto', 'none' or a directory"),
    ({'optim': {'schedule': 'lineal'}}, "did you mean 'linear'"),
    ({'optim': {'freeze_encoder': True, 'layer_decay': 0.5}},
     'no learning rate under optim.freeze_encoder=True; set layer_decay to 1')])
def test_a_mistake_is_one_line_before_the_data_are_read(
    tmp_path, monkeypatch, changes, message):
  monkeypatch.setattr(sources, 'load_examples', None)
  with pytest.raises(errors.UserError, match=message) as caught:
    train.train(tiny.config(**changes), tmp_path / 'run')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_an_evaluation_that_could_not_be_scored_costs_no_step(tmp_path):
  data = tmp_path / 'eval.jsonl'
  data.write_text('{"id": "a", "question": "Who?", "context": "Mira did."}\n')
  assert f'{data}: ' in refusal(train.train, tiny.config(
      data={'eval': str(data)}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('epochs', [1e9, 1e308])
def test_more_updates_than_a_run_can_count_are_refused(epochs):
  config = tiny.config(train={'num_steps': 0, 'num_epochs': epochs})
  assert f'num_epochs={epochs:g} are' in refusal(
      trainer_lib.build_trainer, config)


def test_the_loop_moves_nothing_to_a_device_unasked(tmp_path, monkeypatch):
  loop = train.run_loop

  def guarded(*args, **kwargs):
    with jax.transfer_guard('disallow'):
      return loop(*args, **kwargs)

  monkeypatch.setattr(train, 'run_loop', guarded)
  train.train(tiny.config(data={'eval': ''}, train={'num_steps': 3}),
              tmp_path / 'run')


@pytest.mark.parametrize('steps', [
    pytest.param(range(1, 3), marks=pytest.mark.slow),
    range(2, 10**20)])  # the end of the run ends it
def test_a_profile_holds_the_steps_asked_for(tmp_path, capsys, steps):
  train.train(tiny.config(data={'eval': ''}, train={'num_steps': 4}),
              tmp_path / 'run', profile_steps=steps)
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  assert 'profile of 2 steps in' in capsys.readouterr().err


def test_a_profile_that_an_error_cuts_short_is_written(
    tmp_path, capsys, monkeypatch):
  dispatch = train.SingleRun.dispatch

  def failing(self, step, state):
    if step == 2:
      raise errors.UserError('the device hangs')
    return dispatch(self, step, state)

  monkeypatch.setattr(train.SingleRun, 'dispatch', failing)
  with pytest.raises(errors.UserError, match='hangs'):
    train.train(tiny.config(data={'eval': ''}, train={'num_steps': 4}),
                tmp_path / 'run', profile_steps=range(1, 4))
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  said = capsys.readouterr().err
  assert f'cut short in {tmp_path / "run" / "profile"}' in said
  assert 'profile of' not in said


@pytest.mark.parametrize('steps', [range(4, 6), range(9, 12)])
def test_a_profile_of_steps_that_will_not_be_made_is_refused(tmp_path, steps):
  config = tiny.config(data={'eval': ''}, train={'num_steps': 4})
  with pytest.raises(errors.UserError, match=(
      f'--profile_steps={steps.start}:{steps.stop}: this run makes steps 0 … 3'
      )) as e:
    train.train(config, tmp_path / 'run', profile_steps=steps)
  assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_a_profile_of_steps_that_were_made_is_refused(tmp_path):
  config = tiny.config(data={'eval': ''})
  runs.train_until_killed(config, tmp_path / 'run', 6)
  with pytest.raises(errors.UserError, match='makes steps 4 … 6'):
    train.train(config, tmp_path / 'run', profile_steps=range(1, 4))
