"""Span search against brute force, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import search
from qa_jax.heads.base import SpanScores

NAMES = sorted(search.SEARCHES)


def brute_force(start, end, pair, start_mask, end_mask, longest, count):
  """[(i, j, score)] of one window, by the definition, in Python."""
  floor = lambda x: max(np.float32(x), np.float32(search.LOWEST))
  spans = []
  for i in np.flatnonzero(start_mask):
    for j in range(i, min(i + longest, len(start))):
      if end_mask[j]:
        right = floor(end[j])
        if pair is not None:
          right = floor(right + floor(pair[i, j - i]))
        spans.append((-floor(floor(start[i]) + right), int(i), j))
  return [(i, j, -s) for s, i, j in sorted(spans)[:count]]


@functools.cache
def compiled(name, longest, count):
  return jax.jit(functools.partial(
      search.SEARCHES[name], max_answer_length=longest, n_best=count))


def check(name, start, end, pair, start_mask, end_mask, longest, count):
  found = jax.device_get(compiled(name, longest, count)(
      SpanScores(start, end, pair), start_mask, end_mask))
  for field, dtype in (('start', np.int32), ('end', np.int32),
                       ('score', np.float32), ('valid', np.bool_)):
    value = getattr(found, field)
    assert (value.shape, value.dtype) == ((len(start), count), dtype)
  for b in range(len(start)):
    expected = brute_force(
        start[b], end[b], None if pair is None else pair[b], start_mask[b],
        end_mask[b], longest, count)
    n = len(expected)
    assert found.valid[b].tolist() == [True] * n + [False] * (count - n)
    assert list(zip(found.start[b][:n].tolist(), found.end[b][:n].tolist(),
                    found.score[b][:n].tolist(), strict=True)) == expected
    assert not found.start[b][n:].any() and not found.end[b][n:].any()
    assert (found.score[b][n:] == np.float32(search.ILLEGAL)).all()


def masks(rng, batch, length):
  """Ranges from empty to full, and some with holes."""
  begin = rng.integers(0, length + 1, (batch, 1))
  end = rng.integers(0, length + 1, (batch, 1))
  column = np.arange(length)[None]
  context = (column >= begin) & (column < end)
  context[0] = True
  context[1 % batch] &= rng.random(length) < 0.7
  owned = context & (rng.random((batch, length)) < 0.8)
  return owned, context


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('with_pair', [False, True])
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize(('length', 'longest', 'count'), [
    (1, 1, 1), (1, 512, 5), (2, 1, 3), (3, 2, 20), (7, 30, 50), (33, 5, 20),
    (64, 30, 20), (64, 64, 1), (48, 512, 20), (40, 3, 200), (64, 12, 2),
    (64, 3, 3)])
def test_search_is_brute_force(name, with_pair, tied, length, longest, count):
  rng = np.random.default_rng([length, longest, count, with_pair, tied])
  batch = 6
  draw = (lambda *s: rng.integers(-2, 3, s).astype(np.float32)) if tied else (
      lambda *s: rng.normal(0, 3, s).astype(np.float32))
  pair = draw(batch, length, longest) if with_pair else None
  check(name, draw(batch, length), draw(batch, length), pair,
        *masks(rng, batch, length), longest, count)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('longest', [1, 2, 30, 511, 512, 600])
def test_search_is_brute_force_at_full_length(name, longest):
  rng = np.random.default_rng(longest)
  draw = lambda: rng.integers(-3, 4, (2, 512)).astype(np.float32)
  check(name, draw(), draw(), None, *masks(rng, 2, 512), longest, 20)


@pytest.mark.parametrize('with_pair', [False, True])
def test_all_implementations_agree_bit_for_bit_on_heavy_ties(with_pair):
  rng = np.random.default_rng(5)
  draw = lambda *s: rng.integers(0, 3, s).astype(np.float32)
  scores = SpanScores(draw(64, 384), draw(64, 384),
                      draw(64, 384, 30) if with_pair else None)
  owned, context = masks(rng, 64, 384)
  found = [jax.device_get(compiled(name, 30, 20)(scores, owned, context))
           for name in NAMES]
  for other in found[1:]:
    jax.tree.map(np.testing.assert_array_equal, found[0], other)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('with_pair', [False, True])
@pytest.mark.parametrize('values', [
    (-1e9, 0, 1e9), (-1e30, -1e9, 1, 2), (-np.inf, -1e30, 0, 1),
    (-np.inf,), (-2e38, -3.2e38, 0, 2e38), (np.inf, -np.inf, 1)], ids=str)
@pytest.mark.filterwarnings('ignore:overflow')  # in brute force
def test_legality_follows_the_masks_whatever_the_scores(
    name, with_pair, values):
  rng = np.random.default_rng(8)
  draw = lambda *s: rng.choice(np.array(values, np.float32), s)
  start, end, pair = draw(4, 12), draw(4, 12), draw(4, 12, 5)
  check(name, start, end, pair if with_pair else None, *masks(rng, 4, 12), 5,
        40)


@pytest.mark.parametrize('name', NAMES)
def test_negative_zero_ties_with_zero(name):
  rng = np.random.default_rng(3)
  draw = lambda *s: np.copysign(np.float32(0), rng.normal(size=s)).astype(
      np.float32)
  scores = draw(4, 12), draw(4, 12), draw(4, 12, 5)
  found = jax.device_get(compiled(name, 5, 7)(
      SpanScores(*scores), *[np.ones((4, 12), bool)] * 2))
  assert found.start.tolist() == [[0, 0, 0, 0, 0, 1, 1]] * 4
  assert found.end.tolist() == [[0, 1, 2, 3, 4, 1, 2]] * 4
  assert not np.signbit(found.score).any()


@pytest.mark.parametrize('name', NAMES)
def test_cap_counts_both_ends_and_longer_spans_lose(name):
  # Prefix-maximum dynamic programming returns (0, 0) here.
  start, end = np.zeros((1, 40), np.float32), np.zeros((1, 40), np.float32)
  start[0, 0], start[0, 35], end[0, 39] = 10, 9, 10
  mask = np.ones((1, 40), bool)
  out = compiled(name, 30, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0], out.score[0, 0]) == (35, 39, 19)
  out = compiled(name, 40, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0]) == (0, 39)
  out = compiled(name, 39, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0]) == (35, 39)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('huge', [1e9, 3e38, np.inf, np.nan])
def test_masked_positions_are_never_returned_whatever_their_score(name, huge):
  start = np.array([[huge, 1, 2, huge]], np.float32)
  end = np.array([[huge, -1e9, -1e9, huge]], np.float32)
  mask = np.array([[False, True, True, False]])
  out = jax.device_get(compiled(name, 4, 10)(
      SpanScores(start, end, null=np.zeros(1)), mask, mask))
  assert out.valid[0].tolist() == [True] * 3 + [False] * 7
  assert list(zip(out.start[0, :3], out.end[0, :3], strict=True)) == [
      (1, 1), (1, 2), (2, 2)]  # 1 and 2 vanish beside 1e9: ties


@pytest.mark.parametrize('name', NAMES)
def test_start_and_end_have_each_their_mask(name):
  zeros = np.zeros((1, 4), np.float32)
  out = jax.device_get(compiled(name, 3, 5)(
      SpanScores(zeros, zeros), np.array([[False, True, False, True]]),
      np.array([[True, False, True, False]])))
  assert out.valid[0].tolist() == [True] + [False] * 4
  assert (out.start[0, 0], out.end[0, 0]) == (1, 2)


@pytest.mark.parametrize('name', NAMES)
def test_masked_end_does_not_recommend_the_starts_before_it(name):
  start, end = np.zeros((1, 4), np.float32), np.array([[5, 0, 9, 0]])
  out = compiled(name, 2, 1)(
      SpanScores(start, end.astype(np.float32)), np.ones((1, 4), bool),
      np.array([[True, True, False, True]]))
  assert (out.start[0, 0], out.end[0, 0], out.score[0, 0]) == (0, 0, 5)


@pytest.mark.parametrize('name', NAMES)
def test_half_precision_scores_are_searched_in_float32(name):
  start = jnp.asarray([[256.0, 1.0]], jnp.bfloat16)
  end = jnp.asarray([[0.0, 1.0]], jnp.bfloat16)
  mask = np.ones((1, 2), bool)
  out = compiled(name, 2, 3)(SpanScores(start, end), mask, mask)
  assert out.score.tolist() == [[257.0, 256.0, 2.0]]  # 257 is no bfloat16


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('with_pair', [False, True])
def test_jit_equals_eager(name, with_pair):
  rng = np.random.default_rng(0)
  draw = lambda *s: np.round(rng.normal(size=s), 1).astype(np.float32)
  scores = SpanScores(draw(3, 20), draw(3, 20),  # has both zeros
                      draw(3, 20, 4) if with_pair else None)
  mask = np.ones((3, 20), bool)
  eager = search.SEARCHES[name](scores, mask, mask, max_answer_length=4,
                                n_best=5)
  jax.tree.map(np.testing.assert_array_equal, eager,
               compiled(name, 4, 5)(scores, mask, mask))


@pytest.mark.parametrize('name', NAMES)
def test_null_is_the_cls_span_or_the_heads_own(name):
  start, end = np.array([[2.0, 9.0]]), np.array([[0.5, 9.0]])
  mask = np.array([[False, True]])
  run = compiled(name, 2, 1)
  assert run(SpanScores(start, end), mask, mask).null_score == 2.5
  assert run(SpanScores(start, end, null=np.array([7.0])), mask,
             mask).null_score == 7


@pytest.mark.parametrize('name', NAMES)
def test_pair_term_narrower_than_the_cap_is_refused(name):
  scores = SpanScores(np.zeros((1, 9)), np.zeros((1, 9)),
                      np.zeros((1, 9, 3)))
  mask = np.ones((1, 9), bool)
  with pytest.raises(ValueError, match='max_answer_length 4 exceeds the 3'):
    search.SEARCHES[name](scores, mask, mask, max_answer_length=4, n_best=1)
