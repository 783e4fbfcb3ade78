"""Null thresholds, and curves of selective prediction.

Glossary of shapes: N questions. Shares are percentages unless a docstring says
otherwise.
"""

from typing import Any

import numpy as np

COVERAGE = 80  # percent of the questions answered, for one score of a report
AT_COVERAGE = f'score_at_{COVERAGE}'
CURVE_POINTS = 101


def declines(na_score: Any, threshold: float) -> Any:
  """Returns whether a no-answer score exceeds the null threshold, elementwise.

  A question of such a score gets no answer; at the threshold it still gets one.
  """
  return na_score > threshold


def precision_recall(score: np.ndarray,  # [N], higher: more surely positive
                     positive: np.ndarray) -> list[list[float]]:  # [N] bool
  """Computes [recall, precision] at each threshold, by rising recall.

  Equal scores are one threshold. A curve of more than CURVE_POINTS thresholds
  is reduced to the first points at or above equal steps of recall.
  """
  _, group = np.unique(-score, return_inverse=True)
  true_positives = np.cumsum(np.bincount(group, positive))
  retrieved = np.cumsum(np.bincount(group))
  recall = 100 * true_positives / positive.sum()
  curve = np.stack([recall, 100 * true_positives / retrieved], axis=1)
  if len(curve) > CURVE_POINTS:
    first = np.searchsorted(recall, np.linspace(recall[0], 100, CURVE_POINTS))
    curve = curve[np.unique(first)]
  return curve.tolist()


def average_precision(score: np.ndarray,  # [N], higher: more surely positive
                      positive: np.ndarray) -> float:  # [N] bool
  """Computes the sum of (recall step · precision) over thresholds, 0 … 1."""
  _, group = np.unique(-score, return_inverse=True)
  hits = np.bincount(group, positive)
  true_positives, retrieved = np.cumsum(hits), np.cumsum(np.bincount(group))
  return float((hits / positive.sum() * true_positives / retrieved).sum())


def risk_coverage(confidence: np.ndarray,  # [N]
                  score: np.ndarray) -> dict[str, Any]:  # [N], 0 … 1
  """Computes the mean score of the most confident questions, by coverage.

  See El-Yaniv and Wiener (2010). `score_at_80` is the mean score, in percent,
  of the COVERAGE percent of questions with the highest confidence. `area` is
  the mean over all coverages 1/N … 1, which is 100 - AURC. Questions of equal
  confidence each count with the mean score of these questions.
  """
  order = np.argsort(-confidence, kind='stable')
  _, group = np.unique(-confidence[order], return_inverse=True)
  mean = np.bincount(group, score[order]) / np.bincount(group)
  running = np.cumsum(mean[group]) / np.arange(1, len(score) + 1) * 100
  # Whole numbers: 0.07 * 100 is above 7, so its ceiling would be 8 questions.
  at = lambda percent: float(running[-(-percent * len(score) // 100) - 1])
  return {AT_COVERAGE: at(COVERAGE), 'score_at_100': float(running[-1]),
          'area': float(running.mean()),
          'curve': [[float(c), at(c)] for c in range(1, 101)]}
