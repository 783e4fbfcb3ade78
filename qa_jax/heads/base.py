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
