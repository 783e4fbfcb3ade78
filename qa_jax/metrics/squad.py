"""Exact match and F1 of the official SQuAD scripts, and their best thresholds.

Glossary of shapes: N questions. The two official scripts differ, and each is
matched to the last digit: evaluate-v1.1.py (Rajpurkar et al., 2016) and
evaluate-v2.0.py (Rajpurkar et al., 2018), as they add up before Python 3.12,
whose `sum` compensates rounding. Where the scripts crash, a question without a
prediction scores 0 here, and a question that cannot be scored is a UserError.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import numbers
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.data import examples as examples_lib
from qa_jax.data.examples import Example
from qa_jax.metrics import selective

VERSIONS = ('auto', '1.1', '2.0')


def score_answer(prediction: str, golds: Sequence[str], *,
                 version: str) -> tuple[float, float]:
  """Returns exact match and F1 of a prediction, 0 … 1: the best over the golds.

  Version '2.0' drops golds that normalise to '' and, if none is left, expects
  no answer. Version '1.1' scores with all golds and needs at least one.

  Raises:
    UserError: the version is neither, `golds` is a text, or version '1.1' has
      no gold.
  """
  errors.check_choice('score_answer', 'version', version, VERSIONS[1:])
  if isinstance(golds, str):
    raise errors.UserError(
        f'score_answer: golds={golds!r} is a text, expected a list of texts')
  errors.require(version == '2.0' or len(golds) > 0,
                 "score_answer: version '1.1' needs a gold text")
  predicted = examples_lib.normalize_answer(prediction)
  expected = [examples_lib.normalize_answer(g) for g in dict.fromkeys(golds)]
  if version == '2.0':
    expected = [g for g in expected if g] or ['']
  tokens = predicted.split()
  return (float(predicted in expected),
          max(_f1(tokens, g.split(), version) for g in expected))


def _f1(predicted: list[str], expected: list[str], version: str) -> float:
  """Computes F1 over bags of tokens.

  Two empty bags are equal in version '2.0', but have nothing in common in
  version '1.1': there the prediction "the" for the gold "the" has EM 1, F1 0.
  """
  if version == '2.0' and not (predicted and expected):
    return float(predicted == expected)
  if set(predicted).isdisjoint(expected):
    return 0.0
  common = (collections.Counter(predicted)
            & collections.Counter(expected)).total()
  precision, recall = common / len(predicted), common / len(expected)
  return 2 * precision * recall / (precision + recall)


def per_question(examples: Iterable[Example], predictions: Mapping[str, str],
                 version: str = 'auto') -> np.ndarray:  # [2, N]
  """Computes exact match and F1 of every question, float64, 0 … 1.

  Version 'auto' is '2.0' if any question is impossible, else '1.1'.

  Raises:
    UserError: the version is unknown, or is 1.1 and a question has no gold.
  """
  examples = list(examples)
  version = resolve_version(examples, version)
  scores = np.zeros((2, len(examples)))
  for i, example in enumerate(examples):
    if version == '1.1' and not example.gold_texts:
      raise errors.UserError(
          f'question {example.id!r} has no gold answer, which version 1.1 '
          'cannot score; mark it is_impossible or leave it out')
    if example.id in predictions:
      scores[:, i] = score_answer(
          predictions[example.id], example.gold_texts, version=version)
  return scores


def empty_scores(examples: Iterable[Example], version: str = 'auto'
                 ) -> np.ndarray:  # [2, N]
  """Computes exact match and F1 of the empty text for every question, 0 … 1.

  It is right for a question without answer, and for a gold that normalises to
  ''. Raises as `per_question`.
  """
  examples = list(examples)
  return per_question(examples, {e.id: '' for e in examples}, version)


def squad_metrics(
    examples: Iterable[Example] | None = None,
    predictions: Mapping[str, str] | Sequence[Mapping[str, Any]] = (), *,
    references: Sequence[Mapping[str, Any]] | None = None,
    na_scores: Mapping[str, float] | None = None,
    na_threshold: float = 1.0, version: str = 'auto') -> dict[str, float]:
  """Computes the official metrics of predictions: percentages and counts.

  `predictions` are texts by question id. They may also be rows of Hugging
  Face's `evaluate`, {id, prediction_text} and for version 2.0 also
  no_answer_probability; and `references`, {id, answers: {text, answer_start}},
  may stand for `examples`.

  The keys are those of metrics.json. `missing` counts questions without a
  prediction, which score 0. `unknown` counts predictions of unknown questions.
  Both keys are left out if the count is 0.

  Version 2.0 also takes no-answer scores, which are higher the surer it is that
  there is no answer; version 1.1 ignores them. If the score exceeds
  `na_threshold`, the question is declined: this scores 1 if it has no answer,
  else 0, as in the official script. The best thresholds (`best_*`) are over
  `predictions`, so no threshold may have been applied to these before: an
  answer that is already '' cannot come back. `Predictions` does both.

  Raises:
    UserError: there is no question, a question cannot be scored, a row has
      wrong fields, or a prediction is no text, or a no-answer score or the
      threshold no number.
  """
  if (examples is None) == (references is None):
    raise errors.UserError('squad_metrics: give one of examples and references')
  if not isinstance(predictions, Mapping):
    rows = _by_id(predictions, 'predictions')
    predictions = {key: examples_lib.text_field(
        row, 'prediction_text', f'predictions: {key}')
                   for key, row in rows.items()}
    probabilities = _no_answer_probabilities(rows)
    if na_scores is not None and probabilities:
      raise errors.UserError(
          'squad_metrics: na_scores and no_answer_probability contradict each '
          'other; give one of them')
    na_scores = probabilities or na_scores
    # `evaluate` has a metric for each version; that of 2.0 needs probabilities.
    if version == 'auto' and references is not None and probabilities:
      version = '2.0'
  if references is not None:
    examples = [_reference_example(key, row) for key, row in _by_id(
        references, 'references').items()]
  examples = list(examples)
  if not examples:
    raise errors.UserError('there is no question to score')
  if not isinstance(examples[0], Example):
    raise errors.UserError(
        f'squad_metrics: examples[0] is {examples[0]!r:.80}, expected an '
        "Example; give rows of Hugging Face's evaluate as references=")
  _check_values(predictions, 'predictions', str, 'a text')
  _check_values(na_scores or {}, 'na_scores', numbers.Real, 'a number')
  version = resolve_version(examples, version)
  answered = per_question(examples, predictions, version)
  if version == '1.1' or na_scores is None:
    return summarize_scores(examples, predictions, answered, version)
  errors.require(
      isinstance(na_threshold, numbers.Real) and na_threshold == na_threshold,
      f'squad_metrics: na_threshold is {na_threshold!r}, expected a number')
  check_covers(na_scores, examples)
  declined = [e.id in predictions and selective.declines(
      na_scores[e.id], na_threshold) for e in examples]
  scores = np.where(declined, [not e.gold_texts for e in examples], answered)
  return (summarize_scores(examples, predictions, scores, version)
          | best_thresholds(examples, predictions, answered, na_scores))


def _check_values(values: Mapping[str, Any], where: str, kind: type,
                  expected: str) -> None:
  for key, value in values.items():
    if not isinstance(value, kind) or value != value:
      raise errors.UserError(
          f'squad_metrics: {where}[{key!r}] is {value!r}, expected {expected}')


def _by_id(rows: Any, where: str) -> dict[str, Mapping[str, Any]]:
  if not isinstance(rows, Sequence) or isinstance(rows, str):
    raise errors.UserError(
        f'{where} is {type(rows).__name__}, expected a list of dicts')
  table: dict[str, Mapping[str, Any]] = {}
  for i, row in enumerate(rows):
    key = examples_lib.id_field(row, 'id', f'{where}[{i}]')
    if key in table:
      raise errors.UserError(f'{where}[{i}]: the id {key!r} stands there twice')
    table[key] = row
  return table


def _no_answer_probabilities(rows: Mapping[str, Mapping[str, Any]]
                             ) -> dict[str, float]:
  values = {key: row['no_answer_probability'] for key, row in rows.items()
            if 'no_answer_probability' in row}
  if values and len(values) < len(rows):
    missing = next(key for key in rows if key not in values)
    raise errors.UserError(f'predictions: {missing} has no '
                           "'no_answer_probability', but others have it")
  return values


def _reference_example(key: str, row: Mapping[str, Any]) -> Example:
  """Returns a question without context, whose gold texts are the answers."""
  answers = examples_lib.required_field(row, 'answers', dict,
                                        f'references: {key}')
  texts = examples_lib.required_field(answers, 'text', list,
                                      f'references: {key}.answers')
  return Example(key, '', '', impossible=not texts, accepted=tuple(
      examples_lib.check_text(text, f'references: {key}.answers.text')
      for text in texts))


def summarize_scores(examples: Sequence[Example],
                     predictions: Mapping[str, str],
                     scores: np.ndarray,  # [2, N] exact match and F1, 0 … 1
                     version: str) -> dict[str, float]:
  """Computes the entries of metrics.json that need no no-answer scores."""
  em, f1 = scores
  has_answer = np.array([bool(e.gold_texts) for e in examples])
  ids = {e.id for e in examples}
  values = {'exact_match': _percent(em), 'f1': _percent(f1), 'total': len(em)}
  values |= {name: len(odd) for name, odd in (
      ('missing', ids - predictions.keys()),
      ('unknown', predictions.keys() - ids)) if odd}
  if version == '1.1':
    return values
  if has_answer.any():
    values |= {'has_answer_exact_match': _percent(em[has_answer]),
               'has_answer_f1': _percent(f1[has_answer]),
               'has_answer_total': int(has_answer.sum())}
  if not has_answer.all():
    values |= {'no_answer_exact_match': _percent(em[~has_answer]),
               'no_answer_total': int((~has_answer).sum())}
  return values


def best_thresholds(examples: Sequence[Example], answers: Mapping[str, str],
                    scores: np.ndarray,  # [2, N] of these answers, 0 … 1
                    na_scores: Mapping[str, float]) -> dict[str, float]:
  """Computes the best EM and F1 over all thresholds, with their thresholds."""
  values = {}
  for name, x in zip(('exact_match', 'f1'), scores, strict=True):
    values[f'best_{name}'], values[f'best_{name}_threshold'] = best_threshold(
        examples, answers, x, na_scores)
  return values


def best_threshold(examples: Sequence[Example], answers: Mapping[str, str],
                   scores: np.ndarray,  # [N] of these answers, 0 … 1
                   na_scores: Mapping[str, float]) -> tuple[float, float]:
  """Returns the best score over all thresholds, in percent, and its threshold.

  The sweep starts with no answer to any question (threshold 0.0, whatever the
  scale of the scores). Questions then get their answers by rising no-answer
  score, and the first maximum is returned. Questions of equal score are taken
  one by one in the order of `na_scores`, as the official script does, so no
  threshold may reach a best score that lies inside a tie.
  """
  # Answering a question without answer loses the point that '' had. The
  # official script tests the raw text here, so that 'the' loses it as well.
  gain = {e.id: s if e.gold_texts else -float(bool(answers.get(e.id)))
          for e, s in zip(examples, scores.tolist(), strict=True)}
  order = [k for k in sorted(na_scores, key=na_scores.__getitem__)
           if k in gain]
  unanswered = sum(not e.gold_texts and e.id in answers for e in examples)
  path = np.cumsum([unanswered, *(gain[k] for k in order)], dtype=np.float64)
  best = int(path.argmax())
  return (100.0 * float(path[best]) / len(examples),
          float(na_scores[order[best - 1]]) if best else 0.0)


def answers_nothing(metrics: Mapping[str, float], score: str) -> bool:
  """Returns whether the best of metrics.json is to answer no question.

  `score` is 'exact_match' or 'f1'. The official script then reports the
  threshold 0.0, whatever the scale of the no-answer scores is. A true threshold
  of 0.0 has a better score than no answer at all.
  """
  unanswerable = 100.0 * metrics.get('no_answer_total', 0) / metrics['total']
  return (metrics[f'best_{score}_threshold'] == 0.0
          and metrics[f'best_{score}'] <= unanswerable)


def resolve_version(examples: Sequence[Example], version: str) -> str:
  """Returns '1.1' or '2.0'; raises a UserError if version is unknown."""
  if version not in VERSIONS:
    raise errors.UserError(
        f'version {version!r} is none of {", ".join(VERSIONS)}')
  if version == 'auto':
    return '2.0' if any(e.impossible for e in examples) else '1.1'
  return version


def check_covers(na_scores: Mapping[str, float],
                 examples: Sequence[Example]) -> None:
  """Raises a UserError unless every question has a no-answer score."""
  without = [e.id for e in examples if e.id not in na_scores]
  if without:
    raise errors.UserError(
        f'{len(without)} of {len(examples)} questions have no na_score, the '
        f'first is {without[0]!r}; give one for every question')


def _percent(values: np.ndarray) -> float:
  # np.sum adds in pairs and rounds unlike the scripts.
  return 100.0 * float(np.cumsum(values)[-1]) / len(values)
