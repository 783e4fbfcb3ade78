"""One model on many data sets: a row for each, and macro averages.

Glossary of shapes: N questions.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from qa_jax.runtime import console

SCORES = ('exact_match', 'f1')


@dataclasses.dataclass(frozen=True)
class Row:
  """A data set of a suite."""

  group: str
  name: str
  data: str  # SPEC
  values: Mapping[str, float] | None  # as metrics.json; None: could not be had
  low: float = math.nan  # 95 % interval of F1 over articles and questions
  high: float = math.nan
  reason: str = ''  # why it could not be had


def check_suite(groups: Any) -> dict[str, dict[str, str]]:
  """{group: {name: SPEC}} of a suite's file.

  Raises:
    UserError: another shape, or no set.
  """
  ok = isinstance(groups, Mapping) and bool(groups) and all(
      isinstance(sets, Mapping) and sets
      and all(isinstance(spec, str) and spec for spec in sets.values())
      for sets in groups.values())
  if not ok:
    raise errors.UserError(
        'a suite is {group: {name: data SPEC}}, none of them empty; see '
        'configs/suites')
  return {group: dict(sets) for group, sets in groups.items()}


def run_suite(qa: predict.QA, groups: Mapping[str, Mapping[str, str]],
              output: pathlib.Path, *, seed: int = 0) -> list[Row]:
  """Evaluates on every set that can be had; the files of each go into
  `output`/GROUP/NAME. Others are told in a line as soon as they are met.

  Raises:
    UserError: none can be had, or scores are not finite.
  """
  rows = []
  for group, sets in groups.items():
    for name, data in sets.items():
      try:
        loaded = input_pipeline.load_windows(qa.config, data, qa.tokenizer)
      except errors.UserError as e:
        console.say(f'SKIPPED {group}/{name}: {e}')
        rows.append(Row(group, name, data, None, reason=str(e)))
        continue
      folder = output / group / name
      values = evaluator.evaluate_windows(qa,
                                          loaded,
                                          output=folder,
                                          progress=name)
      examples = loaded[0].examples
      _, f1 = squad.per_question(examples, squad.read_predictions(
          folder / 'predictions.json'))
      low, high = significance.hierarchical_interval(
          100 * f1[None], [e.article for e in examples], seed=seed)
      rows.append(Row(group, name, data, values, low, high))
  if all(row.values is None for row in rows):
    raise errors.UserError(
        f'none of the {len(rows)} sets of the suite can be had; the first: '
        f'{rows[0].reason}')
  return rows


def averages(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
  """Macro averages of each group, and of all sets: each set weighs the same."""
  had = [row for row in rows if row.values is not None]
  groups = {group: [row for row in had if row.group == group]
            for group in dict.fromkeys(row.group for row in had)}
  return {name: {'sets': len(members), **{
      score: float(np.mean([row.values[score] for row in members]))
      for score in SCORES}} for name, members in {**groups, 'all': had}.items()}


def write_suite(rows: Sequence[Row], output: pathlib.Path,
                title: str) -> list[documents.Block]:
  """Writes suite.{json,md,html}; the parts of the report."""
  found = averages(rows)
  files.write_json(output / 'suite.json', {
      'sets': [{'group': row.group, 'name': row.name, 'data': row.data,
                'metrics': row.values, 'skipped': row.reason,
                **({} if row.values is None else {
                    'f1_low': row.low, 'f1_high': row.high})}
               for row in rows],
      'macro': found})
  blocks = _blocks(rows, found, title)
  files.write_text(output / 'suite.md', documents.to_markdown(blocks))
  files.write_text(output / 'suite.html', documents.to_html(blocks, output))
  return blocks


def _blocks(rows: Sequence[Row], found: Mapping[str, Mapping[str, float]],
            title: str) -> list[documents.Block]:
  held_out = any('at_held_out_f1' in (row.values or {}) for row in rows)
  extra = {'has_answer_f1': 'HasAns F1', 'no_answer_exact_match': 'NoAns'} | (
      {'at_zero_f1': 'F1 at 0', 'best_f1': 'F1, oracle'} if held_out else {})
  shown = {k: v for k, v in extra.items() if any(
      k in (row.values or {}) for row in rows)}
  number = lambda values, key: (
      f'{values[key]:.2f}' if key in values else '–')
  table = []
  for group in dict.fromkeys(row.group for row in rows):
    members = [row for row in rows if row.group == group]
    for row in members:
      if row.values is None:
        table.append([f'{group}/{row.name}', 'SKIPPED',
                      *['–'] * (3 + len(shown))])
        continue
      table.append([
          f'{group}/{row.name}', str(row.values['total']),
          *(number(row.values, k) for k in SCORES),
          f'{row.low:.2f} … {row.high:.2f}',
          *(number(row.values, k) for k in shown)])
    if len(members) > 1 and group in found:
      table.append(_macro(group, found[group], len(members), len(shown)))
  table.append(_macro('all', found['all'], len(rows), len(shown)))
  blocks: list[documents.Block] = [
      documents.Title(1, title),
      documents.Table(
          ['set', 'questions', 'EM', 'F1', 'F1, 95 %', *shown.values()], table),
      documents.Text(
          'Macro averages weigh each set alike and leave out what was '
          'skipped. Intervals are over articles and their questions.')
  ]
  skipped = [(f'{row.group}/{row.name}', row.reason) for row in rows
             if row.values is None]
  if skipped:
    blocks += [
        documents.Title(
            2, f'{len(skipped)} of {len(rows)} sets could not be '
            'had'),
        documents.Items(skipped)
    ]
  return blocks


def _macro(name: str, values: Mapping[str, float], count: int,
           columns: int) -> list[str]:
  return [f'macro average of {name}', f'{values["sets"]} of {count} sets',
          *(f'{values[k]:.2f}' for k in SCORES), *['–'] * (1 + columns)]
