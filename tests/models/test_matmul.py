"""Tests of bfloat16 products that accumulate in float32, and gradients."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax.models import matmul
from qa_jax.models.encoders import bert
from tests.common import platforms

SPECS = {'nd,df->nf': ((6, 4), (4, 5)),
         'bac,bcd->ad': ((4, 3, 5), (4, 5, 6)),
         'bhqk,bhsk->bhqs': ((2, 3, 6, 4), (2, 3, 5, 4)),
         'bhqs,bhsk->bhqk': ((2, 3, 6, 5), (2, 3, 5, 4))}


def operands(spec: str, dtype=jnp.float32) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0))
  return [jax.random.normal(k, shape, dtype)
          for k, shape in zip(keys, SPECS[spec], strict=True)]


@pytest.mark.parametrize('spec', sorted(SPECS))
def test_value_and_gradients_in_float32_are_those_of_einsum(spec):
  a, b = operands(spec)
  y, pull = jax.vjp(
      lambda a, b: matmul.einsum(spec, a, b, jnp.float32), a, b)
  expected, expected_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  for gradient, expected_gradient in zip(
      pull(expected), expected_pull(expected), strict=True):
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize('on_cpu', [True, False])
@pytest.mark.parametrize('spec', sorted(SPECS))
def test_bfloat16_rounds_only_the_operands(spec, on_cpu, monkeypatch):
  if not on_cpu:
    platforms.leave_the_cpu(monkeypatch)
  a, b = operands(spec)
  rounded = lambda x: np.asarray(x.astype(jnp.bfloat16), np.float64)
  y, pull = jax.vjp(
      lambda a, b: matmul.einsum(spec, a, b, jnp.bfloat16), a, b)
  np.testing.assert_allclose(
      y, np.einsum(spec, rounded(a), rounded(b)), atol=1e-5)
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  da, db = pull(y)
  assert da.dtype == db.dtype == jnp.float32
  np.testing.assert_allclose(
      da, np.einsum(f'{out},{right}->{left}', rounded(y), rounded(b)),
      atol=1e-4)
  np.testing.assert_allclose(
      db, np.einsum(f'{left},{out}->{right}', rounded(a), rounded(y)),
      atol=1e-4)


@pytest.mark.parametrize('on_cpu', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dense_is_its_formula_up_to_the_rounding_of_its_results(
    dtype, on_cpu, monkeypatch):
  if not on_cpu:
    platforms.leave_the_cpu(monkeypatch)
  rng = np.random.default_rng(0)
  x, w, b, g = (jnp.asarray(rng.normal(size=s), dtype).astype(jnp.float32)
                for s in ((6, 4), (4, 5), (5,), (6, 5)))
  y, pull = jax.vjp(lambda *a: matmul.dense(*a, jnp.dtype(dtype)), x, w, b)
  gradients = pull(g.astype(dtype))
  assert y.dtype == dtype and {d.dtype for d in gradients} == {x.dtype}
  x, w, b, g = (np.float64(a) for a in (x, w, b, g))
  # The product, the sum with the bias, or both are rounded to 8 bits.
  close = dict(rtol=1e-6, atol=1e-6) if dtype == 'float32' else dict(
      rtol=2**-7, atol=2**-7)
  for ours, formula in zip((y, *gradients), (
      x @ w + b, g @ w.T, x.T @ g, g.sum(axis=0)), strict=True):
    np.testing.assert_allclose(np.float64(ours), formula, **close)


def test_all_three_products_have_the_form_with_a_native_kernel():
  a, b = operands('nd,df->nf')

  def loss(a, b):
    return matmul.einsum('nd,df->nf', a, b, jnp.bfloat16).sum()

  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(a, b))
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) >= 2
  assert text.count('preferred_element_type=float32') == len(dots)
  operands_of = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b).as_text()
  for line in operands_of.splitlines():
    if 'stablehlo.dot_general' in line:
      assert line.count('bf16>') == 2 and line.rstrip().endswith('f32>')


@pytest.mark.parametrize('rows', [8, 256])
def test_the_gradient_of_a_weight_is_not_transposed(rows):
  """A loop that transposes what it reads touches a row for every number."""
  x, kernel, g = map(jnp.ones, ((rows, 64), (64, 16), (rows, 16)))

  def update(x, kernel, g):
    _, pull = jax.vjp(
        lambda k: matmul.dense(x, k, None, jnp.bfloat16), kernel)
    gradient, = pull(g.astype(jnp.bfloat16))
    return gradient + kernel, gradient * gradient

  text = jax.jit(update).lower(x, kernel, g).compile().as_text()
  assert re.findall(r'= (\w+)\[\S* transpose\(', text) == ['bf16']


@pytest.mark.slow
def test_an_encoder_and_its_gradient_multiply_bfloat16_as_compiled():
  """Checks the compiled program: without a kernel XLA upcasts silently."""
  config = bert.BertConfig(vocab_size=30, hidden_size=32, num_layers=1,
                           num_heads=2, mlp_size=64, dropout=0.0)
  encoder = bert.BertEncoder(config, jnp.bfloat16)
  ids = jnp.zeros((2, 16), jnp.int32)
  params = encoder.init(jax.random.key(0), ids, ids, ids + 1)

  def loss(params):
    return (encoder.apply(params, ids, ids, ids + 1)[-1] ** 2).sum()

  text = jax.jit(jax.value_and_grad(loss)).lower(params).compile().as_text()
  dtypes = dict(re.findall(r'%([\w.-]+) = (\w+)\[', text))
  dots = re.findall(r' dot\(%([\w.-]+), %([\w.-]+)\)', text)
  assert collections.Counter(
      tuple(dtypes[name] for name in pair) for pair in dots) == {
          # Dense layers and products of attention.
          ('bf16', 'bf16'): 3 * (4 + 2),
          # Two sums over a token in the gradient of each of 3 LayerNorms.
          ('f32', 'f32'): 2 * 3}
