"""Attention in plain JAX: the reference implementation.

Glossary of shapes: B rows, L row length, H attention heads, K head size.

Every pass over an array [B, H, L, L] costs as much as a product with it, so the
gradient is written by hand. It needs no dropout mask and no scale of dropout:
the scores have the gradient d∘w' - c w, where w are the weights, w' the weights
after dropout, d the gradient of w', and c = Σ g y for the output y of a query.
"""

import functools

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.models import matmul
from qa_jax.models.attention import base
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible

# Rows of at least so many tokens have more scores than fit in the caches of a
# CPU. One head after another then takes 0.86 of the time (measured at 384).
LONG = 320


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention by its definition, with a float32 softmax."""
  if visible.segment_ids is None:
    seen = visible.attention_mask[:, None, None, :]
  else:
    ids = visible.segment_ids
    seen = ids[:, None, :, None] == ids[:, None, None, :]
  return _attend(
      matmul.float32_precision(q.dtype), base.scaled(q), k, v, seen, drop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(precision: matmul.Precision, q: jax.Array,  # q / √K
            k: jax.Array, v: jax.Array, seen: jax.Array,  # [B, 1, 1 or L, L]
            drop: Drop) -> jax.Array:
  # JAX replaces this function by _forward if it needs the gradient.
  whole = lambda *arrays: _forward(precision, *arrays, drop)[0]
  if drop.active or q.shape[2] < LONG:
    return whole(q, k, v, seen)

  def by_heads(q, k, v, seen):
    y = jax.lax.map(lambda heads: whole(*(x[:, None] for x in heads), seen),
                    [x.swapaxes(0, 1) for x in (q, k, v)])
    return y[:, :, 0].swapaxes(0, 1)  # from [H, B, 1, L, K]
  return jax.lax.platform_dependent(
      q, k, v, seen, cpu=by_heads, default=whole)


def _forward(precision, q, k, v, seen, drop):
  product = functools.partial(
      matmul.product, dtype=q.dtype, precision=precision)
  # A sum is as exact as a choice, because MASKED absorbs every score, and it
  # takes XLA two thirds of the time on a CPU.
  scores = product('bhqk,bhsk->bhqs', q, k) + jnp.where(
      seen, 0.0, span_scores.MASKED)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  # The factor after the product takes L·K multiplications instead of L·L.
  factor = 1 / weights.sum(axis=-1, keepdims=True)  # [B, H, L, 1]
  dropped = weights
  if drop.active:
    dropped = jnp.where(drop.kept(weights.shape), weights, 0.0)
    factor /= 1 - drop.rate
  dropped = dropped.astype(q.dtype)
  y = product('bhqs,bhsk->bhqk', dropped, v) * factor
  return y, (q, k, v, seen, weights, dropped, factor, y, drop)


def _backward(precision, residuals, g):
  q, k, v, seen, weights, dropped, factor, y, drop = residuals
  product = functools.partial(
      matmul.product, dtype=q.dtype, precision=precision)
  centre = (g * y).sum(axis=-1, keepdims=True)
  if drop.active:
    centre *= 1 - drop.rate  # `factor` is divided by it
  g *= factor
  slope = (product('bhqk,bhsk->bhqs', g, v) * dropped.astype(jnp.float32)
           - weights * (centre * factor))
  # A query that sees no token has equal scores, MASKED, whatever q and k are.
  any_seen = seen.any(axis=-1, keepdims=True).astype(q.dtype)
  dq = product('bhqs,bhsk->bhqk', slope, k) * any_seen
  dk = product('bhqs,bhqk->bhsk', slope, q * any_seen)
  dv = product('bhqs,bhqk->bhsk', dropped, g)
  return (*(x.astype(q.dtype) for x in (dq, dk, dv)), None, None)


_attend.defvjp(_forward, _backward)
