"""Attention in plain JAX: the reference implementation.

Glossary of shapes: B rows, L row length, H attention heads, K head size.
"""

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.models import matmul
from qa_jax.models.attention import base
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop, bias: jax.Array | None = None,  # [B or 1, H, L, L]
           ) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention by its definition, with a float32 softmax."""
  scores = matmul.einsum('bhqk,bhsk->bhqs', base.scaled(q), k, q.dtype)
  if bias is not None:
    scores += bias
  if visible.segment_ids is None:
    seen = visible.attention_mask[:, None, None, :]
  else:
    ids = visible.segment_ids
    seen = ids[:, None, :, None] == ids[:, None, None, :]
  scores = jnp.where(seen, scores, span_scores.MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(
      scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1, keepdims=True)
  # The division after the product takes L·K divisions instead of L·L.
  return matmul.einsum('bhqs,bhsk->bhqk', drop(weights), v, q.dtype) / total
