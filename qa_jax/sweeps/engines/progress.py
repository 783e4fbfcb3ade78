"""What a sweep shows while it runs: a table on a terminal, lines elsewhere."""

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
  """A trial that runs."""

  name: str
  step: int
  fraction: float  # of its training
  f1: float  # of its last evaluation; NaN: none yet
  seconds: float  # since it began here


def progress_row(trial: plan.Trial, seconds: float) -> Row:
  """What the trial's metrics.jsonl says."""
  rows = RunDirectory(trial.run).read_metrics()
  config = trial.config.train
  step, fraction, f1 = 0, 0.0, math.nan
  for line in rows:
    step = line['step']
    if line['split'] == 'train':
      fraction = (step / config.num_steps if config.num_steps
                  else line['epoch'] / config.num_epochs)
    elif line['split'] == 'eval':
      f1 = line['f1']
  return Row(trial.name, step, min(fraction, 1.0), f1, seconds)


def eta(rows: Sequence[Row], waiting: int, workers: int,
        finished: Sequence[float]) -> float:
  """Seconds until all are complete; NaN before anything is known.

  A trial takes what `finished` ones took on average, or what those that run
  promise.
  """
  known = [*finished] or [r.seconds / r.fraction for r in rows if r.fraction]
  if not known:
    return math.nan
  each = sum(known) / len(known)
  left = sum(r.seconds / r.fraction - r.seconds if r.fraction
             else max(each - r.seconds, 0.0) for r in rows)
  return (left + waiting * each) / max(workers, 1)


class Board:
  """Lines when a trial ends; on a terminal a table of those that run, too."""

  def __init__(self, total: int, done: int):
    self._total, self._done = total, done
    self._live, self._lines = None, None
    self._shown = 0.0
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
      self._live = rich.live.Live(console=console, auto_refresh=False)
      self._live.start()
    else:
      self._lines = console_lib.Progress('sweep', total, done)

  def ended(self, done: int, note: str) -> None:
    """`done` have ended, the last of them as `note` says."""
    self._done = done
    if self._lines:
      self._lines.update(done)
      self._lines.note(note)
    else:
      self._live.console.print(note, markup=False, highlight=False)

  @property
  def is_due(self) -> bool:
    """Whether the table wants new rows."""
    return (self._live is not None
            and time.monotonic() > self._shown + REFRESH_SECONDS)

  def show(self, rows: Sequence[Row], seconds: float) -> None:
    """`seconds` are left of the sweep."""
    self._shown = time.monotonic()
    self._live.update(progress_table(rows, self._done, self._total, seconds),
                      refresh=True)

  def close(self) -> None:
    if self._lines:
      self._lines.close()
    else:
      self._live.stop()


def progress_table(rows: Sequence[Row], done: int, total: int,
                   seconds: float) -> rich.table.Table:
  """What runs, and how far the whole is."""
  left = '–' if math.isnan(seconds) else _clock(seconds)
  made = rich.table.Table(
      title=f'{done} of {total} trials, ETA {left}', title_justify='left')
  made.add_column('trial', overflow='fold')
  for name in ('step', 'done', 'F1', 'time', 'left'):
    made.add_column(name, justify='right')
  for r in rows:
    made.add_row(
        rich.text.Text(r.name), str(r.step), f'{100 * r.fraction:.0f} %',
        '–' if math.isnan(r.f1) else f'{r.f1:.2f}', _clock(r.seconds),
        _clock(r.seconds / r.fraction - r.seconds) if r.fraction else '–')
  return made


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f'{hours}:{minutes:02d}:{seconds:02d}' if hours
          else f'{minutes}:{seconds:02d}')
