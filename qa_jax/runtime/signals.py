"""Signals that ask a run to stop: it saves at the next step, and ends."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from types import FrameType
from types import TracebackType
from typing import Any

# SIGUSR2 is what SLURM is told to send before it pre-empts a job.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(SystemExit):
  """The end of a run that was asked to stop; its code is 128 + the signal."""


class Interrupted(BaseException):
  """The end of work that is not worth waiting for."""


class StopRequests:
  """Takes note of SIGNALS while it is entered.

  The first decides the exit code. Others change nothing, so that no save is
  torn, but for a second Ctrl-C, which is obeyed at once.
  """

  def __init__(self, alone: bool = True) -> None:
    self.noted: signal.Signals | None = None
    # What the run stops for: noted here or, of several processes (not
    # `alone`), what all `heard` of after the same step.
    self.signal: signal.Signals | None = None
    self._alone = alone
    self._before: dict[signal.Signals, Any] = {}
    self._interruptible = False

  def __enter__(self) -> 'StopRequests':
    # Only there does Python allow it, and only there it is the run's process.
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, kind: type[BaseException] | None,
               error: BaseException | None, trace: TracebackType | None
               ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.noted is None:
      self.noted = signal.Signals(number)
      if self._alone:
        self.signal = self.noted
        if self._interruptible:
          raise Interrupted
    elif number == signal.SIGINT == self.noted:
      raise KeyboardInterrupt

  def hear(self, number: int) -> None:
    """Takes what some process has noted, 0 for nothing."""
    if number and not self.signal:
      self.signal = signal.Signals(number)

  @contextlib.contextmanager
  def interrupting(self) -> Iterator[None]:
    """Work within is given up when a signal comes, or has come: Interrupted.

    Of several processes, which must do it together, none gives it up.
    """
    self._interruptible = True
    try:
      if self.signal:
        raise Interrupted
      yield
    finally:
      self._interruptible = False

  def stopped(self) -> Stopped:
    """What to raise when all is saved."""
    assert self.signal
    return Stopped(128 + self.signal)
