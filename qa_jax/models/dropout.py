"""Dropout masks as a function of (key, row of the global batch, position).

Keyed by row, a mask does not depend on how rows are spread over devices or
micro-steps: one config gives the same losses on 1 or 8 devices.

Glossary of shapes: B rows here, N elements of one row, which for attention
weights are [H, L, L].
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# Places of the network that drop units; a layer's keys are folded with them.
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2
EMBEDDINGS = 2**31 - 1  # outside every layer


@flax.struct.dataclass
class DropoutKeys:
  """One key per row of the batch."""

  keys: jax.Array  # [B] typed PRNG keys
  # [B] int32: attention weights get the masks that they have at this L, though
  # theirs is longer; None: at theirs.
  lengths: jax.Array | None = None

  @classmethod
  def of(cls, key: jax.Array, rows: jax.Array,
         lengths: jax.Array | None = None) -> 'DropoutKeys':
    """`rows` [B] int32 number the rows of the global batch."""
    return cls(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), lengths)

  def fold(self, number: int) -> 'DropoutKeys':
    """Independent keys for another place of the network."""
    return self.replace(
        keys=jax.vmap(jax.random.fold_in, (0, None))(self.keys, number))


def counter_hash(keys: jax.Array, count: int, rate: float,
                 index: jax.Array | None = None,  # [B, N] uint32
                 ) -> jax.Array:
  """[B, N] bool: two rounds of an integer hash over the element's index.

  About twelve integer operations that fuse into the consumer, where threefry
  needs a hundred and a pass over memory. The round is "lowbias32" (Wellons,
  2018), seeded per row by 64 bits of the key.
  """
  seed = seeds(keys)
  if index is None:
    index = jax.lax.broadcasted_iota(jnp.uint32, (len(keys), count), 1)
  return kept(index, seed[:, :1], seed[:, 1:], rate)


def seeds(keys: jax.Array) -> jax.Array:
  """[B, 2] uint32: what `counter_hash` takes of each key."""
  return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)


def kept(index: jax.Array, first: jax.Array, second: jax.Array,
         rate: float) -> jax.Array:
  """Whether the elements numbered `index`, uint32, of a row are kept.

  The row's two seeds broadcast against `index`.
  """
  bits = _lowbias32(_lowbias32(index ^ first) ^ second)
  return bits >= jnp.uint32(round(rate * 2**32))


def _lowbias32(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array,  # [B, …]
            rate: float, keys: DropoutKeys | None, place: int) -> jax.Array:
  """x / (1 - rate) where kept, else 0; x itself if there are no keys."""
  if keys is None or rate == 0:
    return x
  index = None
  if keys.lengths is not None and x.ndim == 4:
    index = _index(x.shape, keys.lengths)
  keep = counter_hash(
      keys.fold(place).keys, math.prod(x.shape[1:]), rate, index)
  scale = jnp.asarray(1 / (1 - rate), x.dtype)
  return jnp.where(keep.reshape(x.shape), x * scale, jnp.zeros((), x.dtype))


def _index(shape: tuple[int, ...],  # B, H, L, L
           lengths: jax.Array,  # [B]
           ) -> jax.Array:  # [B, H·L·L] uint32
  """The number that an element would have among [H, length, length]."""
  head, query, key = (
      jax.lax.broadcasted_iota(jnp.uint32, (1, *shape[1:]), axis)
      for axis in (1, 2, 3))
  length = lengths.astype(jnp.uint32)[:, None, None, None]
  return ((head * length + query) * length + key).reshape(shape[0], -1)
