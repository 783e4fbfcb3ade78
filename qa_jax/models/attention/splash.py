"""JAX's splash attention: TPUs, packed or not.

Glossary of shapes: B rows, L length, P padded length, H heads, K head size.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qa_jax.models.attention import base
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible

LANES = 128  # a length must be a multiple


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """The result is rounded to the compute dtype."""
  assert not drop.active
  heads, length = q.shape[1:3]
  missing = -length % LANES
  query_ids, key_ids = visible.ids()
  # A row without any real token sees all: no softmax over nothing.
  key_ids = jnp.where((key_ids == query_ids).any(axis=1, keepdims=True),
                      key_ids, query_ids)
  # Padding of packed rows has the number 0 and sees itself.
  query_ids, key_ids = (jnp.pad(x, ((0, 0), (0, missing)))  # [B, P]
                        for x in (query_ids, key_ids))
  q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))
             for x in (base.scaled(q), k, v))  # [B, H, P, K]
  tables, kernel = jax.tree.flatten(_kernel(heads, length + missing))
  y = _spread(kernel, tables, q, k, v, query_ids, key_ids)
  return y[:, :, :length].astype(jnp.float32)


def _kernel(heads: int, length: int) -> Any:
  """A pytree to call: what it keeps are tables of its blocks."""
  # Deferred: a tenth of a command's start-up, for TPUs alone.
  from jax.experimental.pallas.ops.tpu import splash_attention

  mask = splash_attention.MultiHeadMask(
      [splash_attention.FullMask((length, length))] * heads)
  return splash_attention.make_splash_mha_single_device(
      mask, block_sizes=splash_attention.BlockSizes(  # a head is one block
          block_q=length, block_kv=length, block_q_dkv=length,
          block_kv_dkv=length, block_q_dq=length, block_kv_dq=length))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(kernel: Any, tables: Sequence[jax.Array],
            *arrays: jax.Array) -> jax.Array:  # [B, H, P, K]
  return base.by_rows(functools.partial(_rows, kernel), arrays, tables)


def _forward(kernel, tables, *arrays):
  return _spread(kernel, tables, *arrays), (tables, arrays)


def _backward(kernel, kept, g):
  """Runs forward anew: what splash itself keeps cannot be told into rows."""
  tables, arrays = kept

  def gradients(q, k, v, query_ids, key_ids, g, *tables):
    _, pull = jax.vjp(lambda q, k, v: _rows(
        kernel, q, k, v, query_ids, key_ids, *tables), q, k, v)
    return pull(g)
  return None, *base.by_rows(gradients, (*arrays, g), tables), None, None


_spread.defvjp(_forward, _backward)


def _rows(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array,
          query_ids: jax.Array, key_ids: jax.Array,
          *tables: jax.Array) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import splash_attention

  run = jax.tree.unflatten(kernel, tables)
  return jax.vmap(lambda q, k, v, *ids: run(
      q, k, v, splash_attention.SegmentIds(*ids)))(
          q, k, v, query_ids, key_ids)
