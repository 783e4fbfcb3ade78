"""Span search: the n-best legal spans of a window.

Glossary of shapes: B windows, L window length, W longest span, K n-best spans.

A span has score(i, j) = start[i] + (end[j] + pair[i, j - i]) (Devlin et al.,
2019, section 4.2). It is legal if start_mask[i], end_mask[j] and
0 <= j - i < W.

Three searches are exact: `dense`, `banded` and `two_stage` have one signature
and bit-equal results. Equal scores are ordered by the earlier start, then by
the shorter span. Three searches of the literature serve as baselines: `top_k`,
`argmax` and `beam` are the exact search restricted to fewer starts and ends.
They can miss a span, but they never return an illegal span or a wrong score.

Proof that `two_stage` is exact: let b[i] be the score of the best span from
start i. Suppose (i, j) is among the K best spans but b[i] is not among the K
largest. Then each of K other starts has a span at least as good as (i, j).
With equal scores top_k prefers the lower start, and so does the order above.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import check_width

# Three constants stand for "no score" and must not be confused:
# * span_scores.MASKED (-1e30) is a masked logit of a head or an objective.
# * ILLEGAL (about -3.4e38) is the score of an illegal span in a search. A legal
#   span scores at least LOWEST, even if a logit is -inf or a sum overflows, so
#   that the masks alone decide which spans are legal.
# * candidates.NO_SPAN (-1e9) stands for the score of a window without a span in
#   null rules. Reported scores are None instead.
LOWEST = -3e38
ILLEGAL = float(jnp.finfo(jnp.float32).min)


@flax.struct.dataclass
class Spans:
  """The K best spans of each window, the best first and the invalid last."""

  start: jax.Array  # [B, K] int32; 0 where invalid
  end: jax.Array  # [B, K] int32, inclusive; 0 where invalid
  score: jax.Array  # [B, K] float32; ILLEGAL where invalid
  valid: jax.Array  # [B, K] bool
  null_score: jax.Array  # [B] float32


Search = Callable[..., Spans]


def dense(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array, *,
          max_answer_length: int, n_best: int) -> Spans:
  """Returns the best spans of the masked [L, L] table of all span scores.

  This search is the definition. The masks are [B, L] bool; `max_answer_length`
  counts tokens, both ends included. Scores below LOWEST count as LOWEST, and
  -0.0 as 0.0. Results for NaN scores are unspecified. A ValueError is raised
  if the pair term is narrower than `max_answer_length`.
  """
  start, end, pair = _canonical_scores(scores, max_answer_length)
  batch, length = start.shape
  i = jnp.arange(length)[:, None]
  j = jnp.arange(length)[None, :]
  legal = (start_mask[:, :, None] & end_mask[:, None, :]
           & ((j >= i) & (j < i + max_answer_length))[None])
  right = jnp.broadcast_to(end[:, None, :], (batch, length, length))
  if pair is not None:
    offset = jnp.clip(j - i, 0, pair.shape[-1] - 1)[None]
    right = _floored_sum(right, jnp.take_along_axis(
        pair, jnp.broadcast_to(offset, right.shape), axis=2))
  table = jnp.where(legal, _floored_sum(start[:, :, None], right), ILLEGAL)
  best, flat = _top_k(table, n_best)
  return _spans(scores, best, flat // length, flat % length)


def banded(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array, *,
           max_answer_length: int, n_best: int) -> Spans:
  """Returns the best spans of the [L, W] band of all span scores."""
  table = span_band(scores, start_mask, end_mask,
                    max_answer_length=max_answer_length)
  width = table.shape[-1]
  best, flat = _top_k(table, n_best)
  return _spans(scores, best, flat // width, flat // width + flat % width)


def two_stage(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array,
              *, max_answer_length: int, n_best: int) -> Spans:
  """Returns the best spans of the K starts that have the best spans.

  The first stage ranks the starts by their best span, the second stage ranks
  the K·W spans of the K best starts. Without a pair term, the best end of every
  start comes from log W shifted maxima, without an array of size L·W.
  """
  start, end, pair = _canonical_scores(scores, max_answer_length)
  length = start.shape[1]
  width = min(max_answer_length, length)
  if pair is None:
    right = None
    reach = _sliding_max(jnp.where(end_mask, end, ILLEGAL), width)
  else:
    right = _end_band(end, end_mask, pair, width)
    reach = right.max(axis=-1)
  _, starts = jax.lax.top_k(_add_start(start, start_mask, reach),
                            min(n_best, length))
  starts = jnp.sort(starts, axis=-1)  # row-major order again, for equal scores
  take = lambda x: jnp.take_along_axis(x, starts, axis=1)
  if right is None:
    columns = starts[:, :, None] + jnp.arange(width)[None, None]  # [B, K, W]
    padded = jnp.pad(jnp.where(end_mask, end, ILLEGAL),
                     ((0, 0), (0, width - 1)), constant_values=ILLEGAL)
    right = jax.vmap(lambda row, index: row[index])(padded, columns)
  else:
    right = jnp.take_along_axis(right, starts[:, :, None], axis=1)
  table = _add_start(take(start), take(start_mask), right)
  best, flat = _top_k(table, n_best)
  first = jnp.take_along_axis(starts, flat // width, axis=1)
  return _spans(scores, best, first, first + flat % width)


def top_k(*, k: int = 20) -> Search:
  """Builds the search of the k best starts times the k best ends.

  Starts and ends are chosen among *all* tokens and masked afterwards, as in
  run_squad.py (Devlin et al., 2019) and run_qa.py of transformers. Tokens of
  the question and [CLS] can be among the k, so that legal spans are missed. If
  none is left, every slot is invalid, where BERT returns the text "empty".
  There are four more differences: k need not equal `n_best`; equal scores are
  ordered as in the other searches here, not by rank of start and end;
  candidates with equal texts are not merged (see `decode.merge`); padding is
  never a candidate before a token, since decoding sets its scores to MASKED.
  """
  errors.check_at_least(1, "search 'top_k'", k=k)
  return _restricted(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, k),
      end_mask & _among_best(scores.end, k)))


def argmax() -> Search:
  """Builds the search that chooses the best start and end independently.

  There is no valid span if the end is before the start or too far behind it.
  """
  return _restricted(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, 1, start_mask),
      end_mask & _among_best(scores.end, 1, end_mask)))


def beam(*, width: int = 5) -> Search:
  """Builds the search of all ends after the `width` best-scoring legal starts.

  Source: Yang et al., 2019, XLNet. Their code also restricts the ends.
  """
  errors.check_at_least(1, "search 'beam'", width=width)
  return _restricted(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, width, start_mask), end_mask))


SEARCHES: dict[str, Callable[..., Search]] = {
    'dense': lambda: dense, 'banded': lambda: banded,
    'two_stage': lambda: two_stage, 'top_k': top_k,
    'argmax': argmax, 'beam': beam}
EXACT = frozenset({'dense', 'banded', 'two_stage'})


def find_search(spec: str) -> Search:
  """Builds the search of a spec; that of a user's package is checked.

  The checked search gives illegal spans the score ILLEGAL and orders the spans.
  It raises a UserError if the fields of the spans have wrong shapes or types.
  """
  find = registry.build(SEARCHES, spec, what='search', kind=Callable)
  return _checked(spec, find) if registry.is_importable(spec) else find


def is_exact(spec: str) -> bool:
  """Returns whether a spec of SEARCHES names an exact search."""
  return registry.parse_spec(spec)[0] in EXACT


def log_partition(scores: SpanScores, start_mask: jax.Array,
                  end_mask: jax.Array, *, max_answer_length: int,
                  temperature: jax.Array | float = 1.0) -> jax.Array:  # [B]
  """Returns the log-partition log Σ exp(score(i, j) / temperature).

  The sum is over all legal spans, without null; ILLEGAL if there are none. If
  both masks are the context mask, it is the log-partition of the span softmax
  in training. If only owned tokens are legal starts, as in a search, the
  partitions of a question's windows can be added.
  """
  table = span_band(scores, start_mask, end_mask,
                    max_answer_length=max_answer_length)
  return jax.nn.logsumexp(jnp.where(
      table > ILLEGAL, jnp.maximum(table / temperature, LOWEST), ILLEGAL),
                          axis=(1, 2))


def span_band(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array, *,
              max_answer_length: int) -> jax.Array:  # [B, L, W]
  """Returns the scores of all legal spans as [i, j - i], ILLEGAL elsewhere.

  Unlike `span_scores.band` of the objectives, this band has two masks, is not
  differentiated, and has canonical scores, without -0.0 and at least LOWEST,
  since the order of equal scores and the legality of spans depend on it.
  """
  start, end, pair = _canonical_scores(scores, max_answer_length)
  width = min(max_answer_length, start.shape[1])
  return _add_start(start, start_mask, _end_band(end, end_mask, pair, width))


def _restricted(restrict: Callable[..., tuple[jax.Array, jax.Array]]) -> Search:
  """Builds the exact search of the starts and ends that `restrict` selects."""
  return lambda scores, start_mask, end_mask, **options: two_stage(
      scores, *restrict(scores, start_mask, end_mask), **options)


def _checked(spec: str, find: Search) -> Search:
  def checked(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array,
              *, max_answer_length: int, n_best: int) -> Spans:
    spans = find(scores, start_mask, end_mask,
                 max_answer_length=max_answer_length, n_best=n_best)
    errors.require(isinstance(spans, Spans),
                   f'search {spec!r} returns {type(spans).__name__}, '
                   'expected qa_jax.decoding.Spans')
    batch, length = scores.start.shape
    for name, kind in (('start', jnp.integer), ('end', jnp.integer),
                       ('score', jnp.floating), ('valid', jnp.bool_),
                       ('null_score', jnp.floating)):
      x, text, shape = getattr(spans, name), '[B, n_best]', (batch, n_best)
      if name == 'null_score':
        text, shape = '[B]', (batch,)
      errors.require(
          getattr(x, 'shape', None) == shape and jnp.issubdtype(x.dtype, kind),
          f'search {spec!r} returns {name} of shape '
          f'{getattr(x, "shape", None)} and type {getattr(x, "dtype", None)}, '
          f'expected {text} = {shape} of {kind.__name__}; slots without a span '
          'are valid=False')
    take = lambda mask, index: jnp.take_along_axis(
        mask, jnp.clip(index, 0, length - 1), axis=1)
    start, end = spans.start, spans.end
    legal = (spans.valid & (start >= 0) & (end < length) & (end >= start)
             & (end - start < max_answer_length)
             & take(start_mask, start) & take(end_mask, end)
             & ~jnp.isnan(spans.score))
    best, order = _top_k(jnp.where(
        legal, _canonical(spans.score), ILLEGAL), n_best)
    return _spans(scores, best, *(jnp.take_along_axis(x, order, axis=1)
                                  for x in (start, end))).replace(
        null_score=spans.null_score)
  return checked


def _among_best(x: jax.Array, count: int,
                mask: jax.Array | None = None) -> jax.Array:
  """Returns [B, L] bool: the `count` largest scores, leftmost if equal."""
  length, x = x.shape[1], _canonical(x)
  if mask is not None:
    x = jnp.where(mask, x, ILLEGAL)
  _, best = jax.lax.top_k(x, min(count, length))
  return jax.nn.one_hot(best, length, dtype=bool).any(axis=1)


def _canonical_scores(scores: SpanScores, max_answer_length: int) -> tuple[
    jax.Array, jax.Array, jax.Array | None]:
  """Returns start, end and pair in float32, without -0.0 and >= LOWEST."""
  pair = scores.pair
  check_width(pair, max_answer_length, f'max_answer_length={max_answer_length}')
  return (_canonical(scores.start), _canonical(scores.end),
          None if pair is None else _canonical(pair))


def _canonical(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  # top_k ranks -0.0 below 0.0. XLA removes x + 0.0, so zeros are replaced.
  return jnp.where(x == 0, 0.0, jnp.maximum(x, LOWEST))


def _floored_sum(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the sum of legal scores, at least LOWEST: never -inf or NaN.

  It is monotone, so that a start's best end is known before its score is added.
  """
  return jnp.maximum(left + right, LOWEST)


def _end_band(end, end_mask, pair, width) -> jax.Array:  # [B, L, W]
  """Returns end[i + d] + pair[i, d], ILLEGAL if i + d is no legal end."""
  length = end.shape[1]
  reach = jnp.arange(length)[:, None] + jnp.arange(width)[None, :]
  index = jnp.minimum(reach, length - 1)
  right, end_mask = end[:, index], jnp.asarray(end_mask)
  if pair is not None:
    right = _floored_sum(right, pair[:, :, :width])
  return jnp.where(end_mask[:, index] & (reach < length)[None], right, ILLEGAL)


def _add_start(start, start_mask, right) -> jax.Array:
  """Returns start + right [B, L] or [B, L, W]; ILLEGAL if either is illegal."""
  extra = (1,) * (right.ndim - start.ndim)
  start = start.reshape(*start.shape, *extra)
  legal = start_mask.reshape(*start_mask.shape, *extra) & (right > ILLEGAL)
  return jnp.where(legal, _floored_sum(start, right), ILLEGAL)


def _sliding_max(x: jax.Array, width: int) -> jax.Array:  # [B, L]
  """Returns max(x[i], …, x[i + width - 1]) in log2(width) steps."""
  def shifted(y, by):
    return jnp.pad(y[:, by:], ((0, 0), (0, by)), constant_values=ILLEGAL)
  span = 1
  while 2 * span <= width:
    x = jnp.maximum(x, shifted(x, span))
    span *= 2
  return jnp.maximum(x, shifted(x, width - span)) if width > span else x


def _top_k(table: jax.Array,  # [B, …]
           count: int) -> tuple[jax.Array, jax.Array]:  # [B, K] each
  """Returns the best scores of each window and their flat positions.

  They are padded to `count` slots with ILLEGAL.
  """
  rows = jax.lax.collapse(table, 1)
  best, flat = jax.lax.top_k(rows, min(count, rows.shape[1]))
  pad = ((0, 0), (0, count - best.shape[-1]))
  return (jnp.pad(best, pad, constant_values=ILLEGAL), jnp.pad(flat, pad))


def _spans(scores, best, first, last) -> Spans:
  valid = best > ILLEGAL
  return Spans(
      start=jnp.where(valid, first, 0).astype(jnp.int32),
      end=jnp.where(valid, last, 0).astype(jnp.int32),
      score=best, valid=valid,
      null_score=scores.null_score.astype(jnp.float32))
