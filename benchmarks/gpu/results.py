"""The results of a stage of the GPU check, as lines of a JSON file."""

from collections.abc import Callable, Iterable
import json
import os
import pathlib
import time
from typing import Any

TINY = os.environ.get('TINY') == '1'  # a rehearsal with small sizes
VERDICTS = {False: 'FAILED', True: 'passed', None: 'measured'}


class Results:
  """The results file of the check, and the time that is left to a stage."""

  def __init__(self, directory: pathlib.Path, stage: str, seconds: float):
    self.directory, self._stage = directory, stage
    self._deadline = time.monotonic() + seconds

  def record(self, name: str, **values: Any) -> None:
    """Adds a result; its value `ok` says whether a check passed."""
    with open(self.directory / 'results.jsonl', 'a', encoding='utf-8') as file:
      file.write(json.dumps(
          {'stage': self._stage, 'name': name, **values}) + '\n')
    print(f'{self._stage}: {name}: {_shown(values)}', flush=True)

  def attempt(self, name: str, function: Callable[..., dict[str, Any]],
              *args: Any) -> None:
    """Records the values of function(*args), or its error."""
    try:
      if time.monotonic() > self._deadline:
        raise TimeoutError('no time left')
      values = function(*args)
    except Exception as e:  # the other checks go on
      values = dict(ok=False, error=f'{type(e).__name__}: {str(e)[:400]}')
    self.record(name, **values)


def table(lines: Iterable[str]) -> tuple[str, int]:
  """Returns a Markdown table, failed checks first, and the number of these."""
  rows = sorted(map(json.loads, lines),
                key=lambda row: [*VERDICTS].index(row.get('ok')))
  text = ['| stage | what | verdict | values |', '|---|---|---|---|']
  text += [f'| {row["stage"]} | {row["name"]} | {VERDICTS[row.get("ok")]} | '
           f'{_shown(row)} |' for row in rows]
  return '\n'.join(text) + '\n', sum(row.get('ok') is False for row in rows)


def _shown(values: dict[str, Any]) -> str:
  return ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
      for k, v in values.items() if k not in ('stage', 'name', 'ok')
      ).replace('\n', ' ').replace('|', '/')
