"""Dropout masks as a function of key, row of the global batch and position.

Every row has its own key, so masks and losses do not depend on the distribution
of the rows over devices and micro-steps.

Glossary of shapes: B rows on this device, L row length, H attention heads,
N elements of one row; attention weights have N = H·L·L.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# The places of the network that drop units. Each place folds its number into
# the keys of its layer.
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2
EMBEDDINGS = 2**31 - 1  # in no layer; no layer has this number


@flax.struct.dataclass
class DropoutKeys:
  """The dropout keys of the rows of a batch."""

  keys: jax.Array  # [B] typed PRNG keys
  # [B] int32, at most L, or None for L. The masks of attention weights are
  # those of a row of this length. Population training pads the rows of a member
  # to the length of another member, and must not change their masks.
  lengths: jax.Array | None = None

  @classmethod
  def from_rows(cls, key: jax.Array, rows: jax.Array,  # [B] int32
                lengths: jax.Array | None = None) -> 'DropoutKeys':
    """Builds keys from the key of a train step and rows of the global batch."""
    return cls(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), lengths)

  def fold(self, number: int) -> 'DropoutKeys':
    """Returns independent keys for the place or layer with this number."""
    return self.replace(
        keys=jax.vmap(jax.random.fold_in, (0, None))(self.keys, number))


def counter_hash(keys: jax.Array, count: int, rate: float,
                 index: jax.Array | None = None) -> jax.Array:  # [B, N] bool
  """Computes masks of `count` elements a row; true elements are not dropped.

  The random bits of an element are two rounds of an integer hash of its index
  ([B, N] uint32): about twelve integer operations, which XLA fuses into their
  consumer. Threefry needs a hundred and a pass over memory. The round is
  "lowbias32" (Wellons, 2018), seeded for each row by 64 bits of its key.
  """
  seeds = row_seeds(keys)
  if index is None:
    index = jax.lax.broadcasted_iota(jnp.uint32, (len(keys), count), 1)
  return keep_mask(index, seeds[:, :1], seeds[:, 1:], rate)


def row_seeds(keys: jax.Array) -> jax.Array:  # [B] → [B, 2] uint32
  """Draws the two seeds of each row for `keep_mask`."""
  return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)


def keep_mask(index: jax.Array,  # uint32
              first: jax.Array, second: jax.Array, rate: float) -> jax.Array:
  """Computes the mask of the elements of a row that have the numbers `index`.

  `first` and `second` are the seeds of the row and broadcast against `index`.
  """
  bits = _lowbias32(_lowbias32(index ^ first) ^ second)
  return bits >= jnp.uint32(round(rate * 2**32))


def _lowbias32(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array,  # [B, …]
            rate: float, keys: DropoutKeys | None, place: int) -> jax.Array:
  """Drops units of `x` at a `place`, and scales the others by 1 / (1 - rate).

  Without keys, or at rate 0, it returns `x` itself.
  """
  if keys is None or rate == 0:
    return x
  scale = jnp.asarray(1 / (1 - rate), x.dtype)
  return jnp.where(kept(x.shape, rate, keys, place), x * scale,
                   jnp.zeros((), x.dtype))


def kept(shape: tuple[int, ...], rate: float, keys: DropoutKeys,
         place: int) -> jax.Array:  # bool
  """Computes the mask of the units of [B, …] that `dropout` does not drop."""
  index = (_index(shape, keys.lengths)
           if keys.lengths is not None and len(shape) == 4 else None)
  return counter_hash(keys.fold(place).keys, math.prod(shape[1:]), rate,
                      index).reshape(shape)


def _index(shape: tuple[int, ...], lengths: jax.Array) -> jax.Array:
  """Computes the uint32 number of each element in a row [H, length, length]."""
  head, query, key = (jax.lax.broadcasted_iota(
      jnp.uint32, (1, *shape[1:]), axis) for axis in (1, 2, 3))
  length = lengths.astype(jnp.uint32)[:, None, None, None]
  return ((head * length + query) * length + key).reshape(shape[0], -1)
