"""A head that scores the end given the start: p(i, j) = p(i) p(j | i).

Glossary of shapes: B batch (windows), L window length, D hidden size,
H units of the hidden layer, K starts, W longest span.

  log p(i)     = log softmax_i  S · h_i
  log p(j | i) = log softmax_j  w · LN(tanh(W [h_j; h_i] + b)),         H = D
                 log softmax_j  w · gelu(W [h_j; h_i] + b),             H = 512

over the context tokens and [CLS]. The first form is XLNet's (Yang et al., 2019,
code: get_qa_outputs), the second ELECTRA's (Clark et al., 2020, code:
qa_tasks).

In training i is the gold start, so plain cross-entropy on `start` and `end` is
-log p(i) - log p(j | i). Decoding has no gold start; it scores the ends for
each of the K best starts, and the spans of all other starts score about NEVER.
W [h_j; h_i] is W_j h_j + W_i h_i, so after these two matrix products each start
costs only L·H operations.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import span_scores
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

# Form → H (0 for D), and the function that follows the product.
FORMS: dict[str, tuple[int, Callable[[jax.Array], jax.Array]]] = {
    'xlnet': (0, lambda x: layers.normalize(jnp.tanh(x))),
    'electra': (512, lambda x: nn.gelu(x, approximate=False)),
}
# log p(j | i) of the starts outside the beam. Their spans are legal, so NEVER
# is finite and far above span_scores.MASKED, the score of illegal spans.
NEVER = -1e9


class Conditional(nn.Module):
  """The conditional head: D + H(2D + 2) parameters."""

  form: str = 'xlnet'
  beam: int = 5  # K
  width: int = 30  # W

  def __post_init__(self):
    errors.check_choice("head 'conditional'", 'form', self.form, FORMS)
    errors.check_at_least(1, "head 'conditional'", beam=self.beam,
                          width=self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden, mask = inputs.hidden, inputs.context_mask
    size, activation = FORMS[self.form]
    size = size or hidden.shape[-1]
    start = layers.project('start', hidden)  # [B, L]
    log_start = layers.log_softmax(start, mask)
    legal = mask if inputs.start_mask is None else inputs.start_mask
    starts = (_beam(log_start, legal, self.beam)  # [B, 1 + K], [CLS] first
              if inputs.gold_start is None else inputs.gold_start[:, None])

    token = layers.dense(size, 'end_token')(hidden)  # [B, L, H]
    given = layers.dense(size, 'given_start', bias=True)(
        jnp.take_along_axis(hidden, starts[:, :, None], axis=1))
    w = self.param('end', layers.kernel_init, (size,))
    ends = jax.lax.map(  # [1 + K, B, L]; one [B, L, H] is in memory at a time
        lambda x: activation(token + x[:, None]) @ w, given.swapaxes(0, 1))

    if inputs.gold_start is not None:
      return SpanScores(start=start, end=ends[0], conditional=True)
    log_end = layers.log_softmax(ends, mask).swapaxes(0, 1)  # [B, 1 + K, L]
    pair = _band(log_end[:, 1:], starts[:, 1:], self.width)
    return SpanScores(start=log_start, end=jnp.zeros_like(log_start), pair=pair,
                      null=log_start[:, 0] + log_end[:, 0, 0])


def _beam(log_start: jax.Array, start_mask: jax.Array,
          beam: int) -> jax.Array:  # [B, 1 + K]
  """Returns the position of [CLS], then the K most probable starts.

  In a window with fewer, other tokens follow; no search starts a span there.
  """
  masked = jnp.where(start_mask, log_start, span_scores.MASKED)
  _, best = jax.lax.top_k(masked, min(beam, log_start.shape[1]))
  return jnp.pad(best, ((0, 0), (1, 0)))


def _band(log_end: jax.Array, starts: jax.Array,  # [B, K, L], [B, K]
          width: int) -> jax.Array:  # [B, L, W]
  """Returns log p(i + d | i) in the rows of `starts`, NEVER in all others."""
  batch, _, length = log_end.shape
  columns = starts[:, :, None] + jnp.arange(width)[None, None]  # [B, K, W]
  rows = jnp.take_along_axis(log_end, jnp.minimum(columns, length - 1), axis=2)
  table = jnp.full((batch, length, width), NEVER, jnp.float32)
  return table.at[jnp.arange(batch)[:, None], starts].set(rows)
