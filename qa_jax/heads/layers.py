"""What heads are made of: projections, LayerNorm, the softmax domain, the band.

Glossary of shapes: B batch (windows), L window length, D hidden size,
H units of a head's own layer, W longest span.
"""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.span_scores import MASKED
from qa_jax.span_scores import softmax_domain

# BERT's initialiser, for every head: Flax's default is 1.8 times as wide at
# D = 768, and a comparison of heads would compare that too.
kernel_init = nn.initializers.truncated_normal(0.02)


def dense(features: int, name: str, *, bias: bool = False,
          init: nn.initializers.Initializer = kernel_init) -> nn.Dense:
  """A Dense layer of the module whose compact method calls this."""
  return nn.Dense(features, use_bias=bias, kernel_init=init,
                  dtype=jnp.float32, name=name)


def project(name: str, x: jax.Array,  # […, D]
            *, bias: bool = False) -> jax.Array:  # […]
  """w · x (+ b)."""
  return dense(1, name, bias=bias)(x)[..., 0]


def log_normalise(x: jax.Array) -> jax.Array:  # […, H]
  """LayerNorm without scale and shift.

  Heads put a vector w right behind it: w absorbs the scale, and a shift adds
  the same number to every score, which no softmax sees.
  """
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-12)


def log_softmax(scores: jax.Array,  # […, L]
                context_mask: jax.Array) -> jax.Array:  # [B, L] bool → […, L]
  """log p over the context tokens and [CLS]; about MASKED elsewhere."""
  domain = jnp.broadcast_to(softmax_domain(context_mask), scores.shape)
  return jax.nn.log_softmax(jnp.where(domain, scores, MASKED))


def over_band(score: Callable[[jax.Array], jax.Array],
              right: jax.Array,  # [B, L, H]
              width: int) -> jax.Array:  # [B, L, W]
  """score(right[:, i + d]) of every start i and every d = 0 … W - 1.

  `score` gets the vectors of the ends beside those of the starts, [B, L, H],
  and returns [B, L]; beyond the window ends are zero vectors. It runs offset
  by offset, and again on the way back: a few [B, L, H] are alive at a time
  where the band holds W of them, and a table of all pairs L.
  """
  length = right.shape[1]
  padded = jnp.pad(right, ((0, 0), (0, width - 1), (0, 0)))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def at(d: jax.Array) -> jax.Array:
    return score(jax.lax.dynamic_slice_in_dim(padded, d, length, axis=1))

  return jnp.moveaxis(jax.lax.map(at, jnp.arange(width)), 0, -1)


def check_at_least(least: int, head: str, **sizes: int) -> None:
  """Raises a UserError for a size that is smaller than `least`."""
  for name, value in sizes.items():
    if value < least:
      raise errors.UserError(
          f'head {head!r} has {name}={value}; it must be at least {least}')


def choose(head: str, name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises a UserError for a `value` that is not `known`."""
  if value not in known:
    raise errors.UserError(f'head {head!r} has {name}={value!r}'
                           f'{errors.did_you_mean(value, known)}')
