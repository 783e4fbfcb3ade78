"""The parts that encoders share: sizes, Dense, LayerNorm, one traced layer.

Glossary of shapes: B rows, L row length, D hidden size, F output features of a
layer, H attention heads, K head size, P positions, T token types.

An encoder is an `Encoder`, called as

  encoder(token_ids, token_type_ids,  # [B, L] int32
          attention_mask,             # [B, L], 0 at padding
          keys=None,                  # DropoutKeys; without them no dropout
          segment_ids=None,           # [B, L]: the segments of a packed row
          position_ids=None)          # [B, L], from 0 in each segment

It returns its embeddings and the output of each layer, [B, L, D] float32. A
token of a packed row attends to its own segment alone. Parameters are float32,
below `embeddings`, `layer_0`, `layer_1`, … and, if they belong to no layer,
`final`.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.models import attention as attention_lib
from qa_jax.models import matmul
from qa_jax.models.dropout import DropoutKeys

# (x, rate, place) → x after dropout.
DropUnits = Callable[..., jax.Array]
# Sizes from Devlin et al. (2019), Turc et al. (2019) and Wang et al. (2020).
PRESETS: dict[str, dict[str, int]] = {
    name: dict(num_layers=n, hidden_size=d, num_heads=h, mlp_size=4 * d)
    for name, n, d, h in (
        ('tiny', 2, 128, 2), ('mini', 4, 256, 4), ('small', 4, 512, 8),
        ('medium', 8, 512, 8), ('base', 12, 768, 12), ('large', 24, 1024, 16),
        ('minilm_l6', 6, 384, 12))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """The sizes, dropout rates and constants of an encoder.

  An architecture is a subclass with its own constants and `build`.
  """

  PRESETS: ClassVar[dict[str, dict[str, int]]] = PRESETS  # model.preset → sizes
  ATTENTION_BIAS: ClassVar[bool] = False  # whether its attention gets a bias
  SHARES_LAYERS: ClassVar[bool] = False  # whether all layers are layer_0
  # The path below the encoder of a table of biases, which is not decayed.
  BIAS_TABLE: ClassVar[str] = ''
  hidden_act: ClassVar[str] = 'gelu'  # activation of the MLP

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
  # Fresh parameters are normal with this standard deviation, cut at two of
  # them, which leaves 0.88 of it. BERT's 0.02 suits a hidden size of 768. A
  # small encoder learns faster with 1 / sqrt(hidden_size), because its
  # attention is then less uniform at first.
  initializer_range: float = 0.02
  position_base: float = 0.0  # see `position_init`
  equal_query_key: bool = False  # see `query_key_init`
  # The model_type that transformers gets, an entry of ARCHITECTURES in
  # checkpoints. It changes nothing that the encoder computes.
  architecture: str = ''

  def __post_init__(self):
    errors.check_at_least(0, 'encoder', type_vocab_size=self.type_vocab_size)
    errors.check_at_least(
        1, 'encoder', hidden_size=self.hidden_size, num_layers=self.num_layers,
        num_heads=self.num_heads, mlp_size=self.mlp_size)
    errors.require(
        self.hidden_size % self.num_heads == 0,
        f'encoder: hidden_size {self.hidden_size} is not divisible by '
        f'num_heads {self.num_heads}')
    errors.require(0 < self.layer_norm_eps < 1, 'encoder: layer_norm_eps='
                   f'{self.layer_norm_eps} must be in (0, 1)')

  @property
  def has_position_table(self) -> bool:
    """Whether the embeddings add a learned vector for each position."""
    return True

  @property
  def attention_window(self) -> int | None:
    """The tokens to either side that local layers see; None: none is local."""
    return None

  def build(self, compute_dtype: jnp.dtype = jnp.float32,
            attention: str = 'auto') -> nn.Module:
    """Returns the encoder; `attention` is an entry of ATTENTION."""
    raise NotImplementedError


class Encoder(nn.Module):
  """An encoder: it maps token ids to the contextual vectors of all layers."""

  config: EncoderConfig
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
    layers = self.compute_layers(
        token_ids, token_type_ids,
        attention_lib.Visible(attention_mask > 0, segment_ids), keys,
        position_ids)
    return tuple(x.astype(jnp.float32) for x in layers)

  def compute_layers(
      self, token_ids: jax.Array, token_type_ids: jax.Array,
      visible: attention_lib.Visible, keys: DropoutKeys | None,
      position_ids: jax.Array | None) -> list[jax.Array]:
    """Computes the embeddings and the output of each layer, of any dtype."""
    raise NotImplementedError


class Dense(nn.Module):
  """The layer x W + b in the compute dtype."""

  config: EncoderConfig
  features: int
  dtype: jnp.dtype
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer | None = None  # None: `init`

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # […, D] → […, F]
    size = x.shape[-1]
    kernel = self.param('kernel', self.kernel_init or init(self.config),
                        (size, self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,)
                      ) if self.use_bias else None
    return matmul.dense(x.reshape(-1, size), kernel, bias, self.dtype).reshape(
        *x.shape[:-1], self.features)


def split_heads(x: jax.Array, count: int,  # [B, L, count · D]
                num_heads: int) -> list[jax.Array]:  # [B, H, L, K] each
  """Splits vectors such as q, k and v together into `count` parts by heads.

  A split has a cheap gradient, one pass. Its parts are whole heads, which a
  fused kernel joins again, so that XLA copies nothing.
  """
  parts = jnp.split(x.reshape(*x.shape[:2], count * num_heads, -1), count,
                    axis=2)
  return [part.transpose(0, 2, 1, 3) for part in parts]


def join_heads(y: jax.Array,  # [B, H, L, K]
               dtype: jnp.dtype) -> jax.Array:  # [B, L, D] in dtype
  """Joins the vectors of all heads of a token."""
  batch, _, length, _ = y.shape
  return y.transpose(0, 2, 1, 3).reshape(batch, length, -1).astype(dtype)


def choose_type(vectors: jax.Array,  # [T, D]
                numbers: jax.Array) -> jax.Array:  # [B, L] → [B, L, D]
  """Returns the vector of each token's type, without a gather.

  The gradient is then a sum over tokens instead of a scatter into a few rows,
  which a GPU would do by atomic additions. RoBERTa has one type, that of all
  tokens.
  """
  chosen = vectors[:1, None]  # [1, 1, D]
  for number in range(1, len(vectors)):
    chosen = jnp.where(numbers[:, :, None] == number,
                       vectors[number:number + 1, None], chosen)
  return chosen


def init(config: EncoderConfig) -> nn.initializers.Initializer:
  """Returns the initializer of kernels and embeddings."""
  return nn.initializers.truncated_normal(config.initializer_range)


def query_key_init(config: EncoderConfig) -> nn.initializers.Initializer:
  """Returns the initializer of joined weights that begin with q and k.

  They are [D, 2 · D], or [D, 3 · D] with v. With `equal_query_key`, k begins
  with the weights of q. The product of the two is then near a multiple of the
  identity, so that a token first attends to itself and to its repetitions, as
  in trained encoders (Trockman and Kolter, 2023, section 3).
  """
  drawn = init(config)
  if not config.equal_query_key:
    return drawn

  def equal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32):
    weights, size = drawn(key, shape, dtype), config.hidden_size
    return weights.at[:, size:2 * size].set(weights[:, :size])

  return equal


def position_init(config: EncoderConfig) -> nn.initializers.Initializer:
  """Returns the initializer of the table of positions [P, D].

  With a `position_base` b, row p holds sin(p / b^(2 i / D)) for i < D / 2, then
  the cosines (Vaswani et al., 2017, section 3.5). Their root mean square is
  twice the `initializer_range`, so that heads prefer some distance at first. A
  shift by n tokens is one rotation of all rows, so what a head learns of
  neighbours at one position holds at all others.
  """
  base = config.position_base
  if not base:
    return init(config)

  def sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any = None):
    del key  # nothing is drawn
    count, size = shape
    turns = base ** (-2 * jnp.arange((size + 1) // 2) / size)
    angle = jnp.outer(jnp.arange(count), turns)
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    return (2 * math.sqrt(2) * config.initializer_range
            * table[:, :size]).astype(dtype or jnp.float32)

  return sinusoids


def layer_norm(config: EncoderConfig, *, use_bias: bool = True):
  """Returns a function (x, dtype) → LayerNorm of x, computed in float32."""
  layer = LayerNorm(config.layer_norm_eps, use_bias, name='layer_norm')
  return lambda x, dtype: layer(x.astype(jnp.float32)).astype(dtype)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis (Ba et al., 2016), in float32.

  Values and parameters are those of `flax.linen.LayerNorm`. The gradient is
  written by hand. On a CPU, its sums over a token are products with the scale:
  XLA would copy the scale once for each token before it takes such a sum.

  The variance is E[x²] − E[x]², from one pass over x. Its relative error passes
  1e-4 where |E[x]| is 40 standard deviations; in MiniLM-L6 it is below 0.1.
  E[(x − E[x])²] has no such limit, but adds 48 kernels and 1 % to the roofline
  of an update of BERT-base on an H100, and a third to the time of one LayerNorm
  of MiniLM-L6 on a CPU (measured in commit 8c1b695).
  """

  epsilon: float
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] float32
    size = x.shape[-1:]
    aligned = lambda a: a.reshape((1,) * (x.ndim - 1) + size)
    scale = aligned(self.param('scale', nn.initializers.ones, size))
    bias = (aligned(self.param('bias', nn.initializers.zeros, size))
            if self.use_bias else None)
    return _normalise(self.epsilon, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(epsilon, x, scale, bias):
  return _normalise_forward(epsilon, x, scale, bias)[0]


def _normalise_forward(epsilon, x, scale, bias):
  mean = x.mean(axis=-1, keepdims=True)
  variance = (x * x).mean(axis=-1, keepdims=True) - mean * mean
  rate = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
  y = (x - mean) * (rate * scale)
  return y if bias is None else y + bias, (x, mean, rate, scale, bias)


def _normalise_backward(_, residuals, g):
  x, mean, rate, scale, bias = residuals
  unit = (x - mean) * rate
  along = g * unit

  def mean_scaled(values):
    return jax.lax.platform_dependent(
        values, scale / scale.size,
        cpu=lambda a, b: jnp.einsum('...d,d->...', a, b.ravel())[..., None],
        default=lambda a, b: (a * b).sum(axis=-1, keepdims=True))

  dx = rate * (g * scale - mean_scaled(g) - unit * mean_scaled(along))
  over_tokens = functools.partial(
      jnp.sum, axis=tuple(range(x.ndim - 1)), keepdims=True)
  return dx, over_tokens(along), None if bias is None else over_tokens(g)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def apply_layer(encoder: nn.Module, make: Callable[..., nn.Module], name: str,
                *inputs: Any) -> Any:
  """Applies the module `make(name=name)` of an encoder to `inputs`.

  Equal modules share one jitted function, so JAX traces, differentiates and
  lowers a single layer. That saves a third of the time to lower MiniLM-L6, and
  half for BERT-large (measured in commit bfaa8a3). `nn.jit(Block)` lowers as
  little, but adds up to 0.1 s a program to trace the layers of MiniLM-L6.
  """
  if encoder.is_initializing() and not encoder.has_variable('params', name):
    return make(name=name)(*inputs)
  with jax.named_scope(name):
    return _apply(make(parent=None), encoder.variables['params'][name], *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _apply(layer: nn.Module, params: Any, *inputs: Any) -> Any:
  return layer.apply({'params': params}, *inputs)
