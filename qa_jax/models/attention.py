"""Self-attention of a row of tokens, by several programs with one result.

Glossary of shapes: B rows, L length, H heads, K head size.

  y = dropout(softmax(q kᵀ / √K)) v          (Vaswani et al., 2017, section 3.2)

over the real tokens or, in a packed row, over those of the query's own segment.
"""

from collections.abc import Callable
import math

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax.models import products

MASKED = -1e9  # finite: a row without any real token keeps finite gradients


@flax.struct.dataclass
class Visible:
  """What a token attends to."""

  attention_mask: jax.Array  # [B, L] bool: the real tokens
  # [B, L] int32, 0 at padding: the same number is the same segment of a packed
  # row. None: a row is one segment, and padding attends to it as well.
  segment_ids: jax.Array | None = None


def xla(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
        k: jax.Array, v: jax.Array, visible: Visible,
        drop: Callable[[jax.Array], jax.Array],  # on weights, [B, H, L, L]
        ) -> jax.Array:  # [B, H, L, K] float32
  """The definition, with a float32 softmax."""
  scores = products.einsum(
      'bhqk,bhsk->bhqs', q / math.sqrt(q.shape[-1]), k, q.dtype)
  if visible.segment_ids is None:
    seen = visible.attention_mask[:, None, None, :]
  else:
    ids = visible.segment_ids
    seen = ids[:, None, :, None] == ids[:, None, None, :]
  scores = jnp.where(seen, scores, MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(
      scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1, keepdims=True)
  # Dividing after the product costs L·K instead of L·L divisions.
  return products.einsum(
      'bhqs,bhsk->bhqk', drop(weights), v, q.dtype) / total
