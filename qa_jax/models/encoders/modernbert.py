"""The ModernBERT encoder (Warner et al., 2024), for up to 8,192 tokens.

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, M hidden size of the MLP.

It has pre-LayerNorm blocks without biases, rotary positions and GeGLU (section
2.1.1). Every third layer attends to all tokens, the others to a window around
each token (section 2.1.2). The normalised output of the last layer is the last
of the layers, as in transformers. Precision is that of `bert`.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import errors
from qa_jax.models import attention as attention_lib
from qa_jax.models import dropout as dropout_lib
from qa_jax.models import gelu
from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.encoders import base
from qa_jax.models.encoders.base import Dense
from qa_jax.models.encoders.base import DropUnits

# cos and sin of the angles of a row, [B or 1, L, K / 2].
Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(base.EncoderConfig):
  """The sizes and constants of ModernBERT."""

  # Warner et al. (2024), appendix A; tiny is for rehearsals.
  PRESETS: ClassVar[dict[str, dict[str, int]]] = {
      'tiny': dict(num_layers=3, hidden_size=128, num_heads=2, mlp_size=192),
      'base': dict(num_layers=22, hidden_size=768, num_heads=12, mlp_size=1152),
      'large': dict(
          num_layers=28, hidden_size=1024, num_heads=16, mlp_size=2624)}

  max_position: int = 8192
  type_vocab_size: int = 1  # there are no token types
  layer_norm_eps: float = 1e-5
  local_attention: int = 128  # tokens of a window, half of them on either side
  global_every: int = 3  # layers 0, 3, 6, … attend to all tokens
  global_theta: float = 160_000.0  # base of the wavelengths of global layers
  local_theta: float = 10_000.0
  attention_bias: bool = False  # whether the products of attention have biases
  mlp_bias: bool = False
  norm_bias: bool = False
  architecture: str = 'modernbert'

  def __post_init__(self):
    super().__post_init__()
    errors.require(
        self.type_vocab_size == 1, "encoder 'modernbert': type_vocab_size="
        f'{self.type_vocab_size}, but it has no token types; leave it out')
    errors.check_at_least(1, "encoder 'modernbert'", global_every=(
        self.global_every), local_attention=self.local_attention)
    for name in ('global_theta', 'local_theta'):
      errors.require(
          0 < getattr(self, name) < math.inf,
          f"encoder 'modernbert': {name}={getattr(self, name)} must be above 0")
    errors.require(
        self.hidden_size % (2 * self.num_heads) == 0,
        f"encoder 'modernbert': hidden_size {self.hidden_size} must be "
        f'divisible by 2 · num_heads, {2 * self.num_heads}: a rotary position '
        'turns pairs of the units of a head')

  @property
  def attention_window(self) -> int | None:
    every = self.num_layers == 1 or self.global_every == 1
    return None if every else self.local_attention // 2

  @property
  def has_position_table(self) -> bool:
    return False

  def build(self, compute_dtype: jnp.dtype = jnp.float32,
            attention: str = 'auto') -> nn.Module:
    return ModernBertEncoder(self, compute_dtype, attention)

  def output_layer(self) -> 'ModernBertConfig':
    """Returns constants for the layers whose outputs the residual stream adds.

    Their fresh parameters are smaller the more layers there are, as in the code
    of ModernBERT.
    """
    return dataclasses.replace(self, initializer_range=(
        self.initializer_range / math.sqrt(2 * self.num_layers)))


def rotation(position_ids: jax.Array,  # [B or 1, L] int32
             size: int, theta: float) -> Rotation:
  """Computes the angles of rotary positions (Su et al., 2021, section 3.2.2).

  Pair i of a head turns by position · theta^(-2i / K), for K = `size`.
  """
  # In the roundings of torch: at position 8,192, an error of one bit in a
  # frequency is an error of 5e-4 in an angle.
  exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
  wavelength = theta ** exponent.astype(np.float64)
  frequency = 1 / wavelength.astype(np.float32)  # [K / 2] float32
  angle = position_ids[..., None].astype(jnp.float32) * frequency[None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array,  # [B, H, L, K]
           by: Rotation) -> jax.Array:
  """Rotates the pairs (i, i + K / 2) of queries or keys, in float32."""
  cos, sin = (angle[:, None] for angle in by)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Embeddings(nn.Module):
  """The word vectors after LayerNorm."""

  config: ModernBertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self, token_ids: jax.Array) -> jax.Array:  # [B, L] → [B, L, D]
    c = self.config
    x = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=base.init(c),
                 name='word')(token_ids)
    return _layer_norm(c)(x, self.compute_dtype)


class Attention(nn.Module):
  """LayerNorm, except in the first layer, and self-attention."""

  config: ModernBertConfig
  compute_dtype: jnp.dtype
  implementation: str
  is_first: bool

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               visible: attention_lib.Visible, by: Rotation, drop: DropUnits,
               drop_weights: attention_lib.Drop) -> jax.Array:
    c, dtype = self.config, self.compute_dtype
    if not self.is_first:
      x = _layer_norm(c)(x, dtype)
    q, k, v = base.split_heads(
        Dense(c, 3 * c.hidden_size, dtype, c.attention_bias,
              name='query_key_value', kernel_init=base.query_key_init(c))(x),
        3, c.num_heads)
    y = base.join_heads(attention_lib.attend(
        self.implementation, rotate(q, by), rotate(k, by), v, visible,
        drop_weights), dtype)
    y = Dense(c.output_layer(), c.hidden_size, dtype, c.attention_bias,
              name='output')(y)
    return drop(y, c.attention_dropout, place=dropout_lib.ATTENTION_OUTPUT)


class MLP(nn.Module):
  """LayerNorm and GeGLU (Shazeer, 2020): W_o (gelu(W x) ⊙ V x)."""

  config: ModernBertConfig
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, drop: DropUnits) -> jax.Array:  # [B, L, D]
    c, dtype = self.config, self.compute_dtype
    x = _layer_norm(c)(x, dtype)
    x, gate = jnp.split(Dense(c, 2 * c.mlp_size, dtype, c.mlp_bias,
                              name='intermediate')(x), 2, axis=-1)
    y = drop(gelu.gelu(x) * gate, c.dropout,  # [B, L, M]
             place=dropout_lib.MLP_OUTPUT)
    return Dense(c.output_layer(), c.hidden_size, dtype, c.mlp_bias,
                 name='output')(y)


class Block(nn.Module):
  """One layer of the encoder: attention and MLP, both with a residual."""

  config: ModernBertConfig
  compute_dtype: jnp.dtype
  implementation: str  # an entry of attention.ATTENTION
  is_first: bool

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               visible: attention_lib.Visible, by: Rotation,
               keys: DropoutKeys | None) -> jax.Array:
    c, dtype = self.config, self.compute_dtype
    drop = functools.partial(dropout_lib.dropout, keys=keys)
    x += Attention(c, dtype, self.implementation, self.is_first,
                   name='attention')(
        x, visible, by, drop, attention_lib.Drop(keys, c.attention_dropout))
    return x + MLP(c, dtype, name='mlp')(x, drop)


class Final(nn.Module):
  """The LayerNorm behind the last layer."""

  config: ModernBertConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D] → float32
    return _layer_norm(self.config)(x, jnp.float32)


class ModernBertEncoder(base.Encoder):
  """The encoder of ModernBERT; token types have no effect.

  A segment of a packed row is contiguous, so windows are counted in places of
  the row.
  """

  config: ModernBertConfig

  def compute_layers(self, token_ids, token_type_ids, visible, keys,
                     position_ids):
    del token_type_ids
    c = self.config
    if position_ids is None:
      position_ids = jnp.arange(token_ids.shape[1])[None]  # [1, L]
    everywhere, local = (
        (visible.replace(window=window),
         rotation(position_ids, c.hidden_size // c.num_heads, theta))
        for window, theta in ((None, c.global_theta),
                              (c.local_attention // 2, c.local_theta)))
    x = Embeddings(c, self.compute_dtype, name='embeddings')(token_ids)
    x = dropout_lib.dropout(x, c.dropout, keys, dropout_lib.EMBEDDINGS)
    layers = [x]
    for i in range(c.num_layers):
      block = functools.partial(
          Block, c, self.compute_dtype, self.attention, i == 0)
      x = base.apply_layer(self, block, f'layer_{i}', x,
                           *(local if i % c.global_every else everywhere),
                           None if keys is None else keys.fold(i))
      layers.append(x)
    layers[-1] = Final(c, name='final')(x)
    return layers


def _layer_norm(config: ModernBertConfig):
  return base.layer_norm(config, use_bias=config.norm_bias)
