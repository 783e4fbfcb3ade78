"""Trials as processes of this machine, one a worker."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from typing import BinaryIO

from qa_jax import errors
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import scheduler


def run(trials: Sequence[plan.Trial], command: scheduler.Command,
        setup: scheduler.Setup) -> dict[str, str]:
  """Runs trials → {name: why it failed}.

  A worker has its own share of the CPU cores. What ends this function ends its
  processes. If it is killed they go on, and the next call waits for them: the
  process that writes a trial's log holds a lock on it.
  """
  workers = len(setup.environments)

  def start(starts: Sequence[scheduler.Start]) -> Iterator[Process]:
    for s in starts:
      with s.log:
        yield Process(command(s.trial), s.log, setup.environments[s.worker],
                      cores=_cores(s.worker, workers))

  return scheduler.run_trials(
      scheduler.Queue(trials, setup.study), workers, start)


class Process:
  """A command that writes a locked log, and with it holds the lock."""

  def __init__(self, command: Sequence[str], log: BinaryIO,
               environment: Mapping[str, str], *, cores: Sequence[int] = (),
               directory: pathlib.Path | None = None):
    log.write(f'{scheduler.LOG_MARK}{shlex.join(command)}\n'.encode())
    log.flush()
    self._process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env={**os.environ, **environment}, cwd=directory,
        start_new_session=True)  # Ctrl-C is for us: we end it
    if sys.platform == 'linux' and cores:
      with contextlib.suppress(ProcessLookupError):  # it may have ended
        # Before its first thread: all inherit it, and XLA counts these cores.
        os.sched_setaffinity(self._process.pid, cores)

  def poll(self) -> int | None:
    return self._process.poll()

  def end(self, force: bool) -> None:
    """With its children."""
    if self.poll() is None:
      os.killpg(self._process.pid, signal.SIGKILL if force else signal.SIGTERM)


def _cores(worker: int, workers: int) -> list[int]:
  """The worker's share; several share one if there are too few."""
  if sys.platform != 'linux':
    return []
  cores = sorted(os.sched_getaffinity(0))
  first = worker * len(cores) // workers
  return cores[first:max((worker + 1) * len(cores) // workers, first + 1)]


@dataclasses.dataclass(frozen=True)
class Devices:
  """What each worker has to itself."""

  environments: Sequence[Mapping[str, str]]  # added to that of the worker
  count: int  # devices of a worker


def list_devices(workers: int) -> Devices:
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
  return share_devices(platform, int(number), workers,
                       os.environ.get('CUDA_VISIBLE_DEVICES', ''))


def share_devices(platform: str, count: int, workers: int,
                  visible: str) -> Devices:
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
