"""GELU (Hendrycks and Gimpel, 2016): exact with erf, and approximate with tanh.

The forms differ by up to 5e-4, too much for parity with released encoders, so
each encoder has its own. The gradient of the exact one is written by hand: the
automatic one stores four arrays where one is enough, and rounds between all
operations.
"""

import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Computes x Φ(x) in float32 and returns it in the dtype of `x`."""
  y = x.astype(jnp.float32)
  return (y * _cdf(y)).astype(x.dtype)


def _forward(x):
  return gelu(x), x


def _backward(x, g):
  y = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
  slope = _cdf(y) + y * density
  return ((slope * g.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(_forward, _backward)


def _cdf(x):
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_new(x: jax.Array) -> jax.Array:
  """Computes GELU with tanh in float32 and returns it in the dtype of `x`.

  It is the approximation in section 2 of Hendrycks and Gimpel (2016), and
  hidden_act gelu_new of transformers.
  """
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
