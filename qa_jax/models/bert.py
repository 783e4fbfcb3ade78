"""The BERT encoder (Devlin et al., 2019), exactly as published.

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, M hidden size of the MLP, F output features of a layer.

It has post-LayerNorm blocks, erf GELU, learned positions and token types. Its
parameters are float32. With bfloat16 as compute dtype, matrix products still
accumulate in float32, and softmax, LayerNorm and the outputs of the encoder are
float32.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax.models import attention as attention_lib
from qa_jax.models import dropout as dropout_lib
from qa_jax.models import gelu
from qa_jax.models import matmul
from qa_jax.models.dropout import DropoutKeys

# Sizes from Devlin et al. (2019), Turc et al. (2019) and Wang et al. (2020).
PRESETS: dict[str, dict[str, int]] = {
    name: dict(num_layers=n, hidden_size=d, num_heads=h, mlp_size=4 * d)
    for name, n, d, h in (
        ('tiny', 2, 128, 2), ('mini', 4, 256, 4), ('small', 4, 512, 8),
        ('medium', 8, 512, 8), ('base', 12, 768, 12), ('large', 24, 1024, 16),
        ('minilm_l6', 6, 384, 12))}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The sizes, dropout rates and constants of an encoder."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_size: int
  max_position: int = 512
  type_vocab_size: int = 2
  dropout: float = 0.1
  attention_dropout: float = 0.1
  layer_norm_eps: float = 1e-12
  # Standard deviation of fresh parameters. BERT's 0.02 suits a hidden size of
  # 768. A small encoder learns faster with 1 / sqrt(hidden_size), because its
  # attention is then less uniform at first.
  initializer_range: float = 0.02
  # The entry of checkpoints.weight_names.ARCHITECTURES that transformers gets.
  # It changes nothing that the encoder computes.
  architecture: str = 'bert'


# (x, rate, place) → x after dropout.
Drop = Callable[..., jax.Array]


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

    if c.type_vocab_size == 1:  # RoBERTa: all tokens have the one type
      token_type_ids = jnp.zeros_like(token_type_ids)
    embed = lambda name, size: nn.Embed(
        size, c.hidden_size, embedding_init=_init(c), name=name)
    x = (embed('word', c.vocab_size)(token_ids)
         + embed('position', c.max_position)(position_ids)
         + embed('token_type', c.type_vocab_size)(token_type_ids))
    return _layer_norm(c)(x, self.compute_dtype)


class Dense(nn.Module):
  """The layer x W + b, rounded to the compute dtype once, after the sum."""

  config: BertConfig
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # […, D] → […, F]
    size = x.shape[-1]
    kernel = self.param('kernel', _init(self.config), (size, self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = matmul.einsum('nd,df->nf', x.reshape(-1, size), kernel, self.dtype)
    return (y + bias[None]).astype(self.dtype).reshape(
        *x.shape[:-1], self.features)


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
    return _layer_norm(c)(x + y, self.compute_dtype)


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
    return _layer_norm(c)(x + y, self.compute_dtype)


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
      name, layer_keys = f'layer_{i}', None if keys is None else keys.fold(i)
      if self.is_initializing():
        x = block(name=name)(x, visible, layer_keys)
      else:
        with jax.named_scope(name):
          x = _apply_block(block(parent=None), self.variables['params'][name],
                           x, visible, layer_keys)
      layers.append(x)
    return tuple(x.astype(jnp.float32) for x in layers)


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(block: Block, params: Any, x: jax.Array,
                 visible: attention_lib.Visible,
                 keys: DropoutKeys | None) -> jax.Array:
  """Applies an unbound block to the parameters of one layer.

  All layers share this jitted function, so JAX traces, differentiates and
  lowers a single block. That saves a third of the time to lower MiniLM-L6, and
  half for BERT-large (measured in commit bfaa8a3). `nn.jit(Block)` lowers as
  little, but adds up to 0.1 s a program to trace the layers of MiniLM-L6.
  """
  return block.apply({'params': params}, x, visible, keys)


def _init(config: BertConfig) -> nn.initializers.Initializer:
  return nn.initializers.truncated_normal(config.initializer_range)


def _layer_norm(config: BertConfig):
  layer = nn.LayerNorm(
      epsilon=config.layer_norm_eps, dtype=jnp.float32, name='layer_norm')
  return lambda x, dtype: layer(x.astype(jnp.float32)).astype(dtype)
