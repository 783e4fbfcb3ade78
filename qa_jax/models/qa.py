"""Encoder + head → SpanScores.

Glossary of shapes: B batch (windows), L window length.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax.heads.base import HeadInput
from qa_jax.heads.base import SpanScores
from qa_jax.models import bert
from qa_jax.models.dropout import DropoutKeys


class QAModel(nn.Module):
  """A BERT encoder under a span head; parameters {'encoder', 'head'}."""

  config: bert.BertConfig
  head: nn.Module
  compute_dtype: jnp.dtype = jnp.float32
  dropout_impl: str = 'counter_hash'

  def setup(self):
    self.encoder = bert.BertEncoder(
        self.config, self.compute_dtype, self.dropout_impl)

  def __call__(self, token_ids: jax.Array,  # [B, L] int32
               token_type_ids: jax.Array,  # [B, L] int32
               attention_mask: jax.Array,  # [B, L]
               context_mask: jax.Array,  # [B, L] bool
               *, dropout_key: jax.Array | None = None,
               rows: jax.Array | None = None,  # [B] row of the global batch
               gold_start: jax.Array | None = None) -> SpanScores:
    """Scores of every position; drops units only if given a `dropout_key`."""
    keys = None
    if dropout_key is not None:
      keys = DropoutKeys.of(dropout_key, rows)
    layers = self.encoder(token_ids, token_type_ids, attention_mask, keys)
    return self.head(HeadInput(layers, context_mask, gold_start))


def init_params(model: QAModel, key: jax.Array, length: int = 8) -> Any:
  """Fresh float32 parameters; their shapes do not depend on `length`."""
  ids = jnp.zeros((1, length), jnp.int32)
  return jax.jit(model.init)(key, ids, ids, ids + 1, ids > 0)['params']
