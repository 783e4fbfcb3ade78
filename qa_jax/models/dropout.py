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
POSITIONS, CONVOLUTION = 3, 4
EMBEDDINGS = 2**31 - 1  # in no layer; no layer has this number


@flax.struct.dataclass
class DropoutKeys:
  """The dropout keys of the rows of a batch."""

  seeds: jax.Array  # [B, 2] uint32
  # [B] int32, at most L, or None for L. The masks of attention weights are
  # those of a row of this length. Population training pads the rows of a member
  # to the length of another member, and must not change their masks.
  lengths: jax.Array | None = None
  # [B, 2] uint32, drawn from the key of the step alone and equal in all rows.
  step: jax.Array | None = None

  @classmethod
  def from_rows(cls, key: jax.Array, rows: jax.Array,  # [B] int32
                lengths: jax.Array | None = None) -> 'DropoutKeys':
    """Draws keys from the key of a train step and rows of the global batch."""
    draw = lambda key: jax.random.bits(key, (2,), jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return cls(jax.vmap(draw)(keys), lengths,
               jnp.broadcast_to(draw(key), (*rows.shape, 2)))

  def fold(self, number: int) -> 'DropoutKeys':
    """Returns independent keys for the place or layer with this number.

    They are a hash of seeds and number: a few operations that XLA fuses into
    their consumer. Threefry would be a kernel of its own at each place.
    """
    return self.replace(
        seeds=_fold(self.seeds, number),
        step=self.step if self.step is None else _fold(self.step, number))

  def shared(self) -> 'DropoutKeys':
    """Returns keys of one row, for an array that all rows of a batch share.

    Its mask then depends neither on the rows nor on their distribution.
    """
    return DropoutKeys(self.step[:1])


def _fold(seeds: jax.Array, number: int) -> jax.Array:  # [B, 2] uint32
  steps = jnp.asarray([[0x9E3779B9, 0x85EBCA6B]], jnp.uint32)
  return _lowbias32(_lowbias32(seeds + steps * jnp.uint32(number)) ^ steps)


def keep_mask(index: jax.Array,  # uint32
              first: jax.Array, second: jax.Array, rate: float) -> jax.Array:
  """Computes the mask of the elements of a row that have the numbers `index`.

  True elements are not dropped. `first` and `second` are the uint32 seeds of
  the row and broadcast against `index`.

  The random bits of an element are two rounds of an integer hash of its number:
  about twelve integer operations, which XLA fuses into their consumer. Threefry
  needs a hundred and a pass over memory. The round is "lowbias32" (Wellons,
  2018), seeded for each row by 64 bits.
  """
  bits = _lowbias32(_lowbias32(index ^ first) ^ second)
  return bits >= jnp.uint32(round(rate * 2**32))


def _lowbias32(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array,  # [B, …]
            rate: float, keys: DropoutKeys | None, place: int,
            index: jax.Array | None = None) -> jax.Array:
  """Drops units of `x` at a `place`, and scales the others by 1 / (1 - rate).

  Without keys, or at rate 0, it returns `x` itself. `index` has the uint32
  number of each unit in its row, [B or 1, units]; without it they are 0, 1, …
  """
  if keys is None or rate == 0:
    return x
  # In bfloat16, 1 / (1 - rate) itself would be rounded, the same for all units.
  scaled = (x.astype(jnp.float32) * (1 / (1 - rate))).astype(x.dtype)
  return jnp.where(unit_mask(x.shape, rate, keys, place, index), scaled,
                   jnp.zeros((), x.dtype))


def unit_mask(shape: tuple[int, ...], rate: float, keys: DropoutKeys,
              place: int, index: jax.Array | None = None) -> jax.Array:  # bool
  """Computes the mask of the units of [B, …] that `dropout` does not drop."""
  seeds = keys.fold(place).seeds
  if index is None:
    index = jax.lax.broadcasted_iota(
        jnp.uint32, (len(seeds), math.prod(shape[1:])), 1)
  return keep_mask(index, seeds[:, :1], seeds[:, 1:], rate).reshape(shape)
