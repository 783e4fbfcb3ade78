"""Training: wrapped train steps agree, and a killed run resumes exactly."""

import contextlib
import functools
import json
import pathlib
import shutil
import signal
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import objectives
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.evaluation import evaluator
from qa_jax.export import hugging_face as export
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.models import qa as qa_lib
from qa_jax.runtime import compilation
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import signals
from qa_jax.training import metrics_log
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import runs
from tests.common import tiny
from tests.common.refusals import refusal

WRAPPERS = [('jit', 1, {}), ('pmap', 1, {}), ('pmap', 4, {}), ('pmap', 8, {}),
            ('mesh', 8, {'data': 8}),
            ('mesh', 8, {'data': 2, 'fsdp': 4}),
            ('mesh', 4, {'data': 1, 'fsdp': -1})]


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(tiny.config())


@pytest.fixture(scope='module')
def batch(trainer) -> dict[str, np.ndarray]:
  """Builds 16 rows, of which the last 5 are padding.

  The last of 4 or 8 devices has only padding rows.
  """
  rows = np.concatenate([np.arange(11), np.full(5, -1)])
  return {**trainer.windows.gather(rows, 64),
          'row': np.arange(16, dtype=np.int32)}


def loss_fn(trainer, params, batch, key):
  scores = trainer.model.apply(
      {'params': params}, **qa_lib.model_inputs(batch), dropout_key=key,
      rows=batch['row'])
  return {'loss': objectives.cross_entropy().loss(scores, batch)}


def sgd_update(trainer, batch, mode, devices, axes, accumulation=1):
  """Returns loss, gradient norm and new parameters of one SGD step."""
  optimizer = optax.sgd(1.0)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=trainer.state.params,
      opt_state=optimizer.init(trainer.state.params),
      key_data=jax.random.key_data(jax.random.key(5)))
  wrapped = parallel.wrap_step(
      functools.partial(
          step_lib.train_step, loss_fn=functools.partial(loss_fn, trainer),
          optimizer=optimizer, accumulation=accumulation),
      mode=mode, devices=jax.devices()[:devices], axes=axes)
  state = jax.device_put(jax.tree.map(jnp.copy, state),
                         wrapped.state_sharding(state))
  state, values = wrapped.step(state, wrapped.place_batch(batch))
  return jax.device_get((values['loss'], values['grad_norm'], state.params))


@pytest.fixture(scope='module')
def reference(trainer, batch):
  """Computes the update from the 11 real rows only, by its definition."""
  real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
  key = jax.random.fold_in(jax.random.key(5), 0)
  mean = lambda params: loss_fn(trainer, params, real, key)['loss'].mean()
  loss, grads = jax.jit(jax.value_and_grad(mean))(trainer.state.params)
  return jax.device_get((loss, optax.tree.norm(grads), jax.tree.map(
      jnp.subtract, trainer.state.params, grads)))


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'devices', 'axes'), WRAPPERS)
def test_loss_gradient_and_update_do_not_depend_on_the_wrapper(
    trainer, batch, reference, mode, devices, axes):
  update = sgd_update(trainer, batch, mode, devices, axes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), update, reference)


@pytest.mark.parametrize('accumulation', [2, 4])
def test_accumulation_changes_nothing_but_the_rows_at_a_time(
    trainer, batch, reference, accumulation, monkeypatch):
  of_rows, counts = loss_fn, set()

  def counted(trainer, params, rows, key):
    counts.add(len(rows['row']))
    return of_rows(trainer, params, rows, key)

  monkeypatch.setitem(globals(), 'loss_fn', counted)
  update = sgd_update(trainer, batch, 'pmap', 2, {}, accumulation)
  assert counts == {16 // 2 // accumulation}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), update, reference)


def test_a_batch_of_padding_alone_changes_nothing(trainer, batch):
  empty = {**batch, 'weight': np.zeros(16, np.float32)}
  loss, norm, params = sgd_update(trainer, empty, 'pmap', 2, {})
  assert loss == norm == 0
  jax.tree.map(np.testing.assert_array_equal, params,
               jax.device_get(trainer.state.params))


def test_one_real_row_is_the_mean_of_one(trainer, batch):
  one = {**batch, 'weight': np.eye(16, dtype=np.float32)[3]}
  loss, _, params = sgd_update(trainer, one, 'pmap', 2, {})
  key = jax.random.fold_in(jax.random.key(5), 0)
  real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
  expected, grads = jax.jit(jax.value_and_grad(
      lambda p: loss_fn(trainer, p, real, key)['loss'][3]))(
          trainer.state.params)
  assert loss == pytest.approx(float(expected), rel=1e-6)
  jax.tree.map(lambda a, p, g: np.testing.assert_allclose(
      a, p - g, rtol=1e-6, atol=1e-6), params,
               jax.device_get(trainer.state.params), jax.device_get(grads))


def test_every_step_has_its_dropout_masks(trainer, batch):
  """Compares losses of equal parameters with dropout keys folded by hand."""
  key, losses = jax.random.key(5), []
  for step in (0, 1, 7):
    state = step_lib.TrainState(
        step=jnp.asarray(step, jnp.int32), params=trainer.state.params,
        opt_state=(), key_data=jax.random.key_data(key))
    _, values = jax.jit(functools.partial(
        step_lib.train_step, loss_fn=functools.partial(loss_fn, trainer),
        optimizer=optax.with_extra_args_support(optax.identity())))(
            state, batch)
    real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
    expected = loss_fn(trainer, trainer.state.params, real,
                       jax.random.fold_in(key, step))['loss'].mean()
    losses.append(float(values['loss']))
    assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
  assert len(set(losses)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(('parallel_fields', 'train_fields', 'kills'), [
    ({'mode': 'pmap', 'num_devices': 1}, {}, (2, 6)),
    ({'mode': 'pmap', 'num_devices': 4}, {'grad_accumulation': 2}, (6,)),
    ({'mode': 'mesh', 'num_devices': 4, 'mesh': {'data': 2, 'fsdp': 2}},
     {'eval_every_steps': 3}, (6,)),
    ({'mode': 'jit', 'num_devices': 1}, {}, (2,))])
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path, parallel_fields, train_fields, kills):
  config = tiny.config(parallel=parallel_fields, train=train_fields)
  metrics = train.train(config, tmp_path / 'whole')
  for step in kills:
    runs.train_until_killed(config, tmp_path / 'killed', step)
  assert train.train(config, tmp_path / 'killed') == metrics
  assert runs.rows_of(tmp_path / 'killed') == runs.rows_of(tmp_path / 'whole')
  whole, killed = (runs.state_of(tmp_path / w, 7) for w in ('whole', 'killed'))
  assert whole.keys() == killed.keys() and len(whole) > 20
  for name, value in whole.items():
    np.testing.assert_array_equal(value, killed[name], err_msg=name)


def test_a_resumed_run_sees_each_window_once_an_epoch_in_a_new_order(
    tmp_path, monkeypatch):
  config = tiny.config(data={'eval': ''}, train={'num_steps': 14},
                       parallel={'num_devices': 1})
  windows: list[list[int]] = []  # of each batch of one process
  count = metrics_log.StepMetrics.add_batch

  def counting(self, batch, lengths):
    windows.append(batch[batch >= 0].tolist())
    count(self, batch, lengths)
  monkeypatch.setattr(metrics_log.StepMetrics, 'add_batch', counting)
  runs.train_until_killed(config, tmp_path / 'run', 9)
  before = windows[:8]
  windows.clear()
  train.train(config, tmp_path / 'run')
  assert len(windows) == 6  # resumed from step 8
  trained = trainer_lib.build_trainer(config).batches.indices.tolist()
  order = [window for batch in before + windows for window in batch]
  first, second = (order[i * len(trained):(i + 1) * len(trained)]
                   for i in range(2))
  assert len(trained) > 32 and len(second) == len(trained)
  assert sorted(first) == sorted(second) == sorted(trained)
  assert first != second


def test_a_run_that_dies_in_its_last_save_does_not_look_complete(
    finished, tmp_path, monkeypatch):
  config, killed = tiny.config(), tmp_path / 'killed'
  save = manager.Checkpoints.save

  def dying(self, step, **items):
    if step == config.train.num_steps:
      raise runs.Killed
    save(self, step, **items)
  with monkeypatch.context() as patch:
    patch.setattr(manager.Checkpoints, 'save', dying)
    with pytest.raises(runs.Killed):
      train.train(config, killed)
  assert not [*killed.glob('eval/*/metrics.json')]
  train.train(config, killed)
  assert runs.rows_of(killed) == runs.rows_of(finished)
  outputs = [*finished.glob('eval/*/*')]
  assert any(path.name == 'metrics.json' for path in outputs)
  for path in outputs:
    assert (killed / path.relative_to(finished)
            ).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(4, 1), (1, 8)])
def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path, capsys, before, after):
  on_before, on_after = (
      tiny.config(parallel={'num_devices': count}) for count in (before, after))
  train.train(on_before, tmp_path / 'whole')
  runs.train_until_killed(on_before, tmp_path / 'moved', 5)
  train.train(on_after, tmp_path / 'moved')
  assert f'{before} devices before, {after} now' in capsys.readouterr().err
  for a, b in zip(runs.rows_of(tmp_path / 'whole'),
                  runs.rows_of(tmp_path / 'moved'),
                  strict=True):
    assert a['split'] == b['split'] and a['step'] == b['step']
    if a['split'] == 'train':
      assert a['loss'] == pytest.approx(b['loss'], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(('fields', 'why'), [
    ({'data': {**tiny.FIELDS['data'], 'packing': 'rows'}}, 'data.packing=rows'),
    ({'objective': 'shared_norm'}, 'the objective keeps questions together')])
def test_a_plan_of_the_devices_does_not_go_on_with_another_number(
    tmp_path, capsys, fields, why):
  one, two = (tiny.config(
      parallel={'num_devices': count},
      train={**tiny.FIELDS['train'], 'num_steps': 3}, **fields)
              for count in (1, 2))
  runs.train_until_killed(two, tmp_path, 3)
  with pytest.raises(errors.UserError, match=(
      rf'2 devices before, 1 now, .*\({why}\); resume it on as many, such as '
      'by --config.parallel.num_devices=2, or')):
    train.train(one, tmp_path)
  metrics = train.train(two, tmp_path)
  assert train.train(one, tmp_path) == metrics  # It reads no batch.
  assert 'is complete at step 3' in capsys.readouterr().err


QUESTIONS = [
    {'id': str(i), 'question': 'Who came?', 'context': f'{name} came home.',
     'answers': [{'text': name, 'answer_start': 0}]}
    for i, name in enumerate(['Ada', 'Eve', 'Bob', 'Kim', 'Leo', 'Mia'] * 2)]


def write_questions(path: pathlib.Path, rows=None) -> None:
  path.write_text(''.join(
      json.dumps(row) + '\n' for row in rows or QUESTIONS))


@pytest.fixture
def interrupted(tmp_path):
  """Returns the config, data and directory of a run killed after step 2."""
  data = tmp_path / 'train.jsonl', tmp_path / 'eval.jsonl'
  for path in data:
    write_questions(path)
  config = tiny.config(
      data={**tiny.FIELDS['data'], 'train': str(data[0]), 'eval': str(data[1])},
      train={**tiny.FIELDS['train'], 'num_steps': 3})
  runs.train_until_killed(config, tmp_path / 'run', 3)
  return config, data, tmp_path / 'run'


def test_a_run_does_not_go_on_with_other_training_data(interrupted):
  config, (train_data, _), workdir = interrupted
  write_questions(train_data, [
      {**QUESTIONS[0], 'context': 'Ada saw a zebra.'}, *QUESTIONS[1:9]])
  with pytest.raises(errors.UserError, match=(
      'began with other inputs: the vocabulary and the training data changed; '
      r'put back .* or choose a new --workdir')) as e:
    train.train(config, workdir)
  assert '\n' not in str(e.value)
  record = files.read_object(workdir / 'run.json')
  write_questions(train_data)
  train.train(config, workdir)
  assert files.read_object(workdir / 'run.json') == record


def test_other_evaluation_data_are_named(interrupted, capsys):
  config, (_, eval_data), workdir = interrupted
  write_questions(eval_data, QUESTIONS[:5])
  train.train(config, workdir)
  assert 'the evaluation data changed since the run' in capsys.readouterr().err


def test_a_run_whose_record_has_no_hashes_goes_on(interrupted):
  config, (train_data, _), workdir = interrupted
  record = files.read_object(workdir / 'run.json')
  files.write_json(workdir / 'run.json', {
      k: v for k, v in record.items() if k != 'sha256'})
  # The vocabulary is learned from the set of words, which stays.
  write_questions(train_data, QUESTIONS[::-1])
  assert train.train(config, workdir)


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> pathlib.Path:
  """Trains the tiny config to its end; returns the run directory."""
  workdir = tmp_path_factory.mktemp('runs') / 'tiny'
  with mock.patch.object(sys, 'argv', ['train', '--x']):
    train.train(tiny.config(), workdir)
  return workdir


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(workdir)): p.read_bytes()
          for p in sorted(workdir.rglob('*')) if p.is_file()}


def test_a_run_directory_stands_alone(finished):
  record = files.read_object(finished / 'run.json')
  assert record['seed'] == 3 and record['argv'] == ['train', '--x']
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


def test_a_complete_run_is_left_as_it_is(finished, capsys):
  before = contents(finished)
  metrics = train.train(tiny.config(), finished)
  assert 'is complete at step 7' in capsys.readouterr().err
  assert contents(finished) == before
  assert metrics == files.read_object(
      finished / 'eval' / run_directory.evaluation_name(tiny.config().data.eval)
      / 'metrics.json')


@pytest.mark.parametrize('train_fields', [
    {'num_steps': 5}, {'num_steps': 0, 'num_epochs': 0.7}])
@pytest.mark.parametrize('evaluation', ['', tiny.FIELDS['data']['eval']])
def test_a_complete_run_needs_no_data(
    tmp_path, capsys, train_fields, evaluation):
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps({
      'id': e.id, 'question': e.question, 'context': e.context,
      'answers': {'text': [a.text for a in e.answers],
                  'answer_start': [a.start for a in e.answers]}}) + '\n'
      for e in sources.load_examples(tiny.FIELDS['data']['train'])))
  config = tiny.config(data={'train': str(data), 'eval': evaluation},
                       train={**tiny.FIELDS['train'], **train_fields})
  runs.train_until_killed(config, tmp_path / 'killed', 4)
  metrics = train.train(config, tmp_path / 'run')
  assert bool(metrics) == bool(evaluation)
  data.unlink()
  before = contents(tmp_path / 'run')
  capsys.readouterr()
  assert train.train(config, tmp_path / 'run') == metrics
  [line] = capsys.readouterr().err.splitlines()
  assert f'{data}: No such file' in line and 'run is complete; not' in line
  assert contents(tmp_path / 'run') == before
  assert 'data.jsonl: No such file' in refusal(
      train.train, config, tmp_path / 'killed')


def test_a_complete_run_has_no_metrics_of_another_checkpoint(
    finished, tmp_path):
  """`evaluate` replaces the evaluation of the last step by that of the best."""
  run = RunDirectory(shutil.copytree(finished, tmp_path / 'run'))
  folder = run.evaluation(tiny.config().data.eval)
  assert run_directory.read_step(folder) == 7
  last = files.read_object(folder / 'metrics.json')
  files.write_json(folder / 'metrics.json', {'f1': -1.0})
  run_directory.record_step(folder, 4)
  assert train.train(tiny.config(), run.path) == pytest.approx(last)
  assert run_directory.read_step(folder) == 7
  assert files.read_object(folder / 'metrics.json') == pytest.approx(last)


def test_another_config_is_refused_with_a_table_of_the_differences(finished):
  before = contents(finished)
  with pytest.raises(errors.UserError) as caught:
    train.train(tiny.config(seed=4, optim={'learning_rate': 1e-3}), finished)
  message = str(caught.value)
  assert 'optim.learning_rate  0.01 → 0.001' in message
  assert 'seed                 3 → 4' in message
  assert contents(finished) == before


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


def test_every_checkpoint_has_the_state_before_its_step(finished):
  store = manager.Checkpoints(finished / 'checkpoints')
  steps = store.steps
  store.close()
  # An epoch has six steps. The position moves when a batch is read.
  positions = {6: {'epoch': 0, 'index': 6}, 7: {'epoch': 1, 'index': 1}}
  assert steps == list(positions)
  for step, position in positions.items():
    state = runs.state_of(finished, step)
    assert state["[1]['step']"] == step
    assert state['position'] == position


def test_a_run_can_start_from_a_run(finished, tmp_path):
  config = tiny.config(model={'init_from': str(finished), 'hidden_size': 0,
                              'num_layers': 0, 'num_heads': 0, 'mlp_size': 0})
  started = trainer_lib.build_trainer(config)
  qa = predict.load(finished)
  jax.tree.map(np.testing.assert_array_equal,
               jax.device_get(started.state.params), jax.device_get(qa.params))
  assert started.tokenizer == qa.tokenizer


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


def shallow(source, num_layers, **fields) -> config_lib.Config:
  return tiny.config(model={
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
    ({'parallel': {'mode': 'mesh', 'mesh': {'data': 3}}}, 'does not multiply'),
    ({'parallel': {'mode': 'mesh', 'mesh': {'model': 2}}}, "no axis 'model'"),
    ({'model': {'head': 'independant'}}, "did you mean 'independent'"),
    ({'model': {'preset': 'bse'}}, "did you mean 'base'"),
    ({'model': {'num_heads': 3}}, 'not divisible by num_heads 3'),
    ({'model': {'num_layers': 0}}, 'num_layers is 0'),
    ({'model': {'init_from': '/no/where'}}, 'nor a hub id'),
    ({'objective': 'cross_entropi'}, "did you mean 'cross_entropy'"),
    ({'objective': 'cross_entropy(domain="al")'}, "did you mean 'all'"),
    ({'data': {'train': ''}}, 'data.train is empty'),
    ({'data': {'buckets': (0,)}}, 'data.buckets has 0'),
    ({'data': {'window_overlap': 60}}, 'leaves no step'),
    ({'data': {'windows_without_answer': 'keep'}}, 'choose cls or drop'),
    ({'data': {'vocab': '/no/where'}}, 'is not a directory'),
    ({'data': {'cache': ''}}, "choose 'auto', 'none' or a directory"),
    ({'optim': {'schedule': 'lineal'}}, "did you mean 'linear'")])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    train.train(tiny.config(**changes), tmp_path / 'run')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


def test_the_schedule_ends_with_the_run(trainer):
  assert float(trainer.schedule(trainer.num_steps)) == 0
  assert float(trainer.schedule(trainer.num_steps - 1)) > 0


def test_the_loop_moves_nothing_to_a_device_unasked(tmp_path, monkeypatch):
  loop = train.run_loop

  def guarded(*args, **kwargs):
    with jax.transfer_guard('disallow'):
      return loop(*args, **kwargs)

  monkeypatch.setattr(train, 'run_loop', guarded)
  train.train(tiny.config(data={'eval': ''}, train={'num_steps': 3}),
              tmp_path / 'run')


@pytest.mark.parametrize('mode', ['pmap', 'mesh'])
def test_every_shape_is_compiled_once_and_before_the_first_step(mode):
  compiled = []
  listen = lambda name, *_, **__: compiled.append(name) if name.endswith(
      'backend_compile_duration') else None
  trainer = trainer_lib.build_trainer(tiny.config(
      data={'eval': '', 'buckets': (48, 56)}, parallel={'mode': mode},
      train={'num_steps': 100}))
  state = jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  lengths = {length for length, _ in trainer.batches._plan}
  assert len(lengths) > 1
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with trainer.start_compiling(state) as programs:
      programs.wait_for_all()
    assert len(programs) == len(compiled) == len(lengths)
    for _ in range(trainer.batches.steps_per_epoch):
      state, _ = trainer.parallel.step(
          state, trainer.place(*trainer.batches.next_rows()))
    assert len(compiled) == len(lengths)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def dispatched(monkeypatch, workdir, **changes) -> list[int]:
  """Trains, and returns the number of updates of each dispatch."""
  counts, dispatch = [], train.SingleRun.dispatch

  def counting(self, step, state):
    state, values, count = dispatch(self, step, state)
    counts.append(count)
    return state, values, count

  with monkeypatch.context() as patch:
    patch.setattr(train.SingleRun, 'dispatch', counting)
    train.train(several(**changes), workdir)
  return counts


@pytest.fixture
def as_users_compile(monkeypatch):
  """Makes XLA optimise train steps as it does outside of tests.

  Without, it rounds in the loop of a dispatch otherwise than in one update.
  """
  options = {'xla_backend_optimization_level': 3}
  if jax.__version_info__ < (0, 11):  # see conftest.py
    options['xla_cpu_use_fusion_emitters'] = True
  monkeypatch.setattr(parallel, 'DETERMINISTIC', options)


def several(most: int = 3, *, buckets=(), packing='rows', mode='pmap', **more):
  return tiny.config(
      precision={'deterministic': True},  # takes parallel.DETERMINISTIC
      model={**tiny.FIELDS['model'], 'dropout': 0.1},
      data={'eval': '', 'packing': packing, 'buckets': buckets},
      parallel={'mode': mode, 'num_devices': 1 if mode == 'jit' else 2},
      train={'num_steps': 11, 'checkpoint_every_steps': 7,
             'updates_per_dispatch': most}, **more)


@pytest.mark.parametrize('changes', [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({'mode': 'mesh'}, marks=pytest.mark.slow),
    pytest.param({'mode': 'jit'}, marks=pytest.mark.slow),
    pytest.param({'packing': True}, marks=pytest.mark.slow),
    pytest.param({'packing': False, 'buckets': (48, 56)},
                 marks=pytest.mark.slow),
    {'optim': {'learning_rate': 1e-2, 'skip_norm': 1.9}}])
def test_updates_of_a_dispatch_equal_single_ones_bit_for_bit(
    tmp_path, monkeypatch, as_users_compile, changes):
  counts = dispatched(monkeypatch, tmp_path / 'several', **changes)
  assert sum(counts) == 11 and max(counts) > 1
  ends = {*np.cumsum(counts).tolist()}
  assert {7, 11} <= ends  # a checkpoint and the end are never crossed
  if changes.get('packing', 'rows') == 'rows':  # nor is an epoch of 5 or 6
    assert len(counts) <= 6
  train.train(several(1, **changes), tmp_path / 'single')
  rows = [runs.rows_of(tmp_path / name) for name in ('several', 'single')]
  assert rows[0] == rows[1] and len(rows[0]) == 11
  if 'optim' in changes:
    assert 0 < rows[0][-1]['skipped'] < 11
  for step in (7, 11):
    one, other = (runs.state_of(tmp_path / name, step)
                  for name in ('several', 'single'))
    assert one.pop('position') == other.pop('position')
    for name, value in one.items():
      np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.slow
def test_a_run_of_several_updates_a_dispatch_resumes_bit_for_bit(
    tmp_path):
  train.train(several(), tmp_path / 'whole')
  runs.train_until_killed(several(), tmp_path / 'killed', 9)
  train.train(several(), tmp_path / 'killed')
  assert runs.rows_of(tmp_path / 'killed') == runs.rows_of(tmp_path / 'whole')
  one, other = (runs.state_of(tmp_path / name, 11)
                for name in ('killed', 'whole'))
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_dispatch_of_any_number_of_updates_is_one_program(tmp_path):
  compiled = []
  listen = lambda name, *_, **__: compiled.append(name) if name.endswith(
      'backend_compile_duration') else None
  trainer = trainer_lib.build_trainer(several())
  state = jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with trainer.start_compiling(state) as programs:
      programs.wait_for_all()
    assert len(compiled) == 1
    for most in (3, 1, 2):
      length, rows = trainer.batches.next_alike(most)
      state, _ = trainer.parallel.step(state, trainer.place(length, *rows))
    assert len(compiled) == 1
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert int(state.step) == 3 + 1 + 1  # an epoch has five batches


def on_an_accelerator(monkeypatch):
  """Makes 'auto' resolve as on a GPU, while a CPU computes."""
  resolve, lengths = config_lib.packing, config_lib.buckets
  monkeypatch.setattr(
      config_lib, 'packing', lambda config, _: resolve(config, 'gpu'))
  monkeypatch.setattr(
      config_lib, 'buckets', lambda config, _: lengths(config, 'gpu'))


@pytest.mark.parametrize('packing', ['auto', False])
def test_a_run_keeps_the_choices_of_the_platform_it_began_on(
    tmp_path, monkeypatch, capsys, packing):
  config = several(1, packing=packing)
  run = tmp_path / 'run'
  with monkeypatch.context() as patch:
    on_an_accelerator(patch)
    train.train(config, tmp_path / 'whole')
    runs.train_until_killed(config, run, 9)
  record = RunDirectory(run).read_record()['platform_choices']
  assert record == {'data.packing': 'rows' if packing else False,
                    'data.buckets': [64],
                    'precision.compute_dtype': 'float32'}
  stored = RunDirectory(run).read_config().data
  assert stored.packing == packing and stored.buckets == ()
  assert RunDirectory(run).settle(config, 'gpu').data.packing == (
      record['data.packing'])
  capsys.readouterr()
  train.train(config, run)
  said = capsys.readouterr().err
  assert ('data.packing stays rows, with which the run began; on a cpu it '
          'would be False' in said) == (packing == 'auto')
  assert runs.rows_of(run) == runs.rows_of(tmp_path / 'whole')


def test_a_run_that_began_in_bfloat16_stays_in_bfloat16(tmp_path, capsys):
  config = several(1)
  run = RunDirectory(tmp_path / 'run')
  train.train(config, run.path)
  record = run.read_record()
  record['platform_choices'] |= {'precision.compute_dtype': 'bfloat16'}
  run.record_file.write_text(json.dumps(record))
  assert run.settle(config, 'cpu').precision.compute_dtype == 'bfloat16'
  assert 'compute_dtype stays bfloat16' in capsys.readouterr().err


def test_a_run_of_earlier_versions_stays_unpacked(tmp_path, capsys):
  """Its config says False, and its run.json has no choices."""
  run = RunDirectory(tmp_path / 'run')
  train.train(several(1, packing=False), run.path)
  record = run.read_record()
  del record['platform_choices']
  run.record_file.write_text(json.dumps(record))
  given = several(1, packing='auto')
  run.check_config(given)
  settled = run.settle(given, 'gpu').data
  assert (settled.packing, settled.buckets) == (False, (64,))
  assert 'data.packing stays False' in capsys.readouterr().err
  config_file = json.loads(run.config_file.read_text())
  config_file['precision']['compute_dtype'] = 'float32'
  run.config_file.write_text(json.dumps(config_file))
  run.check_config(given)
  assert run.settle(given, 'gpu').precision.compute_dtype == 'float32'
  with pytest.raises(errors.UserError, match=r'data\.packing .* → True'):
    run.check_config(several(1, packing=True))
@pytest.mark.parametrize('fields', [
    {}, {'layer_decay': 0.5, 'clip_norm': 1.0, 'bias_correction': False}])
def test_the_initial_state_of_the_optimizer_is_that_of_optax(fields):
  config = tiny.config(optim=fields)
  trainer = trainer_lib.build_trainer(config)
  _, optimizer = trainer_lib.build_optimizer(
      config.optim, num_steps=7, num_layers=1)
  given, wanted = trainer.state.opt_state, optimizer.init(trainer.state.params)
  assert jax.tree.structure(given) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(wanted),
                  strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


BUCKETS = {'data': {'buckets': (40, 44, 48, 56), 'eval': ''}}


def hold_programs(monkeypatch, until):
  """Makes all programs but the first wait for `until`; returns their count."""
  compile_, held = compilation.Compilation._compile, []

  def late(self, lower):
    held.append(lower)
    if len(held) > 1:
      assert until.wait(60.0)
    compile_(self, lower)
  monkeypatch.setattr(compilation.Compilation, '_compile', late)
  return held


@pytest.mark.slow
@pytest.mark.parametrize('packing', [False, True])
def test_training_that_begins_with_one_program_repeats_the_run_with_all(
    tmp_path, monkeypatch, packing):
  config = tiny.config(**{**BUCKETS, 'data': {
      **BUCKETS['data'], 'packing': packing}})
  with monkeypatch.context() as patch:
    patch.setattr(compilation, 'may_overlap', lambda: False)
    train.train(config, tmp_path / 'all')
  logged = threading.Event()
  add_steps = metrics_log.StepMetrics.add_steps

  def add(self, done):
    add_steps(self, done)
    if done:
      logged.set()
  monkeypatch.setattr(metrics_log.StepMetrics, 'add_steps', add)
  held = hold_programs(monkeypatch, logged)
  train.train(config, tmp_path / 'one')
  assert len(held) > 1 and logged.is_set()
  assert runs.rows_of(tmp_path / 'one') == runs.rows_of(tmp_path / 'all')
  one, all_ = (runs.state_of(tmp_path / name, 7) for name in ('one', 'all'))
  assert one.keys() == all_.keys()
  for name, value in all_.items():
    np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_a_program_that_fails_later_ends_the_run_in_one_line(
    tmp_path, monkeypatch):
  compile_, count = compilation.Compilation._compile, []

  def failing(self, lower):
    count.append(1)
    if len(count) > 1:
      raise jax.errors.JaxRuntimeError('INTERNAL: no\nkernel')
    compile_(self, lower)
  monkeypatch.setattr(compilation.Compilation, '_compile', failing)
  with pytest.raises(errors.UserError, match=(
      r'^the train step for a batch \(8, \d+\) cannot be compiled: '
      'INTERNAL: no kernel$')):
    train.train(tiny.config(**BUCKETS), tmp_path)


def test_a_signal_ends_the_wait_for_a_program(tmp_path, monkeypatch):
  opened, wait, waits = threading.Event(), train.SingleRun.wait_for_program, []
  hold_programs(monkeypatch, opened)

  def signalled(self):
    waits.append(self._next_shape())
    if {*waits} != {waits[0]}:  # a later program, which is held
      signal.raise_signal(signal.SIGTERM)
    wait(self)
  monkeypatch.setattr(train.SingleRun, 'wait_for_program', signalled)
  try:
    with pytest.raises(signals.Stopped):
      train.train(tiny.config(**BUCKETS), tmp_path)
  finally:
    opened.set()  # Python waits for the thread when it ends
  steps = manager.Checkpoints(
      RunDirectory(tmp_path).checkpoints, read_only=True).steps
  assert len(steps) == 1 and 0 < steps[0] < 7


def test_metrics_are_read_when_later_steps_are_on_their_way():
  ahead = devices_lib.RunAhead(2)
  pushed = [ahead.push(step, {'loss': jnp.full((), step)})
            for step in range(4)]
  assert [[step for step, _ in done] for done in pushed] == [[], [], [0], [1]]
  assert [values['loss'] for _, values in ahead.drain()] == [2, 3]


@pytest.mark.parametrize('steps', [
    pytest.param(range(1, 3), marks=pytest.mark.slow), range(2, 9)])
def test_a_profile_holds_the_steps_asked_for(tmp_path, steps):
  train.train(tiny.config(data={'eval': ''}, train={'num_steps': 4}),
              tmp_path / 'run', profile_steps=steps)
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


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
