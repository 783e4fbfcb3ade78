"""Official SQuAD exact match and F1, thresholds, and files of predictions.

Strings and numpy only. The two official scripts differ, and both are matched
to the last digit: evaluate-v1.1.py (Rajpurkar et al., 2016) and
evaluate-v2.0.py (Rajpurkar et al., 2018), as they add up before Python 3.12,
whose `sum` compensates rounding. Where they crash, we say so or define it:
a question without a prediction scores 0 in both versions.

Glossary of shapes: N questions.
"""

import collections
from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.data import examples as examples_lib
from qa_jax.data.examples import Example
from qa_jax.io import files

VERSIONS = ('auto', '1.1', '2.0')


def score_answer(prediction: str, golds: Sequence[str], *,
                 version: str) -> tuple[float, float]:
  """Exact match and F1 of a prediction, 0 … 1: each the best over the golds.

  Version '2.0' drops golds that normalise to '' and, if none is left, expects
  no answer; version '1.1' keeps them and needs at least one.
  """
  predicted = examples_lib.normalize_answer(prediction)
  expected = [examples_lib.normalize_answer(g) for g in dict.fromkeys(golds)]
  if version == '2.0':
    expected = [g for g in expected if g] or ['']
  tokens = predicted.split()
  return (float(predicted in expected),
          max(_f1(tokens, g.split(), version) for g in expected))


def _f1(predicted: list[str], expected: list[str], version: str) -> float:
  """F1 over bags of tokens. Two empty bags are equal in version '2.0', but
  have nothing in common in '1.1': there "the" for "the" is EM 1 and F1 0."""
  if version == '2.0' and not (predicted and expected):
    return float(predicted == expected)
  if set(predicted).isdisjoint(expected):
    return 0.0
  common = (collections.Counter(predicted)
            & collections.Counter(expected)).total()
  precision, recall = common / len(predicted), common / len(expected)
  return 2 * precision * recall / (precision + recall)


def per_question(examples: Sequence[Example], predictions: Mapping[str, str],
                 version: str = 'auto', *,
                 known: dict[tuple[int, str], tuple[float, float]] | None = None
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Exact match and F1 of every question, [N] float64 each, 0 … 1.

  Version 'auto' is '2.0' if any question is impossible, else '1.1'. `known`
  keeps what a text scores at a position, for another call with these examples.

  Raises:
    UserError: no such version, or version 1.1 and a question without golds.
  """
  version, known = _resolve(examples, version), {} if known is None else known
  scores = np.zeros((2, len(examples)))
  for i, example in enumerate(examples):
    if version == '1.1' and not example.gold_texts:
      raise errors.UserError(
          f'question {example.id!r} has no gold answer, which version 1.1 '
          'cannot score; mark it is_impossible or leave it out')
    if example.id in predictions:
      key = i, predictions[example.id]
      if key not in known:
        known[key] = score_answer(key[1], example.gold_texts, version=version)
      scores[:, i] = known[key]
  return scores[0], scores[1]


def squad_metrics(examples: Sequence[Example],
                  predictions: Mapping[str, str], *,
                  na_scores: Mapping[str, float] | None = None,
                  always_answer: Mapping[str, str] | None = None,
                  na_threshold: float | None = None,
                  version: str = 'auto') -> dict[str, float]:
  """What metrics.json holds: percentages, and counts of questions.

  `missing` questions have no prediction and score 0, `unknown` predictions no
  question; either is there only if it is not 0. Version 1.1 has no `na_scores`
  and ignores them. In 2.0 they are higher the surer it is that there is no
  answer, and a prediction whose score exceeds `na_threshold` counts as ''.

  Best thresholds are read from `always_answer`, predictions that no threshold
  has touched, since an answer that is already '' cannot come back. Without it
  `predictions` are taken to be such, and `na_threshold` to be 1.0: what the
  official script does with two files. With it, no threshold is the default.

  Raises:
    UserError: no question, or a question that cannot be scored.
  """
  if not examples:
    raise errors.UserError('there is no question to score')
  version = _resolve(examples, version)
  known: dict[tuple[int, str], tuple[float, float]] = {}
  em, f1 = per_question(examples, predictions, version, known=known)
  has_answer = np.array([bool(e.gold_texts) for e in examples])
  if version == '2.0' and na_scores is not None:
    check_covers(na_scores, examples)
    if na_threshold is None:
      na_threshold = 1.0 if always_answer is None else math.inf
    silent = np.array([e.id in predictions and na_scores[e.id] > na_threshold
                       for e in examples])
    em = np.where(silent, ~has_answer, em)
    f1 = np.where(silent, ~has_answer, f1)

  ids = {e.id for e in examples}
  out = {'exact_match': _percent(em), 'f1': _percent(f1), 'total': len(em)}
  for name, odd in (('missing', ids - predictions.keys()),
                    ('unknown', predictions.keys() - ids)):
    if odd:
      out[name] = len(odd)
  if version == '1.1':
    return out
  if has_answer.any():
    out |= {'has_answer_exact_match': _percent(em[has_answer]),
            'has_answer_f1': _percent(f1[has_answer]),
            'has_answer_total': int(has_answer.sum())}
  if not has_answer.all():
    out |= {'no_answer_exact_match': _percent(em[~has_answer]),
            'no_answer_total': int((~has_answer).sum())}
  if na_scores is not None:
    answers = predictions if always_answer is None else always_answer
    for name, scores in zip(
        ('exact_match', 'f1'), per_question(
            examples, answers, version, known=known), strict=True):
      out[f'best_{name}'], out[f'best_{name}_threshold'] = best_threshold(
          examples, answers, scores, na_scores)
  return out


def best_threshold(examples: Sequence[Example], answers: Mapping[str, str],
                   scores: np.ndarray,  # [N] of these answers, 0 … 1
                   na_scores: Mapping[str, float]) -> tuple[float, float]:
  """The best score over all thresholds, in percent, and its threshold.

  Starts with no answer to any question (threshold 0.0, whatever the scale)
  and lets them answer by rising na_score; the first maximum wins. Ties are
  taken one by one in the order of `na_scores`, so that a best score inside a
  tie may not be reachable by a threshold: so does the official script.
  """
  # Answering what has no answer loses the point that '' had; the official
  # script looks at the raw text here, so that 'the' loses it as well.
  gain = {e.id: s if e.gold_texts else -float(bool(answers.get(e.id)))
          for e, s in zip(examples, scores.tolist(), strict=True)}
  order = [k for k in sorted(na_scores, key=na_scores.__getitem__)
           if k in gain]
  silent = sum(not e.gold_texts and e.id in answers for e in examples)
  path = np.cumsum([silent, *(gain[k] for k in order)], dtype=np.float64)
  best = int(path.argmax())
  return (100.0 * float(path[best]) / len(examples),
          float(na_scores[order[best - 1]]) if best else 0.0)


def read_predictions(path: pathlib.Path) -> dict[str, str]:
  """{question id: text} of a JSON file.

  Raises:
    UserError: unreadable, of another shape, or an id twice.
  """
  return _read_map(path, str, 'a string')


def read_na_probs(path: pathlib.Path) -> dict[str, float]:
  """{question id: score} of a JSON file, in its order; scores are finite.

  Raises:
    UserError: unreadable, of another shape, an id twice, NaN or infinity.
  """
  scores = _read_map(path, float, 'a number', parse_int=float)
  for key, score in scores.items():
    if not math.isfinite(score):
      raise errors.UserError(
          f'{path}: {key!r} is {score}, expected a finite number')
  return scores


def _read_map(path: pathlib.Path, kind: type, what: str,
              **options: Any) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
      if key in found:
        raise errors.UserError(f'{path}: {key!r} stands there twice')
      found[key] = value
    return found

  values = files.parse_object(
      files.read_text(path), path, object_pairs_hook=unique, **options)
  for key, value in values.items():
    if not isinstance(value, kind):
      raise errors.UserError(
          f'{path}: {key!r} is {json.dumps(value)[:80]}, expected {what}')
  return values


def _resolve(examples: Sequence[Example], version: str) -> str:
  if version not in VERSIONS:
    raise errors.UserError(
        f'version {version!r} is none of {", ".join(VERSIONS)}')
  if version == 'auto':
    return '2.0' if any(e.impossible for e in examples) else '1.1'
  return version


def check_covers(na_scores: Mapping[str, float],
                 examples: Sequence[Example]) -> None:
  """Raises a UserError unless every question has a score."""
  without = [e.id for e in examples if e.id not in na_scores]
  if without:
    raise errors.UserError(
        f'{len(without)} of {len(examples)} questions have no na_score, the '
        f'first is {without[0]!r}; give one for every question')


def _percent(values: np.ndarray) -> float:
  """100 · mean, added left to right: np.sum adds in pairs, and rounds
  differently."""
  return 100.0 * float(np.cumsum(values)[-1]) / len(values)
