"""The results of a stage of the GPU check, as lines of a JSON file."""

from collections.abc import Callable, Iterable
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

TINY = os.environ.get('TINY') == '1'  # a rehearsal with small sizes
FILE = 'results.jsonl'
VERDICTS = {False: 'FAILED', True: 'passed', None: 'measured'}


@dataclasses.dataclass(frozen=True)
class Given:
  """Data, weights and the peer of the check, by flags of the command."""

  train: str = ''  # data SPEC; '': generated, with SQuAD's lengths
  eval: str = ''
  model: str = ''  # directory of MiniLM-L6; '': random weights
  peer_python: str = sys.executable

  @property
  def flags(self) -> list[str]:
    return [f'--{name}={value}' for name, value in vars(self).items()]


class Results:
  """The results file of the check, and the time that is left to a stage."""

  def __init__(self, directory: pathlib.Path, stage: str, seconds: float,
               scratch: pathlib.Path | None = None, given: Given | None = None):
    self.directory, self._stage = directory, stage
    # Run directories and caches are too large to be copied from a machine.
    self.scratch = scratch or directory
    self.given = given or Given()
    self._deadline = time.monotonic() + seconds

  @property
  def seconds_left(self) -> float:
    """Returns the seconds that the stage has left; negative if it is late."""
    return self._deadline - time.monotonic()

  def record(self, name: str, **values: Any) -> None:
    """Adds a result; its value `ok` says whether a check passed."""
    # Printed first, because the disk may be full.
    print(f'{self._stage}: {name}: {_shown(values)}', flush=True)
    with open(self.directory / FILE, 'a', encoding='utf-8') as file:
      file.write(json.dumps(
          {'stage': self._stage, 'name': name, **values}) + '\n')

  def fail(self, name: str, error: Exception) -> None:
    """Records an error as a failed check."""
    self.record(name, ok=False,
                error=f'{type(error).__name__}: {str(error)[:400]}')

  def attempt(self, name: str, function: Callable[..., dict[str, Any]],
              *args: Any) -> bool:
    """Records the values of function(*args), or its error.

    Returns whether the check did not fail.
    """
    try:
      if self.seconds_left < 0:
        raise TimeoutError('no time left')
      values = function(*args)
    except Exception as e:  # the other checks go on
      self.fail(name, e)
      return False
    self.record(name, **values)
    return values.get('ok') is not False


def reached(value: float, goal: float, *, most: bool = False
            ) -> dict[str, Any]:
  """Returns the verdict on a goal, the least value or, if `most`, the largest.

  A rehearsal has no verdict.
  """
  ok = value <= goal if most else value >= goal
  return {'goal': goal} if TINY else {'goal': goal, 'ok': bool(ok)}


def table(lines: Iterable[str]) -> tuple[str, int]:
  """Returns a Markdown table, failed checks first, and the number of these."""
  rows = sorted(map(json.loads, lines),
                key=lambda row: [*VERDICTS].index(row.get('ok')))
  text = ['| stage | what | verdict | values |', '|---|---|---|---|']
  text += [f'| {row["stage"]} | {row["name"]} | {_verdict(row)} | '
           f'{_shown(row)} |' for row in rows]
  return '\n'.join(text) + '\n', sum(row.get('ok') is False for row in rows)


def _verdict(row: dict[str, Any]) -> str:
  return 'left out' if 'left_out' in row else VERDICTS[row.get('ok')]


def _shown(values: dict[str, Any]) -> str:
  return ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
      for k, v in values.items() if k not in ('stage', 'name', 'ok')
      ).replace('\n', ' ').replace('|', '/')
