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
