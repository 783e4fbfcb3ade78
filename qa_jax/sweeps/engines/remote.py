"""What runs a trial on another machine, which sees the same file system."""

from collections.abc import Sequence
import fcntl
import pathlib
import time

from qa_jax.sweeps.engines import local
from qa_jax.sweeps.engines import scheduler


class Work:
  """A trial's command, to be sent; a call runs it → exit code.

  It holds the lock of the log, as a trial here does, and waits for whoever has
  it: of two that run one trial, the second finds it complete. What interrupts
  the call ends the process.
  """

  def __init__(self, command: Sequence[str], log: pathlib.Path,
               metrics: pathlib.Path):
    self._command = [*command]
    self._log, self._metrics = log.absolute(), metrics.absolute()
    self._directory = pathlib.Path.cwd()  # of the relative paths in a command

  def __call__(self, where: str = '') -> int:
    """`where` it runs goes into the log."""
    with self._log.open('ab') as log:
      fcntl.flock(log, fcntl.LOCK_EX)
      if self._metrics.is_file():
        return 0
      if where:
        scheduler.record_note(self._log, where)
      process = local.Process(self._command, log, {},
                              directory=self._directory)
    try:
      while process.poll() is None:
        time.sleep(scheduler.POLL_SECONDS)
      return process.poll()
    finally:
      scheduler.stop([process])
