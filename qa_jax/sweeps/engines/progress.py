"""The progress of a sweep: a table on a terminal, lines elsewhere."""

from collections.abc import Sequence
import dataclasses
import math
import time

import rich.console
import rich.live
import rich.table
import rich.text

from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import console as console_lib
from qa_jax.sweeps import plan

REFRESH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
  """The progress of a running trial."""

  name: str
  step: int
  fraction: float  # of its training
  f1: float  # of its last evaluation; NaN: none yet
  seconds: float  # since this process started it


def progress_row(trial: plan.Trial, seconds: float) -> Row:
  """Reads the progress of a trial from its metrics.jsonl."""
  config = trial.config.train
  step, fraction, f1 = 0, 0.0, math.nan
  for line in RunDirectory(trial.run).read_metrics():
    step = line['step']
    if line['split'] == 'train':
      fraction = (step / config.num_steps if config.num_steps
                  else line['epoch'] / config.num_epochs)
    elif line['split'] == 'eval':
      f1 = line['f1']
  return Row(trial.name, step, min(fraction, 1.0), f1, seconds)


def eta(rows: Sequence[Row], waiting: int, workers: int,
        finished: Sequence[float]) -> float:
  """Estimates the seconds until all trials are complete; NaN if unknown.

  `finished` are the durations of complete trials; their mean is the duration of
  a waiting trial. Without them it is estimated from the running trials. Nothing
  is known of a trial without progress that runs for longer than this.
  """
  known = [*finished] or [r.seconds / r.fraction for r in rows if r.fraction]
  if not known:
    return math.nan
  each = sum(known) / len(known)
  if any(not r.fraction and r.seconds > each for r in rows):
    return math.nan
  left = sum(r.seconds / r.fraction - r.seconds if r.fraction
             else each - r.seconds for r in rows)
  return (left + waiting * each) / max(workers, 1)


class Board:
  """The display of a sweep: a line a finished trial, a table on a terminal.

  Without a terminal, the table is one line, printed after each long silence.
  """

  def __init__(self, total: int, done: int):
    self._total, self._done, self._live = total, done, None
    self._shown, self._patience = time.monotonic(), console_lib.FIRST_SECONDS
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
      self._live = rich.live.Live(console=console, auto_refresh=False)
      self._live.start()
      self._patience = 0.0  # then REFRESH_SECONDS

  def ended(self, done: int, note: str) -> None:
    """Shows that `done` trials have ended; `note` describes the last one."""
    self._done = done
    if self._live:
      self._live.console.print(note, markup=False, highlight=False)
    else:
      self._say(note)

  @property
  def is_due(self) -> bool:
    """Returns whether the table is to be drawn again."""
    return time.monotonic() > self._shown + self._patience

  def show(self, rows: Sequence[Row], queued: int, seconds: float) -> None:
    """Draws the table.

    `queued` trials have not begun on the machine that takes them. `seconds` is
    the time left of the sweep.
    """
    if self._live:
      self._shown, self._patience = time.monotonic(), REFRESH_SECONDS
      self._live.update(progress_table(rows, queued, self._done, self._total,
                                       seconds), refresh=True)
    else:
      trained = sum(r.fraction for r in rows) / max(len(rows), 1)
      self._say(f'{len(rows)} running{_queued(queued)}, '
                f'{100 * trained:.0f} % trained, ETA {_left(seconds)}')

  def close(self) -> None:
    if self._live:
      self._live.stop()

  def _say(self, note: str) -> None:
    console_lib.say(f'sweep {self._done}/{self._total}  {note}')
    self._shown = time.monotonic()
    self._patience = console_lib.QUIET_SECONDS


def progress_table(rows: Sequence[Row], queued: int, done: int, total: int,
                   seconds: float) -> rich.table.Table:
  """Returns the table of running trials, titled with the sweep's progress."""
  table = rich.table.Table(
      title=f'{done} of {total} trials{_queued(queued)}, '
            f'ETA {_left(seconds)}',
      title_justify='left')
  table.add_column('trial', overflow='fold')
  for name in ('step', 'done', 'F1', 'time', 'left'):
    table.add_column(name, justify='right')
  for r in rows:
    table.add_row(
        rich.text.Text(r.name), str(r.step), f'{100 * r.fraction:.0f} %',
        '–' if math.isnan(r.f1) else f'{r.f1:.2f}', _clock(r.seconds),
        _clock(r.seconds / r.fraction - r.seconds) if r.fraction else '–')
  return table


def _queued(count: int) -> str:
  return f', {count} queued' * bool(count)


def _left(seconds: float) -> str:
  return '–' if math.isnan(seconds) else _clock(seconds)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f'{hours}:{minutes:02d}:{seconds:02d}' if hours
          else f'{minutes}:{seconds:02d}')
