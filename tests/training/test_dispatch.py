"""Programs of the train step: compiled once, several updates in one."""

import signal
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import compilation
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import signals
from qa_jax.runtime import watchdog
from qa_jax.training import metrics_log
from qa_jax.training import parallel
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import compiled
from tests.common import runs
from tests.common import tiny


@pytest.mark.parametrize('mode', ['pmap', 'mesh'])
def test_every_shape_is_compiled_once_and_before_the_first_step(mode):
  trainer = trainer_lib.build_trainer(tiny.config(
      data={'eval': '', 'buckets': (48, 56)}, parallel={'mode': mode},
      train={'num_steps': 100}))
  state = jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  lengths = {length for length, _ in trainer.batches._plan}
  assert len(lengths) > 1
  with compiled.listed() as made:
    with trainer.start_compiling(state) as programs:
      programs.wait_for_all()
    assert len(made) == len(lengths)
    for _ in range(trainer.batches.steps_per_epoch):
      state, _ = trainer.parallel.step(
          state, trainer.place(*trainer.batches.next_rows()))
    assert len(made) == len(lengths)


def dispatched(monkeypatch, workdir, profile=range(0), **changes) -> list[int]:
  """Trains, and returns the number of updates of each dispatch."""
  counts, dispatch = [], train.SingleRun.dispatch

  def counting(self, step, state):
    state, values, count = dispatch(self, step, state)
    counts.append(count)
    return state, values, count

  with monkeypatch.context() as patch:
    patch.setattr(train.SingleRun, 'dispatch', counting)
    train.train(several(**changes), workdir, profile_steps=profile)
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


def test_a_profile_begins_and_ends_between_dispatches(tmp_path, monkeypatch):
  counts = dispatched(monkeypatch, tmp_path, profile=range(1, 2), mode='jit')
  assert counts[:2] == [1, 1] and max(counts) == 3


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
  trainer = trainer_lib.build_trainer(several())
  state = jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  with compiled.listed() as made:
    with trainer.start_compiling(state) as programs:
      programs.wait_for_all()
    assert len(made) == 1
    for most in (3, 1, 2):
      length, rows = trainer.batches.next_alike(most)
      state, _ = trainer.parallel.step(state, trainer.place(length, *rows))
    assert len(made) == 1
  assert int(state.step) == 3 + 1 + 1  # an epoch has five batches


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


@pytest.mark.parametrize(('platform', 'updates', 'unread'), [
    ('cpu', 1, 2), ('cpu', 4, 2), ('gpu', 1, 8), ('gpu', 2, 4), ('gpu', 8, 2)])
def test_the_loop_reads_as_soon_as_the_platform_has_enough_to_do(
    monkeypatch, platform, updates, unread):
  """XLA on a CPU aborts with many updates in flight."""
  done = []
  program = mock.Mock(
      most_at_once=updates, read=lambda some: done.extend(s for s, _ in some),
      **{f'{name}.return_value': False for name in (
          'is_compiling', 'is_complete', 'has_failed')})
  program.is_due.side_effect = lambda step: step == 16 * updates
  seen = []

  def dispatch(step, state):
    seen.append(step // updates - len(done))
    return state + updates, {}, updates

  program.dispatch.side_effect = dispatch
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert train.run_loop(
      program, 0, start=0, num_steps=16 * updates,
      requests=mock.Mock(signal=None), dog=watchdog.Watchdog(0, '')
      ) == 16 * updates
  assert seen == [*range(unread), *(unread,) * (16 - unread)]
  # Before the runs are saved, all of it is read; the first step is step 1.
  assert [k for steps in done for k in steps] == [*range(1, 16 * updates + 1)]
