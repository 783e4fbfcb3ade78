"""Engines that use other machines: rehearsed on this one."""

import contextlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import rich.console

from experiments import cli
from qa_jax import errors
from qa_jax.io import files
from qa_jax.runtime import console as console_lib
from qa_jax.sweeps import study as study_lib
from qa_jax.sweeps.engines import local
from qa_jax.sweeps.engines import progress
from qa_jax.sweeps.engines import ray
from qa_jax.sweeps.engines import remote
from qa_jax.sweeps.engines import scheduler
from qa_jax.sweeps.engines import slurm
from tests.common import commands
from tests.common import sweeps

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

# One finishes, one dies first, one has a mistake in it, one shares the training
# of that, one is hopeless.
VARIANTS = ({}, {'optim.eps': 1e-5}, {'optim.eps': 1e-6},
            {'optim.eps': 1e-6, 'decode.n_best': 9}, {'optim.eps': 1e-7})
CODES = ('finish()', 'die() if attempt == 1 else finish()',
         'sys.exit("error: bad")', 'finish()',
         sweeps.SLOW.replace('SCORE', '20.0'))
DRIVER = '''
import json, pathlib, sys
import jax
from tests.sweeps import test_engines
jax.devices()  # as the checks of the trials do
print(json.dumps(test_engines.table('ray', pathlib.Path(sys.argv[1]))))
'''
# A trial that takes 5 seconds to save its state.
SAVES = """
def save(*_):
  time.sleep(5)
  started.with_suffix('.saved').touch()
  sys.exit()
signal.signal(signal.SIGTERM, save)
with started.open('a') as f: f.write('ready')  # a second word
time.sleep(60)
"""
SIGNALLED = f"""
import pathlib, signal, sys
from qa_jax.sweeps.engines import ray, scheduler
from tests.common import sweeps
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
ray.run(sweeps.plan(pathlib.Path(sys.argv[1]))[:1],
        lambda trial: sweeps.stand_in(trial, {SAVES!r}),
        scheduler.Setup(workers=1, address='local'))
"""
INTERRUPTED = f"""
import pathlib, sys
from qa_jax.sweeps.engines import remote
from tests.common import sweeps
trial = sweeps.plan(pathlib.Path(sys.argv[1]))[0]
trial.log.parent.mkdir()
remote.Work(sweeps.stand_in(trial, {SAVES!r}), trial.log, trial.metrics)()
"""
RUNS = {
    'local': (local.run, scheduler.Setup([{}, {}])),
    'ray': (ray.run, scheduler.Setup(workers=2, address='local')),
    'slurm': (slurm.run, scheduler.Setup(slurm={'cluster': 'local'}))}


def table(engine: str, workdir: pathlib.Path) -> dict:
  """What became of five trials; run again, nothing starts."""
  trials = sweeps.plan(workdir, VARIANTS)
  codes = dict(zip([t.name for t in trials], CODES, strict=True))
  sweeps.measure(trials[0], 50.0)
  study = study_lib.open_study(workdir, pruner='halving', eval_every_steps=10)
  run, setup = RUNS[engine]
  setup = scheduler.Setup(setup.environments, setup.workers, setup.address,
                          setup.slurm, study)
  command = lambda t: sweeps.stand_in(t, codes[t.name])
  failed = run(trials, command, setup)
  return {
      'failed': failed, 'starts': [sweeps.starts(t) for t in trials],
      'complete': [t.metrics.is_file() for t in trials],
      'rows': {name: (row.state.name, row.value)
               for name, row in sweeps.rows(study).items()},
      'pruned': [t.pruned.is_file() for t in trials],
      'alive': [pid for t in trials if sweeps.starts(t) for pid in map(
          int, sweeps.started(t).read_text().split())
          if pathlib.Path(f'/proc/{pid}').exists()]}


@pytest.fixture(scope='module')
def here(tmp_path_factory) -> dict:
  result = table('local', tmp_path_factory.mktemp('here'))
  assert result['starts'] == [0, 2, 1, 0, 1]
  assert result['complete'] == [True, True, False, False, False]
  assert result['pruned'] == [False] * 4 + [True]
  assert 'bad' in result['failed'].values() and not result['alive']
  return result


@pytest.mark.slow
def test_ray_gives_the_same_table_as_here(tmp_path, here):
  pytest.importorskip('ray')
  done = subprocess.run(  # it leaves threads behind
      [sys.executable, '-c', DRIVER, str(tmp_path)], cwd=commands.ROOT,
      capture_output=True, text=True, timeout=240, check=False)
  if 'timed out during startup' in done.stderr:
    pytest.skip('Ray gives itself 30 seconds to start; this machine was busy')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'os.fork' not in done.stderr  # JAX warns of it
  assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
      json.dumps(here))


# SIGINT is ignored, as a shell does for a command in the background.
BACKGROUND = ('sh', '-c', 'trap "" INT; exec "$0" "$@"', sys.executable, '-c')


@pytest.mark.slow
def test_trials_on_ray_have_seconds_to_save_after_sigterm(tmp_path):
  pytest.importorskip('ray')
  trial = sweeps.plan(tmp_path)[0]
  driver = subprocess.Popen(
      [*BACKGROUND, SIGNALLED, str(tmp_path)], cwd=commands.ROOT,
      stderr=subprocess.PIPE, text=True)
  while sweeps.starts(trial) < 2:
    if driver.poll() is not None:
      assert 'timed out during startup' in driver.stderr.read()
      pytest.skip('Ray gives itself 30 seconds to start')
    time.sleep(0.1)
  driver.terminate()
  _, output = driver.communicate(timeout=60)
  assert driver.returncode == 143, output[-3000:]
  assert sweeps.started(trial).with_suffix('.saved').is_file()


@pytest.mark.slow
def test_a_second_interrupt_leaves_a_trial_time_to_save(tmp_path):
  trial = sweeps.plan(tmp_path)[0]
  task = subprocess.Popen(
      [*BACKGROUND, INTERRUPTED, str(tmp_path)], cwd=commands.ROOT,
      stderr=subprocess.DEVNULL)
  while sweeps.starts(trial) < 2:
    assert task.poll() is None
    time.sleep(0.1)
  for _ in range(3):
    task.send_signal(signal.SIGINT)
    time.sleep(1)
  task.wait(timeout=60)
  assert sweeps.started(trial).with_suffix('.saved').is_file()


@pytest.mark.slow
def test_slurm_gives_the_same_table_as_here(tmp_path, here):
  assert table('slurm', tmp_path) == here


# What is shown.


def test_eta_by_hand():
  half = progress.Row('a', 5, 0.5, 1.0, 30.0)  # takes 60, 30 are left
  begun = progress.Row('b', 0, 0.0, 1.0, 10.0)  # of 60, as the other promises
  assert math.isnan(progress.eta([begun], 3, 1, []))
  assert progress.eta([half, begun], 2, 2, []) == (30 + 50 + 2 * 60) / 2
  assert progress.eta([half, begun], 2, 2, [100.0, 140.0]) == (
      30 + 110 + 2 * 120) / 2
  assert progress.eta([], 0, 2, [100.0]) == 0
  assert math.isnan(progress.eta([begun], 0, 1, [9.0]))


def test_a_row_is_what_metrics_say(tmp_path):
  steps, epochs = (sweeps.plan(tmp_path / name, [{}], train=fields)[0]
                   for name, fields in (
                       ('a', {'num_steps': 40}),
                       ('b', {'num_steps': 0, 'num_epochs': 2.0})))
  assert progress.progress_row(steps, 3.0).fraction == 0
  for trial in (steps, epochs):
    files.write_jsonl(trial.run / 'metrics.jsonl', [
        {'step': 10, 'split': 'train', 'epoch': 0.8},
        {'step': 10, 'split': 'eval', 'f1': 33.0}])
  assert progress.progress_row(steps,
                               3.0) == progress.Row(steps.name, 10, 0.25, 33.0,
                                                    3.0)
  assert progress.progress_row(epochs, 3.0).fraction == 0.4


def test_the_table_has_every_trial_that_runs():
  out = io.StringIO()
  console = rich.console.Console(file=out, width=100)
  console.print(progress.progress_table([
      progress.Row('head-[red]x', 10, 0.25, 33.0, 60.0),
      progress.Row('other', 0, 0.0, math.nan, 3661.0)], 3, 2, 7, 3700.0))
  said = out.getvalue()
  assert '2 of 7 trials, 3 queued, ETA 1:01:40' in said
  assert 'head-[red]x' in said
  assert re.search(r'10 +│ +25 % +│ +33.00 +│ +1:00 +│ +3:00', said)
  assert re.search(r'0 +│ +0 % +│ +– +│ +1:01:01 +│ +–', said)


def test_a_terminal_has_the_table_and_a_file_has_lines(tmp_path, capsys,
                                                       monkeypatch):
  trials = sweeps.plan(tmp_path)
  run = lambda code: local.run(
      trials, lambda t: sweeps.stand_in(t, code), scheduler.Setup([{}]))
  run('sys.exit("error: x")')
  assert capsys.readouterr().err.splitlines()[0].startswith(
      f'sweep 1/2  {trials[0].name}: failed: x')
  monkeypatch.setattr(console_lib, 'FIRST_SECONDS', 0.0)
  run('time.sleep(0.5)\nfinish()')
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'sweep 0/2  1 running, 0 % trained, ETA –'
  assert lines[1].startswith(f'sweep 1/2  {trials[0].name}: EM 50.00 F1 60.00')
  for trial in trials:
    shutil.rmtree(trial.run)
  monkeypatch.setenv('FORCE_COLOR', '1')
  monkeypatch.setattr(progress, 'REFRESH_SECONDS', 0.0)
  run('time.sleep(0.5)\nfinish()')
  said = capsys.readouterr().err
  assert '0 of 2 trials, ETA –' in said and 'sweep 1/2' not in said
  assert f'{trials[0].name}: EM 50.00 F1 60.00' in said


def test_an_attempt_that_died_promises_no_end(tmp_path, monkeypatch):
  durations = []
  monkeypatch.setattr(progress, 'eta', lambda rows, waiting, workers, finished:
                      durations.append([*finished]) or math.nan)
  monkeypatch.setattr(console_lib, 'QUIET_SECONDS', 0.0)
  monkeypatch.setattr(console_lib, 'FIRST_SECONDS', 0.0)
  trials = sweeps.plan(tmp_path)
  code = 'time.sleep(0.3)\ndie() if attempt == 1 else finish()'
  assert local.run(trials, lambda t: sweeps.stand_in(t, code),
                   scheduler.Setup([{}])) == {}
  assert max(map(len, durations)) == 2  # not 4, the number of processes


# Work on another machine.


def work(trial, code) -> remote.Work:
  trial.log.parent.mkdir(parents=True, exist_ok=True)
  return remote.Work(sweeps.stand_in(trial, code), trial.log,
                     trial.metrics)


def test_of_two_that_run_a_trial_the_second_finds_it_complete(tmp_path):
  trial = sweeps.plan(tmp_path)[0]
  codes = []
  threads = [threading.Thread(target=lambda: codes.append(
      work(trial, 'time.sleep(0.3)\nfinish()')())) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert codes == [0, 0] and sweeps.starts(trial) == 1


def test_what_interrupts_work_ends_its_process(tmp_path, monkeypatch):
  trial = sweeps.plan(tmp_path)[0]

  def interrupt(seconds):
    del seconds
    if sweeps.starts(trial):
      monkeypatch.undo()
      raise KeyboardInterrupt

  monkeypatch.setattr(remote.time, 'sleep', interrupt)
  with pytest.raises(KeyboardInterrupt):
    work(trial, 'time.sleep(60)')()
  with pytest.raises(ProcessLookupError):
    os.kill(int(sweeps.started(trial).read_text()), 0)


# SLURM.


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again(tmp_path):
  """SIGUSR2 is what submitit has SLURM send then."""
  import submitit
  trial = sweeps.plan(tmp_path)[0]
  executor = submitit.AutoExecutor(tmp_path / 'slurm', cluster='local')
  executor.update_parameters(timeout_min=60)
  trial.log.parent.mkdir()
  job = executor.submit(slurm.Work(
      sweeps.stand_in(
          trial, 'time.sleep(600) if attempt == 1 else finish()'),
      trial.log, trial.metrics))
  deadline = time.monotonic() + 60
  while not sweeps.starts(trial):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  child = sweeps.started(trial).read_text().strip()
  os.kill(int(subprocess.check_output(['ps', '-o', 'ppid=', '-p', child])),
          signal.SIGUSR2)
  assert job.result() == 0
  assert sweeps.starts(trial) == 2 and trial.metrics.is_file()
  with pytest.raises(ProcessLookupError):
    os.kill(int(child), 0)


@pytest.mark.parametrize(('options', 'message'), [
    ({}, 'this machine has no sbatch'),
    ({'cluster': 'lokal'}, "lokal"),
    ({'cluster': 'local', 'slurm_partitoin': 'x'},
     "'slurm_partitoin'; options of sbatch begin with slurm_, such as "),
    ({'cluster': 'local', 'nodes': 2}, 'nodes=2, but a trial is one process'),
    ({'cluster': 'local', 'timeout_min': 'x'}, 'timeout_min=x: give minutes'),
    ({'slurm_time': '04:00:00'}, 'slurm_time=04:00:00: give minutes'),
    ({'cluster': 'local', 'mem_gb': 'x'}, 'mem_gb')])
def test_bad_slurm_options_are_one_line(options, message, monkeypatch):
  if 'slurm_time' in options:
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
  with pytest.raises(errors.UserError) as caught:
    slurm.check(scheduler.Setup(slurm=options))
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_slurm_options_are_literals_of_python():
  assert cli.assignments([
      'timeout_min=240', 'mem_gb=1.5', 'slurm_exclusive=True',
      'slurm_use_srun=False', 'slurm_partition=gpu', 'slurm_comment=a=b',
      'slurm_setup=["module load x"]', 'slurm_mem=16G', 'slurm_a={[64]}',
      'slurm_b={'], '') == {
          'timeout_min': 240, 'mem_gb': 1.5, 'slurm_exclusive': True,
          'slurm_use_srun': False, 'slurm_partition': 'gpu',
          'slurm_comment': 'a=b', 'slurm_setup': ['module load x'],
          'slurm_mem': '16G', 'slurm_a': '{[64]}', 'slurm_b': '{'}


@pytest.mark.parametrize('item', ['exclusive', '=3', 'b'])
def test_a_slurm_option_without_a_value_is_one_line(item, tmp_path,
                                                    sweep_config):
  assert f"--slurm: '{item}' is not NAME=VALUE" in commands.refusal(
      'sweep', f'--config={sweep_config}', f'--workdir={tmp_path}/x',
      '--engine=slurm', f'--slurm=timeout_min=60,{item}')
  assert not (tmp_path / 'x').exists()


@pytest.fixture
def submitit():
  """The module, whose handler of messages keeps the stderr of its import.

  Tests name this fixture before `capsys`, whose stderr is closed with the test.
  """
  import submitit
  return submitit


@pytest.fixture
def sbatch(submitit, tmp_path, monkeypatch) -> pathlib.Path:
  """Puts commands of SLURM on the path."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name in ('srun', 'sacct', 'scancel', 'sbatch'):
    (folder / name).write_text('#!/bin/sh\n')
    (folder / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  return folder / 'sbatch'


@pytest.mark.parametrize(('options', 'workers', 'seeds', 'lines'), [
    ({}, 0, 1, ['--time=1440', '--array=0-1%2']),
    ({'timeout_min': 30}, 1, 1, ['--time=30', '--array=0-1%1']),
    ({'slurm_time': 20}, 0, 130, ['--time=20', '--array=0-259%260'])])
def test_what_slurm_refuses_is_one_line(sbatch, tmp_path, capsys, options,
                                        workers, seeds, lines):
  sbatch.write_text(
      f'#!/bin/sh\ncp "$1" {tmp_path}/script\n'
      'echo "sbatch: error: invalid partition: gpux" >&2\nexit 1\n')
  console_lib.say_once.cache_clear()
  with pytest.raises(errors.UserError) as caught:
    slurm.run(sweeps.plan(tmp_path, seeds=seeds), lambda trial: ['true'],
              scheduler.Setup(workers=workers, slurm=options))
  message = str(caught.value)
  assert '\n' not in message
  assert f'sbatch refused {2 * seeds} trials: ' in message
  assert 'error: invalid partition: gpux; change --slurm' in message
  script = (tmp_path / 'script').read_text().split('\n')
  assert {f'#SBATCH {line}' for line in lines} <= {*script}
  said = capsys.readouterr().err
  assert ('may take 24 hours' in said) == (not options) and 'gpux' not in said


class Jobs:
  """Stands for `submitit.AutoExecutor`, whose jobs wait and are then lost."""

  def __init__(self, lost: list[str]):
    self.lost = lost

  def batch(self):
    return contextlib.nullcontext()

  def submit(self, work):
    name = f'7_{len(self.lost)}'
    return mock.Mock(
        job_id=name, done=lambda: True, paths=mock.Mock(stderr=f'{name}.err'),
        exception=lambda: RuntimeError(self.lost.pop(0)))


def test_a_log_says_why_slurm_lost_a_job(submitit, tmp_path, monkeypatch,
                                         capsys):
  traceback = submitit.core.utils.FailedJobError(
      'Job (task=0) failed during processing with trace:\n'
      '----------------------\nTraceback …\nOSError: no space\n\n'
      '----------------------\nYou can check full logs')
  memory = ('Job 7 (task: 0) with path 7_0_result.pkl\nhas not produced any '
            'output (state: OUT_OF_MEMORY)\nNo error stream produced.')
  monkeypatch.setattr(slurm, '_executor', lambda *_: Jobs(
      [str(traceback), memory, memory]))
  trial = sweeps.plan(tmp_path)[0]
  failed = slurm.run([trial], lambda trial: ['true'], scheduler.Setup())
  log = trial.log.read_text().split('\n')
  assert log[0] == 'sweep: OSError: no space; see 7_3.err'
  assert log[1].startswith('sweep: Job 7 (task: 0) with path 7_0_result.pkl '
                           'has not produced any output (state: OUT_OF_MEMORY)')
  assert 'OUT_OF_MEMORY' in failed[trial.name]
  assert f'submitted job 7: {trial.name}\n' in capsys.readouterr().err


def test_a_task_is_queued_until_it_writes_to_the_log(tmp_path):
  trial = sweeps.plan(tmp_path)[0]
  trial.log.parent.mkdir()
  trial.log.write_text('of an earlier attempt\n')
  process = remote.Process(trial, trial.log.stat().st_size)
  assert process.is_queued()
  work(trial, 'finish()')()
  assert not process.is_queued()


# Ray.


@pytest.mark.parametrize(('nodes', 'workers', 'expected'), [
    ([{'CPU': 4}], 0, (1, {'num_cpus': 4})),
    ([{'CPU': 4}, {'CPU': 2}], 0, (3, {'num_cpus': 2})),
    ([{'CPU': 4}, {'CPU': 4}], 4, (4, {'num_cpus': 2})),
    ([{'CPU': 4}, {'CPU': 4}], 3, (3, {'num_cpus': 2})),
    ([{'CPU': 8, 'GPU': 4}], 0, (4, {'num_cpus': 1, 'num_gpus': 1})),
    ([{'CPU': 8, 'GPU': 8}] * 2, 4, (4, {'num_cpus': 1, 'num_gpus': 4})),
    ([{'CPU': 8, 'GPU': 8}, {'CPU': 9}], 3,
     (3, {'num_cpus': 1, 'num_gpus': 2})),
    ([{'CPU': 8, 'TPU': 4}] * 2, 0,
     (2, {'num_cpus': 1, 'resources': {'TPU': 4}}))])
def test_a_cluster_is_shared_out(nodes, workers, expected):
  assert ray.share(nodes, workers) == expected


@pytest.mark.parametrize(('nodes', 'workers', 'message'), [
    ([{'CPU': 4}], 5, 'workers=5, but .* at most 4 trials on its 4 CPUs'),
    ([{'GPU': 4, 'CPU': 9}], 5, 'at most 4 trials on its 4 GPUs'),
    ([{'TPU': 4, 'CPU': 9}], 2, 'at most 1 trials on its 4 TPUs')])
def test_more_than_a_cluster_has_is_one_line(nodes, workers, message):
  with pytest.raises(errors.UserError, match=message):
    ray.share(nodes, workers)


def test_a_server_that_is_not_ray_is_one_line_and_soon(monkeypatch):
  monkeypatch.setattr(ray, 'JOIN_SECONDS', 0.2)
  with socket.create_server(('', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(errors.UserError, match='there: no answer in '):
      ray.check(scheduler.Setup(address=address))


def test_a_cluster_that_was_here_and_is_gone_is_one_line(monkeypatch):
  monkeypatch.setenv('RAY_ADDRESS', '127.0.0.2:1')  # or what `ray start` left
  with pytest.raises(errors.UserError, match=(
      r'--address=auto \(127.0.0.2:1\): no Ray cluster there: Connection')):
    ray.check(scheduler.Setup(address='auto'))


@pytest.mark.parametrize(('address', 'given', 'expected'), [
    ('auto', None, 'token'), ('auto', 'disabled', 'disabled'),
    ('local', None, None)])
def test_a_token_is_shown_to_a_cluster(tmp_path, monkeypatch, address, given,
                                       expected):
  monkeypatch.setattr(ray, 'TOKEN', tmp_path / 'auth_token')
  (tmp_path / 'auth_token').write_text('0' * 64)
  monkeypatch.setattr(os, 'environ', {
      **os.environ, **({'RAY_AUTH_MODE': given} if given else {})})
  if not given:
    os.environ.pop('RAY_AUTH_MODE', None)
  ray._import(address)
  assert os.environ.get('RAY_AUTH_MODE') == expected


def test_a_log_says_where_its_trial_ran(tmp_path):
  trial = sweeps.plan(tmp_path)[0]
  assert work(trial, 'finish()')('on 10.0.0.1') == 0
  assert trial.log.read_text().splitlines()[0] == 'sweep: on 10.0.0.1'


@pytest.mark.parametrize(('address', 'message'), [
    ('127.0.0.1:1', 'no Ray cluster there: Connection refused'),
    ('ray://127.0.0.1:1', 'no Ray cluster there: Connection refused'),
    ('no.such.host.invalid:6379', 'no Ray cluster there: '),
    ('a..b:6379', 'no Ray cluster there: '),
    ('127.0.0.1:99999', 'no Ray cluster there: '),
    ('6379', 'expected HOST:PORT'), ('host:', 'expected HOST:PORT')])
def test_an_unreachable_cluster_is_one_line(
    address, message, tmp_path, sweep_config):
  said = commands.refusal(
      'sweep', f'--config={sweep_config}', f'--workdir={tmp_path}/x',
      '--engine=ray', f'--address={address}')
  assert message in said and not (tmp_path / 'x').exists()
