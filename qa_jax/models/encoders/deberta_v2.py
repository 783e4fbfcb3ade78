"""The DeBERTa encoder, versions 2 and 3 (He et al., 2021a and 2021b).

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, S the longest distance that has a vector (`span`).

Its layers are those of BERT with disentangled attention (2021a, section 3.1).
The score of query i and key j is

  (q_i · k_j + q_i · r_δ(i,j) + k_j · s_δ(i,j)) / √(3 K)     (2021a, equation 4)

with a key r_d and a query s_d of the relative position d = δ(i, j). The last
two terms are named c2p (content to position) and p2c. For the p2c term the
paper has δ(j, i); the authors' code, transformers and all checkpoints have
δ(i, j). An encoder with one of the terms divides by √(2 K).

δ(i, j) is S plus the distance i - j, limited to [-S, S - 1]. With position
buckets, S is their number and long distances share vectors on a log scale.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import errors
from qa_jax.models import attention as attention_lib
from qa_jax.models import dropout as dropout_lib
from qa_jax.models import gelu
from qa_jax.models import matmul
from qa_jax.models.attention import base as attention_base
from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.encoders import base
from qa_jax.models.encoders import bert
from qa_jax.models.encoders.base import Dense
from qa_jax.models.encoders.base import DropUnits

TERMS = ('c2p', 'p2c')
NORMS = ('none', 'layer_norm')
CONVOLUTION_ACTIVATIONS = {'gelu': gelu.gelu, 'tanh': jnp.tanh}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaV2Config(bert.BertConfig):
  """The sizes and constants of DeBERTa; the defaults are those of version 3.

  Fields have the names of transformers.
  """

  # The sizes of the released models of version 3, and those of BERT under
  # other names.
  PRESETS: ClassVar[dict[str, dict[str, int]]] = base.PRESETS | {
      name: dict(num_layers=n, hidden_size=d, num_heads=h, mlp_size=4 * d)
      for name, n, d, h in (
          ('xsmall', 12, 384, 6), ('small', 6, 768, 12), ('base', 12, 768, 12),
          ('large', 24, 1024, 16))}
  ATTENTION_BIAS: ClassVar[bool] = True

  type_vocab_size: int = 0
  layer_norm_eps: float = 1e-7
  architecture: str = 'deberta-v2'
  # The terms of a score beside q · k, joined by '|'.
  pos_att_type: str = 'c2p|p2c'
  # The number of buckets of distances on either side; below 1 each distance has
  # vectors of its own.
  position_buckets: int = 256
  # Longer distances share the last vectors; below 1 it is max_position.
  max_relative_positions: int = -1
  # Whether r and s are computed with the weights of keys and queries.
  share_att_key: bool = True
  norm_rel_ebd: str = 'layer_norm'  # of the relative positions, or 'none'
  position_biased_input: bool = False  # adds absolute positions to the input
  conv_kernel_size: int = 0  # of the convolution in the first layer; 0: none
  conv_act: str = 'tanh'  # or 'gelu'

  def __post_init__(self):
    super().__post_init__()
    terms = self.pos_att_type.split('|')
    errors.require(
        set(terms) <= {*TERMS} and len({*terms}) == len(terms),
        f'pos_att_type {self.pos_att_type!r} is not supported; only '
        "'c2p', 'p2c' and 'c2p|p2c' are")
    errors.require(
        self.norm_rel_ebd in NORMS,
        f'norm_rel_ebd {self.norm_rel_ebd!r} is not supported; only '
        f'{" and ".join(map(repr, NORMS))} are')
    errors.require(
        self.conv_kernel_size == 0 or (
            self.conv_kernel_size > 0 and self.conv_kernel_size % 2),
        f'conv_kernel_size is {self.conv_kernel_size}, expected 0 for none, or '
        'an odd number of tokens')
    errors.check_known('conv_act', self.conv_act, CONVOLUTION_ACTIVATIONS)
    errors.require(
        self.position_buckets < 1
        or 1 <= self.position_buckets // 2 < self.reach - 1,
        f'position_buckets {self.position_buckets} does not fit; expected '
        f'below 1 for none, or 2 to {2 * self.reach - 3} for distances up to '
        f'{self.reach} (max_relative_positions, or max_position if that is '
        'below 1)')

  @property
  def has_position_table(self) -> bool:
    return self.position_biased_input

  @property
  def reach(self) -> int:
    """The longest distance that is told from all longer ones."""
    return (self.max_relative_positions if self.max_relative_positions > 0
            else self.max_position)

  @property
  def span(self) -> int:
    """The number S of relative positions on either side."""
    return self.position_buckets if self.position_buckets > 0 else self.reach

  def build(self, compute_dtype: jnp.dtype = jnp.float32,
            attention: str = 'auto') -> nn.Module:
    return DebertaV2Encoder(self, compute_dtype, attention)


def relative_positions(config: DebertaV2Config,
                       distances: np.ndarray) -> np.ndarray:
  """Computes δ of distances i - j: int32 in [0, 2 S - 1], of their shape.

  With m = position_buckets // 2, distances below m have buckets of their own.
  A longer distance d has the bucket m + ⌈(m - 1) log(d / m) / log((n - 1) / m)⌉
  of distances up to n. The quotients are float32, as in transformers, because
  another rounding could move a distance to the next bucket.
  """
  bucket = distances
  if config.position_buckets > 0:
    middle = config.position_buckets // 2
    ratio = np.maximum(abs(distances), middle).astype(np.float32) / np.float32(
        middle)
    scale = np.log(np.float32((config.reach - 1) / middle))
    far = np.ceil(np.log(ratio) / scale * np.float32(middle - 1)) + middle
    bucket = np.where(abs(distances) <= middle, distances,
                      far.astype(np.int64) * np.sign(distances))
  return np.clip(bucket + config.span, 0, 2 * config.span - 1).astype(np.int32)


class RelativePositions(nn.Module):
  """The vectors of the relative positions, with LayerNorm if configured."""

  config: DebertaV2Config
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self) -> jax.Array:  # [2 S, D]
    c = self.config
    table = self.param('embedding', base.init(c), (2 * c.span, c.hidden_size))
    if c.norm_rel_ebd == 'none':
      return table.astype(self.compute_dtype)
    return base.layer_norm(c)(table, self.compute_dtype)


class Embeddings(nn.Module):
  """The vectors of the tokens, zero at padding, and of relative positions."""

  config: DebertaV2Config
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, token_ids: jax.Array, token_type_ids: jax.Array,  # [B, L] int32
      inside: jax.Array,  # [B, L] bool, false at padding
      position_ids: jax.Array | None,  # None: 0 … L - 1
      ) -> tuple[jax.Array, jax.Array]:  # [B, L, D], [2 S, D]
    c = self.config
    embed = lambda name, size, init=base.init: nn.Embed(
        size, c.hidden_size, embedding_init=init(c), name=name)
    x = embed('word', c.vocab_size)(token_ids)
    if c.position_biased_input:
      if position_ids is None:
        position_ids = jnp.arange(token_ids.shape[1])[None]
      x += embed('position', c.max_position,
                 base.position_init)(position_ids)
    if c.type_vocab_size:
      types = embed('token_type', c.type_vocab_size).embedding
      x += base.choose_type(types, token_type_ids)
    x = base.layer_norm(c)(x, self.compute_dtype)
    return (jnp.where(inside[..., None], x, 0),
            RelativePositions(c, self.compute_dtype, name='relative')())


def skew(x: jax.Array) -> jax.Array:  # [H, B, L, 2 L] → [H, B, L, L]
  """Returns y with y[i, j] = x[i, j - i + L - 1].

  Column j - i + L - 1 is at (2 L - 1) i + j + L - 1 of the flat array, so rows
  of 2 L - 1 from L - 1 on begin with the rows of y. The gradient is also a
  copy: on a CPU, that of the two terms of a layer of base size took 0.19 s and
  114 MiB for 2 windows of 384 tokens, against 0.38 s and 310 MiB for a gather
  from [B, H, L, 2 S], whose gradient adds element by element.
  """
  *outer, length, _ = x.shape
  cut = functools.partial(jax.lax.slice_in_dim, axis=-1)
  flat = cut(x.reshape(*outer, -1), length - 1, 2 * length**2 - 1)
  return cut(flat.reshape(*outer, length, 2 * length - 1), 0, length)


class Attention(nn.Module):
  """Disentangled self-attention with residual connection and LayerNorm."""

  config: DebertaV2Config
  compute_dtype: jnp.dtype
  implementation: str

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               positions: jax.Array,  # [2 S, D] compute dtype
               visible: attention_lib.Visible, drop: DropUnits,
               drop_weights: attention_lib.Drop) -> jax.Array:
    c = self.config
    dense = functools.partial(Dense, c, dtype=self.compute_dtype)
    heads = lambda x: x.reshape(  # […, D] → […, H, ·, K]
        *x.shape[:-1], c.num_heads, -1).swapaxes(-2, -3)
    terms = c.pos_att_type.split('|')
    query_key = dense(2 * c.hidden_size, name='query_key',
                      kernel_init=base.query_key_init(c))
    q, k = map(heads, jnp.split(query_key(x), 2, axis=-1))
    v = heads(dense(c.hidden_size, name='value')(x))
    if c.share_att_key:
      s, r = jnp.split(query_key(positions), 2, axis=-1)
    else:
      r, s = (dense(c.hidden_size, name=name)(positions) if term in terms
              else None for term, name in (
                  ('c2p', 'position_key'), ('p2c', 'position_query')))
    # `attend` divides by √K.
    q, small_k = (attention_base.scaled(x, 1 + len(terms)) for x in (q, k))
    bias = _position_scores(c, q, small_k, *(
        heads(y) if term in terms else None
        for term, y in (('c2p', r), ('p2c', s))))
    y = base.join_heads(attention_lib.attend(
        self.implementation, q, k, v, visible, drop_weights, bias), x.dtype)
    y = drop(dense(c.hidden_size, name='output')(y), c.dropout,
             place=dropout_lib.ATTENTION_OUTPUT)
    return base.layer_norm(c)(x + y, self.compute_dtype)


def _position_scores(
    config: DebertaV2Config, q: jax.Array, k: jax.Array,  # [B, H, L, K]
    r: jax.Array | None, s: jax.Array | None,  # [H, 2 S, K], None: no such term
    ) -> jax.Array:  # [B, H, L, L] float32
  """Computes the sum of the terms c2p and p2c, divided by √K.

  Within a segment of a packed row, distances of positions are distances of
  columns, and no token sees another segment. Scores therefore depend on
  columns alone, and every distance has one vector for all rows.
  """
  # 2 L distances, the last of them unused. L is a variable in an exported
  # program, so they are looked up among those that fit into a window.
  batch, num_heads, length, _ = q.shape
  longest, bias = config.max_position, 0
  distances = jnp.arange(2 * length) + 1 - length
  places = jnp.asarray(relative_positions(
      config, np.arange(-longest, longest + 1)))
  for x, table, sign in ((q, r, -1), (k, s, 1)):
    if table is not None:
      vectors = table[:, places[sign * distances + longest]]  # [H, 2 L, K]
      # One index for B and L: their sum in the gradient has a bfloat16 kernel.
      rows = attention_base.scaled(x).swapaxes(0, 1).reshape(
          num_heads, batch * length, -1)
      scores = skew(matmul.einsum('hnk,hdk->hnd', rows, vectors, x.dtype)
                    .reshape(num_heads, batch, length, 2 * length))
      bias += scores if x is q else scores.swapaxes(2, 3)
  return bias.swapaxes(0, 1)


class Convolution(nn.Module):
  """A convolution over tokens, added to the output of the first layer.

  The model with 1.5 billion parameters has it (He et al., 2021a). A token of
  another segment counts as zero, so that packed rows have the results of their
  windows.
  """

  config: DebertaV2Config
  compute_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array,  # [B, L, D] before, after it
               visible: attention_lib.Visible, drop: DropUnits) -> jax.Array:
    c, size = self.config, self.config.conv_kernel_size
    kernel = self.param(
        'kernel', base.init(c), (size, c.hidden_size, c.hidden_size))
    bias = self.param('bias', nn.initializers.zeros, (c.hidden_size,))
    ids, inside = visible.ids()[1], visible.attention_mask[..., None]
    pad = lambda x, *axes: jnp.pad(x, ((0, 0), (size // 2,) * 2, *axes))
    padded, padded_ids, length = pad(x, (0, 0)), pad(ids), x.shape[1]
    near = [  # the tokens from size // 2 before to size // 2 behind each token
        jnp.where((cut(padded_ids) == ids)[..., None], cut(padded), 0)
        for cut in (functools.partial(
            jax.lax.slice_in_dim, start_index=i, limit_index=i + length, axis=1)
                    for i in range(size))]
    z = matmul.dense(
        jnp.concatenate(near, -1).reshape(-1, size * c.hidden_size),
        kernel.reshape(-1, c.hidden_size), bias, x.dtype).reshape(x.shape)
    z = CONVOLUTION_ACTIVATIONS[c.conv_act](drop(
        jnp.where(inside, z, 0), c.dropout, place=dropout_lib.CONVOLUTION))
    return jnp.where(inside, base.layer_norm(c)(y + z, x.dtype), 0)


class Block(nn.Module):
  """One layer of the encoder: attention and the MLP of BERT."""

  config: DebertaV2Config
  compute_dtype: jnp.dtype
  implementation: str  # an entry of attention.ATTENTION
  convolves: bool = False

  @nn.compact
  def __call__(self, x: jax.Array,  # [B, L, D] compute dtype
               positions: jax.Array,  # [2 S, D] compute dtype
               visible: attention_lib.Visible,
               keys: DropoutKeys | None) -> jax.Array:
    c, dtype = self.config, self.compute_dtype
    drop = functools.partial(dropout_lib.dropout, keys=keys)
    if keys is not None:
      positions = dropout_lib.dropout(
          positions[None], c.dropout, keys.shared(), dropout_lib.POSITIONS)[0]
    y = Attention(c, dtype, self.implementation, name='attention')(
        x, positions, visible, drop,
        attention_lib.Drop(keys, c.attention_dropout))
    y = bert.MLP(c, dtype, name='mlp')(y, drop)
    if not self.convolves:
      return y
    return Convolution(c, dtype, name='convolution')(x, y, visible, drop)


class DebertaV2Encoder(base.Encoder):
  """The encoder of DeBERTa v2 and v3."""

  config: DebertaV2Config

  def compute_layers(self, token_ids, token_type_ids, visible, keys,
                     position_ids):
    c = self.config
    x, positions = Embeddings(c, self.compute_dtype, name='embeddings')(
        token_ids, token_type_ids, visible.attention_mask, position_ids)
    x = dropout_lib.dropout(x, c.dropout, keys, dropout_lib.EMBEDDINGS)
    layers = [x]
    for i in range(c.num_layers):
      block = functools.partial(
          Block, c, self.compute_dtype, self.attention,
          convolves=i == 0 and c.conv_kernel_size > 0)
      x = base.apply_layer(self, block, f'layer_{i}', x, positions, visible,
                           None if keys is None else keys.fold(i))
      layers.append(x)
    return layers
