"""Trials as processes of this machine, one a worker."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from typing import BinaryIO

from qa_jax import sweep
from qa_jax.engines import schedule


def run(trials: Sequence[sweep.Trial], command: schedule.Command,
        setup: schedule.Setup) -> dict[str, str]:
  """Runs trials → {name: why it failed}.

  A worker has its own share of the CPU cores. What ends this function ends its
  processes. If it is killed they go on, and the next call waits for them: the
  process that writes a trial's log holds a lock on it.
  """
  workers = len(setup.environments)

  def start(starts: Sequence[schedule.Start]) -> Iterator[Process]:
    for s in starts:
      with s.log:
        yield Process(command(s.trial), s.log, setup.environments[s.worker],
                      cores=_cores(s.worker, workers))

  return schedule.drive(
      schedule.Queue(trials, setup.study), workers, start)


class Process:
  """A command that writes a locked log, and with it holds the lock."""

  def __init__(self, command: Sequence[str], log: BinaryIO,
               environment: Mapping[str, str], *, cores: Sequence[int] = (),
               directory: pathlib.Path | None = None):
    log.write(f'{schedule.LOG_MARK}{shlex.join(command)}\n'.encode())
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
