"""Building blocks of heads: projections, LayerNorm, softmax, scores of a band.

Glossary of shapes: B batch (windows), L window length, D hidden size,
H units of the hidden layer of a head, W longest span.
"""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax.span_scores import MASKED
from qa_jax.span_scores import softmax_domain

# Offsets of a band that a GPU or TPU computes in one kernel.
OFFSETS_AT_ONCE = 6
# All heads use BERT's initializer. Flax's default has twice the standard
# deviation at D = 768, and a comparison of heads would also compare that.
kernel_init = nn.initializers.truncated_normal(0.02)


def dense(features: int, name: str, *, bias: bool = False,
          init: nn.initializers.Initializer = kernel_init) -> nn.Dense:
  """Builds a float32 Dense layer of the module whose compact method calls."""
  return nn.Dense(features, use_bias=bias, kernel_init=init, dtype=jnp.float32,
                  name=name)


def project(name: str, x: jax.Array,  # […, D]
            *, bias: bool = False) -> jax.Array:  # […]
  """Computes w · x (+ b) with the parameters called `name`."""
  return dense(1, name, bias=bias)(x)[..., 0]


def normalize(x: jax.Array) -> jax.Array:  # […, H]
  """Computes LayerNorm without scale and shift.

  The vector w that heads multiply it by can absorb a scale. A shift would add
  one number to every score, and a softmax ignores that.
  """
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-12)


def log_softmax(scores: jax.Array,  # […, L]
                context_mask: jax.Array) -> jax.Array:  # [B, L] bool → […, L]
  """Computes log p over context tokens and [CLS]; about MASKED elsewhere."""
  domain = jnp.broadcast_to(softmax_domain(context_mask), scores.shape)
  return jax.nn.log_softmax(jnp.where(domain, scores, MASKED))


def over_band(score: Callable[[jax.Array], jax.Array],
              right: jax.Array,  # [B, L, H]
              width: int) -> jax.Array:  # [B, L, W]
  """Computes score(right[:, i + d]) for every start i and d = 0 … W - 1.

  `score` maps the end vectors of all starts, [B, L, H], to scores [B, L]. End
  vectors beyond the window are zero. The offsets d are computed one by one, or
  several at once on a GPU or TPU, and again for the gradient, so that a few
  [B, L, H] are in memory instead of W.
  """
  length = right.shape[1]
  padded = jnp.pad(right, ((0, 0), (0, width - 1), (0, 0)))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def score_offset(d: jax.Array) -> jax.Array:
    return score(jax.lax.dynamic_slice_in_dim(padded, d, length, axis=1))

  def scores(at_once: int | None) -> jax.Array:  # [W, B, L]
    return jax.lax.map(score_offset, jnp.arange(width), batch_size=at_once)

  return jnp.moveaxis(jax.lax.platform_dependent(
      cpu=lambda: scores(None), default=lambda: scores(OFFSETS_AT_ONCE)), 0, -1)
