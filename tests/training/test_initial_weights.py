"""Runs that start from the weights of a run, whole or in part."""

import json
import shutil

import jax
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import manifest
from qa_jax.evaluation import evaluator
from qa_jax.export import hugging_face as export
from qa_jax.inference import predict
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import runs
from tests.common import tiny
from tests.common.refusals import refusal


def test_a_run_can_start_from_a_run(finished, tmp_path):
  config = tiny.config(model={'init_from': str(finished), 'hidden_size': 0,
                              'num_layers': 0, 'num_heads': 0, 'mlp_size': 0})
  started = trainer_lib.build_trainer(config)
  qa = predict.load(finished)
  jax.tree.map(np.testing.assert_array_equal,
               jax.device_get(started.state.params), jax.device_get(qa.params))
  assert started.windows.tokenizer == qa.tokenizer


def test_a_start_from_an_earlier_checkpoint_than_the_last_is_said(
    tmp_path, capsys, monkeypatch):
  scores = iter((50.0, 30.0, 20.0))
  real = evaluator.Evaluator.evaluate
  monkeypatch.setattr(
      evaluator.Evaluator, 'evaluate', lambda self, *args, **kwargs: {
          **real(self, *args, **kwargs), 'f1': next(scores)})
  source = tmp_path / 'source'
  train.train(tiny.config(train={'num_steps': 3, 'eval_every_steps': 1}),
              source)
  config = shallow(source, 0, data={'eval': ''}, train={'num_steps': 1})
  started = trainer_lib.build_trainer(config)
  note = (f'{source}: the parameters of step 1, its best checkpoint; the last '
          'is of step 3')
  assert note in started.notes
  expected = predict.load(source, checkpoint=1).params
  jax.tree.map(np.testing.assert_array_equal,
               jax.device_get(started.state.params), jax.device_get(expected))
  capsys.readouterr()
  train.train(config, tmp_path / 'run')
  assert note in capsys.readouterr().err
  record = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert record['init_from_step'] == 1


@pytest.mark.parametrize('fields', [
    {'head': 'mlp'}, {'init_head': False}])
def test_a_fresh_head_can_start_on_the_encoder_of_a_run(finished, fields):
  started = trainer_lib.build_trainer(tiny.config(model={
      'init_from': str(finished), 'hidden_size': 0, 'num_layers': 0,
      'num_heads': 0, 'mlp_size': 0, **fields}))
  stored = jax.device_get(predict.load(finished).params)
  jax.tree.map(np.testing.assert_array_equal,
               jax.device_get(started.state.params['encoder']),
               stored['encoder'])
  assert not any(
      np.isin(leaf, stored['head']['start']['kernel']).any()
      for leaf in jax.tree.leaves(jax.device_get(started.state.params['head'])))
  assert any('the head is fresh' in note for note in started.notes)


def shallow(source, num_layers, data=None, train=None, **fields
            ) -> config_lib.Config:
  return tiny.config(data=data or {}, train=train or {}, model={
      'init_from': str(source), 'hidden_size': 0, 'num_layers': num_layers,
      'num_heads': 0, 'mlp_size': 0, **fields})


@pytest.mark.parametrize('steps', [1, 2])
def test_initial_weights_count_until_the_first_checkpoint(
    finished, tmp_path, steps):
  """The first checkpoint is that of step 2."""
  source, workdir = tmp_path / 'source', tmp_path / 'run'
  shutil.copytree(finished, source)
  config = shallow(source, 0)
  runs.train_until_killed(config, workdir, steps + 1)
  with (source / 'config.json').open('a') as file:
    file.write('\n')
  if steps == 2:
    train.train(config, workdir)
    return
  with pytest.raises(errors.UserError, match=(
      r'other inputs: config\.model\.init_from: config\.json changed')):
    train.train(config, workdir)


def test_the_hashes_of_a_run_cover_its_checkpoints(finished, tmp_path):
  source = shutil.copytree(finished, tmp_path / 'source')
  before = hugging_face.file_hashes(source)
  path, *_ = (source / 'checkpoints').glob(f'*/{manifest.NAME}')
  path.write_text(path.read_text() + '\n')
  after = hugging_face.file_hashes(source)
  assert [k for k in after if after[k] != before[k]] == [
      path.relative_to(source).as_posix()]


@pytest.mark.parametrize('steps', [1, 2])
def test_the_best_step_of_a_source_counts_until_the_first_checkpoint(
    finished, tmp_path, steps):
  workdir, config = tmp_path / 'run', shallow(finished, 0)
  runs.train_until_killed(config, workdir, steps + 1)
  record = json.loads((workdir / 'run.json').read_text())
  now = record['init_from_step']
  (workdir / 'run.json').write_text(json.dumps(
      {**record, 'init_from_step': now + 1}))
  if steps == 2:
    train.train(config, workdir)
    return
  with pytest.raises(errors.UserError, match=(
      f'the best step of config.model.init_from, {now + 1} before and {now} '
      'now, changed')):
    train.train(config, workdir)


@pytest.mark.parametrize('init_head', [
    pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_with_a_checkpoint_goes_on_where_its_initial_weights_are_gone(
    finished, tmp_path, capfd, init_head):
  source, whole = tmp_path / 'source', tmp_path / 'whole'
  config = shallow(source, 0, init_head=init_head)
  shutil.copytree(finished, source)
  train.train(config, whole)
  for run, steps in ((tmp_path / 'early', 1), (tmp_path / 'late', 3)):
    runs.train_until_killed(config, run, steps)
  shutil.rmtree(source)
  capfd.readouterr()
  metrics = train.train(config, tmp_path / 'late')
  said = capfd.readouterr().err
  assert f'{source} is not a directory' in said and 'resuming from' in said
  assert 'the head is fresh' not in said
  assert metrics == train.train(config, whole)  # which is complete
  for run in (whole, tmp_path / 'late'):
    assert json.loads((run / 'config.json').read_text())['model'][
        'init_from'] == str(source)
  jax.tree.map(np.testing.assert_array_equal, *(
      jax.device_get(predict.load(run, checkpoint='last').params)
      for run in (whole, tmp_path / 'late')))
  assert 'is not a directory' in refusal(
      train.train, config, tmp_path / 'early')


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
  """Returns the directory of a run with three layers."""
  workdir = tmp_path_factory.mktemp('deep') / 'run'
  train.train(tiny.config(model={'num_layers': 3}, train={'num_steps': 1},
                          data={'eval': ''}), workdir)
  return workdir


@pytest.mark.parametrize('head', ['independent', 'layer_mix'])
def test_first_layers_of_a_run_are_taken_with_a_fresh_head(deep, head):
  started = trainer_lib.build_trainer(shallow(deep, 2, head=head))
  stored = jax.device_get(predict.load(deep).params)
  encoder = jax.device_get(started.state.params['encoder'])
  assert encoder.keys() == {'embeddings', 'layer_0', 'layer_1'}
  for name, values in encoder.items():
    jax.tree.map(np.testing.assert_array_equal, values,
                 stored['encoder'][name])
  head = jax.device_get(started.state.params['head'])
  assert not any(np.isin(leaf, stored['head']['start']['kernel']).any()
                 for leaf in jax.tree.leaves(head))
  assert any('the first 2 of the 3 layers' in note for note in started.notes)


@pytest.mark.parametrize('fields', [
    {'num_layers': 4}, {'num_layers': 0, 'preset': 'mini'}])
def test_layers_that_a_checkpoint_lacks_are_refused(deep, fields):
  with pytest.raises(errors.UserError, match=r'num_layers.4, but .* has 3'):
    trainer_lib.build_trainer(shallow(deep, **fields))


@pytest.mark.slow
def test_a_run_of_first_layers_resumes_loads_and_converts(
    deep, tmp_path):
  config = shallow(deep, 2)
  runs.train_until_killed(config, tmp_path / 'cut', 5)
  train.train(config, tmp_path / 'cut')
  train.train(config, tmp_path / 'whole')
  assert runs.rows_of(tmp_path / 'cut')[-1] == runs.rows_of(
      tmp_path / 'whole')[-1]
  source = predict.load(tmp_path / 'cut')
  assert source.model.config.num_layers == 2
  export.write_hugging_face(export.read_source(str(tmp_path / 'cut')),
                            tmp_path / 'hf')
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(source.params),
               jax.device_get(predict.load(tmp_path / 'hf').params))
