"""Fused attention in Pallas for GPUs: a forward and a backward Triton kernel.

Glossary of shapes: B rows, L row length, P row length padded to whole tiles,
H attention heads, K head size, T tokens of a tile, N tiles of a row.

Only the scores of one tile of queries and one tile of keys exist at a time. The
forward kernel accumulates the softmax over the tiles of keys. The backward
kernel computes it again from the stored maximum and sum (Dao et al., 2022,
algorithms 1 and 4). Dropout hashes the index of a weight (models/dropout.py),
so both kernels have the masks of `xla` bit for bit and store none. On a CPU, in
tests, the kernels are interpreted.

JAX 0.11 announces the end of Pallas through Triton. Replacements then: kernels
for Mosaic GPU, which need another form of memory access, or cuDNN's packed
layout where no weights are dropped.
"""

from collections.abc import Callable
import functools
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

HEAD_SIZES = (16, 32, 64, 128)  # sizes of operands of a Triton product
LONGEST = 512  # tokens
LARGEST_TILE, SMALLEST_TILE = 64, 16
# Ids of places beyond L. They lie on either side of all ids of `Visible.ids`,
# so that no tile seems to see a key in a row that has none.
NO_QUERY, NO_KEY = jnp.iinfo(jnp.int32).max, -1
# The score of a key beyond L. It is below MASKED, so that a row in which all
# keys are masked gives such keys no weight: exp(BEYOND - MASKED) is 0.
BEYOND = 2 * span_scores.MASKED


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention without arrays of L·L elements, and its gradient too.

  The kernel rounds y to the dtype of `q`.
  """
  length = q.shape[2]
  tile = min(LARGEST_TILE, max(
      SMALLEST_TILE, 1 << (length - 1).bit_length()))
  missing = -length % tile
  # The kernels read and write the layout of Dense layers, [B, P, 3H, K], so
  # this cancels the transposes and the split of the caller.
  qkv = jnp.pad(jnp.concatenate([x.swapaxes(1, 2) for x in (q, k, v)], axis=2),
                ((0, 0), (0, missing), (0, 0), (0, 0)))
  ids = [jnp.pad(x, ((0, 0), (0, missing)), constant_values=none)
         for x, none in zip(visible.ids(), (NO_QUERY, NO_KEY), strict=True)]
  y = _fused(length, tile, drop.rate if drop.active else 0.0,
             matmul.float32_precision(q.dtype), qkv, *ids, _bounds(*ids, tile),
             kernels.row_seeds(drop, len(q), length))
  return y[:, :length].swapaxes(1, 2).astype(jnp.float32)


def _bounds(query_ids: jax.Array, key_ids: jax.Array,  # [B, P]
            tile: int) -> jax.Array:  # [B, N, 4] int32
  """Returns the tiles that each tile has common segments with.

  For tile n, they are the first tile of keys that its queries see, the end of
  these tiles, and the same for the queries that see its keys. A tile is skipped
  if the numbers of its segments are all above or all below. In a row without
  any visible key every tile is taken, since there all keys weigh the same.
  """
  low, high = ([f(x.reshape(len(x), -1, tile), axis=2) for x in (
      query_ids, key_ids)] for f in (jnp.min, jnp.max))  # [B, N] each
  meet = ((low[0][:, :, None] <= high[1][:, None])
          & (low[1][:, None] <= high[0][:, :, None]))  # [B, N, N]
  meet |= ~meet.any(axis=(1, 2), keepdims=True)
  count = meet.shape[1]

  def ends(meet: jax.Array) -> list[jax.Array]:  # over the last axis
    last = count - jnp.argmax(meet[:, :, ::-1], axis=2)
    return [jnp.argmax(meet, axis=2), jnp.where(meet.any(axis=2), last, 0)]

  return jnp.stack([*ends(meet), *ends(meet.swapaxes(1, 2))], axis=2).astype(
      jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fused(length: int, tile: int, rate: float, precision: matmul.Precision,
           qkv: jax.Array,  # [B, P, 3H, K]: q, k and v of all heads
           query_ids: jax.Array, key_ids: jax.Array,  # [B, P] int32
           bounds: jax.Array,  # [B, N, 4] int32
           seeds: jax.Array) -> jax.Array:  # uint32 → [B, P, H, K]
  return _forward(length, tile, rate, precision, qkv, query_ids, key_ids,
                  bounds, seeds)[0]


def _forward(length, tile, rate, precision, *rows):
  y, top, total = base.by_rows(
      functools.partial(_forward_call, length, tile, rate, precision), rows)
  return y, (*rows, y, top, total)


def _backward(length, tile, rate, precision, residuals, g):
  gradient = base.by_rows(
      functools.partial(_backward_call, length, tile, rate, precision),
      (*residuals, g))
  return gradient, None, None, None, None


_fused.defvjp(_forward, _backward)


def _forward_call(length, tile, rate, precision, qkv, *others):
  """Calls the forward kernel: returns y [B, P, H, K] and two statistics.

  These are the maximum of the scores of each query and the sum of
  exp(score - maximum), [B, H, P] float32.
  """
  batch, padded, heads, size = *qkv.shape[:2], qkv.shape[2] // 3, qkv.shape[3]
  of_head, of_tile, ids, tile_ids, bounds, seeds = _blocks(qkv.shape, tile)
  statistic = pl.BlockSpec((None, None, tile), lambda b, h, n: (b, h, n))
  statistics = jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)
  return _call(
      functools.partial(_forward_kernel, length, rate, precision),
      qkv, qkv, qkv, *others, grid=(batch, heads, padded // tile),
      in_specs=[of_tile, of_head(1), of_head(2), tile_ids, ids, bounds, seeds],
      out_specs=[of_tile, statistic, statistic],
      out_shape=[jax.ShapeDtypeStruct((batch, padded, heads, size), qkv.dtype),
                 statistics, statistics])


def _backward_call(length, tile, rate, precision, qkv, *others):
  """Calls the backward kernel: returns the gradient [B, P, 3H, K] of qkv."""
  batch, padded, heads, size = *qkv.shape[:2], qkv.shape[2] // 3, qkv.shape[3]
  of_head, _, ids, _, bounds, seeds = _blocks(qkv.shape, tile)
  statistic = pl.BlockSpec((None, None, padded), lambda b, h, n: (b, h, 0))
  return _call(
      functools.partial(_backward_kernel, length, rate, precision, tile),
      qkv, qkv, qkv, *others, grid=(batch, heads, padded // tile),
      in_specs=[of_head(0), of_head(1), of_head(2), ids, ids, bounds, seeds,
                of_head(0), statistic, statistic, of_head(0)],
      out_specs=[pl.BlockSpec((None, tile, 3, None, size),
                              lambda b, h, n: (b, n, 0, h, 0))],
      out_shape=[jax.ShapeDtypeStruct((batch, padded, 3, heads, size),
                                      qkv.dtype)])[0].reshape(qkv.shape)


def _blocks(shape: tuple[int, ...], tile: int) -> list[Any]:
  """Returns the blocks of arrays for the program (row, head, tile).

  `shape` is that of q, k and v together. The blocks are a head of q (0), of k
  (1) or of v (2), a tile of q, a row and a tile of [B, P], a tile of [B, N, 4],
  and a row of seeds. Blocks of q are also those of y.
  """
  _, padded, heads, size = shape
  return [
      lambda part: pl.BlockSpec(
          (None, padded, None, size),
          lambda b, h, n: (b, 0, part * (heads // 3) + h, 0)),
      pl.BlockSpec((None, tile, None, size), lambda b, h, n: (b, n, h, 0)),
      pl.BlockSpec((None, padded), lambda b, h, n: (b, 0)),
      pl.BlockSpec((None, tile), lambda b, h, n: (b, n)),
      pl.BlockSpec((None, None, 4), lambda b, h, n: (b, n, 0)),
      pl.BlockSpec((None, kernels.SEEDS), lambda b, h, n: (b, 0))]


def _call(kernel: Callable[..., None], *arrays: jax.Array, **options: Any):
  # Only GPUs need this import, a twentieth of the time to start a command.
  from jax.experimental.pallas import triton
  return kernels.call(
      kernel, *arrays, compiler=triton.CompilerParams(
          num_warps=4, num_stages=2), **options)


def _forward_kernel(length, rate, precision, q_ref, k_ref, v_ref, query_ids_ref,
                    key_ids_ref, bounds_ref, seeds_ref, y_ref, top_ref,
                    total_ref):
  q, query_ids = base.scaled(q_ref[...]), query_ids_ref[...]  # [T, K], [T]
  tile = len(query_ids)
  this = pl.program_id(2)
  weigh = functools.partial(_factor, rate, seeds_ref, pl.program_id(1))
  product = functools.partial(kernels.product, precision)

  def add(n, sums):
    top, total, y = sums
    at = pl.ds(n * tile, tile)
    scores, _ = _scores(product, length, q, k_ref[at, :], query_ids,
                        key_ids_ref[at], n)
    higher = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp(scores - higher[:, None])
    shrink = jnp.exp(top - higher)
    v = v_ref[at, :]
    dropped = (weights * weigh(this, n, tile)).astype(v.dtype)
    y = y * shrink[:, None] + product(dropped, v, 1, 0)
    return higher, total * shrink + weights.sum(axis=1), y

  top, total, y = jax.lax.fori_loop(
      bounds_ref[0], bounds_ref[1], add,
      (jnp.full((tile,), BEYOND, jnp.float32),
       jnp.zeros((tile,), jnp.float32), jnp.zeros(q.shape, jnp.float32)))
  y_ref[...] = (y / total[:, None]).astype(y_ref.dtype)
  top_ref[...], total_ref[...] = top, total


def _backward_kernel(length, rate, precision, tile, q_ref, k_ref, v_ref,
                     query_ids_ref, key_ids_ref, bounds_ref, seeds_ref, y_ref,
                     top_ref, total_ref, g_ref, out_ref):
  """Computes dk and dv of key tile n, then dq of query tile n.

  n is the third index of the program. The first loop is over tiles of queries,
  the second over tiles of keys.
  """
  this = pl.program_id(2)
  weigh = functools.partial(_factor, rate, seeds_ref, pl.program_id(1))
  product = functools.partial(kernels.product, precision)

  def pair(i, j):
    """Returns the weights after dropout and the gradient of scores, [T, T]."""
    rows, columns = pl.ds(i * tile, tile), pl.ds(j * tile, tile)
    scores, seen = _scores(
        product, length, base.scaled(q_ref[rows, :]), k_ref[columns, :],
        query_ids_ref[rows], key_ids_ref[columns], j)
    weights = jnp.exp(scores - top_ref[rows][:, None])
    weights = weights / total_ref[rows][:, None]
    factor = weigh(i, j, tile)
    g = g_ref[rows, :]
    slope = product(g, v_ref[columns, :], 1, 1) * factor
    centre = (g.astype(jnp.float32) * y_ref[rows, :]).sum(axis=1)
    slope = jnp.where(seen, weights * (slope - centre[:, None]), 0.0)
    return (weights * factor).astype(g.dtype), slope.astype(g.dtype)

  def by_keys(i, sums):
    dk, dv = sums
    weights, slope = pair(i, this)
    rows = pl.ds(i * tile, tile)
    return (dk + product(slope, base.scaled(q_ref[rows, :]), 0, 0),
            dv + product(weights, g_ref[rows, :], 0, 0))

  def by_queries(j, dq):
    return dq + product(
        pair(this, j)[1], k_ref[pl.ds(j * tile, tile), :], 1, 0)

  zeros = jnp.zeros((tile, k_ref.shape[1]), jnp.float32)
  dk, dv = jax.lax.fori_loop(
      bounds_ref[2], bounds_ref[3], by_keys, (zeros, zeros))
  out_ref[:, 1, :] = dk.astype(out_ref.dtype)
  out_ref[:, 2, :] = dv.astype(out_ref.dtype)
  dq = jax.lax.fori_loop(bounds_ref[0], bounds_ref[1], by_queries, zeros)
  out_ref[:, 0, :] = base.scaled(dq).astype(out_ref.dtype)


def _scores(product, length, q, k, query_ids, key_ids, n):
  """Computes the scores of key tile n, and the mask of visible keys.

  The scores are [T, T] float32, MASKED where the mask is false and BEYOND for
  keys beyond `length`.
  """
  seen = query_ids[:, None] == key_ids[None, :]
  scores = jnp.where(seen, product(q, k, 1, 1), span_scores.MASKED)
  column = n * seen.shape[1] + jax.lax.broadcasted_iota(
      jnp.int32, seen.shape, 1)
  return jnp.where(column < length, scores, BEYOND), seen


def _factor(rate, seeds_ref, head, i, j, tile):
  """Computes the dropout factors of query tile i and key tile j, [T, T]."""
  query, key = (n * tile + jax.lax.broadcasted_iota(
      jnp.int32, (tile, tile), axis) for axis, n in enumerate((i, j)))
  return kernels.factor(rate, [seeds_ref[n] for n in range(3)], head, query,
                        key)
