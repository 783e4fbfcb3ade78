"""The inputs of every implementation of attention, and its partition by rows.

Glossary of shapes: B rows, L row length, H attention heads, K head size.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, Protocol

import flax.struct
import jax
from jax.experimental import custom_partitioning
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

  def ids(self) -> tuple[jax.Array, jax.Array]:
    """Returns ids [B, L] of queries and keys; a query sees keys of its id."""
    if self.segment_ids is not None:
      return self.segment_ids, self.segment_ids
    keys = self.attention_mask.astype(jnp.int32)
    return jnp.ones_like(keys), keys


@flax.struct.dataclass
class Drop:
  """The dropout of attention weights; see models/dropout.py."""

  keys: DropoutKeys | None = None  # None: no dropout
  rate: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def active(self) -> bool:
    """Returns whether any weight can be dropped."""
    return self.keys is not None and self.rate > 0

  def kept(self, shape: tuple[int, ...]) -> jax.Array:  # bool
    """Computes the mask of the weights [B, H, L, L] that are not dropped."""
    return dropout.kept(
        shape, self.rate, self.keys, dropout.ATTENTION_WEIGHTS)


class Attend(Protocol):
  """The signature of an implementation of attention."""

  def __call__(self, q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
               k: jax.Array, v: jax.Array, visible: Visible,
               drop: Drop) -> jax.Array:  # [B, H, L, K] float32
    """Computes dropout(softmax(q kᵀ / √K)) v over the visible tokens."""


def scaled(q: jax.Array) -> jax.Array:
  """Computes q / √K in the dtype of `q`."""
  return q / math.sqrt(q.shape[-1])


def by_rows(function: Callable[..., Any], rows: Sequence[jax.Array]) -> Any:
  """Computes function(*rows) on each device for the rows of that device.

  The first axis of the arrays and of the results numbers the rows. Without this
  function the compiler, which cannot look into a kernel, would copy all rows to
  every device. It has no derivative, and vmap turns it into a loop.
  """
  results = jax.tree.leaves(jax.eval_shape(function, *rows))

  def axes(name: str, arrays: Sequence[Any]) -> str:
    return ', '.join(
        ' '.join(['b', *(f'{name}{n}_{axis}' for axis in range(1, x.ndim))])
        for n, x in enumerate(arrays))

  def partition(mesh: jax.sharding.Mesh, arguments: Sequence[Any],
                result: Any) -> Any:
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(
        *arguments[0].sharding.spec[:1]))
    return (mesh, function, jax.tree.map(lambda _: split, result),
            (split,) * len(rows))

  partitioned = custom_partitioning.custom_partitioning(function)
  partitioned.def_partition(partition=partition, sharding_rule=(
      f'{axes("i", rows)} -> {axes("o", results)}'))
  return jax.custom_batching.sequential_vmap(partitioned)(*rows)
