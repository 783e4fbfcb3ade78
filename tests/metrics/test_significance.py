"""Significance against full enumeration, closed forms and hand-worked cases."""

import itertools

import numpy as np
import pytest
from scipy import stats

from qa_jax import errors
from qa_jax.metrics import significance

# Typical differences of EM and F1: most questions have none.
MOST_EQUAL = np.array([0, 0, 0, 1, 0, -1, 0, 0.5, 1, 0, 1 / 3, 0, 1])


def enumerated(differences: np.ndarray) -> float:
  """Returns the share of all 2^N sign patterns whose |sum| is as large."""
  signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
  sums = np.abs(signs @ differences)
  return float(np.mean(sums >= abs(differences.sum()) - 1e-9))


@pytest.mark.parametrize('differences', [
    MOST_EQUAL, -MOST_EQUAL, np.array([1.0]), np.array([0.2, -0.1]),
    np.array([0.1, 0.2, 0.3, 0.1, 0.2]), np.ones(6), np.array([1, -1, 0, 0.0])])
def test_sign_flip_equals_full_enumeration(differences):
  assert significance.sign_flip(differences, seed=0) == pytest.approx(
      enumerated(differences))


def test_sampled_sign_flips_agree_with_the_exact_binomial():
  """With differences of ±1 the test is the sign test, a binomial test."""
  differences = np.concatenate([np.ones(70), -np.ones(46), np.zeros(500)])
  p = significance.sign_flip(differences, seed=1)
  exact = stats.binomtest(70, 116).pvalue
  assert p == pytest.approx(exact, abs=4 * np.sqrt(
      exact / significance.RESAMPLES))
  assert p == significance.sign_flip(differences, seed=1)


def test_no_difference_has_p_one_and_an_empty_interval():
  assert significance.sign_flip(np.zeros(9), seed=0) == 1.0
  assert significance.paired_t(np.zeros(3)) == 1.0
  assert significance.hierarchical_interval(
      np.zeros((1, 9)), list('abcdefghi'), seed=0) == (0.0, 0.0)


def test_a_difference_that_is_nan_has_no_p():
  with pytest.raises(errors.UserError, match='1 of 3 differences are NaN'):
    significance.sign_flip(np.array([1.0, np.nan, 2.0]), seed=0)


@pytest.mark.parametrize('count', [3, 5])
def test_each_question_has_an_article(count):
  with pytest.raises(errors.UserError,
                     match=f'{count} articles for 4 questions'):
    significance.hierarchical_interval(np.ones((2, 4)), ['a'] * count, seed=0)


def test_p_is_never_zero():
  p = significance.sign_flip(np.ones(1000), seed=0)
  assert p == 2 / (significance.RESAMPLES + 1)


def test_false_alarms_have_the_rate_of_the_level():
  rng = np.random.default_rng(3)
  p = [significance.sign_flip(rng.normal(size=8), seed=0) for _ in range(300)]
  assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.05)


def half_width(interval):
  return (interval[1] - interval[0]) / 2


def test_variance_of_the_hierarchy_is_that_of_its_levels():
  """Effects of seeds, articles and questions add up, so there is a closed form.
  """
  rng = np.random.default_rng(0)
  of_seed = rng.normal(0, 0.3, 8)
  of_article = np.repeat(rng.normal(0, 1, 60), 5)
  of_question = of_article + rng.normal(0, 1, 300)
  x = of_seed[:, None] + of_question
  within = of_question.reshape(60, 5)
  variance = (of_seed.var() / 8 + within.mean(axis=1).var() / 60
              + within.var(axis=1).mean() / 300)
  articles = [f'a{n // 5}' for n in range(300)]
  interval = significance.hierarchical_interval(x, articles, seed=1)
  assert half_width(interval) == pytest.approx(1.96 * variance**0.5, rel=0.06)
  assert sum(interval) / 2 == pytest.approx(x.mean(), abs=0.03)
  # Neither the order of questions nor the names of articles matter.
  order = rng.permutation(300)
  again = significance.hierarchical_interval(
      x[:, order], [articles[n] for n in order], seed=1)
  assert half_width(again) == pytest.approx(half_width(interval), rel=0.06)
  # Without seeds and articles the interval is too narrow.
  alone = significance.hierarchical_interval(
      x.mean(axis=0)[None], [str(n) for n in range(300)], seed=1)
  assert half_width(interval) > 1.4 * half_width(alone)


def test_without_seeds_and_articles_the_hierarchy_is_scipys_bootstrap():
  x = np.random.default_rng(0).exponential(size=400)
  interval = significance.hierarchical_interval(
      x[None], [str(n) for n in range(400)], seed=0)
  expected = stats.bootstrap(
      (x,), np.mean, method='percentile', n_resamples=20_000, batch=500,
      rng=np.random.default_rng(1)).confidence_interval
  assert interval == pytest.approx(tuple(expected), abs=0.02)


def test_more_questions_than_memory_holds_are_resampled_one_by_one(monkeypatch):
  x = np.random.default_rng(0).exponential(size=(2, 40))
  interval = lambda: significance.hierarchical_interval(
      x, [str(n // 2) for n in range(40)], seed=0)
  whole = interval()
  monkeypatch.setattr(significance, '_QUESTIONS', 39)
  assert interval() == pytest.approx(whole, abs=0.1 * half_width(whole))


def test_articles_of_unequal_size_weigh_by_their_questions():
  """The interval is of the mean over questions, not over articles."""
  x = np.array([[1.0] * 90 + [0.0] * 10])
  interval = significance.hierarchical_interval(
      np.repeat(x, 2, axis=0), ['long'] * 90 + ['short'] * 10, seed=0)
  assert interval == (0.0, 1.0)  # one article twice
  singles = significance.hierarchical_interval(
      x, list(map(str, range(100))), seed=0)
  assert singles == pytest.approx((0.84, 0.96), abs=0.02)


def test_seeds_that_disagree_widen_the_interval():
  x = np.array([[1.0] * 50, [-1.0] * 50])
  articles = [str(n) for n in range(50)]
  assert significance.hierarchical_interval(x, articles, seed=0) == (-1.0, 1.0)
  assert significance.hierarchical_interval(
      x[:1], articles, seed=0) == (1.0, 1.0)


def test_a_test_over_articles_sees_that_their_questions_are_alike():
  x = np.repeat([1.0, 1, -1, 1, 1], 20)
  articles = np.repeat(['a', 'b', 'c', 'd', 'e'], 20)
  sums = significance.article_sums(x, articles)
  assert sums.tolist() == [20, 20, -20, 20, 20]
  assert significance.sign_flip(sums, seed=0) == pytest.approx(
      stats.binomtest(4, 5).pvalue)
  assert significance.sign_flip(x, seed=0) < 0.001


@pytest.mark.parametrize(('p', 'adjusted'), [
    ([0.01], [0.01]),
    # By hand: 4 · 0.01, max(that, 3 · 0.02), max(that, 2 · 0.02), 1 · 0.2.
    ([0.02, 0.01, 0.02, 0.2], [0.06, 0.04, 0.06, 0.2]),
    ([0.6, 0.9], [1.0, 1.0]),
    ([], [])])
def test_holm_by_hand(p, adjusted):
  np.testing.assert_allclose(significance.holm_adjust(p), adjusted, rtol=1e-12)


@pytest.mark.parametrize(('count', 'comparisons', 'power'), [
    (3, 1, 0.8), (5, 1, 0.8), (5, 8, 0.8), (20, 8, 0.9), (1278, 8, 0.8),
    (20, 1, 0.06)])  # a fifth of this power lies in the wrong tail
def test_detectable_difference_is_found_with_the_power_of_noncentral_t(
    count, comparisons, power):
  shift = significance.detectable_difference(
      2.5, count, comparisons=comparisons, power=power) * count**0.5 / 2.5
  critical = stats.t.isf(0.025 / comparisons, count - 1)
  assert stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(
      -critical, count - 1, shift) == pytest.approx(power, abs=2e-3)


@pytest.mark.parametrize('count', [2, 5])
def test_simulated_pairs_reveal_a_detectable_difference_as_often(count):
  true = significance.detectable_difference(2.5, count, comparisons=8)
  x = np.random.default_rng(0).normal(true, 2.5, (20000, count))
  p = stats.ttest_1samp(x, 0.0, axis=1).pvalue
  assert np.mean(p < 0.05 / 8) == pytest.approx(0.8, abs=0.01)


def test_detectable_difference_of_many_pairs_is_that_of_a_z_test():
  z = stats.norm.isf([0.025, 0.2]).sum()
  assert significance.detectable_difference(3.0, 10**5) == pytest.approx(
      3.0 * z / 10**2.5, rel=1e-4)


def test_detectable_difference_needs_two_pairs_and_a_known_deviation():
  assert np.isnan(significance.detectable_difference(1.0, 1))
  assert np.isnan(significance.detectable_difference(np.nan, 5))
  assert significance.detectable_difference(0.0, 5) == 0
