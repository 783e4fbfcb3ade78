"""The watchdog ends a run whose step hangs, and no run that is busy."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from qa_jax.evaluation import evaluator
from qa_jax.runtime import watchdog
from qa_jax.training import train
from qa_jax.training import trainer
from tests.chaos import processes
from tests.common import runs
from tests.common import tiny

FIELDS = {'train': {'num_steps': 4, 'checkpoint_every_steps': 2,
                    'step_timeout_seconds': 2.0}}


def hang(workdir):
  """Trains a run whose step 3 never ends on one of two devices."""
  make = trainer.build_loss

  def stuck(*args):
    inner = make(*args)

    def loss(params, batch, key):
      out = inner(params, batch, key)
      wait = lambda step, row: time.sleep(
          10**6 * ((step == 3).any() and (row == 0).any())) or step
      step = jax.pure_callback(
          wait, jax.ShapeDtypeStruct(batch['step'].shape, jnp.int32),
          batch['step'], batch['row'])
      return {**out, 'loss': out['loss'] + 0.0 * step}
    return loss
  trainer.build_loss = stuck
  train.train(tiny.config(**FIELDS), workdir)


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run_which_then_resumes(tmp_path):
  with processes.Child(tmp_path / 'log', hang, tmp_path / 'run',
                       devices=2) as child:
    assert child.wait() == watchdog.CODE
    last = child.said.splitlines()[-1]
  assert last.startswith(f'error: {tmp_path}/run: no step has ended for 2 s')
  assert 'Traceback' not in child.said
  # As its message says: with another limit, from the checkpoint before.
  config = tiny.config(train={**FIELDS['train'], 'step_timeout_seconds': 0.0})
  train.train(config, tmp_path / 'run')
  assert [row['step'] for row in runs.rows_of(tmp_path / 'run')
          if row['split'] == 'train'] == [1, 2, 3, 4]


def slow(workdir):
  """Trains with compilation and evaluation that exceed the limit of a step.

  Each takes an hour by the clock of the watchdog, and long enough in real time
  for the watchdog to look at it. The limit is one that no slow machine reaches.
  """
  hours = []
  clock = types.SimpleNamespace(
      monotonic=lambda: time.monotonic() + 3600 * len(hours))
  watchdog.time = clock
  compiling = train.SingleRun.wait_for_program
  evaluating = evaluator.Evaluator.evaluate

  def late(function):
    def call(*args, **kwargs):
      hours.append(1)
      time.sleep(1.5)
      return function(*args, **kwargs)
    return call
  train.SingleRun.wait_for_program = late(compiling)
  evaluator.Evaluator.evaluate = late(evaluating)
  train.train(tiny.config(
      data={'buckets': (44,)},  # so that steps wait for a program
      train={**FIELDS['train'], 'step_timeout_seconds': 600.0}), workdir)
  assert len(hours) >= 2


@pytest.mark.slow
def test_compiling_and_evaluating_may_take_longer(tmp_path):
  with processes.Child(tmp_path / 'log', slow, tmp_path / 'run',
                       devices=2) as child:
    assert child.wait() == 0, child.said


@pytest.mark.parametrize(('seconds', 'ends'), [(9.0, False), (11.0, True)])
def test_only_a_step_that_takes_longer_than_the_limit_ends(
    monkeypatch, capsys, seconds, ends):
  """Looks twice at a step that has taken `seconds` of its 10."""
  now = iter([0.0, seconds, seconds])
  codes, waits, looks = [], [], iter([False, False, True])
  monkeypatch.setattr(watchdog, 'time', types.SimpleNamespace(
      monotonic=lambda: next(now)))
  monkeypatch.setattr(watchdog.os, '_exit', codes.append)
  dog = watchdog.Watchdog(10.0, 'run')
  dog._closed = types.SimpleNamespace(
      wait=lambda seconds: waits.append(seconds) or next(looks))
  with dog.waiting():
    dog._run()
  assert codes == [124] * 2 * ends and waits == [1.0] * 3
  assert capsys.readouterr().err.startswith('error: run: no step') == ends
