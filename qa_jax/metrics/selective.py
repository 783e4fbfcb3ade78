"""When to answer: thresholds, risk and coverage, precision and recall.

Glossary of shapes: N questions.

Strings and numpy only; all shares are percentages but where it is said.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qa_jax.data.examples import Example
from qa_jax.metrics import squad

COVERAGE = 80.0  # percent of the questions answered, of one figure
AT_COVERAGE = f'score_at_{COVERAGE:.0f}'
CURVE_POINTS = 101


def thresholds(examples: Sequence[Example], always: Mapping[str, str],
               na_scores: Mapping[str, float],
               held_out: float | None) -> dict[str, dict[str, float]]:
  """Scores at threshold 0, at the held-out one if there is, and at the best of
  these very questions: an oracle, as the official script reports.

  `always` are answers that no threshold has touched.
  """
  chosen = {'zero': 0.0} | (
      {} if held_out is None else {'held_out': held_out})
  out = {}
  for name, threshold in chosen.items():
    values = squad.squad_metrics(
        examples, {k: '' if na_scores[k] > threshold else text
                   for k, text in always.items()})
    out[name] = {'threshold': threshold, **{k: values[k] for k in (
        'exact_match', 'f1', 'has_answer_f1', 'no_answer_exact_match')
                                            if k in values}}
  best = squad.squad_metrics(
      examples, always, na_scores=na_scores, always_answer=always)
  if 'best_f1' in best:
    out['oracle'] = {'threshold': best['best_f1_threshold'],
                     'exact_match': best['best_exact_match'],
                     'f1': best['best_f1']}
  return out


def precision_recall(score: np.ndarray,  # [N], higher: surer it is positive
                     positive: np.ndarray,  # [N] bool
                     ) -> list[list[float]]:
  """[recall, precision] at each threshold, ties at once, recall rising; of many
  the CURVE_POINTS nearest to equal steps of recall."""
  _, group = np.unique(-score, return_inverse=True)
  found = np.cumsum(np.bincount(group, positive))
  taken = np.cumsum(np.bincount(group))
  recall, precision = 100 * found / positive.sum(), 100 * found / taken
  keep = np.unique(np.searchsorted(
      recall, np.linspace(recall[0], 100, CURVE_POINTS)).clip(
          max=len(recall) - 1)) if len(recall) > CURVE_POINTS else slice(None)
  return np.stack([recall, precision], axis=1)[keep].tolist()


def risk_coverage(confidence: np.ndarray,  # [N]
                  score: np.ndarray,  # [N] of answering, 0 … 1
                  ) -> dict[str, Any]:
  """What answering only the surest questions gains.

  El-Yaniv and Wiener (2010). `score_at_80` is the mean score, in percent, of
  the COVERAGE percent answered with the most confidence, `area` the mean over
  all coverages 1/N … 1 (100 - AURC); questions of equal confidence are taken
  together, each at their mean score.
  """
  order = np.argsort(-confidence, kind='stable')
  _, group = np.unique(-confidence[order], return_inverse=True)
  mean = np.bincount(group, score[order]) / np.bincount(group)
  reached = np.cumsum(mean[group]) / np.arange(1, len(score) + 1) * 100
  at = lambda percent: max(int(np.ceil(percent / 100 * len(score))), 1) - 1
  coverage = np.linspace(0, 100, CURVE_POINTS)[1:]
  return {AT_COVERAGE: float(reached[at(COVERAGE)]),
          'score_at_100': float(reached[-1]), 'area': float(reached.mean()),
          'curve': [[float(c), float(reached[at(c)])] for c in coverage]}


def average_precision(score: np.ndarray,  # [N], higher: surer it is positive
                      positive: np.ndarray,  # [N] bool
                      ) -> float:
  """Σ (recall step · precision) over thresholds, ties at once; 0 … 1."""
  values, group = np.unique(-score, return_inverse=True)
  hits = np.bincount(group, positive, len(values))
  found, taken = np.cumsum(hits), np.cumsum(np.bincount(group))
  return float((hits / positive.sum() * found / taken).sum())
