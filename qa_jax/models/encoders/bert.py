"""The BERT encoder (Devlin et al., 2019), exactly as published.

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, M hidden size of the MLP.

It has post-LayerNorm blocks, erf GELU, learned positions and token types. Its
parameters are float32. With bfloat16 as compute dtype, matrix products still
accumulate in float32, and softmax, LayerNorm and the outputs of the encoder are
float32.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax.models import attention as attention_lib
from qa_jax.models import dropout as dropout_lib
from qa_jax.models import gelu
from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.encoders import base
from qa_jax.models.encoders.base import Dense
from qa_jax.models.encoders.base import Drop


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(base.EncoderConfig):
  """The sizes and constants of BERT, and of ELECTRA and DistilBERT."""

  architecture: str = 'bert'

  def build(self, compute_dtype: jnp.dtype = jnp.float32,
            attention: str = 'auto') -> nn.Module:
    return BertEncoder(self, compute_dtype, attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
  """The constants of RoBERTa (Liu et al., 2019): BERT with one token type."""

  type_vocab_size: int = 1
  layer_norm_eps: float = 1e-5
  architecture: str = 'roberta'


class Embeddings(nn.Module):
  """The sum of word, position and token-type vectors, then LayerNorm."""

  config: BertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, token_ids: jax.Array, token_type_ids: jax.Array,  # [B, L] int32
      position_ids: jax.Array | None) -> jax.Array:  # None: 0 … L - 1
    c = self.config
    if position_ids is None:
      position_ids = jnp.arange(token_ids.shape[1])[None]  # [1, L]

    embed = lambda name, size: nn.Embed(
        size, c.hidden_size, embedding_init=base.init(c), name=name)
    x = (embed('word', c.vocab_size)(token_ids)
         + embed('position', c.max_position)(position_ids)
         + _choose(embed('token_type', c.type_vocab_size).embedding,
                   token_type_ids))
    return base.layer_norm(c)(x, self.compute_dtype)


def _choose(vectors: jax.Array,  # [T, D]
            numbers: jax.Array) -> jax.Array:  # [B, L] → [B, L, D]
  """Returns the vector of each token's type, without a gather.

  The gradient is then a sum over tokens instead of a scatter into a few rows,
  which a GPU would do by atomic additions. RoBERTa has one type, that of all
  tokens.
  """
  chosen = vectors[0]
  for number in range(1, len(vectors)):
    chosen = jnp.where(numbers[:, :, None] == number, vectors[number], chosen)
  return chosen


class Attention(nn.Module):
  """Self-attention with residual connection and LayerNorm."""

  config: BertConfig
  compute_dtype: jnp.dtype
  implementation: str

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               visible: attention_lib.Visible, drop: Drop,
               drop_weights: attention_lib.Drop) -> jax.Array:
    c = self.config
    dense = functools.partial(Dense, c, dtype=self.compute_dtype)
    batch, length, _ = x.shape
    qkv = dense(3 * c.hidden_size, name='query_key_value')(x)  # [B, L, 3D]
    q, k, v = (  # [B, H, L, K] each; a split has a cheap gradient, one pass
        x.reshape(batch, length, c.num_heads, -1).transpose(0, 2, 1, 3)
        for x in jnp.split(qkv, 3, axis=-1))
    y = attention_lib.attend(
        self.implementation, q, k, v, visible, drop_weights)
    y = y.transpose(0, 2, 1, 3).reshape(
        batch, length, c.hidden_size).astype(self.compute_dtype)
    y = drop(dense(c.hidden_size, name='output')(y), c.dropout,
             place=dropout_lib.ATTENTION_OUTPUT)
    return base.layer_norm(c)(x + y, self.compute_dtype)


class MLP(nn.Module):
  """The MLP with residual connection and LayerNorm."""

  config: BertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, drop: Drop) -> jax.Array:  # [B, L, D]
    c = self.config
    dense = functools.partial(Dense, c, dtype=self.compute_dtype)
    y = gelu.gelu(dense(c.mlp_size, name='intermediate')(x))  # [B, L, M]
    y = drop(dense(c.hidden_size, name='output')(y), c.dropout,
             place=dropout_lib.MLP_OUTPUT)
    return base.layer_norm(c)(x + y, self.compute_dtype)


class Block(nn.Module):
  """One layer of the encoder: attention and MLP."""

  config: BertConfig
  compute_dtype: jnp.dtype
  implementation: str  # an entry of attention.ATTENTION

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               visible: attention_lib.Visible,
               keys: DropoutKeys | None) -> jax.Array:
    c, dtype = self.config, self.compute_dtype
    drop = functools.partial(dropout_lib.dropout, keys=keys)
    x = Attention(c, dtype, self.implementation, name='attention')(
        x, visible, drop, attention_lib.Drop(keys, c.attention_dropout))
    return MLP(c, dtype, name='mlp')(x, drop)


class BertEncoder(nn.Module):
  """The encoder: it maps token ids to the contextual vectors of all layers."""

  config: BertConfig
  compute_dtype: jnp.dtype = jnp.float32
  attention: str = 'auto'  # an entry of attention.ATTENTION

  @nn.compact
  def __call__(
      self, token_ids: jax.Array, token_type_ids: jax.Array,  # [B, L] int32
      attention_mask: jax.Array,  # [B, L], 0 at padding
      keys: DropoutKeys | None = None, segment_ids: jax.Array | None = None,
      position_ids: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Returns the embeddings and the output of each layer, [B, L, D] float32.

    Without `keys` there is no dropout. In a packed row, `segment_ids`, [B, L],
    number the segments, each token attends to its own segment, and
    `position_ids`, [B, L], start at 0 in each segment.
    """
    c = self.config
    x = Embeddings(c, self.compute_dtype, name='embeddings')(
        token_ids, token_type_ids, position_ids)
    x = dropout_lib.dropout(x, c.dropout, keys, dropout_lib.EMBEDDINGS)
    visible = attention_lib.Visible(attention_mask > 0, segment_ids)
    layers = [x]
    block = functools.partial(Block, c, self.compute_dtype, self.attention)
    for i in range(c.num_layers):
      x = base.apply_layer(self, block, f'layer_{i}', x, visible,
                           None if keys is None else keys.fold(i))
      layers.append(x)
    return tuple(x.astype(jnp.float32) for x in layers)
