"""A watchdog that ends a process if one train step takes too long.

If one device or process hangs, a collective never returns, and Python cannot
handle signals meanwhile (jax#38503). Compilation, evaluation and saving are not
watched, because their time has no limit.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
import threading
import time

CODE = 124  # exit code of a process that the watchdog ends, as of timeout(1)


class Watchdog:
  """A thread that ends the process if a step takes longer than `seconds`.

  `where` names the run in the message. With 0 seconds nothing is watched.
  """

  def __init__(self, seconds: float, where: str):
    self._seconds, self._where = seconds, where
    self._since: float | None = None
    self._closed = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> 'Watchdog':
    if self._seconds:
      self._thread = threading.Thread(
          target=self._run, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    if self._thread:
      self._thread.join()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Watches the time while it is entered; enter it to wait for a step."""
    self._since = time.monotonic()
    try:
      yield
    finally:
      self._since = None

  def _run(self) -> None:
    while not self._closed.wait(min(self._seconds / 4, 1.0)):
      since = self._since
      if since is not None and time.monotonic() - since > self._seconds:
        # The thread that could raise an error is the one that hangs.
        with contextlib.suppress(OSError):
          print(f'error: {self._where}: no step has ended for '
                f'{self._seconds:g} s: a device or another process hangs. The '
                'same command goes on from the last checkpoint; if steps do '
                'take so long, raise config.train.step_timeout_seconds',
                file=sys.stderr, flush=True)
        os._exit(CODE)
