"""Fused attention in Pallas for TPUs: a forward and a backward Mosaic kernel.

Glossary of shapes: B rows, L row length, H attention heads, K head size,
N numbers of a group of heads, T queries of a tile.

The weights of some queries and all keys fit into the vector memory of a TPU, so
only these exist at a time, and the softmax needs no sums over tiles of keys. A
program computes a group of as many heads as a product has lanes for. It masks
the vectors of all heads but one instead of slicing them, because a product over
128 lanes takes no longer than one over 64. The backward kernel computes the
weights again. Dropout hashes the index of a weight (models/dropout.py), so both
kernels have the masks of `xla` bit for bit and store none. On a CPU, in tests,
the kernels are interpreted.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.models import matmul
from qa_jax.models.attention import base
from qa_jax.models.attention import kernels
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible

LANES = 128  # of a product and of a block of an array
HEAD_SIZES = (16, 32, 64, 128)  # a program of smaller heads compiles slowly
TILES = 128, 64  # queries at a time; all of a row of another length
LONGEST_TILE, LONGEST = 512, 1024  # tokens of a row with one tile, with several


def fits(length: int) -> bool:
  """Returns whether the weights of a tile fit into the vector memory."""
  return length <= (LONGEST_TILE if _tile(length) == length else LONGEST)


def _tile(length: int) -> int:
  return next((n for n in TILES if length % n == 0), length)


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention without arrays of L·L elements, and its gradient too.

  The kernel rounds y to the dtype of `q`.
  """
  batch, heads, length, size = q.shape
  # The kernels read and write the layout of Dense layers, [B, L, 3·H·K], so
  # this cancels the transposes and the split of the caller.
  qkv = jnp.concatenate([x.swapaxes(1, 2) for x in (q, k, v)], axis=2).reshape(
      batch, length, -1)
  query_ids, key_ids = visible.ids()
  y = _fused((heads, drop.rate if drop.active else 0.0, visible.window,
              matmul.float32_precision(q.dtype)),
             qkv, query_ids[:, :, None], key_ids[:, None],
             kernels.row_seeds(drop, batch, length)[:, None])
  return y.reshape(batch, length, heads, size).swapaxes(1, 2).astype(
      jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options: tuple[int, float, int | None, matmul.Precision],
           qkv: jax.Array,  # [B, L, 3·H·K]: q, k and v of all heads
           query_ids: jax.Array, key_ids: jax.Array,  # [B, L, 1], [B, 1, L]
           seeds: jax.Array,  # [B, 1, kernels.SEEDS] uint32
           ) -> jax.Array:  # [B, L, H·K]
  return _forward(options, qkv, query_ids, key_ids, seeds)[0]


def _forward(options, *rows):
  y = base.by_rows(functools.partial(_forward_call, *options), rows)
  return y, (*rows, y)


def _backward(options, residuals, g):
  gradient = base.by_rows(functools.partial(_backward_call, *options),
                          (*residuals, g))
  return gradient, None, None, None


_fused.defvjp(_forward, _backward)


def _forward_call(heads, rate, window, precision, qkv, *others):
  batch, length, width = *qkv.shape[:2], qkv.shape[2] // 3
  groups, tile, of_part, of_tile, ids, seeds = _blocks(qkv.shape)
  return kernels.call(
      functools.partial(_forward_kernel, width // heads, rate, window,
                        precision),
      qkv, qkv, qkv, *others, grid=(batch, groups, length // tile),
      in_specs=[of_tile, of_part(1), of_part(2), *ids, seeds],
      out_specs=of_tile, cost_estimate=_cost(qkv, heads, 2, 4),
      out_shape=jax.ShapeDtypeStruct((batch, length, width), qkv.dtype))


def _backward_call(heads, rate, window, precision, qkv, *others):
  """Calls the backward kernel: returns the gradient [B, L, 3·H·K] of qkv."""
  from jax.experimental.pallas import tpu
  batch, length, width = *qkv.shape[:2], qkv.shape[2] // 3
  groups, tile, of_part, of_tile, ids, seeds = _blocks(qkv.shape)
  count, lanes = length // tile, width // groups
  return kernels.call(
      functools.partial(_backward_kernel, width // heads, rate, window,
                        precision),
      qkv, qkv, qkv, *others, grid=(batch, groups, count + 2),
      in_specs=[of_tile, of_part(1), of_part(2), *ids, seeds, of_tile,
                of_tile],
      # The program of the last tile of queries is followed by two more, which
      # write the gradients of k and v.
      out_specs=pl.BlockSpec((None, length, lanes), lambda b, g, n: (
          b, 0, jnp.maximum(n - count + 1, 0) * groups + g)),
      out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
      cost_estimate=_cost(qkv, heads, 5, 8),
      scratch_shapes=[tpu.VMEM((2, length, lanes), jnp.float32)])


def _cost(qkv: jax.Array, heads: int, products: int, arrays: int
          ) -> pl.CostEstimate:
  """Returns what XLA is told of a kernel that moves `arrays` of [B, L, H·K]."""
  batch, length, width = *qkv.shape[:2], qkv.shape[2] // 3
  weights = batch * heads * length**2
  return pl.CostEstimate(
      flops=2 * products * weights * width // heads, transcendentals=weights,
      bytes_accessed=arrays * batch * length * width * qkv.dtype.itemsize)


def _blocks(shape: tuple[int, ...]) -> tuple[Any, ...]:
  """Returns sizes, and the blocks of a program (row, group, tile of queries).

  `shape` is that of q, k and v together. The results are the number of groups;
  the size of a tile; the block of a group of q (0), k (1) or v (2); that of a
  tile of q, y or the gradient of y; and those of a row's ids, first as queries
  and then as keys, and of its seeds.
  """
  # Only TPUs need this import, as in pallas.py that of Triton.
  from jax.experimental.pallas import tpu
  _, length, width = shape
  groups = max(1, width // 3 // LANES)
  tile = _tile(length)
  last = length // tile - 1
  lanes = width // 3 // groups
  of_row = functools.partial(
      pl.BlockSpec, index_map=lambda b, g, n: (b, 0, 0))
  return (
      groups, tile,
      lambda part: pl.BlockSpec((None, length, lanes),
                                lambda b, g, n: (b, 0, part * groups + g)),
      pl.BlockSpec((None, tile, lanes),
                   lambda b, g, n: (b, jnp.minimum(n, last), g)),
      (of_row((None, length, 1)), of_row((None, 1, length))),
      of_row((None, 1, kernels.SEEDS), memory_space=tpu.SMEM))


def _forward_kernel(size, rate, window, precision, q_ref, k_ref, v_ref,
                    query_ids_ref, key_ids_ref, seeds_ref, y_ref):
  product = functools.partial(kernels.product, precision)
  q, k, v = base.scaled(q_ref[...], size), k_ref[...], v_ref[...]
  this = pl.program_id(2)
  places = _places(this, len(q), len(k))
  seen = _seen(query_ids_ref[_rows(this, len(q), len(k)), :], key_ids_ref[...],
               places, window)
  y = jnp.zeros(q.shape, jnp.float32)
  for n, head, seeds in _heads(q, size, seeds_ref):
    weights = _weights(product, _only(n, q, size), k, seen)
    scale = 1 / weights.sum(axis=1, keepdims=True)  # [T, 1]
    dropped = weights * kernels.factor(rate, seeds, head, *places)
    y += product(dropped.astype(k.dtype), _only(n, v, size), 1, 0) * scale
  y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(size, rate, window, precision, q_ref, k_ref, v_ref,
                     query_ids_ref, key_ids_ref, seeds_ref, y_ref, g_ref,
                     out_ref, sums_ref):
  """Computes dq of a tile and adds to dk and dv, or writes one of these."""
  this, tile = pl.program_id(2), len(q_ref)
  count = len(k_ref) // tile
  heads = _heads(q_ref, size, seeds_ref)

  @pl.when(this == 0)
  def _():
    sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

  @pl.when(this < count)
  def _():
    product = functools.partial(kernels.product, precision)
    q, k, v = base.scaled(q_ref[...], size), k_ref[...], v_ref[...]
    g = g_ref[...]
    places = _places(this, tile, len(k))
    rows = _rows(this, tile, len(k))
    seen = _seen(query_ids_ref[rows, :], key_ids_ref[...], places, window)
    gy = g.astype(jnp.float32) * y_ref[...].astype(jnp.float32)
    dq = jnp.zeros(q.shape, jnp.float32)
    for n, head, seeds in heads:
      only_q, only_g = _only(n, q, size), _only(n, g, size)
      weights = _weights(product, only_q, k, seen)
      weights *= 1 / weights.sum(axis=1, keepdims=True)
      factor = kernels.factor(rate, seeds, head, *places)
      slope = product(only_g, v, 1, 1) * factor
      slope -= _only(n, gy, size).sum(axis=1, keepdims=True)
      slope = jnp.where(seen, weights * slope, 0.0).astype(k.dtype)
      dq += product(slope, _only(n, k, size), 1, 0)
      sums_ref[0] += product(slope, only_q, 0, 0)
      sums_ref[1] += product((weights * factor).astype(k.dtype), only_g, 0, 0)
    out_ref[rows, :] = (dq / math.sqrt(size)).astype(out_ref.dtype)

  @pl.when(this >= count)
  def _():
    out_ref[...] = sums_ref[this - count].astype(out_ref.dtype)


def _rows(n: jax.Array, tile: int, length: int) -> Any:
  """Returns the slice of tile n: it begins at a known multiple of 8."""
  return pl.ds(n * tile if length > tile else 0, tile)


def _places(tile: jax.Array, queries: int, keys: int
            ) -> tuple[jax.Array, jax.Array]:
  """Returns the places in the row of a tile of queries and all keys, [T, L]."""
  query, key = (jax.lax.broadcasted_iota(jnp.int32, (queries, keys), axis)
                for axis in (0, 1))
  return tile * queries + query, key


def _seen(query_ids, key_ids, places, window: int | None) -> jax.Array:
  """Computes the mask of the keys that queries see, [T, L]."""
  seen = query_ids == key_ids
  if window is not None:
    seen &= abs(places[0] - places[1]) <= window
  return seen


def _heads(q, size: int, seeds_ref) -> list[tuple[int, jax.Array, list[Any]]]:
  """Returns the heads of the group: number, that of all heads, and seeds."""
  seeds = [seeds_ref[0, n] for n in range(3)]
  count = q.shape[1] // size
  return [(n, pl.program_id(1) * count + n, seeds) for n in range(count)]


def _only(n: int, x: jax.Array, size: int) -> jax.Array:  # [T or L, N]
  """Returns the vectors of head n of the group, and zeros for the others."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where(lane // size == n, x, jnp.zeros((), x.dtype))


def _weights(product, q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
  """Computes the weights of a head before they are divided by their sum."""
  scores = jnp.where(seen, product(q, k, 1, 1), span_scores.MASKED)
  return jnp.exp(scores - scores.max(axis=1, keepdims=True))
