"""What a run leaves to read: metrics.jsonl, TensorBoard, progress, run.json."""

import contextlib
import sys
import time

import rich.console
import rich.progress

from qa_jax.runtime import processes


def say(message: str) -> None:
  """One line for the user, on stderr: stdout is for results.

  A run does not end because nobody listens any more, or a log's disk is full.
  """
  if not processes.is_first_process():
    return
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


class Progress:
  """A progress bar with ETA on a terminal, plain lines otherwise."""

  def __init__(self, what: str, total: int, done: int = 0):
    self._what, self._total, self._begin, self._done = what, total, done, done
    self._started = time.monotonic()
    console = rich.console.Console(stderr=True)
    self._bar = None
    if console.is_terminal and processes.is_first_process():
      columns = rich.progress
      self._bar = columns.Progress(
          columns.TextColumn('{task.description}'), columns.BarColumn(),
          columns.MofNCompleteColumn(), columns.TimeRemainingColumn(),
          columns.TextColumn('{task.fields[note]}'), console=console)
      self._task = self._bar.add_task(what, total=total, completed=done,
                                      note='')
      self._bar.start()

  def update(self, done: int) -> None:
    self._done = done
    if self._bar:
      self._bar.update(self._task, completed=done)

  def note(self, note: str) -> None:
    """A line with values; `update` moves the bar without one."""
    if self._bar:
      self._bar.update(self._task, note=note)
      return
    seconds = time.monotonic() - self._started
    per_unit = seconds / max(self._done - self._begin, 1)
    eta = per_unit * (self._total - self._done)
    say(f'{self._what} {self._done}/{self._total}  {note}  '
        f'ETA {int(eta // 60)}:{int(eta % 60):02d}')

  def close(self) -> None:
    if self._bar:
      self._bar.stop()
