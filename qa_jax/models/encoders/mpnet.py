"""The MPNet encoder (Song et al., 2020): BERT with relative positions, too.

Its tokens have positions, as in BERT, but no types. One bias of the attention
scores is shared by all layers; it is that of T5 (Raffel et al., 2020, section
2.1), bidirectional, with 32 buckets of distances.

Glossary of shapes: L row length, H attention heads.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax.models.encoders import base
from qa_jax.models.encoders import bert

BUCKETS = 32
# A half of the buckets is for keys behind the query. In a half, distances 0 to
# 7 have a bucket each, and bucket 7 + n begins at the distance 8 · 2^((n-1)/2),
# rounded up.
FIRST_DISTANCES = (8, 12, 16, 23, 32, 46, 64, 91)


class RelativePositions(nn.Module):
  """The bias of the attention scores for the distance of key and query."""

  config: base.EncoderConfig

  @nn.compact
  def __call__(self, length: int) -> jax.Array:  # [1, H, L, L] float32
    """Computes the bias, which is equal for all rows.

    A segment of a packed row is contiguous, so its distances are those of a row
    of its own.
    """
    c, place = self.config, jnp.arange(length)
    table = self.param('embedding', base.init(c), (BUCKETS, c.num_heads))
    return table[bucket(place[None] - place[:, None])].transpose(2, 0, 1)[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(bert.BertConfig):
  """The sizes and constants of MPNet."""

  ATTENTION_BIAS: ClassVar[bool] = True
  RELATIVE_POSITIONS: ClassVar[type[nn.Module] | None] = RelativePositions
  BIAS_TABLE: ClassVar[str] = 'embeddings/relative/embedding'
  type_vocab_size: int = 0
  layer_norm_eps: float = 1e-5
  architecture: str = 'mpnet'


def bucket(distance: jax.Array) -> jax.Array:  # int32, key minus query
  """Returns the bucket of each distance between a key and a query."""
  size = abs(distance)
  far = FIRST_DISTANCES[0] - 1 + sum(
      (size >= first).astype(jnp.int32) for first in FIRST_DISTANCES)
  near = jnp.where(size < FIRST_DISTANCES[0], size, far)
  return near + jnp.where(distance > 0, BUCKETS // 2, 0)
