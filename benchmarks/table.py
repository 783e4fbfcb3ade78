"""The printed table of a benchmark and its record bench.json."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import platform
from typing import Any

from benchmarks import harness
from benchmarks.session import Outcome
from benchmarks.session import Session

TITLES = ('suite', 'what', 'ours', '/s', 'tokens/s', 'peer', '/s', 'tokens/s',
          'ratio', 'gate', 'goal', 'verdict')
LEFT = (0, 1, 2, 5, 11)  # columns of text


def plain(record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
  """Returns the text to print: machine, table, contenders, checks and notes."""
  rows = [row for o in outcomes for row in o.rows]
  timings = [t for o in outcomes for t in o.timings]
  blocks = [_heading(record)]
  if rows:
    blocks.append(_align([TITLES, *map(_cells, rows)], LEFT))
  if timings:
    blocks.append(_align([
        ('side', 'contender', 'items', '/s', 'tokens/s', 'median s', 'spread',
         'runs'), *((
             t.side, t.name, t.unit, _number(t.items_per_second),
             _number(t.tokens_per_second), f'{t.median:.4g}',
             f'{100 * _spread(t):.0f} %', str(len(t.seconds)))
             for t in timings)], (0, 1, 2)))
  checks = dict.fromkeys(f'{row.suite} {row.what}: {check}'
                         for row in rows for check in row.checks)
  notes = [note for o in outcomes for note in o.notes]
  blocks += ['\n'.join(lines) for lines in (checks, notes) if lines]
  return '\n\n'.join(blocks) + '\n'


def _cells(row: harness.Row) -> tuple[str, ...]:
  sides: list[str] = []
  for timing, name in ((row.ours, ''), (row.peer, row.against)):
    if timing is None or row.refused:
      sides += [name, '', '']
    else:
      sides += [timing.name, _number(timing.items_per_second),
                _number(timing.tokens_per_second)]
  ratio = '' if row.ratio is None else f'{row.ratio:.2f}'
  wanted = [f'{x:g}' if x else '' for x in (row.gate, row.goal)]
  return (row.suite, row.what, *sides, ratio, *wanted, row.verdict)


def _number(value: float) -> str:
  return '' if not value else f'{value:,.{max(0, 2 - _digits(value))}f}'


def _digits(value: float) -> int:
  return max(0, math.floor(math.log10(value)))


def _spread(timing: harness.Timing) -> float:
  """Returns (slowest - fastest) / median of the runs."""
  return (max(timing.seconds) - min(timing.seconds)) / timing.median


def _align(rows: Iterable[Sequence[str]], left: Sequence[int]) -> str:
  rows = list(rows)
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  ).rstrip() for row in rows)


def record(session: Session, outcomes: Mapping[str, Outcome],
           argv: Sequence[str]) -> dict[str, Any]:
  """Returns bench.json: the numbers and the machine, versions and data."""
  if 'ours' not in session.about:
    session.worker('ours', 'search').close()  # the row names its own kind
  return {
      'argv': list(argv), 'ours': session.about['ours'],
      'peer': session.about.get('peer'),
      'hardware': {'processor': processor(), 'cores': os.cpu_count(),
                   'threads': session.threads,
                   'allocator': harness.ALLOCATOR},
      'seed': session.seed, 'rounds': session.rounds,
      'sizes': dataclasses.asdict(session.sizes),
      'data': session.source(), 'data_is_generated': not session.data,
      'encoder': session.encoder or 'random weights',
      'overrides': dict(session.overrides),
      'suites': {name: _suite(o) for name, o in outcomes.items()}}


def _heading(record: Mapping[str, Any]) -> str:
  """Returns the heading: machine, versions and data."""
  hardware, devices = record['hardware'], record['ours']['devices']
  packages = [record[side]['packages'] if record[side] else {}
              for side in ('ours', 'peer')]
  versions = [f'{name} {of_side[name]}' for of_side, names in zip(
      packages, (('jax',), ('torch', 'transformers', 'onnxruntime')),
      strict=True) for name in names if name in of_side]
  data = ('generated corpus, lengths as SQuAD 1.1\'s'
          if record['data_is_generated'] else record['data'])
  return '\n'.join((
      f'{devices["kind"]} on {hardware["processor"]}, '
      f'{hardware["threads"]} threads; {", ".join(versions)}',
      f'commit {record["ours"]["git"]["commit"][:12] or "unknown"}'
      f'{" with changes" * bool(record["ours"]["git"]["diff"])}; seed '
      f'{record["seed"]}; {record["rounds"]} rounds; data: {data}; weights: '
      f'{record["encoder"]}'))


def _suite(outcome: Outcome) -> dict[str, Any]:
  """Returns a suite as JSON values; NaN, which JSON lacks, becomes None."""
  rows = [{'what': row.what, 'against': row.against,
           'ours': row.ours.name if row.ours else None,
           'peer': row.peer.name if row.peer else None,
           'ratio': row.ratio, 'gate': row.gate or None,
           'goal': row.goal or None, 'verdict': row.verdict,
           'checks': [{'what': c.what, 'tolerance': c.tolerance,
                       'difference': c.difference if math.isfinite(
                           c.difference) else None, 'passed': c.passed}
                      for c in row.checks]} for row in outcome.rows]
  timings = [{'side': t.side, 'name': t.name, 'unit': t.unit,
              'seconds': list(t.seconds), 'items': t.items,
              'tokens': t.tokens or None, 'median_seconds': t.median,
              'items_per_second': t.items_per_second,
              'tokens_per_second': t.tokens_per_second or None}
             for t in outcome.timings]
  return {'rows': rows, 'timings': timings, 'notes': outcome.notes,
          'curves': outcome.curves}


def processor() -> str:
  """Returns the name of the CPU, as far as the system reports it."""
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()
