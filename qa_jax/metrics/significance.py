"""Significance of a difference between two systems on the same questions.

Glossary of shapes: S seeds, A articles, N questions, V comparisons.

A difference is the score of a question by one system minus that by another. Its
mean over seeds includes what a seed changes for all questions at once. No test
over questions can see this, nor that the questions of one article are alike.
Hence `hierarchical_interval`, and tests over `article_sums` and over seeds.
"""

from collections.abc import Sequence

import numpy as np

from qa_jax import errors

RESAMPLES = 9999  # sign flips; p is at least 2 / (RESAMPLES + 1)
BOOTSTRAPS = 1999
ALPHA = 0.05  # level of a test; intervals cover 1 - ALPHA
_BATCH = 256  # resamples of signs held in memory at a time
_VARIANCES = 2000  # quantiles of the estimated variance of a t-test
_QUESTIONS = 2**19  # questions of bootstraps held in memory at a time


def paired_difference(differences: np.ndarray,  # [S, N]
                      articles: Sequence[str],  # [N], of each question
                      *, seed: int) -> dict[str, float]:
  """Computes mean, interval, and p over questions, articles and paired seeds.

  `p_seeds` is left out if there is a single seed.
  """
  average = differences.mean(axis=0)
  return {**mean_interval(differences, articles, seed=seed),
          'p': sign_flip(average, seed=seed),
          'p_articles': sign_flip(article_sums(average, articles), seed=seed),
          **({'p_seeds': paired_t(differences.mean(axis=1))}
             if len(differences) > 1 else {})}


def paired_t(differences: np.ndarray) -> float:  # [S], S > 1
  """Returns the two-sided p-value of Student's t-test that the mean is 0."""
  from scipy import stats  # lazily: slow to import
  if np.ptp(differences) == 0:  # t is 0 / 0 or infinite
    return 1.0 if differences[0] == 0 else 0.0
  return float(stats.ttest_1samp(differences, 0.0).pvalue)


def mean_interval(values: np.ndarray,  # [S, N]
                  articles: Sequence[str], *, seed: int) -> dict[str, float]:
  """Computes a mean and its 95 % interval over seeds, articles, questions."""
  low, high = hierarchical_interval(values, articles, seed=seed)
  return {'mean': float(values.mean()), 'low': low, 'high': high}


def sign_flip(differences: np.ndarray, *, seed: int) -> float:  # [N]
  """Returns the two-sided p-value of the paired permutation test of the mean.

  Swapping the two systems' scores of a question turns the sign of its
  difference. Under the null hypothesis every pattern of signs is as likely as
  the observed one (Fisher's randomisation; Yeh, 2000, "More accurate tests for
  the statistical significance of result differences"). The test takes all 2^N
  patterns if these are at most RESAMPLES, else RESAMPLES random ones. A NaN is
  a UserError.
  """
  errors.require(
      not np.isnan(differences).any(),
      f'{np.isnan(differences).sum()} of {len(differences)} differences are '
      'NaN, which no test orders; leave out these questions in both systems')
  from scipy import stats  # lazily: slow to import
  changed = differences[differences != 0]  # a zero has no sign to turn
  if len(changed) < 2:  # both signs of a single difference are equally large
    return 1.0
  return float(stats.permutation_test(
      (changed,), lambda x, axis: x.sum(axis), permutation_type='samples',
      vectorized=True, n_resamples=RESAMPLES, batch=_BATCH,
      rng=np.random.default_rng(seed)).pvalue)


def hierarchical_interval(differences: np.ndarray,  # [S, N]
                          articles: Sequence[str], *, seed: int  # [N]
                          ) -> tuple[float, float]:
  """Computes the 95 % bootstrap interval of a mean over seeds and questions.

  Seeds and questions are crossed. Each draw takes S seeds with replacement and,
  independently, A articles and from each as many questions as it has (Davison
  and Hinkley, 1997, section 3.8, strategy with replacement at both levels). The
  seeds' part of the interval is too narrow by √((S - 1) / S).
  """
  errors.require(
      len(articles) == differences.shape[1],
      f'{len(articles)} articles for {differences.shape[1]} questions; give '
      'the article of each question')
  _, group = np.unique(np.asarray(articles), return_inverse=True)
  order = np.argsort(group, kind='stable')
  x = differences[:, order]
  size = np.bincount(group)
  first = np.cumsum(size) - size
  rng = np.random.default_rng(seed)
  means = []
  portion = max(1, _QUESTIONS // x.shape[1])
  for done in range(0, BOOTSTRAPS, portion):
    count = min(portion, BOOTSTRAPS - done)
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
  low, high = np.quantile(
      np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2])
  return float(low), float(high)


def article_sums(differences: np.ndarray,  # [N]
                 articles: Sequence[str]) -> np.ndarray:  # [A]
  """Sums differences by article, for a `sign_flip` of whole articles."""
  _, group = np.unique(np.asarray(articles), return_inverse=True)
  return np.bincount(group, differences)


def holm_adjust(p_values: Sequence[float]) -> np.ndarray:  # [V]
  """Adjusts p-values (Holm, 1979): those below α hold together at level α."""
  p = np.asarray(p_values, np.float64)
  order = np.argsort(p, kind='stable')
  stepped = p[order] * np.arange(len(p), 0, -1)
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
  return adjusted


def detectable_difference(sd: float, count: int, *, comparisons: int = 1,
                          power: float = 0.8) -> float:
  """Computes the true mean difference that a paired t-test finds with `power`.

  `sd` is the standard deviation of a pair's difference, and `count` the number
  of pairs. The test is two-sided at ALPHA / `comparisons`, the first step of
  Holm's correction. NaN for fewer than two pairs or an unknown `sd`.
  """
  from scipy import optimize  # lazily: slow to import
  from scipy import stats  # lazily: slow to import
  if count < 2 or not sd >= 0:
    return float('nan')
  freedom = count - 1
  # Given its estimate of the variance, the test is one of a normal mean. (The
  # noncentral t of scipy is NaN for shifts of 30 standard errors.)
  quantiles = (np.arange(_VARIANCES) + 0.5) / _VARIANCES
  critical = stats.t.isf(ALPHA / comparisons / 2, freedom) * np.sqrt(
      stats.chi2.ppf(quantiles, freedom) / freedom)
  lacking = lambda shift: power - np.mean(
      stats.norm.sf(critical - shift) + stats.norm.sf(critical + shift))
  return sd * optimize.brentq(lacking, 0.0, critical[-1] + 5) / count**0.5


def half_width(values: Sequence[float]) -> float:
  """Computes half the 95 % interval of a mean (Student's t); NaN for one."""
  from scipy import stats  # lazily: slow to import
  if (n := len(values)) < 2:
    return float('nan')
  return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
