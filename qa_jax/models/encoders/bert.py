"""The BERT encoder (Devlin et al., 2019), exactly as published.

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, M hidden size of the MLP.

It has post-LayerNorm blocks, erf GELU, learned positions and token types. Its
parameters are float32. With bfloat16 as compute dtype, matrix products still
accumulate in float32, and softmax, LayerNorm and the outputs of the encoder are
float32.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.models import attention as attention_lib
from qa_jax.models import dropout as dropout_lib
from qa_jax.models import gelu
from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.encoders import base
from qa_jax.models.encoders.base import Dense
from qa_jax.models.encoders.base import DropUnits

# hidden_act of config.json → activation of the MLP.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': gelu.gelu, 'gelu_new': gelu.gelu_new}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(base.EncoderConfig):
  """The sizes and constants of BERT, and of DistilBERT.

  The constants in capitals are those in which a subclass differs.
  """

  # Whether embeddings are projected even if their size is D.
  ALWAYS_PROJECTS: ClassVar[bool] = False
  # A module class: RELATIVE_POSITIONS(config)(L) is the bias of the attention
  # scores, [1, H, L, L].
  RELATIVE_POSITIONS: ClassVar[type[nn.Module] | None] = None
  embedding_size: ClassVar[int] = 0  # 0: D
  architecture: str = 'bert'

  def __post_init__(self):
    super().__post_init__()
    errors.check_at_least(0, 'encoder', embedding_size=self.embedding_size)

  def build(self, compute_dtype: jnp.dtype = jnp.float32,
            attention: str = 'auto') -> nn.Module:
    return BertEncoder(self, compute_dtype, attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
  """The constants of RoBERTa (Liu et al., 2019): BERT with one token type."""

  type_vocab_size: int = 1
  layer_norm_eps: float = 1e-5
  architecture: str = 'roberta'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(BertConfig):
  """The constants of ELECTRA (Clark et al., 2020): BERT with small embeddings.

  Section 3.3 there and its table 6 have an embedding size of 128 for the small
  model. Embeddings as wide as the layers are not projected.
  """

  embedding_size: int = 128
  architecture: str = 'electra'


class Embeddings(nn.Module):
  """The sum of word, position and token-type vectors, then LayerNorm.

  Vectors of another size than D are projected to D after dropout, the factors
  of Lan et al. (2020), section 3.1.
  """

  config: BertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, token_ids: jax.Array, token_type_ids: jax.Array,  # [B, L] int32
      position_ids: jax.Array | None,  # None: 0 … L - 1
      keys: DropoutKeys | None = None
      ) -> tuple[jax.Array, jax.Array | None]:  # [B, L, D], [1, H, L, L]
    """Returns the vectors, and the bias of attention scores or None."""
    c = self.config
    if position_ids is None:
      position_ids = jnp.arange(token_ids.shape[1])[None]  # [1, L]

    size = c.embedding_size or c.hidden_size
    embed = lambda name, count, init=base.init: nn.Embed(
        count, size, embedding_init=init(c), name=name)
    x = (embed('word', c.vocab_size)(token_ids)
         + embed('position', c.max_position, base.position_init)(position_ids))
    if c.type_vocab_size:
      types = embed('token_type', c.type_vocab_size).embedding
      x += base.choose_type(types, token_type_ids)
    x = base.layer_norm(c)(x, self.compute_dtype)
    x = dropout_lib.dropout(x, c.dropout, keys, dropout_lib.EMBEDDINGS)
    if size != c.hidden_size or c.ALWAYS_PROJECTS:
      x = Dense(c, c.hidden_size, self.compute_dtype, name='project')(x)
    if c.RELATIVE_POSITIONS is None:
      return x, None
    return x, c.RELATIVE_POSITIONS(c, name='relative')(token_ids.shape[1])


class Attention(nn.Module):
  """Self-attention with residual connection and LayerNorm."""

  config: BertConfig
  compute_dtype: jnp.dtype
  implementation: str

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               visible: attention_lib.Visible, drop: DropUnits,
               drop_weights: attention_lib.Drop,
               bias: jax.Array | None) -> jax.Array:  # [1, H, L, L]
    c = self.config
    dense = functools.partial(Dense, c, dtype=self.compute_dtype)
    q, k, v = base.split_heads(
        dense(3 * c.hidden_size, name='query_key_value',
              kernel_init=base.query_key_init(c))(x), 3, c.num_heads)
    y = base.join_heads(attention_lib.attend(
        self.implementation, q, k, v, visible, drop_weights, bias), x.dtype)
    y = drop(dense(c.hidden_size, name='output')(y), c.dropout,
             place=dropout_lib.ATTENTION_OUTPUT)
    return base.layer_norm(c)(x + y, self.compute_dtype)


class MLP(nn.Module):
  """The MLP with residual connection and LayerNorm."""

  config: BertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, drop: DropUnits) -> jax.Array:  # [B, L, D]
    c = self.config
    dense = functools.partial(Dense, c, dtype=self.compute_dtype)
    y = ACTIVATIONS[c.hidden_act](
        dense(c.mlp_size, name='intermediate')(x))  # [B, L, M]
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
               visible: attention_lib.Visible, keys: DropoutKeys | None,
               bias: jax.Array | None = None) -> jax.Array:  # [1, H, L, L]
    c, dtype = self.config, self.compute_dtype
    drop = functools.partial(dropout_lib.dropout, keys=keys)
    x = Attention(c, dtype, self.implementation, name='attention')(
        x, visible, drop, attention_lib.Drop(keys, c.attention_dropout), bias)
    return MLP(c, dtype, name='mlp')(x, drop)


class BertEncoder(base.Encoder):
  """The encoder of BERT, and of those that differ in constants alone."""

  config: BertConfig

  def compute_layers(self, token_ids, token_type_ids, visible, keys,
                     position_ids):
    c = self.config
    x, bias = Embeddings(c, self.compute_dtype, name='embeddings')(
        token_ids, token_type_ids, position_ids, keys)
    layers = [x]
    block = functools.partial(Block, c, self.compute_dtype, self.attention)
    for i in range(c.num_layers):
      name = 'layer_0' if c.SHARES_LAYERS else f'layer_{i}'
      x = base.apply_layer(self, block, name, x, visible,
                           None if keys is None else keys.fold(i), bias)
      layers.append(x)
    return layers
