"""The task that runs a trial on another machine of a shared file system."""

from collections.abc import Iterator, Sequence
import contextlib
import fcntl
import pathlib
import signal
import threading
import time

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
      with _ignored_interrupts():
        scheduler.stop([process])


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
  """Ignores SIGINT, which Ray repeats before a trial has saved its state."""
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread gets signals
    return
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
