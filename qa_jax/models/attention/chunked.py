"""Attention of long rows in plain JAX: the weights of some queries at a time.

Glossary of shapes: B rows, L row length, H attention heads, K head size,
C queries of a chunk, N chunks.

No array has L·L elements, neither in a forward pass nor in its gradient, and
the result is that of `xla` up to rounding. There are two forms:

- All tokens are visible: the chunks of queries are computed one after the
  other. A chunk's weights, [B, H, C, L], are computed again for the gradient
  (Rabe and Staats, 2021), so that those of one chunk are in memory.
- A window of w tokens to either side is visible: a chunk has C >= w queries, so
  its keys are in the chunk itself and in its two neighbours (Beltagy et al.,
  2020, section 3.1). All chunks are computed at once: [B, H, N, C, 3C].
"""

import functools

import jax
import jax.numpy as jnp

from qa_jax.models.attention import xla
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Places
from qa_jax.models.attention.base import Visible

CHUNK = 128  # queries, if all tokens are visible
SMALLEST = 16  # queries of a chunk with a window; smaller products are slow
# Ids of places beyond the row. They are unequal to all ids of `Visible.ids`.
NO_QUERY, NO_KEY = -1, -2


def attend(q: jax.Array,  # [B, H, L, K] compute dtype, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention without arrays of L·L elements, and its gradient too."""
  form = _over_row if visible.window is None else _over_neighbours
  return form(q, k, v, visible, drop)


def chunk_of_window(window: int) -> int:
  """Returns the number of queries of a chunk, C, for a window."""
  return max(window, SMALLEST)


def _over_row(q, k, v, visible, drop):
  batch, heads, length, size = q.shape
  count = -(-length // CHUNK)
  missing = count * CHUNK - length
  query_ids, key_ids = visible.ids()
  queries = jnp.moveaxis(_pad(q, 0, missing).reshape(
      batch, heads, count, CHUNK, size), 2, 0)  # [N, B, H, C, K]
  ids = _pad_ids(query_ids, 0, missing, NO_QUERY).reshape(batch, count, CHUNK)
  place = jnp.arange(count * CHUNK).reshape(count, CHUNK)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk(inputs):
    q, ids, place = inputs  # [B, H, C, K], [B, C], [C]
    seen = ids[:, None, :, None] == key_ids[:, None, None, :]
    return xla.over_seen(q, k, v, seen, drop, Places(
        place[None, None, :, None], jnp.arange(length)[None, None, None],
        length))

  y = jax.lax.map(chunk, (queries, jnp.moveaxis(ids, 1, 0), place))
  return jnp.moveaxis(y, 0, 2).reshape(
      batch, heads, count * CHUNK, size)[:, :, :length]


def _over_neighbours(q, k, v, visible, drop):
  batch, heads, length, size = q.shape
  chunk = chunk_of_window(visible.window)
  count = -(-length // chunk)
  missing = count * chunk - length
  query_ids, key_ids = visible.ids()
  around = (chunk, chunk + missing)
  queries = _pad(q, 0, missing).reshape(batch, heads, count, chunk, size)
  keys, values = (
      _neighbours(_pad(x, *around), chunk, axis=2) for x in (k, v))
  query_ids = _pad_ids(query_ids, 0, missing, NO_QUERY).reshape(
      batch, 1, count, chunk, 1)
  key_ids = _neighbours(_pad_ids(key_ids, *around, NO_KEY), chunk, axis=1)
  first = chunk * jnp.arange(count)[None, None, :, None, None]
  places = Places(
      first + jnp.arange(chunk)[None, None, None, :, None],
      first + jnp.arange(-chunk, 2 * chunk)[None, None, None, None], length)
  seen = (query_ids == key_ids[:, None, :, None, :]) & (
      places.within(visible.window))
  y = xla.over_seen(queries, keys, values, seen, drop, places)
  return y.reshape(batch, heads, count * chunk, size)[:, :, :length]


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0)))


def _pad_ids(ids: jax.Array, before: int, after: int, none: int) -> jax.Array:
  return jnp.pad(ids, ((0, 0), (before, after)), constant_values=none)


def _neighbours(x: jax.Array, chunk: int, axis: int) -> jax.Array:
  """Returns each chunk with the one before and the one behind it.

  `x` has a chunk of padding at either end of the axis, (N + 2)·C → N, 3C. It is
  sliced, because the gradient of an index would be a scatter.
  """
  count = x.shape[axis] // chunk - 2
  parts = [jax.lax.slice_in_dim(x, i * chunk, (i + count) * chunk, axis=axis)
           .reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1:])
           for i in range(3)]
  return jnp.concatenate(parts, axis=axis + 1)
