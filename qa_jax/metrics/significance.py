"""Is a difference between two systems more than chance, on the same questions?

Glossary of shapes: S seeds, A articles, N questions, V comparisons.

Numpy and scipy alone. A question's difference is score(variant) -
score(default). Averaged over seeds, what a seed changes for all questions at
once is in there too and no test over questions sees it; nor does it see that
the questions of an article are alike. Hence intervals by `hierarchical`, and
tests over the sums of articles beside those over questions.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999  # sign flips; p is at least 2 / (RESAMPLES + 1)
BOOTSTRAPS = 1999
_BATCH = 256  # resamples held in memory at a time
_DRAWN = 2**19  # questions held in memory at a time


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


def bootstrap_interval(
    differences: np.ndarray,  # [N]
    *,
    seed: int,
    level: float = 0.95) -> tuple[float, float]:
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


def hierarchical_interval(
    differences: np.ndarray,  # [S, N]
    articles: Sequence[str],  # [N], of each question
    *,
    seed: int,
    level: float = 0.95) -> tuple[float, float]:
  """The percentile bootstrap interval of the mean over seeds, articles and
  questions of these.

  Seeds and questions are crossed: a draw takes S seeds, and on its own A
  articles and, from each, as many questions as it has (Davison and Hinkley,
  1997, section 3.8, strategy with replacement at both levels). With few seeds
  their part is too narrow, by √((S - 1) / S).
  """
  _, group = np.unique(np.asarray(articles), return_inverse=True)
  order = np.argsort(group, kind='stable')
  x = differences[:, order]
  size = np.bincount(group)
  first = np.cumsum(size) - size
  rng = np.random.default_rng(seed)
  means = []
  for count in _portions(BOOTSTRAPS, max(1, _DRAWN // x.shape[1])):
    drawn = rng.integers(len(size), size=(count, len(size)))
    taken = size[drawn].sum(axis=1)
    drawn = drawn.reshape(-1)
    room = np.repeat(size[drawn], size[drawn])
    questions = np.repeat(first[drawn], size[drawn]) + (
        rng.random(len(room)) * room).astype(np.int64)
    of_seed = np.add.reduceat(
        x[:, questions], np.cumsum(taken) - taken, axis=1) / taken
    seeds = rng.integers(len(x), size=(len(x), count))
    means.append(np.take_along_axis(of_seed, seeds, axis=0).mean(axis=0))
  means = np.concatenate(means)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _portions(total: int, most: int) -> list[int]:
  return [min(most, total - done) for done in range(0, total, most)]


def article_sums(differences: np.ndarray,  # [N]
                 articles: Sequence[str]) -> np.ndarray:  # [A]
  """Of each article; `sign_flip` of them exchanges whole articles."""
  _, group = np.unique(np.asarray(articles), return_inverse=True)
  return np.bincount(group, differences)


def holm_adjust(p_values: Sequence[float]) -> np.ndarray:  # [V]
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
