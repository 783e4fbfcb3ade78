"""Tests of GELU and its gradient against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qa_jax.models import gelu

X = np.linspace(-6, 6, 241, dtype=np.float32)


def test_gelu_is_the_erf_form():
  ours = gelu.gelu(jnp.asarray(X))
  exact = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in X.tolist()]
  np.testing.assert_allclose(ours, exact, atol=1e-6)
  assert abs(ours - jax.nn.gelu(X, approximate=True)).max() > 4e-4


@pytest.mark.parametrize('name', ['gelu', 'gelu_new'])
def test_bfloat16_is_computed_in_float32_and_rounded_once(name):
  x = jnp.asarray(X, jnp.bfloat16)
  ours = getattr(gelu, name)(x)
  assert ours.dtype == jnp.bfloat16
  exact = [v * 0.5 * (1 + (
      math.erf(v / 2**0.5) if name == 'gelu' else
      math.tanh((2 / math.pi)**0.5 * (v + 0.044715 * v**3))))
           for v in np.asarray(x, np.float64).tolist()]
  np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=1e-6,
                             rtol=2**-8)  # half a unit in the last place


@pytest.mark.parametrize('dtype,rtol', [('float32', 0), ('bfloat16', 2**-8)])
def test_gradient_is_the_closed_form_rounded_once(dtype, rtol):
  x = jnp.asarray(X, dtype)
  slope = jax.grad(lambda x: gelu.gelu(x).astype(jnp.float32).sum())(x)
  assert slope.dtype == x.dtype
  exact = np.asarray(x, np.float64)
  exact = scipy.stats.norm.cdf(exact) + exact * scipy.stats.norm.pdf(exact)
  rounded = jnp.asarray(exact, jnp.float32).astype(dtype)
  np.testing.assert_allclose(np.asarray(slope, np.float32),
                             np.asarray(rounded, np.float32),
                             atol=1e-6, rtol=rtol)
