"""LayerNorm against flax.linen.LayerNorm, which JAX differentiates itself."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax.models.encoders import base
from tests.common import platforms

EPSILON = 1e-6


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize(('shape', 'on_cpu'), [
    ((3, 5, 24), True), ((7, 1), True), ((24,), True), ((3, 5, 24), False)])
def test_values_and_gradients_are_those_of_flax(
    shape, on_cpu, use_bias, monkeypatch):
  if not on_cpu:
    platforms.leave_the_cpu(monkeypatch)
  rng = np.random.default_rng(0)
  x = rng.normal(3.0, 2.0, shape).astype(np.float32)
  if len(shape) == 3:
    x[0, 0] = 4.0  # a token without variance
  g = rng.normal(size=shape).astype(np.float32)
  params = {name: rng.normal(size=shape[-1]).astype(np.float32)
            for name in ('scale', 'bias')[:1 + use_bias]}
  ours = base.LayerNorm(EPSILON, use_bias)
  flax = nn.LayerNorm(EPSILON, use_bias=use_bias)
  assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == (
      jax.tree.map(jnp.shape, flax.init(jax.random.key(0), x)))
  (y, gradients), (expected, wanted) = (
      jax.jit(lambda layer, p, x: (lambda y, back: (y, back(g)))(
          *jax.vjp(lambda p, x: layer.apply({'params': p}, x), p, x)),
              static_argnums=0)(layer, params, x) for layer in (ours, flax))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for found, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted),
                          strict=True):
    np.testing.assert_allclose(found, right, rtol=1e-4,
                               atol=1e-5 * np.abs(right).max())


def test_a_constant_vector_has_finite_values_and_gradients():
  """Its variance, rounded, may be below 0."""
  x = jnp.full((4, 384), 1000.1) * jnp.array([[1.0], [1.7], [-3.3], [0.01]])
  layer = base.LayerNorm(EPSILON)
  params = layer.init(jax.random.key(0), x)
  y, back = jax.vjp(lambda x: layer.apply(params, x), x)
  assert np.isfinite(y).all() and np.isfinite(back(jnp.ones_like(y))[0]).all()
