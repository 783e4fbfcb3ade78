"""Predictions of a system: scores at any null threshold, and their files.

Glossary of shapes: N questions.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.data.examples import Example
from qa_jax.io import files
from qa_jax.metrics import selective
from qa_jax.metrics import squad

PREDICTIONS = 'predictions.json'  # {question id: text}, '' for no answer
NA_PROBS = 'na_probs.json'  # {question id: no-answer score}
N_BEST = 'nbest.jsonl'  # the n-best candidates of a question in each line
METRICS = 'metrics.json'
ANEW = 'delete the file and evaluate the run again'  # if it is damaged
# Entries of metrics.json that depend on the null threshold.
AT_THRESHOLD = ('exact_match', 'f1', 'has_answer_exact_match', 'has_answer_f1',
                'no_answer_exact_match')
# Entry of metrics.json: whether the calibration, that is the threshold or the
# temperature, was fitted to the questions that it has the scores of.
CHOSEN_HERE = 'threshold_chosen_on_these_questions'


@dataclasses.dataclass(frozen=True)
class Predictions:
  """The answers of one system to all questions, before any null threshold.

  Each answer is scored once; the scores at any threshold follow from these and
  the scores of the empty text.
  """

  examples: Sequence[Example]
  answers: Mapping[str, str]  # by question id
  na_scores: Mapping[str, float] | None  # None: every question is answered
  version: str = 'auto'  # one of squad.VERSIONS

  @functools.cached_property
  def _official_version(self) -> str:
    return squad.resolve_version(self.examples, self.version)

  @functools.cached_property
  def answer_scores(self) -> np.ndarray:  # [2, N]
    """Exact match and F1 of the answers, 0 … 1."""
    return squad.per_question(self.examples, self.answers, self.version)

  @functools.cached_property
  def empty_scores(self) -> np.ndarray:  # [2, N]
    """Exact match and F1 of the empty text, 0 … 1."""
    return squad.empty_scores(self.examples, self.version)

  @functools.cached_property
  def best(self) -> dict[str, float]:
    """The `best_*` entries of metrics.json; empty in version 1.1."""
    if self.na_scores is None or self._official_version == '1.1':
      return {}
    return squad.best_thresholds(
        self.examples, self.answers, self.answer_scores, self.na_scores)

  def declined(self, threshold: float) -> np.ndarray:  # [N] bool
    """Returns which questions get no answer at a null threshold."""
    if self.na_scores is None:
      return np.zeros(len(self.examples), bool)
    return selective.declines(np.array(
        [self.na_scores[e.id] for e in self.examples]), threshold)

  def texts(self, threshold: float) -> dict[str, str]:
    """Returns {question id: text} at a null threshold, '' for no answer."""
    return {e.id: '' if declined else self.answers[e.id] for e, declined in zip(
        self.examples, self.declined(threshold), strict=True)}

  def scores(self, threshold: float) -> np.ndarray:  # [2, N]
    """Computes exact match and F1 at a null threshold, 0 … 1."""
    declined = self.declined(threshold)
    return (np.where(declined, self.empty_scores, self.answer_scores)
            if declined.any() else self.answer_scores)

  def metrics(self, threshold: float) -> dict[str, float]:
    """Computes metrics.json at a null threshold; raises as `squad_metrics`."""
    return squad.summarize_scores(
        self.examples, self.answers, self.scores(threshold),
        self._official_version) | self.best

  def thresholds(self, held_out: float | None) -> dict[str, dict[str, float]]:
    """Computes scores at threshold 0, at the held-out one and at the oracle.

    The held-out threshold was chosen on other questions; None leaves it out.
    The oracle is the best threshold of these questions in the official script.
    """
    shown = {'exact_match', 'f1', 'has_answer_f1', 'no_answer_exact_match'}
    table = {}
    for name, threshold in (('zero', 0.0), ('held_out', held_out)):
      if threshold is not None:
        values = self.metrics(threshold)
        table[name] = {'threshold': threshold, **{
            k: v for k, v in values.items() if k in shown}}
    if self.best:
      # Without a threshold, the best is to answer no question.
      nothing = squad.answers_nothing(self.metrics(0.0), 'f1')
      table['oracle'] = {**({} if nothing else {
          'threshold': self.best['best_f1_threshold']}),
                         'exact_match': self.best['best_exact_match'],
                         'f1': self.best['best_f1']}
    return table

  def held_out_metrics(self, held_out: float) -> dict[str, float]:
    """Computes the entries of metrics.json at 0 and at a held-out threshold."""
    table = self.thresholds(held_out)
    return {'held_out_threshold': held_out} | {
        f'at_{name}_{score}': table[name][score]
        for name in ('zero', 'held_out') for score in ('exact_match', 'f1')}


def write_evaluation(output: pathlib.Path, predictions: Predictions, *,
                     threshold: float, n_best: Iterable[Mapping[str, Any]],
                     metrics: Mapping[str, float] | None) -> None:
  """Writes the files of an evaluation; metrics.json comes last.

  That of an earlier evaluation goes first, so that it never stands beside other
  predictions.
  """
  stale = [METRICS] + [NA_PROBS] * (predictions.na_scores is None)
  for name in stale:
    with contextlib.suppress(OSError):
      (output / name).unlink()
  if predictions.na_scores is not None:
    files.write_json(output / NA_PROBS, predictions.na_scores)
  files.write_json(output / PREDICTIONS, predictions.texts(threshold))
  files.write_jsonl(output / N_BEST, n_best)
  if metrics is not None:
    files.write_json(output / METRICS, metrics)


def read_metrics(path: pathlib.Path) -> dict[str, Any]:
  """Reads a metrics.json, which has at least exact match and F1.

  Raises:
    UserError: the file is unreadable or lacks a score.
  """
  try:
    metrics = files.read_object(path)
  except errors.UserError as e:
    raise errors.UserError(f'{e}; {ANEW}') from None
  check_scores(path, metrics)
  return metrics


def check_scores(path: pathlib.Path, metrics: Mapping[str, Any],
                 names: Sequence[str] = ('exact_match', 'f1')) -> None:
  """Raises a UserError if an entry of the metrics.json is not a number."""
  for name in names:
    if type(metrics.get(name)) not in (int, float):
      raise errors.UserError(f'{path}: {name} is {metrics.get(name)!r}, '
                             f'expected a number; {ANEW}')


def read_predictions(path: pathlib.Path) -> dict[str, str]:
  """Reads {question id: text} from a JSON file.

  Raises:
    UserError: the file is unreadable, of another shape, or has an id twice.
  """
  return _read_map(path, str, 'a string')


def read_na_probs(path: pathlib.Path) -> dict[str, float]:
  """Reads {question id: no-answer score} from a JSON file, in its order.

  Raises:
    UserError: as in `read_predictions`, or a score is not finite.
  """
  scores = _read_map(path, float, 'a number', parse_int=float)
  for key, score in scores.items():
    if not math.isfinite(score):
      raise errors.UserError(
          f'{path}: {key!r} is {score}, expected a finite number')
  return scores


def read_n_best(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Reads {question id: row} from an nbest.jsonl.

  A row has the candidates (`answers`, best first) and the number of `windows`.
  Probabilities are not checked.

  Raises:
    UserError: the file is unreadable, of another shape, or has an id twice.
  """
  rows: dict[str, dict[str, Any]] = {}
  for where, row in files.read_rows(path):
    candidates = row.get('answers')
    if not (isinstance(row.get('id'), str) and isinstance(candidates, list)
            and isinstance(row.get('windows'), int)):
      raise errors.UserError(
          f"{where}: expected 'id', 'windows' and 'answers'; evaluate anew")
    if row['id'] in rows:
      raise errors.UserError(
          f'{where}: question {row["id"]!r} stands there twice')
    if not all(map(_is_candidate, candidates)):
      raise errors.UserError(
          f'{where}: expected answers with text, start, end and a finite score')
    rows[row['id']] = row
  return rows


def _is_candidate(value: Any) -> bool:
  return (isinstance(value, dict) and isinstance(value.get('text'), str)
          and all(isinstance(value.get(k), int) for k in ('start', 'end'))
          and isinstance(value.get('score'), int | float)
          and abs(value['score']) <= sys.float_info.max)


def _read_map(path: pathlib.Path, kind: type, expected: str,
              **options: Any) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
      if key in values:
        raise errors.UserError(f'{path}: {key!r} stands there twice')
      values[key] = value
    return values

  values = files.parse_object(
      files.read_text(path), path, object_pairs_hook=unique, **options)
  for key, value in values.items():
    if not isinstance(value, kind):
      raise errors.UserError(
          f'{path}: {key!r} is {json.dumps(value)[:80]}, expected {expected}')
  return values
