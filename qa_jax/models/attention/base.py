"""The inputs of every implementation of attention, and its partition by rows.

Glossary of shapes: B rows, L row length, H attention heads, K head size; of
the weights that are computed at a time, Q queries and S keys.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from qa_jax.models import dropout
from qa_jax.models.dropout import DropoutKeys


@flax.struct.dataclass
class Visible:
  """The tokens that each token attends to."""

  attention_mask: jax.Array  # [B, L] bool, false at padding
  # [B, L] int32: the number of the segment in a packed row, 0 at padding. If it
  # is None, a row is one segment, and padding attends to it too.
  segment_ids: jax.Array | None = None
  # The number of tokens to either side that a token attends to, in a local
  # layer. None: all tokens.
  window: int | None = flax.struct.field(pytree_node=False, default=None)

  def ids(self) -> tuple[jax.Array, jax.Array]:
    """Returns ids [B, L] of queries and keys; a query sees keys of its id."""
    if self.segment_ids is not None:
      return self.segment_ids, self.segment_ids
    keys = self.attention_mask.astype(jnp.int32)
    return jnp.ones_like(keys), keys


@dataclasses.dataclass(frozen=True)
class Places:
  """The places in a row of the queries and keys of some attention weights."""

  query: jax.Array  # int32 [1, 1, …, Q, 1]
  key: jax.Array  # int32 [1, 1, …, 1, S]
  length: int  # L

  @classmethod
  def all(cls, length: int) -> 'Places':
    """Returns the places of all weights of a row."""
    place = jnp.arange(length)
    return cls(place[None, None, :, None], place[None, None, None], length)

  def within(self, window: int) -> jax.Array:  # bool
    """Returns whether key and query have at most `window` steps between."""
    return abs(self.query - self.key) <= window

  def numbers(self, shape: tuple[int, ...], lengths: jax.Array | None
              ) -> jax.Array:  # [B or 1, weights of a row] uint32
    """Computes the numbers of weights [B, H, …, Q, S] for their dropout.

    A weight has one number, its index in [H, L, L], whether all weights of a
    row are computed at once or some at a time. `lengths` is that of
    DropoutKeys: the L of each row instead of `length`.
    """
    lengths = (jnp.uint32(self.length) if lengths is None else lengths.astype(
        jnp.uint32).reshape(-1, *[1] * (len(shape) - 1)))
    head = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape[1:]), 1)
    numbers = (head * lengths + self.query.astype(jnp.uint32)) * lengths + (
        self.key.astype(jnp.uint32))
    return numbers.reshape(len(numbers), -1)


@flax.struct.dataclass
class Drop:
  """The dropout of attention weights; see models/dropout.py."""

  keys: DropoutKeys | None = None  # None: no dropout
  rate: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def active(self) -> bool:
    """Returns whether any weight can be dropped."""
    return self.keys is not None and self.rate > 0

  def kept(self, shape: tuple[int, ...],  # [B, H, …, Q, S]
           places: Places | None = None) -> jax.Array:  # bool
    """Computes the mask of the attention weights that are not dropped.

    Without `places` they are all weights of a row.
    """
    index = None
    if places or self.keys.lengths is not None:
      index = (places or Places.all(shape[-1])).numbers(
          shape, self.keys.lengths)
    return dropout.unit_mask(
        shape, self.rate, self.keys, dropout.ATTENTION_WEIGHTS, index)


class Attend(Protocol):
  """The signature of an implementation of attention."""

  def __call__(self, q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
               k: jax.Array, v: jax.Array, visible: Visible,
               drop: Drop) -> jax.Array:  # [B, H, L, K] float32
    """Computes dropout(softmax(q kᵀ / √K)) v over the visible tokens.

    `auto` and `xla` also take a `bias` of the scores, [B or 1, H, L, L].
    """


def scaled(q: jax.Array,  # [..., K]
           size: int | None = None) -> jax.Array:
  """Computes q / √K in float32, then rounds it to the dtype of `q`.

  K is `size`, or without it the size of the last axis.
  """
  return (q.astype(jnp.float32) / math.sqrt(size or q.shape[-1])).astype(
      q.dtype)


def by_rows(function: Callable[..., Any], rows: Sequence[jax.Array]) -> Any:
  """Computes function(*rows) on each device for the rows of that device.

  The first axis of the arrays and of the results numbers the rows. The devices
  are those of the mesh in context (devices.on_mesh), all of whose axes divide
  the rows. Without it the compiler, which cannot look into a kernel, would copy
  all rows to every device, or fail. vmap appends the rows of all members of a
  population and calls `function` once.
  """
  @jax.custom_batching.custom_vmap
  def call(*rows):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.size == 1:  # one device calls
      return function(*rows)
    split = jax.sharding.PartitionSpec(mesh.axis_names)
    return jax.shard_map(function, in_specs=split, out_specs=split,
                         check_vma=False)(*rows)

  @call.def_vmap
  def fold(members, is_mapped, *rows):
    rows = [x if mapped else jnp.broadcast_to(x, (members, *x.shape))
            for x, mapped in zip(rows, is_mapped, strict=True)]
    results = by_rows(function, [x.reshape(-1, *x.shape[2:]) for x in rows])
    return jax.tree.map(lambda y: y.reshape(members, -1, *y.shape[1:]),
                        results), jax.tree.map(lambda _: True, results)

  return call(*rows)
