"""Two processes over loopback train as one process does, until one is lost."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest

from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.runtime import stderr_filter
from qa_jax.training import train
from tests.common import commands
from tests.common import refusals
from tests.common import runs as runs_lib
from tests.common import together

pytestmark = pytest.mark.timeout(900)
SLOW = pytest.mark.slow  # starts several processes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def spawn(*command: str) -> subprocess.Popen:
  """Starts a Python process with two virtual CPU devices."""
  return subprocess.Popen(
      [sys.executable, *command], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, cwd=ROOT, env={
          **os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2',
          'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'})


@pytest.fixture(scope='module')
def pair(tmp_path_factory) -> types.SimpleNamespace:
  """Runs tests.common.together in two processes and returns their results.

  They are the directory `workdir` and, by process, the JSON `results`, the
  streams `out` and `err`, and the exit codes `codes`.
  """
  workdir, address = tmp_path_factory.mktemp('pair'), f'localhost:{free_port()}'
  both = [spawn('-m', 'tests.common.together', f'--output={workdir}',
                f'--coordinator={address}', '--num_processes=2',
                f'--process_index={i}') for i in range(2)]
  try:
    outputs = [process.communicate(timeout=800) for process in both]
  finally:
    for process in both:
      process.kill()
      process.communicate()
  files = [workdir / f'{i}.json' for i in range(2)]
  assert all(f.is_file() for f in files), outputs
  return types.SimpleNamespace(
      workdir=workdir, results=[json.loads(f.read_text()) for f in files],
      out=[out for out, _ in outputs], err=[err for _, err in outputs],
      codes=[process.returncode for process in both])


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> pathlib.Path:
  """Trains the runs of `pair` in this process, and returns their directory."""
  workdir = tmp_path_factory.mktemp('alone')
  for name, config in together.RUNS.items():
    train.train(config, workdir / name)
  result = commands.command(
      'evaluate', f'--workdir={workdir / "whole"}',
      f'--output={workdir / "scored"}',
      f'--data={together.RUNS["whole"].data.eval}')
  assert result.code == 0, result
  return workdir


def assert_near(several: pathlib.Path, expected: pathlib.Path) -> None:
  rows = [runs_lib.rows_of(run) for run in (several, expected)]
  assert len(rows[0]) == len(rows[1]) > 2
  for a, b in zip(*rows, strict=True):
    assert a.pop('split') == b.pop('split')
    assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@SLOW
@pytest.mark.parametrize('name', together.RUNS)
def test_two_processes_are_one(pair, alone, name):
  assert_near(pair.workdir / name, alone / name)
  last = together.RUNS[name].train.num_steps
  states = [runs_lib.state_of(run / name, last)
            for run in (pair.workdir, alone)]
  assert states[0].pop('position') == states[1].pop('position')
  for key, value in states[1].items():
    # A shift of all positions, which no softmax over them sees: of its
    # gradient, rounding alone, Adam makes updates of full size.
    if "['mlp']['layer_norm']['bias']" in key:
      continue
    np.testing.assert_allclose(states[0][key], value, rtol=1e-4, atol=1e-5,
                               err_msg=key)


@SLOW
@pytest.mark.parametrize('name', [
    'whole/eval/*/', 'other/eval/*/', 'scored/'])
def test_every_question_is_answered_once(pair, alone, name):
  several, expected = [
      {path.name: path.read_text() for path in run.glob(f'{name}*.json*')}
      for run in (pair.workdir, alone)]
  assert json.loads(several['predictions.json']) == json.loads(
      expected['predictions.json'])
  for file in ('metrics.json', 'na_probs.json'):
    assert json.loads(several[file]) == pytest.approx(
        json.loads(expected[file]), rel=1e-4, abs=1e-4), file
  lines = [[json.loads(line) for line in files['nbest.jsonl'].splitlines()]
           for files in (several, expected)]
  assert [x['id'] for x in lines[0]] == [x['id'] for x in lines[1]]
  assert len(lines[0]) == json.loads(several['metrics.json'])['total'] == 12


@SLOW
def test_all_have_the_metrics_of_training_and_the_first_those_of_a_command(
    pair, alone):
  for name in together.RUNS:
    assert pair.results[0][name] == pair.results[1][name]
  metrics = json.loads((alone / 'scored' / 'metrics.json').read_text())
  assert pair.results[0]['scored'] == pytest.approx(metrics)
  assert pair.results[1]['scored'] == {}


@SLOW
def test_a_process_reads_the_rows_of_its_devices(pair):
  for result in pair.results:
    assert result['whole rows'] == [4]  # of batches of 8, in training and after
    assert result['other rows'] == [4, 8]  # of batches of 8 and, training, 16


@SLOW
def test_the_first_alone_speaks(pair):
  assert 'eval EM' in pair.err[0] and 'eval EM' not in pair.err[1]
  assert pair.out == ['', '']
  record = json.loads((pair.workdir / 'whole' / 'run.json').read_text())
  assert record['devices']['processes'] == 2


@SLOW
def test_the_first_process_alone_records_the_profile(pair):
  assert len([*pair.workdir.rglob('*.xplane.pb')]) == 1
  assert 'profile of 1 step in' in pair.err[0]


@SLOW
def test_all_make_the_steps_of_a_dry_run_that_the_first_has_time_for(pair):
  for result in pair.results:
    assert 'an estimate from 1 timed steps' in result['dry run']['eta']


@SLOW
def test_all_stop_before_one_step_and_resume_bit_for_bit(pair):
  assert [result['stopped'] for result in pair.results] == [143, 143]
  assert pair.results[0]['saved'] == pair.results[1]['saved']
  assert max(pair.results[0]['saved']) in (2, 3, 4)
  assert 'stopped by SIGTERM before step' in pair.err[0]
  runs = pair.workdir / 'stopped', pair.workdir / 'whole'
  rows = [runs_lib.rows_of(run) for run in runs]
  assert rows[0] == rows[1]
  states = [runs_lib.state_of(run, 5) for run in runs]
  for key, value in states[1].items():
    np.testing.assert_array_equal(states[0][key], value, err_msg=key)


@SLOW
def test_one_process_goes_on_from_what_two_saved(pair, alone, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(pair.workdir / 'whole', run)
  shutil.rmtree(run / 'checkpoints' / '5')
  train.train(together.RUNS['whole'], run)
  assert_near(run, alone / 'whole')


@SLOW
def test_a_process_that_is_lost_ends_the_other_with_one_line(pair):
  assert pair.codes[1] == -9 and pair.codes[0] not in (0, -9)
  lines = pair.err[0].split('\n')
  assert lines[-2:] == [f'error: {processes.LOST}', '']
  assert pair.err[0].count('error:') == 1
  assert not any(word in pair.err[0] for word in (
      'Traceback', 'Gloo', 'coordination', 'absl'))


@pytest.mark.parametrize('seed', range(3))
def test_notices_of_gloo_are_dropped_when_threads_mix_their_pieces(seed):
  rng = random.Random(seed)
  texts = []
  for _ in range(100):
    notices = [[
        '[Gloo] Rank ', str(rank), ' is connected to ', '3', ' peer ranks. ',
        'Expected number of connected peer ranks is : ', '3', '\n',
    ] for rank in range(2)]
    while any(notices):
      texts.append(rng.choice([n for n in notices if n]).pop(0))
    texts += 'step 5 of 7\n', '\n'
  result = subprocess.run(
      [sys.executable, '-I', '-S', stderr_filter.__file__, 'MESSAGE'],
      input=''.join(texts), capture_output=True, text=True, check=True)
  assert (result.stdout, result.stderr) == ('', 'step 5 of 7\n\n' * 100)


SIGN = 'coordination_service_agent.cc: a task is lost'
END = f'F {stderr_filter.ENDS_PROCESS}: aborting'


@pytest.mark.parametrize(('lines', 'printed'), [
    (['a', SIGN, 'b'], ['a', SIGN, 'b']),  # this process goes on
    (['a', SIGN, 'b', END, 'c'], ['a', 'MESSAGE']),
    ([END, 'b'], ['MESSAGE'])])
def test_lines_on_a_lost_process_are_replaced_if_they_end_this_one(
    lines, printed):
  result = subprocess.run(
      [sys.executable, '-I', '-S', stderr_filter.__file__, 'MESSAGE'],
      input='\n'.join([*lines, '']), capture_output=True, text=True, check=True)
  assert result.stderr.splitlines() == printed


def test_the_filter_outlives_signals_and_bytes_that_are_no_text():
  process = subprocess.Popen(
      [sys.executable, '-I', '-S', stderr_filter.__file__, 'MESSAGE'],
      stdin=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdin.write(b'before \xff\n')
  process.stdin.flush()
  assert process.stderr.readline() == 'before \ufffd\n'.encode()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
    process.send_signal(number)
  _, err = process.communicate(b'after\n', timeout=60)
  assert (process.returncode, err) == (0, b'after\n')


def test_results_stay_on_stdout_and_native_output_goes_to_stderr():
  process = spawn('-c', '''
import os
from qa_jax.runtime import processes
processes._filter_native_output()
print('result')
os.write(1, b'native\\n')
''')
  assert process.communicate(timeout=200) == ('result\n', 'native\n')


@pytest.mark.parametrize(('error', 'said'), [
    (RuntimeError('Gloo context: Connection closed'), 'distributed service'),
    (RuntimeError('of this process'), 'RuntimeError: of this process'),
    (ValueError('UNAVAILABLE'), 'ValueError: UNAVAILABLE'),
    (SystemExit(3), '')])
def test_a_failure_ends_one_of_several_processes_with_its_reason(
    monkeypatch, capfd, error, said):
  codes = []
  monkeypatch.setattr(processes.os, '_exit', codes.append)
  processes.leave_processes(error, 3)  # alone, it ends as usual
  assert not codes and capfd.readouterr().err == ''
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  processes.leave_processes(error, 3)
  err = capfd.readouterr().err
  assert codes == [3] and said in err and bool(said) == bool(err)


@pytest.mark.parametrize('fails', [False, True])
def test_joining_has_a_limit_until_it_ends(monkeypatch, fails):
  timers, update = [], jax.config.update

  def timer(*_):
    timers.append(mock.Mock())
    return timers[-1]

  def initialize(**options):
    assert set(options) == {  # the others are found out
        'initialization_timeout', 'heartbeat_timeout_seconds'}
    timers[0].start.assert_called_once()
    timers[0].cancel.assert_not_called()
    assert not jax.config.jax_enable_preemption_service
    if fails:
      raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(processes.threading, 'Timer', timer)
  monkeypatch.setattr(processes, '_filter_native_output', lambda: None)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  try:
    if fails:
      assert 'nothing here says what to join' in refusals.refusal(
          processes.join_processes, 'auto')
    else:
      processes.join_processes('auto')
  finally:
    update('jax_enable_preemption_service', True)
  timers[0].cancel.assert_called_once()


DYING = '''
import os, signal
import jax
from experiments import cli
from qa_jax.runtime import devices

def main():
  cli.join()
  mesh = devices.data_mesh()
  for i in range(10**6):
    largest = devices.max_over_processes(jax.process_index() + i, mesh)
    assert int(largest) == i + 1
    if i == 2 and jax.process_index() == 0:
      os.kill(os.getpid(), signal.SIGKILL)
cli.run(main, several=True)
'''


@SLOW
def test_a_coordinator_that_is_lost_is_told_by_the_same_line():
  address = f'localhost:{free_port()}'
  _, other = both = [
      spawn('-c', DYING, f'--coordinator={address}', '--num_processes=2',
            f'--process_index={i}') for i in range(2)]
  try:
    out, err = other.communicate(timeout=300)
  finally:
    for process in both:
      process.kill()
      process.communicate()
  assert other.returncode not in (0, -9)
  assert (out, err) == ('', f'error: {processes.LOST}\n')


@SLOW
def test_what_processes_cannot_share_is_refused_by_all(pair):
  for result in pair.results:
    same, population, mode, weights, seed, workdir = result['refused']
    assert same.startswith('data: not the same on processes 0 and 1')
    assert 'one process, not in 2' in population
    assert "mode='jit' trains on one device" in mode
    assert weights.startswith('weights: not the same on processes 0 and 1')
    assert seed.startswith('config: not the same on processes 0 and 1')
    assert workdir.startswith('the directory --workdir=')
    assert ': not the same on processes 0 and 1' in workdir


@pytest.mark.parametrize(('argv', 'message'), [
    (['--coordinator=h:1', '--num_processes=2'], '--process_index is needed'),
    (['--coordinator=h:1', '--process_index=0'], '--num_processes is needed'),
    (['--process_index=0'], 'goes with --coordinator'),
    (['--coordinator=auto', '--num_processes=2'], 'leave it out'),
    (['--coordinator=h:1', '--num_processes=2', '--process_index=2'],
     '--process_index=2 is outside 0 … 1'),
    (['--coordinator=h:1', '--num_processes=2', '--process_index=-1'],
     '--process_index=-1 is outside 0 … 1'),
    (['--coordinator=h:1', '--num_processes=0', '--process_index=0'],
     '--num_processes=0 must be at least 1'),
    (['--coordinator=localhost', '--num_processes=2', '--process_index=1'],
     'expected HOST:PORT'),
    *((['--coordinator=h:' + port, '--num_processes=2', '--process_index=1'],
       'expected HOST:PORT') for port in ('0', '65536', '99999')),
    (['--coordinator=no.such.host.invalid:1234', '--num_processes=2',
      '--process_index=1'], 'invalid:1234: '),
    (['--coordinator=a..b:1234', '--num_processes=2', '--process_index=1'],
     '--coordinator=a..b:1234: ')])
def test_bad_flags_are_one_line(argv, message):
  assert message in commands.refusal(
      'evaluate', '--data=x', '--workdir=x', *argv)


def test_a_port_that_is_taken_is_one_line():
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    assert 'in use' in refusals.refusal(
        processes.join_processes, f'localhost:{port}', 2, 0)
    processes._check_flags(f'[::1]:{port}', 2, 1)  # it is that of the first


@SLOW
def test_a_coordinator_that_does_not_answer_ends_in_time():
  began = time.monotonic()
  process = spawn('-c', f'''
from qa_jax.runtime import processes
processes.CONNECT_SECONDS = 1.0
processes.join_processes('localhost:{free_port()}', 2, 1)
''')
  out, err = process.communicate(timeout=200)
  assert process.returncode == 1 and not out
  assert err.startswith('error: not all processes came to localhost:')
  assert 'look whether one ended with an error' in err
  assert err.count('\n') == 1 and time.monotonic() - began < 100


def device(process: int, number: int) -> types.SimpleNamespace:
  return types.SimpleNamespace(process_index=process, id=number)


def test_devices_are_taken_evenly_from_processes():
  devices = [device(p, n) for n in range(4) for p in range(2)]
  chosen = devices_lib.select_devices(devices, 4)
  assert [(d.process_index, d.id) for d in chosen] == [
      (0, 0), (0, 1), (1, 0), (1, 1)]
  assert len(devices_lib.select_devices(devices, 0)) == 8


@pytest.mark.parametrize('count', [3, 10])
def test_devices_that_cannot_be_even_are_refused(count):
  devices = [device(p, n) for p in range(2) for n in range(4)]
  message = refusals.refusal(devices_lib.select_devices, devices, count)
  assert message == (f'config.parallel.num_devices={count} must be a multiple '
                     'of the 2 processes, up to 8')


@pytest.mark.parametrize('count', [0, 4])
def test_processes_with_unequal_devices_are_refused(count):
  devices = [device(p, n) for p in range(2) for n in range(4 - 2 * p)]
  assert refusals.refusal(devices_lib.select_devices, devices, count) == (
      'the 2 processes have 4, 2 devices; start all with equally many')


def test_one_process_is_the_first_and_has_all_rows():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(
      jax.sharding.AxisType.Auto,))
  rows = {'window': np.arange(16)}
  assert processes.is_first_process() and not processes.is_multi_process()
  assert devices_lib.local_rows(rows, mesh) is rows
  assert processes.broadcast_from_first([3]) == [3]
