"""Attention in plain JAX: the reference implementation.

Glossary of shapes: B rows, L row length, H attention heads, K head size; of
the weights that are computed at a time, Q queries and S keys.
"""

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.models import matmul
from qa_jax.models.attention import base
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Places
from qa_jax.models.attention.base import Visible


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop, bias: jax.Array | None = None,  # [B or 1, H, L, L]
           ) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention by its definition, with a float32 softmax."""
  if visible.segment_ids is None:
    seen = visible.attention_mask[:, None, None, :]
  else:
    ids = visible.segment_ids
    seen = ids[:, None, :, None] == ids[:, None, None, :]
  if visible.window is not None:
    seen &= Places.all(q.shape[2]).within(visible.window)
  return over_seen(q, k, v, seen, drop, bias=bias)


def over_seen(q: jax.Array,  # [B, H, …, Q, K]
              k: jax.Array, v: jax.Array,  # [B, H, …, S, K]
              seen: jax.Array,  # bool, broadcasts to [B, H, …, Q, S]
              drop: Drop, places: Places | None = None,  # None: the whole row
              bias: jax.Array | None = None,  # of the scores
              ) -> jax.Array:  # [B, H, …, Q, K] float32
  """Computes attention of queries to the keys that they see."""
  more = 'n' * (q.ndim - 4)
  scores = matmul.einsum(f'bh{more}qk,bh{more}sk->bh{more}qs', base.scaled(q),
                         k, q.dtype)
  if bias is not None:
    scores += bias
  scores = jnp.where(seen, scores, span_scores.MASKED)
  weights = jnp.exp(scores - jax.lax.stop_gradient(
      scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1, keepdims=True)
  # The division after the product takes L·K divisions instead of L·L.
  return matmul.einsum(f'bh{more}qs,bh{more}sk->bh{more}qk',
                       drop(weights, places), v, q.dtype) / total
