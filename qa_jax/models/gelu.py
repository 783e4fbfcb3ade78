"""GELU in its exact form with erf (Hendrycks and Gimpel, 2016).

The tanh approximation differs by up to 5e-4, too much for parity with released
encoders. The gradient is written by hand: the automatic one stores four arrays
where one is enough, and rounds between all operations.
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
