"""Populations: each member equals the single run of its config."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.runtime import signals
from qa_jax.sweeps import engines
from qa_jax.sweeps import plan as plan_lib
from qa_jax.sweeps.engines import population as population_lib
from qa_jax.sweeps.engines import scheduler
from qa_jax.training import checkpointing
from qa_jax.training import metrics_log
from qa_jax.training import population
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import commands
from tests.common import runs as runs_lib
from tests.common import sweeps
from tests.common import tiny

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

MEMBERS = ((3, 1e-2, 0.01), (4, 3e-3, 0.5))
BASE = {'train': {'num_steps': 3}, 'data': {'buckets': (48,)}}


def members(**changes) -> list[config_lib.Config]:
  fields = {**BASE, **changes}
  return [tiny.config(**{**fields, 'seed': seed, 'optim': {
      'learning_rate': rate, 'weight_decay': decay}})
          for seed, rate, decay in MEMBERS]


def assert_same_values(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """Checks that all logged values are equal to 1e-5."""
  for a, b in zip(runs_lib.rows_of(workdir), runs_lib.rows_of(expected),
                  strict=True):
    assert a.pop('split') == b.pop('split')
    assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def assert_same_run(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """Checks equal values (to 1e-5) and equal evaluation files."""
  assert_same_values(workdir, expected)
  names = [str(p.relative_to(expected)) for p in expected.rglob('*.json*')
           if 'checkpoints' not in p.parts]
  assert any(n.endswith('/predictions.json') for n in names)
  for name in names:
    a, b = (x / name for x in (workdir, expected))
    assert a.is_file(), name
    if name.endswith(('predictions.json', 'metrics.json', 'alignment.json',
                      'config.json')):
      assert files.read_object(a) == files.read_object(b), name


def kill_after_save(monkeypatch, configs, runs, name: str, step: int) -> None:
  """Trains a population until the run `name` has saved `step`."""
  saved = checkpointing.Checkpointer.evaluate_and_save

  def dying(self, at, state):
    note = saved(self, at, state)
    if at >= step and self._workdir.name == name:
      raise runs_lib.Killed
    return note
  with monkeypatch.context() as patch:
    patch.setattr(checkpointing.Checkpointer, 'evaluate_and_save', dying)
    with pytest.raises(runs_lib.Killed):
      population.train_members(configs, runs)


def assert_equal_state(run: pathlib.Path, expected: pathlib.Path,
                       step: int) -> None:
  """Checks that all logged values and all arrays are equal bit for bit."""
  assert runs_lib.rows_of(run) == runs_lib.rows_of(expected)
  states = [runs_lib.state_of(path, step) for path in (expected, run)]
  for name, value in states[0].items():
    np.testing.assert_array_equal(value, states[1][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    {},
    {'data': {'packing': True}, 'train': {
        'num_steps': 3, 'grad_accumulation': 2, 'eval_every_steps': 2}}])
def test_a_member_is_the_run_trained_alone(tmp_path, changes):
  configs = members(**changes)
  runs = [tmp_path / f'member-{i}' for i in range(len(configs))]
  began = time.perf_counter()
  outcomes = population.train_members(configs, runs)
  seconds = time.perf_counter() - began
  # Each member has its share of the costs of all.
  costs = [sum(row.get('device_seconds', 0.0) for row in RunDirectory(
      run).read_metrics()) for run in runs]
  count = RunDirectory(runs[0]).read_record()['devices']['count']
  assert costs[0] == pytest.approx(costs[1], rel=0.2)
  assert 0 < sum(costs) < count * seconds
  for i, config in enumerate(configs):
    alone = tmp_path / f'alone-{i}'
    metrics = train.train(config, alone)
    assert outcomes[i] == pytest.approx(metrics, abs=1e-4)
    assert_same_run(runs[i], alone)
    assert train.train(config, runs[i]) == outcomes[i]  # complete


def test_members_batches_differ_in_length():
  """Otherwise the test with several buckets would prove nothing."""
  shapes = []
  for config in members():
    trainer = trainer_lib.build_trainer(config)
    start = trainer.batches.position
    shapes.append([next(trainer.batches)['token_ids'].shape[1]
                   for _ in range(3)])
    # Padding to the longest changes no dropout: its lengths are the batch's.
    trainer.batches.seek(start)
    batches = population._Member(
        trainer, None, None, meter=mock.Mock()).next_batches(3)
    assert [b['dropout_lengths'].tolist() for b in batches] == [
        [length] * config.train.batch_size for length in shapes[-1]]
  assert any(len(set(step)) > 1 for step in zip(*shapes, strict=True))


@pytest.mark.parametrize(('complete', 'retried'), [(False, False),
                                                   (True, True)])
def test_a_failed_member_tries_again_if_the_others_are_complete(
    tmp_path, capsys, complete, retried):
  failed, other = (types.SimpleNamespace(
      workdir=tmp_path / name, outcome=None, is_complete=lambda done=done: done)
                   for name, done in (('failed', False), ('other', complete)))
  record = RunDirectory(failed.workdir).failure_file
  files.write_json(record, {'step': 7, 'error': 'not finite'})
  population._read_failures([failed, other])
  assert record.is_file() != retried and other.outcome is None
  assert (failed.outcome is None) == retried
  if not retried:
    assert str(failed.outcome) == 'not finite'
    assert 'failed at step 7; the others' in capsys.readouterr().err


def test_a_member_that_failed_is_asked_for_nothing(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(population.time, 'perf_counter', lambda: now[0])
  failed = population._Member(  # before it began: it has no checkpointer
      mock.Mock(), tmp_path, None, outcome=errors.UserError('failed'))
  other = population._Member(
      mock.MagicMock(), tmp_path, None, meter=mock.Mock(),
      checkpointer=mock.Mock(
          is_due=lambda step: step == 3, is_complete=lambda step: step == 4,
          evaluate_and_save=mock.Mock(
              side_effect=lambda *_: now.__setitem__(0, 5.0))))
  program = population._PopulationProgram(
      [failed, other], mock.Mock(take=lambda states: states), None,
      mock.Mock(), 1)
  assert [program.is_due(step) for step in (2, 3)] == [False, True]
  assert [program.is_complete(step) for step in (3, 4)] == [False, True]
  assert not program.has_failed()
  program.evaluate_and_save(2, [{}, {}])
  assert not other.checkpointer.evaluate_and_save.called
  program.evaluate_and_save(3, [{}, {}])
  assert other.checkpointer.evaluate_and_save.call_count == 1
  assert other.meter.leave_out.call_args.args == (5.0,)


def test_the_first_step_of_a_shape_compiles_and_is_not_timed(
    tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(population.time, 'perf_counter', lambda: now[0])
  trainer = mock.Mock(buckets=(8, 16))
  trainer.batches.count_alike.return_value = 1
  trainer.batches.packing = False
  trainer.batches.next_rows.side_effect = [
      (n, {'window': np.arange(2), 'row': np.arange(2)}) for n in (8, 16, 8)]
  trainer.batches.gather.side_effect = lambda length, rows: {
      'token_ids': np.zeros((2, length), np.int32),
      'row': np.arange(2)}
  member = population._Member(
      trainer, tmp_path, None, meter=mock.Mock(),
      checkpointer=mock.Mock(is_due=lambda step: False))

  def step(*_):
    now[0] += 3.0
    return {}, {}

  program = population._PopulationProgram(
      [member], mock.Mock(step=step, place=lambda trees: trees), None,
      mock.Mock(), 1)
  for k in range(3):
    program.dispatch(k, {})
  assert [c.args for c in member.meter.leave_out.call_args_list] == [(3.0,)] * 2


def test_the_steps_of_a_dispatch_took_equally_long(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(
      metrics_log.time, 'perf_counter', lambda: now.__setitem__(
          0, now[0] + 4.0) or now[0])
  trainer = mock.Mock(buckets=(8,))
  trainer.batches.next_rows.return_value = 8, {'window': np.arange(2)}
  trainer.batches.lengths_of.return_value = np.ones(2)
  log = mock.Mock()
  meter = metrics_log.StepMetrics(
      log, mock.Mock(spent=lambda devices: {}), every_steps=2,
      steps_per_epoch=4, devices=jax.local_devices(), max_skipped=0)
  member = population._Member(trainer, tmp_path, None, meter=meter)
  ending = population._Member(  # failed before it began
      trainer, tmp_path, None, outcome=errors.UserError('failed'))
  progress = mock.Mock()
  program = population._PopulationProgram(
      [member, ending], mock.Mock(take=lambda values: [values] * 2), None,
      progress, 4)
  member.next_batches(4)
  ending.next_batches(4)
  program.read([(range(1, 5), {
      'loss': np.arange(4.0), 'grad_norm': np.ones(4), 'skipped': np.zeros(4)
      })])
  rows = [call.args for call in log.write.call_args_list]
  assert [(step, row['examples_per_second'], row['loss'])
          for step, _, row in rows] == [(2, 2.0, 0.5), (4, 2.0, 2.5)]
  assert progress.update.call_args.args == (4,)
  assert progress.note.call_args.args == ('loss 2.5000 … 2.5000',)


def test_a_member_that_cannot_be_saved_ends_alone(tmp_path):
  full = errors.UserError('no space left')
  def member():
    return population._Member(
        mock.MagicMock(), tmp_path, None, checkpointer=mock.Mock(
            evaluate_and_save=mock.Mock(side_effect=full),
            stop_message=mock.Mock(side_effect=full)))
  saving, stopping, fine = member(), member(), member()
  assert saving.evaluate_and_save(3, {}) == 'no space left'
  assert saving.outcome is full and saving.failed
  assert stopping.stop_message(3) == f'{tmp_path}: no space left'
  assert stopping.outcome is full
  fine.checkpointer = mock.Mock(
      stop_message=lambda step: f'before {step}', metrics={'f1': 1.0},
      evaluate_and_save=lambda step, state: f'after {step}',
      is_complete=lambda step: step == 4)
  assert fine.stop_message(3) == 'before 3'
  assert fine.evaluate_and_save(3, {}) == 'after 3' and fine.outcome is None
  assert fine.evaluate_and_save(4, {}) == 'after 4'
  assert fine.outcome == {'f1': 1.0}
  assert saving.begin(3, None, None, None) is jax.device_get(
      saving.trainer.state)
  assert saving.trainer.batches.skip.call_args.args == (3,)


@pytest.mark.parametrize('count', [1, 2, 8])
def test_devices_and_members_need_not_divide(count):
  program = population.vectorize_step(
      lambda state, rates, batch: (
          state + rates * batch.sum(), {'count': batch.shape[0] + 0 * state}),
      members=3, devices=jax.devices()[:count])
  batches = [np.ones(n, np.float32) for n in (2, 5, 3)]
  rates = [np.float32(r) for r in (1, 10, 100)]
  states, values = program.step(
      program.place([np.float32(0)] * 3), program.place(rates),
      program.place(batches))
  assert program.take(states) == [2, 50, 300]
  assert [v['count'] for v in program.take(values)] == [5, 5, 5]
  assert len(states.sharding.device_set) == min(count, 3)


def dispatched(monkeypatch, directory: pathlib.Path, most: int, buckets=()
               ) -> tuple[list[int], list[pathlib.Path]]:
  """Trains a population; returns the updates of its dispatches, and runs."""
  configs = members(
      data={'eval': '', 'packing': False if buckets else 'rows',
            'buckets': buckets},
      model={**tiny.FIELDS['model'], 'dropout': 0.1}, train={
          'num_steps': 11, 'checkpoint_every_steps': 7,
          'updates_per_dispatch': most})
  runs, counts = [directory / str(i) for i in range(len(configs))], []
  dispatch = population._PopulationProgram.dispatch

  def counting(self, step, states):
    result = dispatch(self, step, states)
    counts.append(result[-1])
    return result

  with monkeypatch.context() as patch:
    patch.setattr(population._PopulationProgram, 'dispatch', counting)
    population.train_members(configs, runs)
  return counts, runs


@pytest.mark.slow
@pytest.mark.parametrize('buckets', [(), (40,)])
def test_a_population_makes_several_updates_a_dispatch(
    tmp_path, monkeypatch, buckets):
  counts, several = dispatched(monkeypatch, tmp_path / 'several', 3, buckets)
  assert sum(counts) == 11 and 1 < max(counts) <= 3
  # A checkpoint and the end are never crossed.
  assert {7, 11} <= {*np.cumsum(counts).tolist()}
  ones, single = dispatched(monkeypatch, tmp_path / 'single', 1, buckets)
  assert ones == [1] * 11
  for one, other in zip(several, single, strict=True):
    assert_same_values(one, other)
    assert (runs_lib.state_of(one, 7)['position']
            == runs_lib.state_of(other, 7)['position'])


@pytest.mark.slow
def test_updates_of_a_dispatch_equal_single_ones_bit_for_bit(tmp_path):
  """XLA optimises here as for users: see tests/conftest.py."""
  config = sweeps.write_config(tmp_path / 'two.py', """
def sweep():
  yield {'optim.learning_rate': 1e-2}
  yield {'optim.learning_rate': 1e-3}
""")
  for most in (1, 3):
    subprocess.run(
        [sys.executable, '-m', 'experiments.sweep', '--engine=population',
         f'--config={config}', f'--workdir={tmp_path / str(most)}',
         '--seeds=1', f'--config.train.updates_per_dispatch={most}',
         '--config.train.num_steps=11', '--config.model.dropout=0.1',
         '--config.train.checkpoint_every_steps=7',
         '--config.data.packing=rows', '--config.train.log_every_steps=1'],
        check=True, cwd=commands.ROOT, capture_output=True,
        env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'})
  trials = sorted((tmp_path / '3' / 'trials').iterdir())
  assert len(trials) == 2
  for trial in trials:
    other = tmp_path / '1' / 'trials' / trial.name
    assert len(runs_lib.rows_of(trial)) == 12  # with the evaluation
    for step in (7, 11):
      assert_equal_state(trial, other, step)


@pytest.mark.slow
def test_a_member_of_several_updates_a_dispatch_is_the_run_trained_alone(
    tmp_path, monkeypatch):
  _, runs = dispatched(monkeypatch, tmp_path, 4)
  for i, run in enumerate(runs):
    train.train(RunDirectory(run).read_config(), tmp_path / f'alone-{i}')
    assert_same_values(run, tmp_path / f'alone-{i}')


@pytest.mark.slow
def test_a_killed_population_resumes_bit_for_bit(tmp_path, monkeypatch):
  configs = members(train={'num_steps': 4, 'checkpoint_every_steps': 2},
                    data={})
  runs = {name: [tmp_path / name / str(i) for i in range(2)]
          for name in ('whole', 'killed')}
  population.train_members(configs, runs['whole'])
  for death in (2, 4):  # the other member lacks this checkpoint
    kill_after_save(monkeypatch, configs, runs['killed'], '0', death)
  population.train_members(configs, runs['killed'])
  for whole, killed in zip(*runs.values(), strict=True):
    assert_equal_state(killed, whole, 4)


def diverging_and_good(num_steps: int) -> list[config_lib.Config]:
  """Returns configs of a run that fails at step 3 and of one that does not."""
  return [tiny.config(
      seed=seed, optim={'learning_rate': rate, 'clip_norm': 0.0,
                        'warmup_fraction': 0.9},
      data={'eval': ''}, train={'num_steps': num_steps, 'max_skipped': 0,
                                'checkpoint_every_steps': 2})
          for seed, rate in ((1, 3e37), (2, 1e-2))]


@pytest.mark.slow
def test_a_failed_member_does_not_hold_back_a_population_that_is_killed(
    tmp_path, monkeypatch, capsys):
  configs = diverging_and_good(10)
  whole, runs = ([tmp_path / name / run for run in ('bad', 'good')]
                 for name in ('whole', 'killed'))
  expected = population.train_members(configs, whole)
  assert isinstance(expected[0], errors.UserError) and expected[1] == {}
  kill_after_save(monkeypatch, configs, runs, 'good', 6)
  record = files.read_object(runs[0] / 'failure.json')
  assert record['error'] == str(expected[0])
  for start, death in ((6, 8), (8, 10)):
    capsys.readouterr()
    kill_after_save(monkeypatch, configs, runs, 'good', death)
    said = capsys.readouterr().err
    assert f'1 run as one program, from step {start}' in said
    assert f'bad: failed at step {record["step"]}; the others go on' in said
    for run in runs:
      store = manager.Checkpoints(run / 'checkpoints', read_only=True)
      assert not any(map(store.damage, store.steps))
  capsys.readouterr()
  bad, good = population.train_members(configs, runs)
  # All others are complete, so the failed member tries again and fails again.
  said = capsys.readouterr().err
  assert 'resuming from step 2 of 10' in said
  assert 'gold spans' in said  # a note of the trainer
  assert str(bad) == str(expected[0]) and good == {}
  assert_equal_state(runs[1], whole[1], 10)


@pytest.mark.slow
def test_a_first_checkpoint_is_used_though_another_member_failed_before_its(
    tmp_path, monkeypatch, capsys):
  configs = diverging_and_good(6)
  configs[0] = dataclasses.replace(configs[0], optim=dataclasses.replace(
      configs[0].optim, warmup_fraction=0.0))
  configs[1] = dataclasses.replace(configs[1], optim=dataclasses.replace(
      configs[1].optim, warmup_fraction=0.0))
  runs = [tmp_path / 'bad', tmp_path / 'good']
  kill_after_save(monkeypatch, configs, runs, 'good', 2)
  assert (runs[0] / 'failure.json').is_file()
  assert not [*(runs[0] / 'checkpoints').iterdir()]
  population.train_members(configs, runs)
  assert '1 run as one program, from step 2' in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_member_that_is_trained_alone_tries_again(tmp_path):
  configs = diverging_and_good(4)
  runs = [tmp_path / 'bad', tmp_path / 'good']
  population.train_members(configs, runs)
  with pytest.raises(errors.UserError, match='not finite'):
    train.train(configs[0], runs[0])
  assert not (runs[0] / 'failure.json').exists()


@pytest.mark.slow
def test_a_full_disk_is_not_recorded_as_a_failure(tmp_path, monkeypatch):
  configs = diverging_and_good(4)[1:]
  write = metrics_log.MetricsLog.write

  def full(self, step, split, values):
    if step == 3:
      raise errors.UserError('No space left on device')
    write(self, step, split, values)
  with monkeypatch.context() as patch:
    patch.setattr(metrics_log.MetricsLog, 'write', full)
    outcome, = population.train_members(configs, [tmp_path / 'run'])
  assert 'No space' in str(outcome)
  assert not (tmp_path / 'run' / 'failure.json').exists()
  assert population.train_members(configs, [tmp_path / 'run']) == [{}]


@pytest.mark.slow
def test_a_member_with_damaged_checkpoints_does_not_hold_back_the_others(
    tmp_path, monkeypatch, capsys):
  configs = members(train={'num_steps': 8, 'checkpoint_every_steps': 2},
                    data={'eval': '', 'buckets': (48,)})
  whole, runs = ([tmp_path / name / str(i) for i in range(2)]
                 for name in ('whole', 'killed'))
  population.train_members(configs, whole)
  kill_after_save(monkeypatch, configs, runs, '1', 6)
  for step in (4, 6):
    path = next((runs[0] / 'checkpoints' / str(step) / 'params/d').iterdir())
    path.write_bytes(path.read_bytes()[:-1])
  population.train_members(configs, runs)
  said = capsys.readouterr().err
  assert '1 run as one program, from step 6' in said
  assert '1 run as one program, from step 0' in said
  for run, expected in zip(runs, whole, strict=True):
    assert_same_values(run, expected)
    store = manager.Checkpoints(run / 'checkpoints', read_only=True)
    assert store.steps == [6, 8] and not any(map(store.damage, store.steps))


class Store:
  def __init__(self, steps):
    self.steps = steps


@pytest.mark.parametrize(('stores', 'expected'), [
    ([[2, 4], [2, 4]], [(4, [0, 1])]),
    ([[2, 4], [4, 6]], [(4, [0, 1])]),  # killed between two saves
    ([[2], []], [(0, [0, 1])]),  # killed between the first saves
    ([[], []], [(0, [0, 1])]),
    ([[1, 4, 6], [6, 8], [6, 8]], [(6, [0, 1, 2])]),
    ([[2, 4], [6, 8], [6, 8]], [(8, [1, 2]), (4, [0])]),
    ([[2, 4], [8, 10], [6, 8], None], [(8, [1, 2, 3]), (4, [0])]),
    ([None, [2]], [(2, [0, 1])]),
    ([None, None], [])])
def test_members_go_on_from_a_common_step_of_their_newest_two(
    stores, expected):
  """None stands for the store of a member that has failed."""
  group = [population._Member(None, None, Store(steps or []),
                              outcome=None if steps is not None
                              else errors.UserError('')) for steps in stores]
  assert [(start, [group.index(m) for m in chosen]) for start, chosen
          in population._group_by_start(group)] == expected


def test_a_member_whose_loss_is_not_finite_ends_alone(tmp_path):
  configs = [tiny.config(seed=seed, optim={
      'learning_rate': rate, 'clip_norm': 0.0, 'warmup_fraction': 0.0},
      train={'num_steps': 3, 'max_skipped': 0})
             for seed, rate in ((1, 1e30), (2, 1e-2))]
  bad, good = population.train_members(
      configs, [tmp_path / 'bad', tmp_path / 'good'])
  assert isinstance(bad, errors.UserError) and 'not finite' in str(bad)
  assert good['f1'] >= 0
  train.train(configs[1], tmp_path / 'alone')
  assert_same_run(tmp_path / 'good', tmp_path / 'alone')
  assert not list((tmp_path / 'bad').glob('eval/*'))
  predict.load(tmp_path / 'good')


def test_what_only_single_runs_do_is_refused(tmp_path):
  configs = members(precision={'deterministic': True})
  runs = [tmp_path / str(i) for i in range(len(configs))]
  with pytest.raises(errors.UserError, match='choose --engine=local'):
    population.train_members(configs, runs)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('change', [
    {'model': {'head': 'biaffine'}}, {'train': {'batch_size': 16}},
    {'parallel': {'mode': 'mesh'}}])
def test_configs_that_are_not_one_population_are_refused(tmp_path, change):
  one = tiny.config(**{'parallel': change.get('parallel', {})})
  other = tiny.config(**{'seed': 9, **change})
  with pytest.raises(errors.UserError, match='alone'):
    population.train_members([one, other], [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('members', 'devices', 'fits'), [
    (1, 1, True), (2, 1, True), (3, 1, False), (4, 2, True), (5, 2, False),
    (2, 8, True)])
def test_more_members_than_memory_are_refused(members, devices, fits):
  # A member has 7 floats: 2 parameters, 2 gradients, 2 moments, 1 step.
  state = step_lib.TrainState(
      step=np.float32(0), params=np.zeros(2, np.float32),
      opt_state=np.zeros(2, np.float32), key_data=np.zeros(0, np.uint32))
  device = types.SimpleNamespace(
      memory_stats=lambda: {'bytes_limit': 2 * 7 * 4})
  if fits:
    population.check_memory(state, members, [device] * devices)
  else:
    with pytest.raises(errors.UserError, match='3 of one take at least'):
      population.check_memory(state, members, [device] * devices)


# The engine.


def plan(workdir: pathlib.Path, *variants: dict, seeds: int = 2,
         **changes) -> list[plan_lib.Trial]:
  return plan_lib.plan_trials(tiny.config(**changes), variants, seeds, workdir)


def names(groups: list[list[plan_lib.Trial]]) -> list[list[str]]:
  return [[t.name for t in group] for group in groups]


def test_trials_are_grouped_by_shape(tmp_path):
  trials = plan(
      tmp_path, {}, {'optim.learning_rate': 0.5}, {'optim.weight_decay': 0.0},
      {'model.head': 'biaffine'}, {'objective': 'span_softmax'},
      {'optim.schedule': 'bert'}, {'decode.n_best': 2})
  rates = ['default', 'optim.learning_rate-0.5', 'optim.weight_decay-0.0']
  assert names(population_lib.groups(trials)) == [
      [f'{v}.seed-{s}' for s in (3, 4) for v in rates],
      *([f'{v}.seed-{s}' for s in (3, 4)] for v in (
          'model.head-biaffine', 'objective-span_softmax',
          'optim.schedule-bert'))]


def finish(trial: plan_lib.Trial, population_names: list[str] | None) -> None:
  record = {} if population_names is None else {'population': population_names}
  files.write_json(trial.run / 'run.json', record)
  files.write_json(trial.metrics, {})


def test_a_population_that_was_killed_keeps_its_members(tmp_path):
  trials = plan(tmp_path, {}, seeds=3)
  together = [t.name for t in trials]
  finish(trials[0], together)  # the process was killed in the last evaluations
  assert names(population_lib.groups(trials)) == [together]


def test_seeds_that_are_added_are_a_population_of_their_own(tmp_path):
  trials = plan(tmp_path, {}, seeds=5)
  for trial in trials[:2]:
    finish(trial, [t.name for t in trials[:2]])
  finish(trials[2], None)
  assert names(population_lib.groups(trials)) == [
      [t.name for t in trials[3:]]]


def test_a_trial_that_failed_tries_again_alone(tmp_path):
  trials = plan(tmp_path, {}, seeds=3)
  for trial in trials[:2]:
    finish(trial, [t.name for t in trials])
  files.write_text(trials[2].log, 'sweep: …\nerror: not finite\n')
  assert names(population_lib.groups(trials)) == [[trials[2].name]]


def test_a_population_that_crashes_does_not_hold_back_the_next(
    tmp_path, monkeypatch):
  def crash(configs, runs):
    raise MemoryError('too large')

  def finish_alone(config, run):
    finish(trials[2], None)
    return {}
  trials = plan(tmp_path, {'objective': 'cross_entropy'}, seeds=2)
  trials += plan(tmp_path, {'objective': 'span_softmax'}, seeds=1)
  monkeypatch.setattr(population, 'train_members', crash)
  monkeypatch.setattr(train, 'train', finish_alone)
  assert population_lib.run(trials, None, scheduler.Setup()) == dict.fromkeys(
      [t.name for t in trials[:2]], 'MemoryError: too large')
  assert [t.metrics.is_file() for t in trials] == [False, False, True]
  assert names(population_lib.groups(trials)) == [
      [t.name] for t in trials[:2]]


def test_a_population_that_is_refused_stays_one(tmp_path, monkeypatch):
  def refuse(configs, runs):
    raise errors.UserError('too large')

  trials = plan(tmp_path, {}, seeds=2)
  monkeypatch.setattr(population, 'train_members', refuse)
  for _ in range(2):
    assert population_lib.run(trials, None, scheduler.Setup()
                              ) == dict.fromkeys(
                                  [t.name for t in trials], 'too large')


def test_a_signal_in_the_last_save_of_a_run_ends_the_sweep(
    tmp_path, monkeypatch, capsys):
  def train_one(config, run):
    began.append(run)
    with signals.StopRequests():
      signal.raise_signal(signal.SIGTERM)
    return {}

  began = []
  monkeypatch.setattr(train, 'train', train_one)
  trials = plan(tmp_path, {'model.head': 'mlp'}, {'model.head': 'shared'},
                seeds=1)
  with (signals.ExitRequests() as requests,
        pytest.raises(signals.Stopped, match='143')):
    population_lib.run(
        trials, None, scheduler.Setup(check_signals=requests.check))
  assert began == [trials[0].run]
  assert f'{trials[0].name}: alone, not in a' in capsys.readouterr().err


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> pathlib.Path:
  """Writes a config of two steps with a sweep of rates, search and head."""
  return sweeps.write_config(
      tmp_path_factory.mktemp('configs') / 'tiny_population.py', '''
def sweep():
  yield {'optim.learning_rate': 1e-2}
  yield {'optim.learning_rate': 1e-3}
  yield {'optim.learning_rate': 1e-2, 'decode.search': 'argmax'}
  yield {'optim.learning_rate': 1e-2, 'model.head': 'shared'}
''')


@pytest.mark.slow
def test_trials_score_as_they_do_one_by_one(config, tmp_path):
  result = commands.command(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/population',
      '--seeds=1', '--engine=population')
  assert result.code == 0, result
  trials = plan(tmp_path / 'local', *(
      {'optim.learning_rate': 1e-2, **more} for more in (
          {}, {'optim.learning_rate': 1e-3}, {'decode.search': 'argmax'},
          {'model.head': 'shared'})),
      seeds=1, train={'num_steps': 2}, data={'max_length': 48},
      parallel={'num_devices': 1})
  for trial in trials:  # the local engine does this in processes
    train.train(trial.config, trial.run)
    metrics = (tmp_path / 'population'
               / trial.metrics.relative_to(trial.workdir))
    assert files.read_object(metrics) == pytest.approx(
        files.read_object(trial.metrics), rel=1e-4)
  shared = next((tmp_path / 'population' / 'trials').glob('*argmax*'))
  assert not (shared / 'metrics.jsonl').exists()  # it only evaluates


@pytest.mark.parametrize(('flag', 'message'), [
    ('--workers=2', '--engine=population has one'),
    ('--config.precision.deterministic=True', 'choose --engine=local')])
def test_a_population_refuses_what_it_has_not(config, tmp_path, flag, message):
  assert message in commands.refusal(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/x', flag,
      '--engine=population')
  assert not (tmp_path / 'x').exists()


def test_a_failed_trial_is_reported_and_the_others_are_complete(tmp_path):
  trials = plan(tmp_path, {}, {'optim.learning_rate': 1e30}, seeds=1,
                optim={'clip_norm': 0.0, 'warmup_fraction': 0.0},
                train={'num_steps': 2, 'max_skipped': 0},
                parallel={'num_devices': 1})
  failed = engines.ENGINES['population'](
      trials, None, scheduler.Setup())
  assert list(failed) == [trials[1].name] and trials[0].metrics.is_file()
  last = trials[1].log.read_text().splitlines()[-1]
  assert last == f'error: {failed[trials[1].name]}' and 'not finite' in last
  assert json.loads((trials[0].run / 'run.json').read_text())[
      'population'] == [t.name for t in trials]
