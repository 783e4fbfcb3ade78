"""Span search: the best legal spans of the outer sum start[i] + end[j].

Glossary of shapes: B batch (windows), L window length, W longest span,
K spans returned.

  score(i, j) = start[i] + (end[j] + pair[i, j - i])   (Devlin et al., 2019,
  section 4.2), over start_mask[i], end_mask[j], 0 <= j - i < W.

Three exact programs with one signature and one result, ties included: by
score, then the earliest start, then the shortest span. And, to compare with,
what others search with: the exact search of fewer starts and ends, so that no
span is illegal or overrated, and none is found faster.

Two-stage is exact. Let b[i] be the score of the best span from start i. If
(i, j) is among the K best spans but b[i] not among the K largest, then K other
starts each own a span at least as good. With equal scores top_k prefers the
lower start, and so does the order above.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.span_scores import SpanScores

# A legal span scores at least LOWEST, even if a logit is -inf or a sum
# overflows, and an illegal one is below it: legality follows the masks alone.
LOWEST = -3e38
ILLEGAL = float(jnp.finfo(jnp.float32).min)  # finite, about -3.4e38


@flax.struct.dataclass
class Spans:
  """The K best spans; slots beyond the last legal span are invalid."""

  start: jax.Array  # [B, K] int32; 0 where invalid
  end: jax.Array  # [B, K] int32, inclusive; 0 where invalid
  score: jax.Array  # [B, K] float32; ILLEGAL where invalid
  valid: jax.Array  # [B, K] bool
  null_score: jax.Array  # [B] float32


Search = Callable[..., Spans]


def dense(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array, *,
          max_answer_length: int, n_best: int) -> Spans:
  """The definition, literally: the masked [L, L] outer sum and top_k.

  `start_mask` and `end_mask` are [B, L] bool; `max_answer_length` counts
  both ends. Scores below LOWEST count as LOWEST and -0.0 as 0.0; which spans
  NaN scores select is unspecified.

  Raises:
    ValueError: the pair term is narrower than `max_answer_length`.
  """
  start, end, pair = _ordered(scores, max_answer_length)
  batch, length = start.shape
  i = jnp.arange(length)[:, None]
  j = jnp.arange(length)[None, :]
  legal = (start_mask[:, :, None] & end_mask[:, None, :]
           & ((j >= i) & (j < i + max_answer_length))[None])
  right = jnp.broadcast_to(end[:, None, :], (batch, length, length))
  if pair is not None:
    width = pair.shape[-1]
    band = jnp.clip(j - i, 0, width - 1)[None]
    right = _sum(right, jnp.take_along_axis(
        pair, jnp.broadcast_to(band, right.shape), axis=2))
  table = jnp.where(legal, _sum(start[:, :, None], right), ILLEGAL)
  best, flat = _top_k(table.reshape(batch, -1), n_best)
  return _spans(scores, best, flat // length, flat % length)


def banded(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array, *,
           max_answer_length: int, n_best: int) -> Spans:
  """As `dense`, over the [L, W] band of spans that are short enough."""
  start, end, pair = _ordered(scores, max_answer_length)
  batch, length = start.shape
  width = min(max_answer_length, length)
  right = _right(end, end_mask, pair, width)  # [B, L, W]
  table = _add(start, start_mask, right)
  best, flat = _top_k(table.reshape(batch, -1), n_best)
  first = flat // width
  return _spans(scores, best, first, first + flat % width)


def two_stage(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array,
              *, max_answer_length: int, n_best: int) -> Spans:
  """The K best starts by their best span, then the K·W spans from those.

  Without a pair term the best end of every window comes from log W shifted
  maxima, and nothing of size L·W is formed.
  """
  start, end, pair = _ordered(scores, max_answer_length)
  length = start.shape[1]
  width = min(max_answer_length, length)
  if pair is None:
    right = None
    reach = _window_max(jnp.where(end_mask, end, ILLEGAL), width)
  else:
    right = _right(end, end_mask, pair, width)
    reach = right.max(axis=-1)
  bound = _add(start, start_mask, reach)
  _, starts = jax.lax.top_k(bound, min(n_best, length))
  starts = jnp.sort(starts, axis=-1)  # row-major order again, for ties
  take = lambda x: jnp.take_along_axis(x, starts, axis=1)
  if right is None:
    columns = starts[:, :, None] + jnp.arange(width)[None, None]  # [B, K, W]
    padded = jnp.pad(jnp.where(end_mask, end, ILLEGAL),
                     ((0, 0), (0, width - 1)), constant_values=ILLEGAL)
    right = jax.vmap(lambda row, index: row[index])(padded, columns)
  else:
    right = jnp.take_along_axis(right, starts[:, :, None], axis=1)
  table = _add(take(start), take(start_mask), right)
  best, flat = _top_k(table.reshape(table.shape[0], -1), n_best)
  first = jnp.take_along_axis(starts, flat // width, axis=1)
  return _spans(scores, best, first, first + flat % width)


def top_k(*, k: int = 20) -> Search:
  """The k best starts times the k best ends of *all* positions, then masks.

  As run_squad.py (Devlin et al., 2019) and transformers' run_qa.py search.
  Question, [CLS] and padding hold places among the k, so legal spans can be
  missed or none be left: every slot is invalid then, where BERT returns the
  text "empty". Further differences: k need not be `n_best`; equal scores are
  ordered as everywhere here, not by rank of start and end; equal texts stay
  (see `decode.merge`); padding reaches to the bucket, not to `max_length`.
  """
  errors.check_at_least(1, "search 'top_k'", k=k)
  return _within(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, k),
      end_mask & _among_best(scores.end, k)))


def argmax() -> Search:
  """The best legal start and, on its own, the best legal end: one span.

  It is invalid, so that the window has no answer at all, if the end comes
  before the start or too far behind it.
  """
  return _within(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, 1, start_mask),
      end_mask & _among_best(scores.end, 1, end_mask)))


def beam(*, width: int = 5) -> Search:
  """The `width` best legal starts by their own score, then every end of each.

  Yang et al. (2019, XLNet), whose code keeps as many ends as starts.
  """
  errors.check_at_least(1, "search 'beam'", width=width)
  return _within(lambda scores, start_mask, end_mask: (
      start_mask & _among_best(scores.start, width, start_mask), end_mask))


SEARCHES: dict[str, Callable[..., Search]] = {
    'dense': lambda: dense, 'banded': lambda: banded,
    'two_stage': lambda: two_stage,
    'top_k': top_k, 'argmax': argmax, 'beam': beam,
}
EXACT = frozenset({'dense', 'banded', 'two_stage'})


def is_exact(spec: str) -> bool:
  """Whether a spec of SEARCHES names an exact search."""
  return registry.parse_spec(spec)[0] in EXACT


def log_partition(scores: SpanScores, start_mask: jax.Array,
                  end_mask: jax.Array, *, max_answer_length: int,
                  temperature: jax.Array | float = 1.0) -> jax.Array:  # [B]
  """log Σ exp(score(i, j) / temperature) over all legal spans, without null.

  ILLEGAL if there is none. With the whole context as both masks it is that of
  the span softmax in training; a search starts at owned tokens only, so that
  windows of one question add up.
  """
  start, end, pair = _ordered(scores, max_answer_length)
  width = min(max_answer_length, start.shape[1])
  table = _add(start, start_mask, _right(end, end_mask, pair, width))
  return jax.nn.logsumexp(jnp.where(
      table > ILLEGAL, jnp.maximum(table / temperature, LOWEST), ILLEGAL),
                          axis=(1, 2))


def _within(narrow: Callable[..., tuple[jax.Array, jax.Array]]) -> Search:
  """The exact search, but of the starts and ends that `narrow` leaves.

  `narrow` sees no pair term: that counts once the candidates are chosen.
  """
  def search(scores: SpanScores, start_mask: jax.Array, end_mask: jax.Array,
             *, max_answer_length: int, n_best: int) -> Spans:
    return two_stage(scores, *narrow(scores, start_mask, end_mask),
                     max_answer_length=max_answer_length, n_best=n_best)
  return search


def _among_best(x: jax.Array, count: int,
                mask: jax.Array | None = None) -> jax.Array:
  """[B, L] bool: the `count` largest (within `mask`), the first of equals."""
  length = x.shape[1]
  x = _canonical(x)
  if mask is not None:
    x = jnp.where(mask, x, ILLEGAL)
  _, best = jax.lax.top_k(x, min(count, length))
  return jax.nn.one_hot(best, length, dtype=bool).any(axis=1)


def _ordered(
    scores: SpanScores, max_answer_length: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Start, end and pair in float32, without -0.0 or less than LOWEST."""
  pair = scores.pair
  if pair is not None and pair.shape[-1] < max_answer_length:
    raise ValueError(
        f'max_answer_length {max_answer_length} exceeds the {pair.shape[-1]} '
        'lengths that the head scores; lower it or widen the head')

  return (_canonical(scores.start), _canonical(scores.end),
          None if pair is None else _canonical(pair))


def _canonical(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  # top_k ranks -0.0 below 0.0. Not x + 0.0: under jit, XLA drops it.
  return jnp.where(x == 0, 0.0, jnp.maximum(x, LOWEST))


def _sum(left: jax.Array, right: jax.Array) -> jax.Array:
  """Of legal scores: never -inf, so never NaN; monotone, so max commutes."""
  return jnp.maximum(left + right, LOWEST)


def _right(end, end_mask, pair, width) -> jax.Array:  # [B, L, W]
  """end[i + d] (+ pair[i, d]); ILLEGAL where i + d is no legal end."""
  length = end.shape[1]
  index = jnp.arange(length)[:, None] + jnp.arange(width)[None, :]
  inside = index < length
  index = jnp.minimum(index, length - 1)
  right = end[:, index]
  if pair is not None:
    right = _sum(right, pair[:, :, :width])
  return jnp.where(end_mask[:, index] & inside[None], right, ILLEGAL)


def _add(start, start_mask, right) -> jax.Array:
  """start + right over trailing axes, ILLEGAL wherever either is."""
  extra = (1,) * (right.ndim - start.ndim)
  start = start.reshape(*start.shape, *extra)
  legal = start_mask.reshape(*start_mask.shape, *extra) & (right > ILLEGAL)
  return jnp.where(legal, _sum(start, right), ILLEGAL)


def _window_max(x: jax.Array, width: int) -> jax.Array:  # [B, L]
  """max(x[i], …, x[i + width - 1]), by doubling."""
  def shifted(y, by):
    return jnp.pad(y[:, by:], ((0, 0), (0, by)), constant_values=ILLEGAL)
  span = 1
  while 2 * span <= width:
    x = jnp.maximum(x, shifted(x, span))
    span *= 2
  return jnp.maximum(x, shifted(x, width - span)) if width > span else x


def _top_k(table: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """top_k padded to `count` slots when the table is smaller."""
  k = min(count, table.shape[-1])
  best, flat = jax.lax.top_k(table, k)
  pad = ((0, 0), (0, count - k))
  return (jnp.pad(best, pad, constant_values=ILLEGAL), jnp.pad(flat, pad))


def _spans(scores, best, first, last) -> Spans:
  valid = best > ILLEGAL
  return Spans(
      start=jnp.where(valid, first, 0).astype(jnp.int32),
      end=jnp.where(valid, last, 0).astype(jnp.int32),
      score=best, valid=valid,
      null_score=scores.null_score.astype(jnp.float32))
