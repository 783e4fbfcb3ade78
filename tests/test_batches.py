"""Batches: every window once, static shapes, a position that restores."""

import itertools

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data import batches
from tests import test_windows

BUCKETS = (8, 10, 12)


def plan(n, batch_size=4, seed=0, epoch=0):
  lengths = np.random.default_rng(1).integers(5, 13, n)
  return lengths, batches.plan_epoch(
      lengths, np.arange(n), batch_size=batch_size, buckets=BUCKETS,
      seed=seed, epoch=epoch)


@pytest.mark.parametrize('n', [1, 3, 4, 5, 33, 100])
def test_an_epoch_holds_every_window_once_in_ceil_batches(n):
  lengths, made = plan(n)
  rows = np.concatenate([r for _, r in made])
  assert sorted(rows[rows >= 0]) == list(range(n))
  assert len(made) == -(-n // 4)
  assert all(lengths[r[r >= 0]].max() <= length for length, r in made)
  assert all(len(r) == 4 for _, r in made)


def test_order_depends_on_seed_and_epoch_alone():
  def flat(**kwargs):
    return np.concatenate([r for _, r in plan(50, **kwargs)[1]]).tolist()
  assert flat() == flat()
  assert flat() != flat(seed=1)
  assert flat() != flat(epoch=1)


@pytest.mark.parametrize('n', [1, 7, 64])
def test_eval_plan_holds_every_window_once(n):
  lengths, _ = plan(n)
  made = batches.plan_eval(lengths, batch_size=4, buckets=BUCKETS)
  rows = np.concatenate([r for _, r in made])
  assert sorted(rows[rows >= 0]) == list(range(n))


def stream():
  w = test_windows.cut(*[test_windows.example(n) for n in range(1, 20)])
  return batches.TrainBatches(w, np.arange(len(w)), 4, (12,), seed=3)


def test_a_restored_position_gives_the_same_next_batches():
  whole = stream()
  expected = list(itertools.islice(whole, 25))
  other = stream()
  for _ in range(11):
    next(other)
  resumed = stream()
  resumed.seek(other.position)
  for a, b in zip(expected[11:], itertools.islice(resumed, 14), strict=True):
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize('bad', [(0, 8), (8, 13)])
def test_bucket_out_of_range_is_refused(bad):
  with pytest.raises(errors.UserError, match=r'data\.buckets'):
    batches.check_buckets(bad, 12)


def test_longest_bucket_is_always_max_length():
  assert batches.check_buckets((8, 8, 4), 12) == (4, 8, 12)
