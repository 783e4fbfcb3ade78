"""Encoder + head → SpanScores.

Glossary of shapes: B batch (windows), L window length, D hidden size; if
packed: S shards, R rows of a shard, P row length. N encoder layers.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qa_jax.models import bert
from qa_jax.models.dropout import DropoutKeys
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


@flax.struct.dataclass
class Packed:
  """Where the windows stand in the encoder's rows; see data/packing.py."""

  segment_ids: jax.Array  # [S, R, P] int32
  position_ids: jax.Array  # [S, R, P] int32
  packed_row: jax.Array  # [S, R] int32: numbers the rows
  first: jax.Array  # [B] int32, in the R·P tokens of the window's shard

  def unpack(self, x: jax.Array,  # [S·R, P, D]
             attention_mask: jax.Array) -> jax.Array:  # [B, L] → [B, L, D]
    """One window a row again, with zeros behind its end."""
    shards, rows, row_length = self.segment_ids.shape
    tokens = x.reshape(shards, rows * row_length, -1)
    column = jnp.arange(attention_mask.shape[1])
    index = jnp.minimum(self.first[:, None] + column[None],
                        tokens.shape[1] - 1)  # [B, L]
    # Shard by shard: no token leaves the device that computed it.
    x = jax.vmap(lambda tokens, index: tokens[index])(
        tokens, index.reshape(shards, -1))  # [S, B / S · L, D]
    return jnp.where(attention_mask[:, :, None] > 0,
                     x.reshape(*index.shape, -1), 0)


class QAModel(nn.Module):
  """A BERT encoder under a span head; parameters {'encoder', 'head'}."""

  config: bert.BertConfig
  head: nn.Module
  compute_dtype: jnp.dtype = jnp.float32
  attention: str = 'auto'  # of attention.ATTENTION

  def setup(self):
    self.encoder = bert.BertEncoder(
        self.config, self.compute_dtype, self.attention)

  def __call__(self, token_ids: jax.Array,  # [B, L] int32; packed [S, R, P]
               token_type_ids: jax.Array,  # as token_ids
               attention_mask: jax.Array,  # [B, L]
               context_mask: jax.Array,  # [B, L] bool
               *, packed: Packed | None = None,
               dropout_key: jax.Array | None = None,
               rows: jax.Array | None = None,  # [B] row of the global batch
               # [B] int32: as if L were this to dropout, see dropout.py
               dropout_lengths: jax.Array | None = None,
               gold_start: jax.Array | None = None) -> SpanScores:
    """Scores of every position; drops units only if given a `dropout_key`."""
    keys = None
    if dropout_key is not None:
      keys = DropoutKeys.of(dropout_key, packed.packed_row.reshape(-1)
                            if packed else rows, dropout_lengths)
    if packed:
      ids, types, segments, positions = (
          x.reshape(-1, x.shape[-1]) for x in (
              token_ids, token_type_ids, packed.segment_ids,
              packed.position_ids))
      layers = self.encoder(ids, types, segments, keys, segments, positions)
      layers = tuple(packed.unpack(x, attention_mask) for x in layers)
    else:
      layers = self.encoder(token_ids, token_type_ids, attention_mask, keys)
    return self.head(HeadInput(layers, context_mask, gold_start))

  def by_layer(self, token_ids: jax.Array,  # [B, L] int32
               token_type_ids: jax.Array,  # [B, L] int32
               attention_mask: jax.Array,  # [B, L]
               context_mask: jax.Array,  # [B, L] bool
               ) -> tuple[SpanScores, jax.Array, jax.Array]:
    """The scores; then start and end, [1 + N, B, L], layer by layer.

    Row n is what the head scores if layer n stands in place of every layer;
    row 0 are the embeddings. Where in the depth does the answer appear?
    """
    layers = self.encoder(token_ids, token_type_ids, attention_mask)
    count, batch = len(layers), token_ids.shape[0]
    alone = self.head(HeadInput(
        (jnp.concatenate(layers),) * count, jnp.tile(context_mask, (count, 1))))
    return (self.head(HeadInput(layers, context_mask)),
            *(x.reshape(count, batch, -1) for x in (alone.start, alone.end)))


def init_params(model: QAModel, key: jax.Array, length: int = 8) -> Any:
  """Fresh float32 parameters; their shapes do not depend on `length`, nor on
  how attention is computed."""
  return _init(model.clone(attention='xla'), key,
               jnp.zeros((1, length), jnp.int32))


def init_head(model: QAModel, key: jax.Array) -> Any:
  """As `init_params`, but zeros for all but the head: the rest is loaded."""
  return zero_params(model) | {'head': _init_head(
      model.clone(attention='xla'), key, jnp.zeros((1, 8), jnp.int32))}


def zero_params(model: QAModel) -> Any:
  """Zeros in the shape of `init_params`; nothing is compiled."""
  return jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


@functools.partial(jax.jit, static_argnums=0)  # traced once for equal models
def _init(model: QAModel, key: jax.Array, ids: jax.Array) -> Any:
  return model.init(key, ids, ids, ids + 1, ids > 0)['params']


@functools.partial(jax.jit, static_argnums=0)
def _init_head(model: QAModel, key: jax.Array, ids: jax.Array) -> Any:
  return _init(model, key, ids)['head']  # of no other is anything compiled
# What the model reads of a batch, and of a packed one besides.
INPUTS = ('token_ids', 'token_type_ids', 'attention_mask', 'context_mask')
PACKED = tuple(f.name for f in dataclasses.fields(Packed))


def model_inputs(batch: Mapping[str, jax.Array]) -> dict[str, Any]:
  """The entries of a batch that the model reads."""
  inputs = {k: batch[k] for k in INPUTS}
  if 'segment_ids' in batch:
    inputs['packed'] = Packed(**{k: batch[k] for k in PACKED})
  return inputs
