"""Ends a process that waits for a step in vain.

A collective of which a device or another process hangs waits for ever, and so
deaf to signals (jax#38503). What is compiled, evaluated or saved meanwhile is
not watched: it may take as long as it takes.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
import threading
import time

CODE = 124  # of a process that is ended so, as timeout(1) has it


class Watchdog:
  """A thread that counts while this one waits; 0 seconds: it does not."""

  def __init__(self, seconds: float, where: str):
    self._seconds, self._where = seconds, where
    self._since: float | None = None
    self._over = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> 'Watchdog':
    if self._seconds:
      self._thread = threading.Thread(
          target=self._run, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()
    if self._thread:
      self._thread.join()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """To be entered for each step that is waited for."""
    self._since = time.monotonic()
    try:
      yield
    finally:
      self._since = None

  def _run(self) -> None:
    while not self._over.wait(min(self._seconds / 4, 1.0)):
      since = self._since
      if since is not None and time.monotonic() - since > self._seconds:
        # Nobody can be asked to raise this: the thread that would is stuck.
        with contextlib.suppress(OSError):
          print(f'error: {self._where}: no step has ended for '
                f'{self._seconds:g} s: a device or another process hangs. The '
                'same command goes on from the last checkpoint; if steps do '
                'take so long, raise config.train.step_timeout_seconds',
                file=sys.stderr, flush=True)
        os._exit(CODE)
