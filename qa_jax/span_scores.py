"""SpanScores: what every head returns and all that follows understands.

Glossary of shapes: B batch (windows), L window length, D hidden size,
W longest span.

  score(i, j) = start[i] + (end[j] + pair[i, j - i]),   0 <= j - i < W
  null        = start[0] + end[0] (at [CLS]), or an explicit null[B]
"""

from typing import Optional

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax import errors

# Finite, so that a row with nothing in the domain has finite gradients; sums
# of a few of them do not overflow.
MASKED = -1e30


@flax.struct.dataclass
class SpanScores:
  """Scores of all spans of a batch of windows, in float32."""

  start: jax.Array  # [B, L]
  end: jax.Array  # [B, L]
  pair: jax.Array | None = None  # [B, L, W], indexed by (start, end - start)
  null: jax.Array | None = None  # [B]
  # Start and end scores of their own, trained beside these by the compound
  # objective and never decoded.
  boundary: Optional['SpanScores'] = None
  # While training with a gold start: `end` is given that start, so start and
  # end must not be added for any other span.
  conditional: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def null_score(self) -> jax.Array:  # [B]
    if self.null is not None:
      return self.null
    return self.start[:, 0] + self.end[:, 0]


@flax.struct.dataclass
class HeadInput:
  """What a head may read."""

  layers: tuple[jax.Array, ...]  # embeddings and layer outputs, [B, L, D]
  context_mask: jax.Array  # [B, L] bool
  gold_start: jax.Array | None = None  # [B] int32, while training

  @property
  def hidden(self) -> jax.Array:  # [B, L, D] float32: heads compute in it
    return self.layers[-1].astype(jnp.float32)


def softmax_domain(context_mask: jax.Array) -> jax.Array:
  """[B, L] bool: the context tokens, and [CLS] for "no answer here"."""
  return context_mask | (jnp.arange(context_mask.shape[1]) == 0)[None]


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
  return jnp.where(legal, scores.start[:, :, None] + right, MASKED)


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
      jnp.where(domain, end, MASKED), axis=1)
  behind = jax.lax.cumlogsumexp(
      jnp.where(mask, end, MASKED), axis=1, reverse=True)
  pad = lambda x, left, right: jnp.pad(
      x, ((0, 0), (left, right)), constant_values=MASKED)
  outside = jnp.logaddexp(pad(before[:, :-1], 1, 0),
                          pad(behind[:, width:], 0, width))  # [B, L]
  terms = (masked_logsumexp(start + outside, mask, axis=1),
           jax.nn.logsumexp(band(scores, mask, width), axis=(1, 2)),
           start[:, 0] + masked_logsumexp(end, mask, axis=1),
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
                   MASKED)


def log_sum_beyond(scores: SpanScores, golds: jax.Array,  # [B, G, 2]
                   longest: int) -> jax.Array:  # [B]
  """log Σ exp over gold spans that are longer than `longest`: not in V."""
  return masked_logsumexp(
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


def masked_logsumexp(x: jax.Array, mask: jax.Array,
                     axis: int | tuple[int, ...]) -> jax.Array:
  """log Σ exp where `mask`; about MASKED where nothing is."""
  return jax.nn.logsumexp(
      jnp.where(mask, x, MASKED), axis=axis)


def valid_mass(scores: SpanScores, context_mask: jax.Array, *,  # [B, L] bool
               max_answer_length: int) -> jax.Array:  # [B]
  """Σ p(start) p(end) over V⁺: how much two softmaxes leave to spans.

  Of start and end alone, over context and [CLS]; 1 in a padding row. It says
  nothing of a conditional head in training.
  """
  apart = SpanScores(start=scores.start, end=scores.end)
  return jnp.exp(log_sum_of_spans(apart, context_mask, max_answer_length)
                 - log_sum_of_pairs(apart, context_mask))
