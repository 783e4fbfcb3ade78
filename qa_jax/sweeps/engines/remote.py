"""The task that runs a trial on another machine of a shared file system.

A task writes to the log of its trial as soon as it begins.
"""

from collections.abc import Iterator, Sequence
import contextlib
import fcntl
import pathlib
import signal
import threading
import time
from typing import Any

from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import local
from qa_jax.sweeps.engines import scheduler


class Work:
  """The command of a trial, which can be pickled and called elsewhere.

  A call waits for the lock of the trial's log, so that two tasks never run one
  trial at once: the second task finds the trial complete. An exception in the
  call ends the process of the trial.
  """

  def __init__(self, command: Sequence[str], log: pathlib.Path,
               metrics: pathlib.Path):
    self._command = [*command]
    self._log, self._metrics = log.absolute(), metrics.absolute()
    self._directory = pathlib.Path.cwd()  # base of relative paths

  def __call__(self, where: str = '') -> int:
    """Runs the command, writes `where` to the log and returns the exit code."""
    # Ray interrupts a task by SIGINT, which nohup has its workers ignore.
    with _on_interrupt(signal.default_int_handler):
      return self._run(where)

  def _run(self, where: str) -> int:
    with self._log.open('ab') as log:
      fcntl.flock(log, fcntl.LOCK_EX)
      if self._metrics.is_file():
        return 0
      if where:
        scheduler.record_note(self._log, where)
      process = local.Process(self._command, log, {}, directory=self._directory)
    try:
      while process.poll() is None:
        time.sleep(scheduler.POLL_SECONDS)
      return process.poll()
    finally:
      # A second interrupt must not end the wait for the state of the trial.
      with _on_interrupt(signal.SIG_IGN):
        scheduler.stop([process])


class Process:
  """A task seen from here; `size` is that of the log before its submission."""

  def __init__(self, trial: plan.Trial, size: int):
    self._trial, self._size = trial, size
    self._code: int | None = None

  def is_queued(self) -> bool:
    return self._trial.log.stat().st_size == self._size


@contextlib.contextmanager
def _on_interrupt(handler: Any) -> Iterator[None]:
  """Handles SIGINT by `handler`; only the main thread gets signals."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGINT, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
