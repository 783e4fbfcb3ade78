"""The engine that runs trials as processes of this machine, one a worker."""

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

# With these variables a log ends with the exception of a trial that died, which
# is shown as the reason, and not with a note of JAX on the frames it has cut.
PLAIN = {'JAX_TRACEBACK_FILTERING': 'off'}


def run(trials: Sequence[plan.Trial], command: scheduler.Command,
        setup: scheduler.Setup) -> dict[str, str]:
  """Runs trials; returns the names of failed trials with the reasons.

  Every worker has a share of the CPU cores. An exception ends the processes of
  all trials. If this process is killed, the trials go on, and the next call
  waits for them, because the process of a trial holds the lock of its log.
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
  """A process, with its children, that writes a locked log and inherits it."""

  def __init__(self, command: Sequence[str], log: BinaryIO,
               environment: Mapping[str, str], *, cores: Sequence[int] = (),
               directory: pathlib.Path | None = None):
    log.write(f'{plan.LOG_MARK}{shlex.join(command)}\n'.encode())
    log.flush()
    self._process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env={**PLAIN, **os.environ, **environment}, cwd=directory,
        start_new_session=True)  # Ctrl-C reaches only the sweep, which ends it
    if sys.platform == 'linux' and cores:
      with contextlib.suppress(ProcessLookupError):  # it may have ended
        # Set before the process has threads, which all inherit the cores; XLA
        # sizes its thread pools by them.
        os.sched_setaffinity(self._process.pid, cores)

  def poll(self) -> int | None:
    return self._process.poll()

  def is_queued(self) -> bool:
    return False

  def end(self, force: bool) -> None:
    if self.poll() is None:
      os.killpg(self._process.pid, signal.SIGKILL if force else signal.SIGTERM)


def _cores(worker: int, workers: int) -> list[int]:
  """Returns the CPU cores of a worker; workers share cores if there are few."""
  if sys.platform != 'linux':
    return []
  cores = sorted(os.sched_getaffinity(0))
  first = worker * len(cores) // workers
  return cores[first:max((worker + 1) * len(cores) // workers, first + 1)]


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices of each worker."""

  environments: Sequence[Mapping[str, str]]  # variables of each worker
  count: int  # devices of a worker


def list_devices(workers: int) -> Devices:
  """Divides the devices of this machine among workers.

  `workers` 0 stands for one worker a GPU, or one without GPUs.

  Raises:
    UserError: jax finds no device, or there are more workers than the devices
      allow: one a GPU, or one on a TPU host.
  """
  # A child process lists the devices, because jax would reserve their memory.
  program = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  child = subprocess.run([sys.executable, '-c', program], capture_output=True,
                         text=True, check=False)
  if child.returncode:
    # A process that the system kills writes nothing.
    reason = child.stderr.strip() or f'exit code {child.returncode}'
    raise errors.UserError(f'jax finds no device: {reason.splitlines()[-1]}')
  platform, number = child.stdout.split()
  return share_devices(platform, int(number), workers,
                       os.environ.get('CUDA_VISIBLE_DEVICES', ''))


def share_devices(platform: str, count: int, workers: int,
                  visible: str) -> Devices:
  """Divides `count` devices equally among `workers`.

  `visible` is CUDA_VISIBLE_DEVICES, which names the GPUs; '' stands for all.

  Raises:
    UserError: there are more workers than the devices allow.
  """
  if platform == 'cpu':
    return Devices([{}] * (workers or 1), count)
  most = count if platform == 'gpu' else 1
  if workers > most:
    raise errors.UserError(f'--workers={workers}, but {count} {platform} '
                           f'devices take at most {most}')
  workers = workers or most
  if workers == 1:
    return Devices([{}], count)
  each = count // workers  # equal shares, because step times are compared
  names = visible.split(',') if visible else [str(i) for i in range(count)]
  return Devices([
      {'CUDA_VISIBLE_DEVICES': ','.join(names[i * each:(i + 1) * each])}
      for i in range(workers)], each)
