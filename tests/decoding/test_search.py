"""Tests of exact searches by brute force, of others by their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import errors
from qa_jax import registry
from qa_jax import span_scores
from qa_jax.decoding import candidates
from qa_jax.decoding import search as search_lib
from qa_jax.heads import conditional
from qa_jax.span_scores import SpanScores
from tests.common import search


def masks(rng, batch, length):
  """Returns owned tokens and context tokens [B, L], from empty to full.

  Some ranges have holes.
  """
  begin = rng.integers(0, length + 1, (batch, 1))
  end = rng.integers(0, length + 1, (batch, 1))
  column = np.arange(length)[None]
  context = (column >= begin) & (column < end)
  context[0] = True
  context[1 % batch] &= rng.random(length) < 0.7
  owned = context & (rng.random((batch, length)) < 0.8)
  return owned, context


@pytest.mark.parametrize('name', search.NAMES)
@pytest.mark.parametrize('with_pair', [False, True])
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize(('length', 'longest', 'count'), [
    (1, 512, 5), (3, 2, 20), (7, 30, 50), (33, 5, 20), (64, 30, 20),
    (64, 64, 1), (40, 3, 200)])
def test_search_is_brute_force(name, with_pair, tied, length, longest, count):
  rng = np.random.default_rng([length, longest, count, with_pair, tied])
  batch = 6
  draw = (lambda *s: rng.integers(-2, 3, s).astype(np.float32)) if tied else (
      lambda *s: rng.normal(0, 3, s).astype(np.float32))
  pair = draw(batch, length, longest) if with_pair else None
  search.assert_equals_brute_force(
      name, draw(batch, length), draw(batch, length), pair,
      *masks(rng, batch, length), longest, count)


@pytest.mark.parametrize('spec', search_lib.SEARCHES)
def test_a_batch_without_windows_has_no_spans(spec):
  scores, mask = SpanScores(np.zeros((0, 8)), np.zeros((0, 8))), np.ones((0, 8))
  spans = search_lib.find_search(spec)(
      scores, mask > 0, mask > 0, max_answer_length=4, n_best=3)
  assert spans.start.shape == spans.score.shape == (0, 3)
  assert spans.null_score.shape == (0,)


@pytest.mark.parametrize('name', search.NAMES)
@pytest.mark.parametrize('longest', [1, 30, 511, 600])
def test_search_is_brute_force_at_full_length(name, longest):
  rng = np.random.default_rng(longest)
  draw = lambda: rng.integers(-3, 4, (2, 512)).astype(np.float32)
  search.assert_equals_brute_force(
      name, draw(), draw(), None, *masks(rng, 2, 512), longest, 20)


@pytest.mark.parametrize('name', search.NAMES)
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
  search.assert_equals_brute_force(
      name, start, end, pair if with_pair else None, *masks(rng, 4, 12), 5, 40)


@pytest.mark.parametrize('name', search.NAMES)
def test_negative_zero_ties_with_zero(name):
  rng = np.random.default_rng(3)
  draw = lambda *s: np.copysign(np.float32(0), rng.normal(size=s)).astype(
      np.float32)
  scores = draw(4, 12), draw(4, 12), draw(4, 12, 5)
  spans = jax.device_get(search.compiled(name, 5, 7)(
      SpanScores(*scores), *[np.ones((4, 12), bool)] * 2))
  assert spans.start.tolist() == [[0, 0, 0, 0, 0, 1, 1]] * 4
  assert spans.end.tolist() == [[0, 1, 2, 3, 4, 1, 2]] * 4
  assert not np.signbit(spans.score).any()


@pytest.mark.parametrize('name', search.NAMES)
def test_cap_counts_both_ends_and_longer_spans_lose(name):
  # Prefix-maximum dynamic programming returns (0, 0) here.
  start, end = np.zeros((1, 40), np.float32), np.zeros((1, 40), np.float32)
  start[0, 0], start[0, 35], end[0, 39] = 10, 9, 10
  mask = np.ones((1, 40), bool)
  out = search.compiled(name, 30, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0], out.score[0, 0]) == (35, 39, 19)
  out = search.compiled(name, 40, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0]) == (0, 39)
  out = search.compiled(name, 39, 1)(SpanScores(start, end), mask, mask)
  assert (out.start[0, 0], out.end[0, 0]) == (35, 39)


@pytest.mark.parametrize('name', search.NAMES)
@pytest.mark.parametrize('huge', [1e9, 3e38, np.inf, np.nan])
def test_masked_positions_are_never_returned_whatever_their_score(name, huge):
  start = np.array([[huge, 1, 2, huge]], np.float32)
  end = np.array([[huge, -1e9, -1e9, huge]], np.float32)
  mask = np.array([[False, True, True, False]])
  out = jax.device_get(search.compiled(name, 4, 10)(
      SpanScores(start, end, null=np.zeros(1)), mask, mask))
  assert out.valid[0].tolist() == [True] * 3 + [False] * 7
  assert list(zip(out.start[0, :3], out.end[0, :3], strict=True)) == [
      (1, 1), (1, 2), (2, 2)]  # all scores are equal, since 1 + 1e9 == 1e9


@pytest.mark.parametrize('name', search.NAMES)
def test_start_and_end_have_different_masks(name):
  zeros = np.zeros((1, 4), np.float32)
  out = jax.device_get(search.compiled(name, 3, 5)(
      SpanScores(zeros, zeros), np.array([[False, True, False, True]]),
      np.array([[True, False, True, False]])))
  assert out.valid[0].tolist() == [True] + [False] * 4
  assert (out.start[0, 0], out.end[0, 0]) == (1, 2)


@pytest.mark.parametrize('name', search.NAMES)
def test_masked_end_does_not_raise_the_rank_of_starts_before_it(name):
  start, end = np.zeros((1, 4), np.float32), np.array([[5, 0, 9, 0]])
  out = search.compiled(name, 2, 1)(
      SpanScores(start, end.astype(np.float32)), np.ones((1, 4), bool),
      np.array([[True, True, False, True]]))
  assert (out.start[0, 0], out.end[0, 0], out.score[0, 0]) == (0, 0, 5)


@pytest.mark.parametrize('name', search.NAMES)
def test_half_precision_scores_are_searched_in_float32(name):
  start = jnp.asarray([[256.0, 1.0]], jnp.bfloat16)
  end = jnp.asarray([[0.0, 1.0]], jnp.bfloat16)
  mask = np.ones((1, 2), bool)
  out = search.compiled(name, 2, 3)(SpanScores(start, end), mask, mask)
  assert out.score.tolist() == [[257.0, 256.0, 2.0]]  # 257 is no bfloat16
  assert out.null_score.dtype == jnp.float32


@pytest.mark.parametrize('name', search.NAMES)
@pytest.mark.parametrize('with_pair', [False, True])
def test_jit_equals_eager(name, with_pair):
  rng = np.random.default_rng(0)
  draw = lambda *s: np.round(rng.normal(size=s), 1).astype(np.float32)
  scores = SpanScores(draw(3, 20), draw(3, 20),  # has 0.0 and -0.0
                      draw(3, 20, 4) if with_pair else None)
  mask = np.ones((3, 20), bool)
  find = functools.partial(search_lib.find_search(name),
                           max_answer_length=4, n_best=5)
  eager = find(scores, mask, mask)
  jax.tree.map(np.testing.assert_array_equal, eager,
               search.compiled(name, 4, 5)(scores, mask, mask))
  jax.tree.map(np.testing.assert_array_equal, eager,  # with masks of numpy
               jax.jit(lambda scores: find(scores, mask, mask))(scores))


@pytest.mark.parametrize('name', search.NAMES)
def test_null_score_is_that_of_cls_or_of_the_null_logit(name):
  start, end = np.array([[2.0, 9.0]]), np.array([[0.5, 9.0]])
  mask = np.array([[False, True]])
  run = search.compiled(name, 2, 1)
  assert run(SpanScores(start, end), mask, mask).null_score == 2.5
  assert run(SpanScores(start, end, null=np.array([7.0])), mask,
             mask).null_score == 7


@pytest.mark.parametrize('name', search.NAMES)
def test_pair_term_narrower_than_the_cap_is_refused(name):
  scores = SpanScores(np.zeros((1, 9)), np.zeros((1, 9)),
                      np.zeros((1, 9, 3)))
  mask = np.ones((1, 9), bool)
  with pytest.raises(
      errors.UserError, match='max_answer_length=4 exceeds the 3'):
    search_lib.find_search(name)(
        scores, mask, mask, max_answer_length=4, n_best=1)


# --- searches that are not exact


def berts_spans(start, end, start_mask, end_mask, longest, k):
  """Searches like write_predictions of google-research/bert, in loops."""
  def best_indexes(logits):
    ranked = sorted(enumerate(logits), key=lambda x: x[1], reverse=True)
    return [i for i, _ in ranked[:k]]
  spans = []
  for i in best_indexes(start):
    for j in best_indexes(end):
      if not start_mask[i] or not end_mask[j] or j < i:
        continue
      if j - i + 1 > longest:
        continue
      spans.append((i, j))
  return spans


def argmax_spans(start, end, start_mask, end_mask, longest):
  legal = lambda x, mask: [x[i] if mask[i] else -np.inf for i in range(len(x))]
  if not start_mask.any() or not end_mask.any():
    return []
  i, j = (int(np.argmax(legal(x, mask)))
          for x, mask in ((start, start_mask), (end, end_mask)))
  return [(i, j)] if i <= j < i + longest else []


def beam_spans(start, end, start_mask, end_mask, longest, width):
  order = sorted(np.flatnonzero(start_mask).tolist(), key=lambda i: -start[i])
  return [(i, j) for i in order[:width] for j in range(len(start))
          if end_mask[j] and i <= j < i + longest]


INEXACT = [
    ('top_k', functools.partial(berts_spans, k=20)),
    ('top_k(k=4)', functools.partial(berts_spans, k=4)),
    ('top_k(k=1)', functools.partial(berts_spans, k=1)),
    ('argmax', argmax_spans),
    ('beam', functools.partial(beam_spans, width=5)),
    ('beam(width=1)', functools.partial(beam_spans, width=1)),
]


def test_every_search_is_exact_or_has_a_definition_here():
  names = {registry.parse_spec(spec)[0] for spec, _ in INEXACT}
  assert names | search_lib.EXACT == search_lib.SEARCHES.keys()
  assert not names & search_lib.EXACT
  for spec, _ in INEXACT:
    assert not search_lib.is_exact(spec)


@pytest.mark.parametrize(('spec', 'definition'), INEXACT,
                         ids=[spec for spec, _ in INEXACT])
@pytest.mark.parametrize('with_pair', [False, True])
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize(('length', 'longest'), [(3, 9), (24, 6)])
def test_inexact_search_is_its_definition(
    spec, definition, with_pair, tied, length, longest):
  rng = np.random.default_rng([length, longest, with_pair, tied])
  signs = lambda *s: rng.choice(np.float32([-1, 1]), s)  # of zeros, too
  draw = (lambda *s: signs(*s) * np.float32(rng.integers(0, 3, s))) if (
      tied) else lambda *s: rng.normal(0, 3, s).astype(np.float32)
  batch, count = 8, 30
  start, end = draw(batch, length), draw(batch, length)
  pair = draw(batch, length, longest) if with_pair else None
  owned, context = masks(rng, batch, length)
  spans = jax.device_get(search.compiled(spec, longest, count)(
      SpanScores(start, end, pair), owned, context))
  for b in range(batch):
    ranked = sorted(
        (-(start[b, i] + (end[b, j] if pair is None
                          else end[b, j] + pair[b, i, j - i])), i, j)
        for i, j in definition(start[b], end[b], owned[b], context[b],
                               longest))[:count]
    n = len(ranked)
    assert spans.valid[b].tolist() == [True] * n + [False] * (count - n)
    assert list(zip((-spans.score[b, :n]).tolist(), spans.start[b, :n],
                    spans.end[b, :n], strict=True)) == ranked


@pytest.mark.parametrize('spec', [spec for spec, _ in INEXACT])
def test_inexact_search_finds_legal_spans_no_better_than_the_best(spec):
  rng = np.random.default_rng(1)
  scores = SpanScores(*rng.normal(0, 3, (2, 64, 48)).astype(np.float32),
                      rng.normal(0, 1, (64, 48, 6)).astype(np.float32))
  owned, context = masks(rng, 64, 48)
  spans, best = (jax.device_get(
      search.compiled(s, 6, 9)(scores, owned, context))
                 for s in (spec, 'dense'))
  assert (spans.score <= best.score).all()
  assert (spans.score[:, 0] < best.score[:, 0]).any()
  row, column = np.nonzero(spans.valid)
  i, j = spans.start[row, column], spans.end[row, column]
  assert owned[row, i].all() and context[row, j].all()
  assert ((i <= j) & (j < i + 6)).all()


def test_question_and_padding_crowd_out_the_context_of_top_k_alone():
  start = np.array([[9, 8, 7, 1, 0, 9]], np.float32)
  mask = np.array([[False, False, False, True, True, False]])
  for spec, valid in (('top_k(k=3)', False), ('top_k(k=5)', True),
                      ('argmax', True), ('beam(width=1)', True)):
    out = search.compiled(spec, 4, 2)(SpanScores(start, start), mask, mask)
    assert out.valid[0, 0] == valid, spec
    assert (out.start[0, 0], out.end[0, 0]) == ((3, 3) if valid else (0, 0))


@pytest.mark.parametrize('side', ['start', 'end'])
def test_padding_crowds_out_no_token_of_top_k(side):
  scores = {'start': np.array([[0, 4, 1, 1, 1, 1]], np.float32),
            'end': np.array([[0, 1, 4, 1, 1, 1]], np.float32)}
  scores[side][:, 3:] = 9
  masked = span_scores.mask_padding(
      SpanScores(**scores), np.array([[1, 1, 1, 0, 0, 0]]))
  mask = np.array([[False, True, True, False, False, False]])
  out = search.compiled('top_k(k=3)', 4, 2)(masked, mask, mask)
  assert (out.start[0, 0], out.end[0, 0], out.score[0, 0]) == (1, 2, 8)
  assert out.null_score == 0


def test_spans_of_starts_outside_of_a_beam_are_no_candidates():
  pair = np.full((1, 4, 2), conditional.NEVER, np.float32)
  pair[0, 2] = -3, -1
  mask = np.array([[False, True, True, True]])
  out = jax.jit(functools.partial(
      candidates.window_candidates, search_lib.banded, longest=2, n_best=4))(
          SpanScores(*np.zeros((2, 1, 4), np.float32), pair), mask, mask)
  assert out['valid'].tolist() == [[True, True, False, False]]
  assert out['score'].tolist() == [[-1, -3, *2 * [search_lib.ILLEGAL]]]


@pytest.mark.parametrize(('end', 'valid'), [(1, False), (2, True), (3, True),
                                            (4, False)])
def test_argmax_of_a_reversed_or_too_long_span_is_no_span(end, valid):
  start_scores, end_scores = np.zeros((2, 1, 6), np.float32)
  start_scores[0, 2] = end_scores[0, end] = 1
  mask = np.ones((1, 6), bool)
  out = search.compiled('argmax', 2, 3)(
      SpanScores(start_scores, end_scores), mask, mask)
  assert out.valid.tolist() == [[valid, False, False]]
  assert out.score[0, 0] == (2 if valid else np.float32(search_lib.ILLEGAL))


@pytest.mark.parametrize('spec', ['top_k(k=0)', 'beam(width=-1)'])
def test_search_with_a_count_below_one_is_refused(spec):
  with pytest.raises(errors.UserError, match='must be at least 1'):
    search_lib.find_search(spec)


# --- the log-partition


@pytest.mark.parametrize('with_pair', [False, True])
@pytest.mark.parametrize('scale', [1, 100])
def test_log_partition_is_the_log_sum_of_all_legal_spans(
    with_pair, scale):
  rng = np.random.default_rng(4)
  draw = lambda *s: rng.normal(0, scale, s).astype(np.float32)
  start, end = draw(6, 20), draw(6, 20)
  pair = draw(6, 20, 5) if with_pair else None
  mask, _ = masks(rng, 6, 20)
  mask[2] = False
  log_partition = search_lib.log_partition(
      SpanScores(start, end, pair), mask, mask, max_answer_length=5)
  for b in range(6):
    span_scores = [s for _, _, s in search.brute_force(
        *np.float64([start[b], end[b]]), None if pair is None else pair[b],
        mask[b], mask[b], 5, 999)]
    expected = np.logaddexp.reduce(
        np.float64(span_scores)) if span_scores else (
        search_lib.ILLEGAL)
    assert log_partition[b] == pytest.approx(expected, rel=1e-6)
