"""Runs faults of the table, one line each; exit code 1 if a check fails."""

import argparse
import pathlib
import sys
import tempfile
import time
import traceback

from _pytest import outcomes
from absl import logging
import jax

from tests.chaos import table


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.chaos')
  parser.add_argument('rows', nargs='*', metavar='ROW',
                      help=f'of {", ".join(table.FAULTS)}; none: all')
  parser.add_argument('--few', action='store_true', help="the suite's counts")
  parser.add_argument('--count', type=int, help='another count')
  parser.add_argument('--seed', type=int, default=0)
  asked = parser.parse_args()
  if unknown := {*asked.rows} - {*table.FAULTS}:
    parser.error(f'no {unknown.pop()!r}; choose of {", ".join(table.FAULTS)}')
  logging.set_verbosity(logging.ERROR)  # orbax's log
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  if not asked.rows:
    for name, why in table.ELSEWHERE.items():
      print(f'{name:5} skipped: {why}')
  failed = 0
  for name in asked.rows or table.FAULTS:
    fault = table.FAULTS[name]
    count = asked.count or (fault.few if asked.few else fault.many)
    if not count:
      print(f'{name:5} skipped: {fault.why}', flush=True)
      continue
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix='chaos') as directory:
      try:
        figure = fault.program(pathlib.Path(directory), count, asked.seed)
      except outcomes.Skipped as e:
        figure = f'skipped: {e}'
      except Exception:  # the other faults run all the same
        traceback.print_exc()
        figure, failed = 'FAILED', failed + 1
    print(f'{name:5} {fault.what}: {figure} '
          f'({time.perf_counter() - began:.0f} s)', flush=True)
  return bool(failed)


if __name__ == '__main__':
  sys.exit(main())
