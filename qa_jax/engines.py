"""ENGINES: what runs the trials of a sweep.

An engine takes trials whose configs are checked, runs what is missing, and
says which ones failed and why.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import BinaryIO

from qa_jax import errors
from qa_jax import files
from qa_jax import logs
from qa_jax import sweep

RETRIES = 2  # of a trial that died; a user's mistake would only come again
GRACE_SECONDS = 10.0  # between asking a trial to end and ending it
POLL_SECONDS = 0.1
LOG_MARK = 'sweep: '  # begins what is not the trial's own

Command = Callable[[sweep.Trial], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Devices:
  """What each worker has to itself."""

  environments: Sequence[Mapping[str, str]]  # added to that of the worker
  count: int  # devices of a worker


def devices(workers: int) -> Devices:
  """This machine's devices, shared out; `workers` 0: one a GPU, else one.

  Raises:
    UserError: more workers than GPUs, or several on a TPU host, whose chips
      belong to one process.
  """
  # Asked of another process: this one must not take their memory.
  ask = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  told = subprocess.run([sys.executable, '-c', ask], capture_output=True,
                        text=True, check=False)
  if told.returncode:
    raise errors.UserError(
        f'jax finds no device: {told.stderr.strip().splitlines()[-1]}')
  platform, number = told.stdout.split()
  return share(platform, int(number), workers,
               os.environ.get('CUDA_VISIBLE_DEVICES', ''))


def share(platform: str, count: int, workers: int, visible: str) -> Devices:
  """`count` devices among `workers`; `visible` names the GPUs, '' all."""
  if platform == 'cpu':
    return Devices([{}] * (workers or 1), count)
  most = count if platform == 'gpu' else 1
  if workers > most:
    raise errors.UserError(
        f'--workers={workers}, but {count} {platform} devices take at most '
        f'{most}')
  workers = workers or most
  if workers == 1:
    return Devices([{}], count)
  each = count // workers  # as many for all: step times are compared
  names = visible.split(',') if visible else [str(i) for i in range(count)]
  return Devices([
      {'CUDA_VISIBLE_DEVICES': ','.join(names[i * each:(i + 1) * each])}
      for i in range(workers)], each)


def local(trials: Sequence[sweep.Trial], command: Command,
          environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
  """Runs trials as processes, one a worker → {name: why it failed}.

  A worker has its own share of the CPU cores. A trial that dies is started
  again and resumes; one that ends with a message is not. What ends this
  function ends its processes. If it is killed they go on, and the next call
  waits for them: the process that writes a trial's log holds a lock on it.
  """
  queue = _Queue(trials)
  running: dict[int, tuple[sweep.Trial, subprocess.Popen]] = {}
  try:
    while queue.waiting or running:
      for worker, environment in enumerate(environments):
        if worker in running:
          trial, process = running[worker]
          if process.poll() is None:
            continue
          del running[worker]
          queue.ended(trial, process.returncode)
        trial, log = queue.next()
        if trial:
          with log:
            running[worker] = trial, _spawn(
                command(trial), log, environment,
                _cores(worker, len(environments)))
      time.sleep(POLL_SECONDS)
  finally:
    _stop([process for _, process in running.values()])
    queue.progress.close()
  return queue.failed


class _Queue:
  """What became of the trials so far."""

  def __init__(self, trials: Sequence[sweep.Trial]):
    self.waiting = list(trials)
    self.failed: dict[str, str] = {}
    self.progress = logs.Progress('sweep', len(trials), sum(
        trial.metrics.is_file() for trial in trials))
    self._trials = {trial.name: trial for trial in trials}
    self._done: set[str] = set()
    self._attempts: collections.Counter[str] = collections.Counter()
    self._locked: set[str] = set()

  def next(self) -> tuple[sweep.Trial, BinaryIO] | tuple[None, None]:
    """A trial that can begin and its log, which is locked; or none."""
    for trial in [*self.waiting]:
      if trial.source in self.failed:
        self.waiting.remove(trial)
        self._fail(trial, f'{trial.source} failed, whose training it shares')
      if trial.source and trial.source not in self._done:
        continue
      log = _locked(trial.log)
      if log is None:
        if trial.name not in self._locked:
          logs.say(f'{trial.name}: waiting for the process that runs it')
        self._locked.add(trial.name)
        continue
      self.waiting.remove(trial)
      if trial.metrics.is_file():
        log.close()
        self._done.add(trial.name)
        continue
      if trial.source and not trial.run.exists():
        sweep.share_training(self._trials[trial.source], trial)
      self._attempts[trial.name] += 1
      return trial, log
    return None, None

  def ended(self, trial: sweep.Trial, code: int) -> None:
    """Takes note of a trial whose process has ended."""
    if trial.metrics.is_file():
      self._done.add(trial.name)
      found = files.read_object(trial.metrics)
      self._note(f'{trial.name}: EM {found["exact_match"]:.2f} '
                 f'F1 {found["f1"]:.2f}')
      return
    reason = _reason(trial.log, code)
    if reason.startswith('error: ') or self._attempts[trial.name] > RETRIES:
      self._fail(trial, reason.removeprefix('error: '))
    else:
      logs.say(f'{trial.name}: {reason}; starting it again')
      self.waiting.insert(0, trial)

  def _fail(self, trial: sweep.Trial, reason: str) -> None:
    self.failed[trial.name] = reason
    self._note(f'{trial.name}: failed: {reason}')

  def _note(self, note: str) -> None:
    self.progress.update(len(self._done) + len(self.failed))
    self.progress.note(note)


def _locked(path: pathlib.Path) -> BinaryIO | None:
  """The open log, which only its holders can open so; None if there is one.

  The lock belongs to the open file, which a trial inherits as its output: it
  lasts until both have ended, however they do.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  log = path.open('ab')
  try:
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    log.close()
    return None
  return log


def _spawn(command: Sequence[str], log: BinaryIO,
           environment: Mapping[str, str],
           cores: Sequence[int]) -> subprocess.Popen:
  log.write(f'{LOG_MARK}{shlex.join(command)}\n'.encode())
  log.flush()
  process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
      env={**os.environ, **environment},
      start_new_session=True)  # Ctrl-C is for us: we end it
  if sys.platform == 'linux' and cores:
    with contextlib.suppress(ProcessLookupError):  # it may have ended
      # Before its first thread: all inherit it, and XLA counts these cores.
      os.sched_setaffinity(process.pid, cores)
  return process


def _cores(worker: int, workers: int) -> list[int]:
  """The worker's share; several share one if there are too few."""
  if sys.platform != 'linux':
    return []
  cores = sorted(os.sched_getaffinity(0))
  first = worker * len(cores) // workers
  return cores[first:max((worker + 1) * len(cores) // workers, first + 1)]


def _reason(log: pathlib.Path, code: int) -> str:
  """Why a process ended so: a signal, or the last line that it wrote."""
  if code < 0:
    reason = f'died of signal {-code} ({signal.strsignal(-code)})'
    with log.open('a', encoding='utf-8') as file:
      file.write(f'{LOG_MARK}{reason}\n')
    return reason
  lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
  last = next(line for line in reversed(lines) if line.strip())
  return last.strip()[:300]


def _stop(processes: Sequence[subprocess.Popen]) -> None:
  """Asks processes and their children to end, then ends them."""
  for number, seconds in ((signal.SIGTERM, GRACE_SECONDS),
                          (signal.SIGKILL, None)):
    for process in processes:
      if process.poll() is None:
        os.killpg(process.pid, number)
    for process in processes:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


ENGINES = {'local': local}
