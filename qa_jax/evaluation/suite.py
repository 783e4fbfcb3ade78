"""Evaluation of one model on many data sets, with macro averages."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import examples as examples_lib
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from qa_jax.runtime import console

SCORES = ('exact_match', 'f1')
ALL = 'all'  # the name of the average of all sets


@dataclasses.dataclass(frozen=True)
class Row:
  """The result of one data set of a suite."""

  group: str
  name: str
  data: str  # SPEC
  metrics: Mapping[str, float] | None  # as metrics.json; None: not available
  low: float = math.nan  # 95 % interval of F1 over articles and questions
  high: float = math.nan
  reason: str = ''  # why the data is not available


def check_suite(groups: Any) -> dict[str, dict[str, str]]:
  """Returns {group: {name: SPEC}}; raises a UserError at another form."""
  if not (isinstance(groups, Mapping) and groups and all(
      isinstance(sets, Mapping) and sets
      and all(isinstance(spec, str) and spec for spec in sets.values())
      for sets in groups.values())):
    raise errors.UserError(
        'a suite is {group: {name: data SPEC}}, none of them empty; see '
        'configs/suites')
  errors.require(
      ALL not in groups,
      f'a suite has a group {ALL!r}, which is the name of the average of all '
      'sets; rename the group')
  return {group: dict(sets) for group, sets in groups.items()}


def run_suite(qa: predict.QA, groups: Mapping[str, Mapping[str, str]],
              output: pathlib.Path, *, seed: int = 0) -> list[Row]:
  """Evaluates a model on every available set of a suite.

  The files of a set go into `output`/GROUP/NAME. A set that cannot be read is
  skipped, with a line that says why. `seed` is that of the resampling.

  Raises:
    UserError: no set can be read, or scores are not finite.
  """
  rows = []
  for group, sets in groups.items():
    for name, data in sets.items():
      try:
        windows, note = input_pipeline.load_windows(
            qa.config, data, qa.tokenizer)
        examples_lib.check_answered(windows.examples, data)
      except errors.UserError as e:
        console.say(f'SKIPPED {group}/{name}: {e}')
        rows.append(Row(group, name, data, None, reason=str(e)))
        continue
      console.say(note)
      folder = output / group / name
      metrics = evaluator.evaluate_windows(
          qa, windows, output=folder, progress=name)
      _, f1 = squad.per_question(
          windows.examples, predictions_lib.read_predictions(
              folder / predictions_lib.PREDICTIONS))
      low, high = significance.hierarchical_interval(
          100 * f1[None], [e.article for e in windows.examples], seed=seed)
      rows.append(Row(group, name, data, metrics, low, high))
  if all(row.metrics is None for row in rows):
    raise errors.UserError(
        f'none of the {len(rows)} sets of the suite can be had; the first: '
        f'{rows[0].reason}')
  return rows


def averages(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
  """Computes the mean over available sets, of each group and of all."""
  available = [row for row in rows if row.metrics is not None]
  groups = {group: [row for row in available if row.group == group]
            for group in dict.fromkeys(row.group for row in available)}
  return {name: {'sets': len(members), **{
      score: float(np.mean([row.metrics[score] for row in members]))
      for score in SCORES}}
          for name, members in {**groups, ALL: available}.items()}


def write_suite(rows: Sequence[Row], output: pathlib.Path,
                title: str) -> list[documents.Block]:
  """Writes suite.{json,md,html}, and returns the blocks of the report."""
  macro = averages(rows)
  files.write_json(output / 'suite.json', {
      'sets': [{'group': row.group, 'name': row.name, 'data': row.data,
                'metrics': row.metrics, 'skipped': row.reason,
                **({} if row.metrics is None else {
                    'f1_low': row.low, 'f1_high': row.high})}
               for row in rows], 'macro': macro})
  blocks = _blocks(rows, macro, title)
  files.write_text(output / 'suite.md', documents.to_markdown(blocks))
  files.write_text(output / 'suite.html', documents.to_html(blocks, output))
  return blocks


def _blocks(rows: Sequence[Row], macro: Mapping[str, Mapping[str, float]],
            title: str) -> list[documents.Block]:
  any_has = lambda key: any(key in (row.metrics or {}) for row in rows)
  extra = {'has_answer_f1': 'HasAns F1', 'no_answer_exact_match': 'NoAns'}
  if any_has('at_held_out_f1'):
    extra |= {'at_zero_f1': 'F1 at 0', 'best_f1': 'F1, oracle'}
  shown = {key: header for key, header in extra.items() if any_has(key)}
  number = lambda values, key: f'{values[key]:.2f}' if key in values else '–'
  macro_row = lambda name, count: [
      f'macro average of {name}', f'{macro[name]["sets"]} of {count} sets',
      *(number(macro[name], k) for k in SCORES), *['–'] * (1 + len(shown))]
  table = []
  for group in dict.fromkeys(row.group for row in rows):
    members = [row for row in rows if row.group == group]
    for row in members:
      cells = ['SKIPPED', *['–'] * (3 + len(shown))] if not row.metrics else [
          str(row.metrics['total']), *(number(row.metrics, k) for k in SCORES),
          f'{row.low:.2f} … {row.high:.2f}',
          *(number(row.metrics, k) for k in shown)]
      table.append([f'{group}/{row.name}', *cells])
    if len(members) > 1 and group in macro:
      table.append(macro_row(group, len(members)))
  table.append(macro_row(ALL, len(rows)))
  blocks: list[documents.Block] = [
      documents.Title(1, title),
      documents.Table(
          ['set', 'questions', 'EM', 'F1', 'F1, 95 %', *shown.values()], table),
      documents.Text(
          'Macro averages give each set the same weight and leave out skipped '
          'sets. Intervals are over articles and their questions.')]
  skipped = [(f'{row.group}/{row.name}', row.reason) for row in rows
             if row.metrics is None]
  if skipped:
    blocks += [documents.Title(
        2, f'{len(skipped)} of {len(rows)} sets could not be read'),
               documents.Items(skipped)]
  return blocks
