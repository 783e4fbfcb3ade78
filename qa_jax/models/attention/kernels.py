"""Seeds, dropout factors and products of the kernels for GPUs and TPUs.

Glossary of shapes: B rows, L row length, K head size, T queries of a tile, S
keys of a tile.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from qa_jax.models import dropout
from qa_jax.models import matmul
from qa_jax.models.attention.base import Drop

# Columns of the seeds of a row: two of the row, its length for the numbers of
# its weights, and one unused, because blocks of Triton are powers of two.
SEEDS = 4


def row_seeds(drop: Drop, batch: int, length: int) -> jax.Array:
  """Returns the seeds of the dropout of attention weights, uint32 [B, SEEDS].

  Without dropout they are 0.
  """
  seeds = jnp.zeros((batch, SEEDS), jnp.uint32)
  if not drop.active:
    return seeds
  keys = drop.keys.fold(dropout.ATTENTION_WEIGHTS)
  return seeds.at[:, :2].set(keys.seeds).at[:, 2].set(
      length if keys.lengths is None else keys.lengths.astype(jnp.uint32))


def factor(rate: float, seeds: list[jax.Array],  # the first three of a row
           head: jax.Array, query: jax.Array, key: jax.Array,  # [T, S] int32
           ) -> jax.Array:
  """Computes the dropout factors of the weights of a head, [T, S] float32.

  `query` and `key` are places in the row. At rate 0 all factors are 1.
  """
  if not rate:
    return jnp.ones(query.shape, jnp.float32)
  head, query, key = (jnp.asarray(x).astype(jnp.uint32)
                      for x in (head, query, key))
  first, second, length = seeds
  keep = dropout.keep_mask((head * length + query) * length + key, first,
                           second, rate)
  return jnp.where(keep, 1 / (1 - rate), 0.0)


def product(precision: matmul.Precision, a: jax.Array, b: jax.Array, i: int,
            j: int) -> jax.Array:
  """Computes the sum over axis i of a and axis j of b, in float32."""
  return jax.lax.dot_general(
      a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32,
      precision=precision)


def call(kernel: Callable[..., None], *arrays: jax.Array, compiler: Any = None,
         **options: Any) -> Any:
  """Calls a kernel, which is interpreted on a CPU.

  `compiler` are compiler_params of Pallas.
  """
  return jax.lax.platform_dependent(
      *arrays, cpu=pl.pallas_call(kernel, interpret=True, **options),
      default=pl.pallas_call(kernel, compiler_params=compiler, **options))
