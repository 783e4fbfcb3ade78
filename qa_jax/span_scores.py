"""SpanScores, the contract between heads, objectives and searches.

Glossary of shapes: B batch (windows), L window length, D hidden size,
W longest span, G gold spans.

  score(i, j) = start[i] + (end[j] + pair[i, j - i]),   0 <= j - i < W
  null score  = start[0] + end[0] (at [CLS]), or an explicit null[B]

V is the set of legal spans (i, j) of a window: i and j are context tokens and
0 <= j - i < W. V⁺ is V and the null answer, "no answer in this window".
"""

from typing import Optional

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax import errors

# The score of a masked position or span. It is finite, so that a wholly masked
# row has finite gradients, and a sum of a few does not overflow in float32.
MASKED = -1e30


@flax.struct.dataclass
class HeadInput:
  """The input of a span head: the layers of the encoder and masks."""

  layers: tuple[jax.Array, ...]  # embeddings and layer outputs, [B, L, D]
  context_mask: jax.Array  # [B, L] bool
  gold_start: jax.Array | None = None  # [B] int32, in training only
  # [B, L] bool: the starts that a search may choose, for a head that scores the
  # spans of a few starts only. None: all context tokens.
  start_mask: jax.Array | None = None

  @property
  def hidden(self) -> jax.Array:  # [B, L, D]
    """Returns the last layer in float32, in which heads compute."""
    return self.layers[-1].astype(jnp.float32)


@flax.struct.dataclass
class SpanScores:
  """The scores of all spans of a batch of windows, in float32."""

  start: jax.Array  # [B, L]
  end: jax.Array  # [B, L]
  pair: jax.Array | None = None  # [B, L, W], indexed by (start, end - start)
  null: jax.Array | None = None  # [B]
  # Separate start and end scores, which the compound objective trains and no
  # search decodes.
  boundary: Optional['SpanScores'] = None
  # True for a conditional head in training: `end` is then computed for the gold
  # start, so start[i] + end[j] is a span score for that i only.
  conditional: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def null_score(self) -> jax.Array:  # [B]
    """Returns the score of "no answer in this window"."""
    return self.start[:, 0] + self.end[:, 0] if self.null is None else self.null


def softmax_domain(context_mask: jax.Array) -> jax.Array:  # [B, L] bool
  """Returns the mask of the context tokens and of [CLS], the null position."""
  return context_mask | (jnp.arange(context_mask.shape[1]) == 0)[None]


def mask_padding(scores: SpanScores,
                 attention_mask: jax.Array) -> SpanScores:  # [B, L]
  """Returns scores whose start and end are MASKED at padding.

  [CLS] is never masked: in a padding row it keeps the null score finite and
  the largest score, so that no metric of the row overflows.
  """
  tokens = softmax_domain(attention_mask > 0)
  mask = lambda x: jnp.where(tokens, x, MASKED)
  return scores.replace(start=mask(scores.start), end=mask(scores.end))


def masked_logsumexp(x: jax.Array, mask: jax.Array,
                     axis: int | tuple[int, ...]) -> jax.Array:
  """Computes log Σ exp over `mask`; it is about MASKED if `mask` is empty."""
  return jax.nn.logsumexp(jnp.where(mask, x, MASKED), axis=axis)


def check_width(pair: jax.Array | jax.ShapeDtypeStruct | None, longest: int,
                what: str) -> None:
  """Raises a UserError, which begins with `what`, if W of `pair` is too small.

  `pair` is [B, L, W], scores of spans of at most W tokens, or None.
  """
  if pair is not None and pair.shape[-1] < longest:
    raise errors.UserError(f'{what} exceeds the {pair.shape[-1]} lengths that '
                           'the head scores; lower it or widen the head')


def band(scores: SpanScores, mask: jax.Array, longest: int) -> jax.Array:
  """Computes the scores of V at [i, j - i], MASKED outside V: [B, L, W].

  V has the spans in `mask`, [B, L], of at most `longest` tokens. So W is
  min(`longest`, L). Raises a UserError if the head scores only shorter spans.
  """
  check_width(scores.pair, longest,
              f'max_answer_length={longest} of the objective')
  pair, width = scores.pair, min(longest, mask.shape[1])
  right = _shifted(scores.end, width)
  if pair is not None:
    right += pair[:, :, :width]
  legal = mask[:, :, None] & _shifted(mask, width)
  return jnp.where(legal, scores.start[:, :, None] + right, MASKED)


def _shifted(x: jax.Array, width: int) -> jax.Array:  # [B, L] → [B, L, W]
  """Returns x[i + d] at [i, d], and 0 where i + d is beyond the end.

  A padded row is repeated and cut into rows that are longer by one, so each row
  is shifted by one more. Indexing gives the same values, but its gradient is a
  scatter, whose sums on a GPU differ in the last bits from run to run.
  """
  batch, length = x.shape
  padded = jnp.pad(x, ((0, 0), (0, width - 1)))
  cut = padded.shape[1] + 1
  rows = jnp.tile(padded, (1, width + 1))[:, :width * cut]
  return rows.reshape(batch, width, cut)[:, :, :length].swapaxes(1, 2)


def log_sum_of_spans(scores: SpanScores, mask: jax.Array,  # [B, L] bool
                     longest: int) -> jax.Array:  # [B]
  """Computes log Σ exp over V⁺: the legal spans and the null answer."""
  spans = jax.nn.logsumexp(band(scores, mask, longest), axis=(1, 2))
  return jnp.logaddexp(spans, scores.null_score)


def log_sum_of_pairs(scores: SpanScores,
                     mask: jax.Array) -> jax.Array:  # [B, L] bool → [B]
  """Computes log Σ exp over all pairs (i, j) of context tokens and [CLS].

  The pair (0, 0) has the null score. Pairs of context tokens inside the band
  have their pair score; other pairs with [CLS] have none. The ends before and
  behind the band have none; their sums are running sums of positive terms, so
  nothing cancels.
  """
  start, end, length = scores.start, scores.end, mask.shape[1]
  width = 1 if scores.pair is None else min(scores.pair.shape[-1], length)
  before = jax.lax.cumlogsumexp(
      jnp.where(softmax_domain(mask), end, MASKED), axis=1)
  # XLA for TPUs takes a minute and a half to compile one with reverse=True.
  behind = jnp.flip(jax.lax.cumlogsumexp(
      jnp.flip(jnp.where(mask, end, MASKED), axis=1), axis=1), axis=1)
  pad = lambda x, left, right: jnp.pad(
      x, ((0, 0), (left, right)), constant_values=MASKED)
  outside = jnp.logaddexp(pad(before[:, :-1], 1, 0),
                          pad(behind[:, width:], 0, width))  # [B, L]
  terms = (masked_logsumexp(start + outside, mask, axis=1),
           jax.nn.logsumexp(band(scores, mask, width), axis=(1, 2)),
           start[:, 0] + masked_logsumexp(end, mask, axis=1),
           scores.null_score)
  return jax.nn.logsumexp(jnp.stack(terms), axis=0)


def gold_scores(scores: SpanScores,
                golds: jax.Array) -> jax.Array:  # [B, G, 2] → [B, G]
  """Computes the scores of gold spans; those of padding (-1) are MASKED.

  A gold span that is longer than the head scores has no pair score.
  """
  first, last = jnp.maximum(golds[..., 0], 0), jnp.maximum(golds[..., 1], 0)
  take = lambda x, index: jnp.take_along_axis(
      x.reshape(len(x), -1), index, axis=1)
  right = take(scores.end, last)
  if scores.pair is not None:
    width = scores.pair.shape[-1]
    offset = jnp.minimum(last - first, width - 1)
    right += jnp.where(last - first < width,
                       take(scores.pair, first * width + offset), 0.0)
  score = take(scores.start, first) + right
  return jnp.where(golds[..., 0] >= 0, score, MASKED)


def log_sum_beyond(scores: SpanScores, golds: jax.Array,  # [B, G, 2]
                   longest: int) -> jax.Array:  # [B]
  """Computes log Σ exp over the gold spans that are too long to be in V."""
  return masked_logsumexp(gold_scores(scores, golds),
                          golds[..., 1] - golds[..., 0] >= longest, axis=1)


def overlap_f1(golds: jax.Array,  # [B, G, 2]
               shape: tuple[int, int]) -> jax.Array:  # [B, L, W]
  """Computes the token F1 of each span of a band [L, W] with its best gold."""
  first = jnp.arange(shape[0])[None, :, None]
  last = first + jnp.arange(shape[1])[None, None]

  def better(best, gold):  # one gold span at a time: O(L·W), not O(L·W·G)
    a, b = gold[:, 0, None, None], gold[:, 1, None, None]
    shared = jnp.minimum(last, b) - jnp.maximum(first, a) + 1
    # A quotient of integers would be float64 if jax_enable_x64 is on.
    total = (last - first + b - a + 2).astype(best.dtype)
    return jnp.maximum(best, 2 * shared / total), None

  zeros = jnp.zeros((len(golds), *shape), jnp.float32)
  return jax.lax.scan(better, zeros, golds.swapaxes(0, 1))[0]


def valid_mass(scores: SpanScores, context_mask: jax.Array, *,  # [B, L] bool
               max_answer_length: int) -> jax.Array:  # [B]
  """Computes Σ p(start) p(end) over V⁺, the valid mass of two softmaxes.

  They are over the context tokens and [CLS]; pair and null scores do not count.
  A padding row has the value 1. The training scores of a conditional head have
  no valid mass.
  """
  boundaries = SpanScores(start=scores.start, end=scores.end)
  domain = softmax_domain(context_mask)
  return jnp.exp(log_sum_of_spans(boundaries, context_mask, max_answer_length)
                 - masked_logsumexp(scores.start, domain, axis=1)
                 - masked_logsumexp(scores.end, domain, axis=1))
