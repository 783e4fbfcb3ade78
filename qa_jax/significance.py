"""Is a difference between two systems more than chance, on the same questions?

Glossary of shapes: N questions, V comparisons.

Numpy and scipy alone. A question's difference is score(variant) -
score(default), each averaged over seeds before; what a seed changes for all
questions at once is in there too and no test over questions sees it, so a
p-value is to be read beside the spread over seeds.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999  # sign flips; p is at least 2 / (RESAMPLES + 1)
BOOTSTRAPS = 1999
_BATCH = 256  # resamples held in memory at a time


def sign_flip(differences: np.ndarray,  # [N]
              *, seed: int) -> float:
  """The two-sided p-value of the paired permutation test of the mean.

  Swapping the two systems' scores of a question turns the sign of its
  difference; under the null hypothesis every pattern of signs is as likely as
  the one observed (Fisher's randomisation; Yeh, 2000, "More accurate tests for
  the statistical significance of result differences"). All 2^N patterns if
  that is at most RESAMPLES, else as many random ones.
  """
  changed = differences[differences != 0]  # a zero has no sign to turn
  if len(changed) < 2:  # one alone is as large with either sign
    return 1.0
  return float(stats.permutation_test(
      (changed,), lambda x, axis: x.sum(axis), permutation_type='samples',
      vectorized=True, n_resamples=RESAMPLES, batch=_BATCH,
      rng=np.random.default_rng(seed)).pvalue)


def interval(differences: np.ndarray,  # [N]
             *, seed: int, level: float = 0.95) -> tuple[float, float]:
  """The percentile bootstrap interval of the mean over drawn questions.

  Efron and Tibshirani (1993), chapter 13.
  """
  if len(differences) == 1:  # every draw is that question
    return float(differences[0]), float(differences[0])
  low, high = stats.bootstrap(
      (differences,), np.mean, method='percentile', confidence_level=level,
      n_resamples=BOOTSTRAPS, batch=_BATCH,
      rng=np.random.default_rng(seed)).confidence_interval
  return float(low), float(high)


def holm(p_values: Sequence[float]) -> np.ndarray:  # [V]
  """Adjusted p-values: those below α hold together at level α (Holm, 1979)."""
  p = np.asarray(p_values, np.float64)
  order = np.argsort(p, kind='stable')
  stepped = p[order] * np.arange(len(p), 0, -1)
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
  return adjusted


def half_width(values: Sequence[float]) -> float:
  """Of the 95 % interval of a mean, by Student's t; NaN for one value."""
  n = len(values)
  if n < 2:
    return float('nan')
  return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
