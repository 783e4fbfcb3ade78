"""Significance against full enumeration, closed forms and hand-worked cases."""

import itertools

import numpy as np
import pytest
from scipy import stats

from qa_jax import significance

# What a question's EM and F1 differences look like: mostly none.
MOST_EQUAL = np.array([0, 0, 0, 1, 0, -1, 0, 0.5, 1, 0, 1 / 3, 0, 1])


def enumerated(differences: np.ndarray) -> float:
  """The share of all 2^N sign patterns whose |sum| is as large."""
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
  """With differences of ±1 the sum is a binomial's: the sign test."""
  differences = np.concatenate([np.ones(70), -np.ones(46), np.zeros(500)])
  p = significance.sign_flip(differences, seed=1)
  exact = stats.binomtest(70, 116).pvalue
  assert p == pytest.approx(exact, abs=4 * np.sqrt(
      exact / significance.RESAMPLES))
  assert p == significance.sign_flip(differences, seed=1)


def test_no_difference_has_p_one_and_an_empty_interval():
  assert significance.sign_flip(np.zeros(9), seed=0) == 1.0
  assert significance.interval(np.zeros(9), seed=0) == (0.0, 0.0)


def test_p_is_never_zero():
  p = significance.sign_flip(np.ones(1000), seed=0)
  assert p == 2 / (significance.RESAMPLES + 1)


def test_false_alarms_come_as_often_as_promised():
  rng = np.random.default_rng(3)
  p = [significance.sign_flip(rng.normal(size=8), seed=0) for _ in range(300)]
  assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_interval_of_a_mean_equals_the_normal_one_for_many_questions():
  differences = np.random.default_rng(0).exponential(size=2000)
  low, high = significance.interval(differences, seed=0)
  mean, half = differences.mean(), 1.96 * differences.std() / np.sqrt(2000)
  assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.005)


def test_interval_of_one_question_is_its_difference():
  assert significance.interval(np.array([0.25]), seed=0) == (0.25, 0.25)


@pytest.mark.parametrize(('p', 'adjusted'), [
    ([0.01], [0.01]),
    # By hand: 4 · 0.01, max(that, 3 · 0.02), max(that, 2 · 0.02), 1 · 0.2.
    ([0.02, 0.01, 0.02, 0.2], [0.06, 0.04, 0.06, 0.2]),
    ([0.6, 0.9], [1.0, 1.0]),
    ([], [])])
def test_holm_by_hand(p, adjusted):
  np.testing.assert_allclose(significance.holm(p), adjusted, rtol=1e-12)
