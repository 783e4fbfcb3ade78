"""What every implementation of attention is given, and how it is spread.

Glossary of shapes: B rows, L length, H heads, K head size.
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

MASKED = -1e9  # finite: a row without any real token keeps finite gradients


@flax.struct.dataclass
class Visible:
  """What a token attends to."""

  attention_mask: jax.Array  # [B, L] bool: the real tokens
  # [B, L] int32, 0 at padding: the same number is the same segment of a packed
  # row. None: a row is one segment, and padding attends to it as well.
  segment_ids: jax.Array | None = None

  def ids(self) -> tuple[jax.Array, jax.Array]:
    """[B, L] int32 of queries and of keys: equal numbers see each other."""
    if self.segment_ids is not None:
      return self.segment_ids, self.segment_ids
    keys = self.attention_mask.astype(jnp.int32)
    return jnp.ones_like(keys), keys


@flax.struct.dataclass
class Drop:
  """Dropout of attention weights; see models/dropout.py."""

  keys: DropoutKeys | None = None  # None: nothing is dropped
  rate: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def active(self) -> bool:
    return self.keys is not None and self.rate > 0

  def __call__(self, weights: jax.Array) -> jax.Array:  # [B, H, L, L]
    return dropout.dropout(
        weights, self.rate, self.keys, dropout.ATTENTION_WEIGHTS)


class Attend(Protocol):
  """softmax(q kᵀ / √K) v, over what is visible."""

  def __call__(self, q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
               k: jax.Array, v: jax.Array, visible: Visible,
               drop: Drop) -> jax.Array:  # [B, H, L, K] float32
    ...


def scaled(q: jax.Array) -> jax.Array:
  """q / √K in its own dtype."""
  return q / math.sqrt(q.shape[-1])


def by_rows(function: Callable[..., Any], rows: Sequence[jax.Array],
            shared: Sequence[jax.Array] = ()) -> Any:
  """function(*rows, *shared), each device computing the rows it has.

  The first axis of `rows` and of the results is that of rows. A kernel is
  opaque to the compiler, which would otherwise bring all rows to every device.
  Under pmap, and on one device, this is a plain call. It has no derivative, and
  vmap makes a loop of it.
  """
  operands = (*rows, *shared)
  results = jax.tree.leaves(jax.eval_shape(function, *operands))

  def axes(name: str, number: int, rank: int) -> str:
    own = [f'{name}{number}_{axis}' for axis in range(rank)]
    return ' '.join(own if name == 's' else ['b', *own[1:]])

  rule = (', '.join([*(axes('i', n, x.ndim) for n, x in enumerate(rows)),
                     *(axes('s', n, x.ndim) for n, x in enumerate(shared))])
          + ' -> ' + ', '.join(
              axes('o', n, x.ndim) for n, x in enumerate(results)))

  def partition(mesh: jax.sharding.Mesh, arguments: Sequence[Any],
                result: Any) -> Any:
    spec = arguments[0].sharding.spec
    split = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*spec[:1]))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return (mesh, function, jax.tree.map(lambda _: split, result),
            (*(split for _ in rows), *(whole for _ in shared)))

  spread = custom_partitioning.custom_partitioning(function)
  spread.def_partition(partition=partition, sharding_rule=rule)
  return jax.custom_batching.sequential_vmap(spread)(*operands)
