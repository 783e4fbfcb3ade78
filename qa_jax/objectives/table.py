"""Sums over the masked outer sum, whose table is a band.

Glossary of shapes: B batch (windows), L window length, W longest span, G gold
spans.

  score(i, j) = start[i] + (end[j] + pair[i, j - i])
  V = {(i, j): both in the context, 0 <= j - i < W},   V⁺ = V ∪ {null}

V is what a search chooses from (though a search starts at owned tokens only),
so training and decoding agree on what a span is. Time and memory are O(L·W).
"""

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads.base import SpanScores
from qa_jax.heads.base import softmax_domain
from qa_jax.objectives import base


def band(scores: SpanScores, mask: jax.Array,  # [B, L] bool
         longest: int) -> jax.Array:  # [B, L, W]
  """Scores of V as [i, j - i], MASKED where there is no span.

  Raises:
    UserError: the head does not score spans as long as `longest`.
  """
  pair, length = scores.pair, mask.shape[1]
  if pair is not None and pair.shape[-1] < longest:
    raise errors.UserError(
        f'max_answer_length={longest} of the objective exceeds the '
        f'{pair.shape[-1]} lengths that the head scores; lower it or widen the '
        'head')
  width = min(longest, length)
  right = _shifted(scores.end, width)
  if pair is not None:
    right += pair[:, :, :width]
  legal = mask[:, :, None] & _shifted(mask, width)
  return jnp.where(legal, scores.start[:, :, None] + right, base.MASKED)


def log_sum_of_spans(scores: SpanScores, mask: jax.Array,
                     longest: int) -> jax.Array:  # [B]
  """log Σ exp over V⁺."""
  spans = jax.nn.logsumexp(band(scores, mask, longest), axis=(1, 2))
  return jnp.logaddexp(spans, scores.null_score)


def log_sum_of_pairs(scores: SpanScores, mask: jax.Array) -> jax.Array:  # [B]
  """log Σ exp over all (i, j) of context ∪ [CLS], (0, 0) being null.

  The band has its pair term. The ends on either side of it, which have none,
  come from running sums: only positive terms are added, so nothing cancels.
  """
  start, end, length = scores.start, scores.end, mask.shape[1]
  width = 1 if scores.pair is None else min(scores.pair.shape[-1], length)
  domain = softmax_domain(mask)
  before = jax.lax.cumlogsumexp(
      jnp.where(domain, end, base.MASKED), axis=1)
  behind = jax.lax.cumlogsumexp(
      jnp.where(mask, end, base.MASKED), axis=1, reverse=True)
  pad = lambda x, left, right: jnp.pad(
      x, ((0, 0), (left, right)), constant_values=base.MASKED)
  outside = jnp.logaddexp(pad(before[:, :-1], 1, 0),
                          pad(behind[:, width:], 0, width))  # [B, L]
  terms = (base.masked_logsumexp(start + outside, mask, axis=1),
           jax.nn.logsumexp(band(scores, mask, width), axis=(1, 2)),
           start[:, 0] + base.masked_logsumexp(end, mask, axis=1),
           scores.null_score)
  return jax.nn.logsumexp(jnp.stack(terms), axis=0)


def gold_scores(scores: SpanScores, golds: jax.Array) -> jax.Array:  # [B, G]
  """Scores of the gold spans [B, G, 2]; MASKED where there is none."""
  first, last = jnp.maximum(golds[..., 0], 0), jnp.maximum(golds[..., 1], 0)
  take = lambda x, index: jnp.take_along_axis(
      x.reshape(len(x), -1), index, axis=1)
  right = take(scores.end, last)
  if scores.pair is not None:
    width = scores.pair.shape[-1]
    offset = jnp.minimum(last - first, width - 1)
    right += jnp.where(last - first < width,
                       take(scores.pair, first * width + offset), 0.0)
  return jnp.where(golds[..., 0] >= 0, take(scores.start, first) + right,
                   base.MASKED)


def log_sum_beyond(scores: SpanScores, golds: jax.Array,  # [B, G, 2]
                   longest: int) -> jax.Array:  # [B]
  """log Σ exp over gold spans that are longer than `longest`: not in V."""
  return base.masked_logsumexp(
      gold_scores(scores, golds), golds[..., 1] - golds[..., 0] >= longest,
      axis=1)


def overlap_f1(golds: jax.Array,  # [B, G, 2]
               shape: tuple[int, int]) -> jax.Array:  # [B, L, W]
  """Token F1 of each span with the gold span that gives it most."""
  first = jnp.arange(shape[0])[None, :, None]
  last = first + jnp.arange(shape[1])[None, None]

  def better(best, gold):  # one gold span at a time: O(L·W), not O(L·W·G)
    a, b = gold[:, 0, None, None], gold[:, 1, None, None]
    shared = jnp.minimum(last, b) - jnp.maximum(first, a) + 1
    return jnp.maximum(best, 2 * shared / (last - first + b - a + 2)), None

  nothing = jnp.zeros((len(golds), *shape), jnp.float32)
  return jax.lax.scan(better, nothing, golds.swapaxes(0, 1))[0]


def _shifted(x: jax.Array, width: int) -> jax.Array:  # [B, L] → [B, L, W]
  """x[i + d] at [i, d], 0 beyond the end.

  A row, repeated and cut one longer, moves by one each time. Indexing would
  do, but its gradient is a scatter: other bits in every run on a GPU.
  """
  batch, length = x.shape
  padded = jnp.pad(x, ((0, 0), (0, width - 1)))
  cut = padded.shape[1] + 1
  rows = jnp.tile(padded, (1, width + 1))[:, :width * cut]
  return rows.reshape(batch, width, cut)[:, :, :length].swapaxes(1, 2)
