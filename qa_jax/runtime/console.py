"""Messages to the user on stderr, and progress bars."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import sys
import threading
import time

import rich.console
import rich.progress

from qa_jax.runtime import processes


def say(message: str) -> None:
  """Prints one line for the user on stderr; stdout is for results.

  Only the first process prints. An error of the stream, such as a closed pipe
  or a full disk, is ignored, so that it does not end a run.
  """
  if processes.is_first_process():
    with contextlib.suppress(OSError):
      print(message, file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
  """Prints a line as `say` does, the first time that it is given."""
  say(message)


# Without a terminal: the longest time without a line, first and later.
FIRST_SECONDS, QUIET_SECONDS = 5.0, 30.0


@contextlib.contextmanager
def say_if_slow(message: str) -> Iterator[Callable[[], None]]:
  """Prints a line after FIRST_SECONDS, unless the block is over by then.

  The block gets a function that cancels the line.
  """
  timer = threading.Timer(FIRST_SECONDS, say, [message])
  timer.daemon = True
  timer.start()
  try:
    yield timer.cancel
  finally:
    timer.cancel()


class Progress:
  """A progress bar with the remaining time, or plain lines without a terminal.

  Without a terminal, `note` prints a line, and so does `update` after
  FIRST_SECONDS without a line, later after QUIET_SECONDS. A first unit that
  takes more than FIRST_SECONDS gets a line as well. The remaining time is known
  from the second unit on.

  `total` is the number of units of work, of which `done` are already done.
  """

  def __init__(self, what: str, total: int, done: int = 0):
    self._what, self._total, self._done = what, total, done
    # The first unit and its moment. The time of a unit is measured from the
    # second, since the first unit includes compilation.
    self._first: tuple[int, float] | None = None
    self._last_line, self._patience = time.monotonic(), FIRST_SECONDS
    self._timer = threading.Timer(FIRST_SECONDS, self.note, [''])
    self._timer.daemon = True
    console = rich.console.Console(stderr=True)
    self._bar = None
    if console.is_terminal and processes.is_first_process():
      columns = rich.progress
      self._bar = columns.Progress(
          columns.TextColumn('{task.description}'), columns.BarColumn(),
          columns.MofNCompleteColumn(), columns.TimeRemainingColumn(),
          columns.TextColumn('{task.fields[note]}'), console=console)
      self._task = self._bar.add_task(
          what, total=total, completed=done, note='')
      self._bar.start()
    else:
      self._timer.start()

  def update(self, done: int) -> None:
    """Moves the bar to `done` units."""
    self._timer.cancel()
    if done > self._done and not self._first:
      self._first = done, time.monotonic()
    self._done = done
    if self._bar:
      self._bar.update(self._task, completed=done)
    elif time.monotonic() - self._last_line > self._patience:
      self.note('')

  def note(self, note: str) -> None:
    """Shows values at the bar, or prints them with the progress as one line."""
    if self._bar:
      self._bar.update(self._task, note=note)
      return
    self._timer.cancel()
    self._last_line, self._patience = time.monotonic(), QUIET_SECONDS
    eta = '–'
    if self._first and self._done > self._first[0]:
      done, began = self._first
      left = (self._total - self._done) * (
          (self._last_line - began) / (self._done - done))
      eta = f'{int(left // 60)}:{int(left % 60):02d}'
    say(f'{self._what} {self._done}/{self._total}  {note}{"  " * bool(note)}'
        f'ETA {eta}')

  def close(self) -> None:
    """Stops the bar and leaves it on the screen."""
    self._timer.cancel()
    if self._bar:
      self._bar.stop()
