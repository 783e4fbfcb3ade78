"""A signal makes a run save at the next step, end, and resume bit for bit."""

import contextlib
import os
import pathlib
import signal
from unittest import mock

import numpy as np
import pytest

from qa_jax.evaluation import evaluator
from qa_jax.runtime import signals
from qa_jax.training import population
from qa_jax.training import train
from tests.chaos import processes
from tests.common import dispatch
from tests.common import runs as runs_lib
from tests.common import tiny

CONFIG = tiny.config(train={'num_steps': 5, 'checkpoint_every_steps': 4,
                            'eval_every_steps': 3})


@contextlib.contextmanager
def interrupt(number, *, step=None, evaluation=None):
  """Makes this process send itself a signal at a step or in an evaluation."""
  run, count = evaluator.Evaluator.evaluate, []
  fault = lambda: os.kill(os.getpid(), number)

  def evaluating(self, *args, **kwargs):
    count.append(1)
    if len(count) == evaluation:
      fault()
    return run(self, *args, **kwargs)

  with (dispatch.fault_at(step, fault),
        mock.patch.object(evaluator.Evaluator, 'evaluate', evaluating)):
    yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  train.train(CONFIG, workdir)
  return workdir


def assert_same(stopped: pathlib.Path, expected: pathlib.Path) -> None:
  assert runs_lib.rows_of(stopped) == runs_lib.rows_of(expected)
  states = [runs_lib.state_of(run, 5) for run in (stopped, expected)]
  for name, value in states[1].items():
    np.testing.assert_array_equal(states[0][name], value, err_msg=name)


@pytest.mark.parametrize(('number', 'code', 'when', 'saved'), [
    (signal.SIGTERM, 143, {'step': 2}, [2]),
    pytest.param(signal.SIGINT, 130, {'evaluation': 1}, [3],  # in the middle
                 marks=pytest.mark.slow),
    (signal.SIGUSR2, 140, {'evaluation': 2}, [3, 4, 5])])
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path, capsys, whole, number, code, when, saved):
  workdir = tmp_path / 'run'
  before = signal.getsignal(number)
  with interrupt(number, **when), pytest.raises(signals.Stopped) as caught:
    train.train(CONFIG, workdir)
  assert caught.value.code == code
  assert signal.getsignal(number) == before
  expected = f'by {signal.Signals(number).name} before step {saved[-1]}: saved'
  assert expected in capsys.readouterr().err
  steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
  assert sorted(steps) == saved and not (workdir / 'lock').exists()
  metrics = train.train(CONFIG, workdir)
  assert metrics == train.train(CONFIG, whole)
  assert_same(workdir, whole)


@pytest.mark.slow
def test_a_stopped_population_resumes_bit_for_bit(tmp_path):
  config = tiny.config(seed=4, train={
      'num_steps': 5, 'checkpoint_every_steps': 4, 'eval_every_steps': 3})
  runs = {name: [tmp_path / name / str(i) for i in range(2)]
          for name in ('whole', 'stopped')}
  population.train_members([CONFIG, config], runs['whole'])
  with (interrupt(signal.SIGTERM, evaluation=2),  # that of the second member
        pytest.raises(signals.Stopped, match='143')):
    population.train_members([CONFIG, config], runs['stopped'])
  population.train_members([CONFIG, config], runs['stopped'])
  for a, b in zip(*runs.values(), strict=True):
    assert_same(b, a)


def test_other_signals_change_nothing_but_a_second_interrupt():
  with signals.StopRequests() as requests:
    os.kill(os.getpid(), signal.SIGUSR2)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
      os.kill(os.getpid(), number)
    assert requests.stopped().code == 140
    with pytest.raises(signals.Interrupted), requests.interrupting():
      raise AssertionError
  with pytest.raises(KeyboardInterrupt), signals.StopRequests():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_one_of_several_processes_stops_for_the_signal_they_agreed_on():
  before = signal.getsignal(signal.SIGTERM)
  with signals.StopRequests(alone=False) as requests, requests.interrupting():
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.noted == signal.SIGTERM and requests.signal is None
    requests.hear(0)
    assert requests.signal is None
    for number in (signal.SIGINT, signal.SIGTERM):
      requests.hear(number)
      assert requests.signal is signal.SIGINT  # the first
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_after_the_work_that_it_may_interrupt_is_noted():
  with signals.StopRequests() as requests:
    with requests.interrupting():
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.signal == signal.SIGTERM


class Lost:
  """Gets a signal where Python ignores exceptions."""

  def __del__(self):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_signal_that_was_lost_ends_a_sweep_at_the_next_check(capfd):
  before = [signal.getsignal(number) for number in signals.SIGNALS]
  with signals.ExitRequests() as requests:
    requests.check()
    with pytest.raises(signals.Stopped, match='130'):
      signal.raise_signal(signal.SIGINT)
  for ignores in (Lost, raise_in_a_run):
    with signals.ExitRequests() as requests:
      ignores()
      for _ in range(2):
        with pytest.raises(signals.Stopped, match='143'):
          requests.check()
  assert before == [signal.getsignal(number) for number in signals.SIGNALS]
  said = capfd.readouterr().err
  assert said.count('stopped by SIGTERM; the same command goes on\n') == 2
  assert said.count('stopped by SIGINT; the same command goes on\n') == 1


def raise_in_a_run() -> None:
  with signals.StopRequests():  # the run is complete and does not stop
    signal.raise_signal(signal.SIGTERM)


FOR_EVER = {'data': {'eval': ''}, 'parallel': {'num_devices': 1},
            'train': {'num_steps': 10**6, 'checkpoint_every_steps': 10**6}}


@pytest.mark.slow
def test_a_process_that_is_terminated_saves_and_ends_with_143(tmp_path):
  workdir = tmp_path / 'run'
  log = workdir / 'metrics.jsonl'
  with processes.Child(tmp_path / 'log', processes.train_run, workdir,
                       FOR_EVER) as child:
    processes.wait_for(lambda: log.is_file() and log.stat().st_size, child)
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    last = child.said.strip().split('\n')[-1]
  assert 'stopped by SIGTERM before step' in last
  assert 'Traceback' not in child.said
  saved, = (workdir / 'checkpoints').iterdir()
  assert f'before step {saved.name}: saved' in last
