"""Signals that stop a run, which writes a checkpoint first, or a sweep."""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

# SLURM can be configured to send SIGUSR2 before it preempts a job.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(SystemExit):
  """The exit of a run that a signal stopped, with code 128 + signal number."""


class Interrupted(BaseException):
  """The abandonment of work, such as an evaluation, after a signal."""


class StopRequests:
  """Handles SIGNALS while it is entered, by recording the first one.

  The first signal decides the exit code. Later signals are ignored, so that
  they do not interrupt a save. Only a second Ctrl-C raises KeyboardInterrupt.

  `noted` is the signal that this process has received, and `signal` the signal
  that the run will stop for. In a run of several processes (`alone` is False)
  `hear` sets it, once they have agreed on it after the same train step.
  """

  def __init__(self, alone: bool = True) -> None:
    self.noted: signal.Signals | None = None
    self.signal: signal.Signals | None = None
    self._alone = alone
    self._before: dict[signal.Signals, Any] = {}
    self._interruptible = False

  def __enter__(self) -> 'StopRequests':
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
      if number == self.noted and isinstance(handler, ExitRequests):
        handler.noted = self.noted

  def _note(self, number: int, _: FrameType | None) -> None:
    if self.noted is None:
      self.noted = signal.Signals(number)
      if self._alone:
        self.signal = self.noted
        if self._interruptible:
          raise Interrupted
    elif number == signal.SIGINT == self.noted:
      raise KeyboardInterrupt

  def hear(self, number: int) -> None:
    """Sets the signal that the processes agreed on; 0 stands for none."""
    if number and not self.signal:
      self.signal = signal.Signals(number)

  @contextlib.contextmanager
  def interrupting(self) -> Iterator[None]:
    """Raises Interrupted in the work within when a signal comes or has come.

    Several processes would have to abandon it together: no work is interrupted.
    """
    self._interruptible = True
    try:
      if self.signal:
        raise Interrupted
      yield
    finally:
      self._interruptible = False

  def stopped(self) -> Stopped:
    """Returns the exception to raise after the last save."""
    assert self.signal
    return Stopped(128 + self.signal)


class ExitRequests:
  """Handles SIGNALS while it is entered, by raising `Stopped`.

  A signal can be lost: Python ignores an exception in a callback of its garbage
  collector, and StopRequests ignore a signal in the last save of a run. `check`
  raises `Stopped` for such a signal.
  """

  def __init__(self) -> None:
    self.noted: signal.Signals | None = None
    self._before: dict[signal.Signals, Any] = {}
    self._said = False

  def __enter__(self) -> 'ExitRequests':
    for number in SIGNALS:
      self._before[number] = signal.signal(number, self)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __call__(self, number: int, _: FrameType | None) -> None:
    self.noted = self.noted or signal.Signals(number)
    self.check()

  def check(self) -> None:
    """Says that the program stops and raises `Stopped`, if a signal came."""
    if not self.noted:
      return
    if not self._said:
      self._said = True
      # A handler may not print, because it may have interrupted a print.
      with contextlib.suppress(OSError):
        os.write(2, f'stopped by {self.noted.name}; the same command goes on\n'
                 .encode())
    raise Stopped(128 + self.noted)
