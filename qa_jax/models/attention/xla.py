"""Attention in plain JAX: the reference implementation.

Glossary of shapes: B rows, L row length, H attention heads, K head size; of
the weights that are computed at a time, Q queries and S keys.

Every pass over an array [B, H, L, L] costs as much as a product with it, so the
gradient is written by hand. It needs no dropout mask and no scale of dropout:
the scores have the gradient d∘w' - c w, where w are the weights, w' the weights
after dropout, d the gradient of w', and c = Σ g y for the output y of a query.
"""

import functools
import re

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.models import matmul
from qa_jax.models.attention import base
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Places
from qa_jax.models.attention.base import Visible

# Rows of at least so many tokens have more scores than fit in the caches of a
# CPU. One head after another then takes 0.86 of the time (measured at 384).
BY_HEADS_FROM = 320


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
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
              bias: jax.Array | None = None,  # [B or 1, H, Q, S]
              ) -> jax.Array:  # [B, H, …, Q, K] float32
  """Computes attention of queries to the keys that they see."""
  rate, kept = 0.0, None
  if drop.active:
    rate, kept = drop.rate, drop.kept((*q.shape[:-1], k.shape[-2]), places)
  return _attend(rate, matmul.float32_precision(q.dtype), base.scaled(q), k, v,
                 seen, kept, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rate: float, precision: matmul.Precision, q: jax.Array,  # q / √K
            k: jax.Array, v: jax.Array, seen: jax.Array,
            kept: jax.Array | None,  # [B, H, …, Q, S] bool; None: no dropout
            bias: jax.Array | None) -> jax.Array:
  # JAX replaces this function by _forward if it needs the gradient.
  whole = lambda q, k, v, seen: _forward(
      rate, precision, q, k, v, seen, kept, bias)[0]
  if (kept is not None or bias is not None or q.ndim > 4
      or q.shape[2] < BY_HEADS_FROM):
    return whole(q, k, v, seen)

  def by_heads(q, k, v, seen):
    y = jax.lax.map(lambda heads: whole(*(x[:, None] for x in heads), seen),
                    [x.swapaxes(0, 1) for x in (q, k, v)])
    return y[:, :, 0].swapaxes(0, 1)  # from [H, B, 1, L, K]
  return jax.lax.platform_dependent(
      q, k, v, seen, cpu=by_heads, default=whole)


def _products(q: jax.Array, precision: matmul.Precision):
  """Returns a product of [B, H, …, x, y] and [B, H, …, y, z] by its letters."""
  def times(letters: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    spec = re.sub('([a-z]+)', 'bh' + 'n' * (q.ndim - 4) + r'\1', letters)
    return matmul.product(spec, a, b, q.dtype, precision, **options)
  return times


def _forward(rate, precision, q, k, v, seen, kept, bias):
  times = _products(q, precision)
  # A sum is as exact as a choice, because MASKED absorbs every score, and it
  # takes XLA two thirds of the time on a CPU.
  scores = times('qk,sk->qs', q, k) + jnp.where(seen, 0.0, span_scores.MASKED)
  if bias is not None:
    scores += bias
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  # The factor after the product takes L·K multiplications instead of L·L.
  factor = 1 / weights.sum(axis=-1, keepdims=True)  # [B, H, …, Q, 1]
  dropped = weights
  if kept is not None:
    dropped = jnp.where(kept, weights, 0.0)
    factor /= 1 - rate
  dropped = dropped.astype(q.dtype)
  y = times('qs,sk->qk', dropped, v) * factor
  return y, (q, k, v, seen, bias, weights, dropped, factor, y)


def _backward(rate, precision, residuals, g):
  q, k, v, seen, bias, weights, dropped, factor, y = residuals
  times = _products(q, precision)
  # `factor` is divided by 1 - rate.
  centre = (g * y).sum(axis=-1, keepdims=True) * (1 - rate)
  g *= factor
  slope = (times('qk,sk->qs', g, v) * dropped.astype(jnp.float32)
           - weights * (centre * factor))
  # A query that sees no token has equal scores, MASKED, whatever q and k are.
  any_seen = seen.any(axis=-1, keepdims=True).astype(q.dtype)
  dq = times('qs,sk->qk', slope, k, out=q.dtype) * any_seen
  dk = times('qs,qk->sk', slope, q * any_seen, out=q.dtype)
  dv = times('qs,qk->sk', dropped, g, out=q.dtype)
  if bias is not None:
    slope *= any_seen.astype(slope.dtype)
    bias = slope.sum(axis=[i for i, n in enumerate(bias.shape)
                           if n < slope.shape[i]], keepdims=True)
  return dq, dk, dv, None, None, bias


_attend.defvjp(_forward, _backward)
