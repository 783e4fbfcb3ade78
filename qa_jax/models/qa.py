"""QAModel: an encoder with a span head, and its parameters.

Glossary of shapes: B batch (windows), L window length, D hidden size, N encoder
layers; in packed batches S shards, R packed rows of a shard, P row length.
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

from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.encoders import EncoderConfig
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


@flax.struct.dataclass
class Packed:
  """The places of the windows in the packed rows; see data/packing.py."""

  segment_ids: jax.Array  # [S, R, P] int32
  position_ids: jax.Array  # [S, R, P] int32
  packed_row: jax.Array  # [S, R] int32, numbers in the global batch
  first: jax.Array  # [B] int32, first token among the R·P tokens of the shard

  def unpack(self, x: jax.Array,  # [S·R, P, …]
             attention_mask: jax.Array) -> jax.Array:  # [B, L] → [B, L, …]
    """Returns the values of each window in its own row, padded with zeros."""
    shards, rows, row_length = self.segment_ids.shape
    tokens = x.reshape(shards, rows * row_length, *x.shape[2:])
    column = jnp.arange(attention_mask.shape[1])[None]
    index = jnp.minimum(self.first[:, None] + column, tokens.shape[1] - 1)
    # With a vmap over shards, no token leaves the device that computed it.
    x = jax.vmap(lambda tokens, index: tokens[index])(
        tokens, index.reshape(shards, -1))  # [S, B / S · L, …]
    x = x.reshape(*index.shape, *x.shape[2:])
    mask = attention_mask.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.where(mask > 0, x, 0)


def is_token_wise(head: nn.Module) -> bool:
  """Returns whether the class of a head declares `token_wise` for itself.

  The declaration is not inherited: a subclass may read other tokens as well.
  """
  return 'token_wise' in vars(type(head)) and bool(head.token_wise)


class QAModel(nn.Module):
  """An encoder with a span head; its parameters are {'encoder', 'head'}."""

  config: EncoderConfig
  head: nn.Module
  compute_dtype: jnp.dtype = jnp.float32
  attention: str = 'auto'  # an entry of attention.ATTENTION
  # Whether a GPU may round the float32 operands of the encoder's products to
  # TF32, which has the 10 bits of float16 for the fraction.
  tf32: bool = False

  def setup(self):
    self.encoder = self.config.build(self.compute_dtype, self.attention)

  def __call__(
      self, token_ids: jax.Array,  # [B, L] int32; packed [S, R, P]
      token_type_ids: jax.Array,  # int32, shaped like token_ids
      attention_mask: jax.Array, context_mask: jax.Array,  # [B, L], [B, L] bool
      *, packed: Packed | None = None, dropout_key: jax.Array | None = None,
      rows: jax.Array | None = None,  # [B] row of the global batch
      dropout_lengths: jax.Array | None = None,  # see DropoutKeys.lengths
      gold_start: jax.Array | None = None,  # [B], in training
      start_mask: jax.Array | None = None) -> SpanScores:  # [B, L] bool
    """Computes the span scores of every window.

    `start_mask` is that of HeadInput.
    There is dropout only with a `dropout_key`; its masks then depend on `rows`,
    or on `packed.packed_row` in a packed batch.
    """
    keys = None
    if dropout_key is not None:
      keys = DropoutKeys.from_rows(
          dropout_key, packed.packed_row.reshape(-1) if packed else rows,
          dropout_lengths)
    if packed:
      ids, types, segments, positions = (x.reshape(-1, x.shape[-1]) for x in (
          token_ids, token_type_ids, packed.segment_ids, packed.position_ids))
      layers = self._encode(ids, types, segments, keys, segments, positions)
      unpack = functools.partial(
          packed.unpack, attention_mask=attention_mask)
      if is_token_wise(self.head):
        # Only scores move from packed rows to windows: D times fewer bytes.
        return jax.tree.map(unpack, self._score(HeadInput(
            layers, jnp.zeros_like(segments, bool))))
      layers = tuple(map(unpack, layers))
    else:
      layers = self._encode(token_ids, token_type_ids, attention_mask, keys)
    return self._score(HeadInput(
        layers, context_mask, gold_start, start_mask))

  def score_zeros(self) -> SpanScores:
    """Computes the span scores of one window whose vectors are zero."""
    c = self.config
    return self._score(HeadInput(
        (jnp.zeros((1, 8, c.hidden_size)),) * (c.num_layers + 1),
        jnp.ones((1, 8), bool)))

  def _encode(self, *inputs: Any) -> tuple[jax.Array, ...]:
    if not self.tf32 or jax.config.jax_default_matmul_precision:
      return self.encoder(*inputs)
    with jax.default_matmul_precision('tensorfloat32'):
      return self.encoder(*inputs)

  def _score(self, inputs: HeadInput) -> SpanScores:
    # A head that a user wrote need not know what TF32 does to its products, nor
    # that a loss and a search compute in the dtype of the scores.
    chosen = jax.config.jax_default_matmul_precision
    with jax.default_matmul_precision(chosen or 'highest'):
      return jax.tree.map(lambda x: x.astype(jnp.float32), self.head(inputs))

  def by_layer(
      self, token_ids: jax.Array, token_type_ids: jax.Array,  # [B, L] int32
      attention_mask: jax.Array, context_mask: jax.Array,  # [B, L], [B, L] bool
      *, start_mask: jax.Array | None = None,  # [B, L] bool, see HeadInput
  ) -> tuple[SpanScores, jax.Array, jax.Array]:
    """Computes the span scores, and start and end scores from each layer.

    The start and end scores are [1 + N, B, L]. Row n has the scores of the head
    if every layer of its input is layer n; layer 0 is the embeddings. They show
    at which depth of the encoder the answer appears.
    """
    layers = self._encode(token_ids, token_type_ids, attention_mask)
    count, batch = len(layers), token_ids.shape[0]
    by_layer = self._score(HeadInput(
        (jnp.concatenate(layers),) * count, jnp.tile(context_mask, (count, 1))))
    return (self._score(HeadInput(
        layers, context_mask, start_mask=start_mask)),
            by_layer.start.reshape(count, batch, -1),
            by_layer.end.reshape(count, batch, -1))


def init_params(model: QAModel, key: jax.Array, length: int = 8) -> Any:
  """Draws float32 parameters that depend on neither `length` nor attention."""
  return _init(
      model.clone(attention='xla'), key, jnp.zeros((1, length), jnp.int32))


def init_head(model: QAModel, key: jax.Array) -> Any:
  """Draws the head of `init_params`, for an encoder that is loaded later.

  The parameters of the encoder are zero.
  """
  return zero_params(model) | {'head': _init_head(model, key)}


def zero_params(model: QAModel) -> Any:
  """Returns zeros in the shapes of `init_params`, without any compilation."""
  return jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))


def param_shapes(model: QAModel) -> Any:
  """Returns the shapes of `init_params`."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)  # equal models are traced once
@jax.enable_x64(False)  # else initializers would draw float64
def _init(model: QAModel, key: jax.Array, ids: jax.Array) -> Any:
  return model.init(key, ids, ids, ids + 1, ids > 0)['params']


@functools.partial(jax.jit, static_argnums=0)
@jax.enable_x64(False)
def _init_head(model: QAModel, key: jax.Array) -> Any:
  # flax derives the key of a parameter from its path, so that the head gets
  # the numbers of `init_params` without a trace of the encoder.
  return model.init(key, method=QAModel.score_zeros)['params']['head']


# The arrays of a batch that the model reads, and those of a packed batch only.
INPUTS = ('token_ids', 'token_type_ids', 'attention_mask', 'context_mask')
PACKED = tuple(f.name for f in dataclasses.fields(Packed))


def model_inputs(batch: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Returns the arrays of a batch that are arguments of the model."""
  inputs = {k: batch[k] for k in INPUTS}
  if 'segment_ids' in batch:
    inputs['packed'] = Packed(**{k: batch[k] for k in PACKED})
  return inputs
