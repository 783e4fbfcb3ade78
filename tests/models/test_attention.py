"""Tests of every implementation of attention against NumPy, and of its limits.

Glossary of shapes: B rows, L row length, H attention heads, K head size,
S length of the key axis.
"""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_of_jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu
from benchmarks.gpu import cases
from qa_jax import build
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer
from qa_jax.inference import predict
from qa_jax.models import attention
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.models.attention import base as attention_base
from qa_jax.models.attention import chunked
from qa_jax.models.attention import kernels
from qa_jax.models.attention import pallas
from qa_jax.models.attention import pallas_tpu
from qa_jax.models.attention import xla
from qa_jax.models.encoders import bert
from qa_jax.models.encoders import modernbert
from qa_jax.runtime import devices
from qa_jax.training import trainer
from tests.common import jaxprs
from tests.common import refusals
from tests.common import tiny

B, H, L, K = 4, 2, 40, 16
RATE = 0.3
TRAINED = ('xla', 'pallas', 'pallas_tpu', 'chunked')
KERNELS = ('pallas', 'pallas_tpu')
WINDOW = 5  # of the cases of a local layer

LENGTHS = np.array([L, 25, 1, 0])
MASK = np.arange(L) < LENGTHS[:, None]  # [B, L]
SEGMENTS = np.zeros((B, L), np.int32)
for _row, _parts in enumerate(([13, 20, 7], [1, 38], [40], [])):
  SEGMENTS[_row, :sum(_parts)] = np.repeat(
      np.arange(len(_parts)) + 1, _parts)
CASES = {'padded': (MASK, None), 'packed': (SEGMENTS > 0, SEGMENTS)}
CASES |= {f'local {name}': case for name, case in CASES.items()}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
  """Divides the rows into three parts, the last half empty, or into five."""
  monkeypatch.setattr(chunked, 'CHUNK', 16)
  monkeypatch.setattr(pallas, 'LARGEST_TILE', 16)
  monkeypatch.setattr(pallas_tpu, 'TILES', (8,))


def window_of(case: str) -> int | None:
  return WINDOW if case.startswith('local') else None


def visible_of(case: str) -> attention.Visible:
  return attention.Visible(*(
      x if x is None else jnp.asarray(x) for x in CASES[case]),
                           window_of(case))


def compared(case: str) -> np.ndarray:
  """Returns the mask of queries whose results are defined, [B, 1, L, 1].

  Padding may see nothing in its window, and is then given any mean of values.
  """
  return (MASK if case == 'local padded' else np.ones_like(MASK))[
      :, None, :, None].astype(np.float32)


def drop_of(rate: float, rows: int = B,
            lengths: jax.Array | None = None) -> attention.Drop:
  if not rate:
    return attention.Drop()
  return attention.Drop(dropout.DropoutKeys.from_rows(
      jax.random.key(7), jnp.arange(rows), lengths), rate)


@functools.cache
def arrays(dtype: str = 'float32') -> tuple[jax.Array, ...]:
  """Draws q, k, v and the cotangent of y."""
  rng = np.random.default_rng(0)
  return *(jnp.asarray(rng.normal(size=(B, H, L, K)), dtype)
           for _ in range(3)), jnp.asarray(
               rng.normal(size=(B, H, L, K)), jnp.float32)


def value_function(name: str, rate: float):
  """Returns the function (q, k, v, visible, keys) → y."""
  return lambda q, k, v, visible, keys: attention.ATTENTION[name](
      q, k, v, visible, dataclasses.replace(drop_of(rate), keys=keys))


def gradient_function(name: str, rate: float):
  """Returns the function (q, k, v, visible, keys, g) → y, dq, dk, dv."""
  def value_and_gradients(q, k, v, visible, keys, g):
    y, pull = jax.vjp(lambda q, k, v: value_function(name, rate)(
        q, k, v, visible, keys), q, k, v)
    return y, *pull(g)
  return value_and_gradients


@functools.cache
def outputs(name: str, case: str, rate: float = 0.0,
            dtype: str = 'float32') -> list[np.ndarray]:
  """Computes y, and dq, dk, dv if the implementation is one of TRAINED."""
  q, k, v, g = arrays(dtype)
  g *= compared(case)
  inputs = q, k, v, visible_of(case), drop_of(rate).keys
  if name not in TRAINED:
    return [np.asarray(jax.jit(value_function(name, rate))(*inputs))]
  y, *gradients = jax.jit(gradient_function(name, rate))(*inputs, g)
  assert y.dtype == jnp.float32 and gradients[0].dtype == dtype
  return [np.asarray(x, np.float64) for x in (y, *gradients)]


@functools.cache
def expected(case: str, rate: float = 0.0,
             dtype: str = 'float32') -> list[np.ndarray]:
  """Computes y, dq, dk, dv by the formulas, in float64."""
  q, k, v, g = (np.asarray(x, np.float64) for x in arrays(dtype))
  g *= compared(case)
  mask, segments = CASES[case]
  seen = np.broadcast_to(mask[:, None], (B, L, L))
  if segments is not None:
    seen = segments[:, :, None] == segments[:, None, :]
  if window_of(case) is not None:
    place = np.arange(L)
    seen = seen & (abs(place[:, None] - place) <= window_of(case))
  seen = seen[:, None]
  scores = np.where(seen, np.einsum('bhqk,bhsk->bhqs', q, k) / K**0.5, -1e9)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  factors = np.ones((B, H, L, L))
  if rate:
    factors = np.asarray(dropout.unit_mask(
        factors.shape, rate, drop_of(rate).keys, dropout.ATTENTION_WEIGHTS)) / (
            1 - rate)
  dweights = np.einsum('bhqk,bhsk->bhqs', g, v) * factors
  dscores = np.where(seen, weights * (
      dweights - (weights * dweights).sum(-1, keepdims=True)), 0) / K**0.5
  return [np.einsum('bhqs,bhsk->bhqk', weights * factors, v),
          np.einsum('bhqs,bhsk->bhqk', dscores, k),
          np.einsum('bhqs,bhqk->bhsk', dscores, q),
          np.einsum('bhqs,bhqk->bhsk', weights * factors, g)]


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', ['auto', 'xla'])
def test_values_are_those_of_the_formula(name, case):
  np.testing.assert_allclose(outputs(name, case)[0] * compared(case),
                             expected(case)[0] * compared(case), atol=2e-6)


@pytest.mark.parametrize(('case', 'rate'), [
    ('padded', 0.0), ('packed', RATE), ('local packed', RATE),
    ('local padded', RATE)])
@pytest.mark.parametrize('name', TRAINED)
def test_values_and_gradients_are_those_of_the_formulas(name, case, rate):
  if name == 'pallas' and window_of(case):
    pytest.skip('LIMITS excludes it')
  for ours, formula in zip(outputs(name, case, rate), expected(case, rate),
                           strict=True):
    # 1e-5: the order of sums of 40 terms differs.
    np.testing.assert_allclose(ours * compared(case), formula * compared(case),
                               atol=1e-5)


@pytest.mark.parametrize('size', [32, 48, 64, 96])
def test_queries_in_bfloat16_are_rounded_once(size):
  """√96 in bfloat16 would make all scores 0.15 % too small."""
  q = np.random.default_rng(0).normal(size=(50, size)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(
      attention_base.scaled(jnp.asarray(q)),
      (q.astype(np.float64) / np.sqrt(size)).astype(jnp.bfloat16))


@pytest.mark.parametrize('case', ['padded', 'packed', 'biased', 'dropped'])
def test_long_rows_have_the_values_that_they_have_with_a_gradient(case):
  """On a CPU they are computed head by head if no gradient is needed."""
  rng = np.random.default_rng(2)
  length = xla.BY_HEADS_FROM
  q, k, v = (jnp.asarray(rng.normal(size=(2, 3, length, 8)), jnp.float32)
             for _ in range(3))
  segments = np.arange(length) // np.array([[100], [77]])
  visible = attention.Visible(jnp.asarray(segments < 3), jnp.asarray(
      segments) if case == 'packed' else None)
  bias = jnp.asarray(rng.normal(size=(1, 3, length, length)), jnp.float32)
  attend = lambda q, k, v: xla.attend(
      q, k, v, visible, drop_of(RATE if case == 'dropped' else 0.0, 2),
      bias if case == 'biased' else None)
  np.testing.assert_allclose(
      jax.jit(attend)(q, k, v),
      jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[0])(q, k, v), atol=1e-6)


@pytest.mark.parametrize('name', TRAINED)
def test_a_row_without_any_real_token_is_finite(name):
  assert not MASK[-1].any()
  assert all(np.isfinite(x).all() for x in outputs(name, 'padded'))


@pytest.mark.parametrize('name', TRAINED)
def test_masked_tokens_get_no_gradient(name):
  _, _, dk, dv = outputs(name, 'padded')
  hidden = ~MASK[:-1]  # in the row of padding, all tokens are visible
  for gradient in dk[:-1], dv[:-1]:
    assert (gradient.swapaxes(1, 2)[hidden] == 0).all()


@pytest.mark.parametrize('name', TRAINED)
def test_bfloat16_differs_by_the_rounding_of_its_operands(name):
  for ours, formula in zip(outputs(name, 'packed', 0.0, 'bfloat16'),
                           expected('packed', 0.0, 'bfloat16'), strict=True):
    # 8 bits of mantissa: rounding of 2^-8 in weights, gradients and results.
    np.testing.assert_allclose(ours, formula, atol=3 * 2**-8, rtol=2**-7)


@functools.cache
def read_out(name: str, lengths: tuple[int, int] | None = None,
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes attention with equal scores and dropout at rate 0.5.

  Returns the mask of the weights, which one-hot values reveal, [2, H, S, S]; y
  of random values, [2, H, S, 16]; and these values.
  """
  size = 48  # three tiles of 16 in pallas
  normal = np.random.default_rng(1).normal(size=(2, H, size, 64 - size))
  v = jnp.asarray(np.concatenate([np.broadcast_to(
      np.eye(size), (2, H, size, size)), normal], axis=3), jnp.bfloat16)
  zeros = jnp.zeros((2, H, size, 64), jnp.bfloat16)
  y = np.asarray(jax.jit(value_function(name, 0.5))(
      zeros, zeros, v, attention.Visible(jnp.ones((2, size), bool)),
      drop_of(0.5, 2, lengths and jnp.array(lengths)).keys))
  return y[..., :size] > 0, y[..., size:], np.asarray(
      v[..., size:], np.float64)


@pytest.mark.parametrize('name', TRAINED)
def test_bfloat16_products_accumulate_in_float32(name):
  mask, y, v = read_out(name)
  # Weights are 0 or 1 / 0.5, so only the sum is rounded; a kernel rounds it
  # to bfloat16.
  np.testing.assert_allclose(
      y, np.einsum('bhqs,bhsk->bhqk', 2.0 * mask, v) / v.shape[2], atol=1e-6,
      rtol=2**-8 if name in KERNELS else 0)


@pytest.mark.parametrize('lengths', [None, (31, 48)])
def test_dropout_masks_of_all_implementations_are_equal(lengths):
  mask, _, _ = read_out('xla', lengths)
  for name in TRAINED:
    np.testing.assert_array_equal(read_out(name, lengths)[0], mask)
  assert abs(mask.mean() - 0.5) < 0.02
  if lengths:  # only the second row has the length of the array
    equal = (mask == read_out('xla')[0]).all(axis=(1, 2, 3))
    assert equal.tolist() == [False, True]


def test_heads_of_all_groups_of_a_tpu_kernel_have_their_own_weights():
  """Two groups of two heads; other tests have one group."""
  rng = np.random.default_rng(3)
  q, k, v, g = (jnp.asarray(rng.normal(size=(2, 4, 16, 64)), jnp.float32)
                for _ in range(4))
  rows = attention.Visible(jnp.ones((2, 16), bool)), drop_of(RATE, 2).keys
  for ours, reference in zip(
      *(jax.jit(gradient_function(name, RATE))(q, k, v, *rows, g)
        for name in ('pallas_tpu', 'xla')), strict=True):
    np.testing.assert_allclose(ours, reference, atol=1e-5)


@pytest.mark.slow
def test_a_simulated_tpu_finds_no_use_of_memory_that_was_not_written(
    monkeypatch):
  """A program of its own has its blocks in memory that begins as NaN."""
  interpret = pltpu.InterpretParams(uninitialized_memory='nan')
  monkeypatch.setattr(
      kernels, 'call', lambda kernel, *arrays, compiler=None, **options:
      pl.pallas_call(kernel, interpret=interpret, **options)(*arrays))
  q, k, v, g = arrays()
  inputs = q, k, v, visible_of('packed'), drop_of(RATE).keys, g
  for ours, formula in zip(gradient_function('pallas_tpu', RATE)(*inputs),
                           expected('packed', RATE), strict=True):
    np.testing.assert_allclose(ours, formula, atol=1e-5)


# --- On several devices -----------------------------------------------------

@pytest.mark.parametrize('name', KERNELS)
def test_each_device_computes_its_own_rows(name):
  mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4],
                       axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  q, k, v, g = arrays()
  inputs = jax.device_put(
      (q, k, v, visible_of('packed'), drop_of(RATE).keys, g), split)
  with devices.on_mesh(mesh):
    program = jax.jit(gradient_function(name, RATE)).lower(*inputs).compile()
  assert 'all-gather' not in program.as_text()
  for ours, alone in zip(program(*inputs), outputs(name, 'packed', RATE),
                         strict=True):
    assert ours.sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(ours, alone, atol=1e-6)


@pytest.mark.parametrize('name', KERNELS)
def test_vmap_over_members_of_a_population_equals_one_batch(name):
  q, k, v, g = arrays()
  rows = (q, k, v, visible_of('packed'), drop_of(RATE).keys, g)
  members = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), rows)
  for ours, alone in zip(
      jax.jit(jax.vmap(gradient_function(name, RATE)))(*members),
      outputs(name, 'packed', RATE), strict=True):
    np.testing.assert_allclose(ours.reshape(alone.shape), alone, atol=1e-6)


@pytest.mark.filterwarnings('ignore:The Pallas Triton')
def test_vmap_calls_a_kernel_once_for_the_rows_of_all_members():
  members = jax.tree.map(lambda x: jnp.stack([x] * 3), arrays())
  visible, keys = visible_of('packed'), drop_of(RATE).keys  # of every member
  gradients = jax.vmap(lambda q, k, v, g: gradient_function('pallas', RATE)(
      q, k, v, visible, keys, g))
  with on_a_gpu():
    text = jax.jit(gradients).trace(*members).lower(
        lowering_platforms=('cuda',)).as_text()
  assert text.count('@__gpu$xla.gpu.triton') == 2  # forward and backward
  assert 'stablehlo.while' not in text
  for ours, alone in zip(jax.jit(gradients)(*members),
                         outputs('pallas', 'packed', RATE), strict=True):
    np.testing.assert_allclose(ours, jnp.stack([alone] * 3), atol=1e-6)


@pytest.mark.slow
def test_an_encoder_under_pmap_is_equal_with_pallas_and_xla(monkeypatch):
  monkeypatch.setitem(attention.LIMITS, 'pallas', ())
  ids = jnp.asarray(SEGMENTS[:2])
  sizes = dataclasses.replace(SIZES, hidden_size=32, initializer_range=0.5)
  params = jax.jit(bert.BertEncoder(sizes, attention='xla').init)(
      jax.random.key(0), ids, ids, ids)

  def gradient(name):
    encoder = bert.BertEncoder(sizes, attention=name)

    def loss(params, ids, seeds):
      return (encoder.apply(
          params, ids, ids % 2, ids, dropout.DropoutKeys(seeds), ids)[-1][
              ..., 0] ** 2).sum()
    return jax.pmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(
        params, ids[:, None], drop_of(0.1, 2).keys.seeds[:, None])

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4,
                                                       atol=1e-4),
               gradient('pallas'), gradient('xla'))


# --- Programs for other platforms -------------------------------------------

def on_a_gpu():
  """Returns a context that names a GPU, which jax 0.11 needs for lowering."""
  if jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  return cases.on_device('NVIDIA H100 80GB HBM3', None, 'gpu')


def lowered(name: str, platform: str, *, packed: bool, rate: float = 0.0,
            length: int = 384, size: int = 64, dtype=jnp.bfloat16) -> str:
  """Returns the lowered program of values and gradients as text."""
  shape = jax.ShapeDtypeStruct
  x = shape((B, H, length, size), dtype)
  visible = attention.Visible(
      shape((B, length), bool), shape((B, length), jnp.int32) if packed
      else None)
  total = lambda *inputs: value_function(name, rate)(*inputs).sum()
  return jax.jit(jax.grad(total, (0, 1, 2))).trace(
      x, x, x, visible, drop_of(rate).keys).lower(
          lowering_platforms=(platform,)).as_text()


# jax 0.11 announces the end of Pallas through Triton.
@pytest.mark.filterwarnings('ignore:The Pallas Triton')
@pytest.mark.parametrize(('length', 'size', 'dtype', 'rate'), [
    (384, 64, jnp.bfloat16, 0.1), (512, 32, jnp.float32, 0.0),
    (96, 128, jnp.bfloat16, 0.1), (50, 16, jnp.float32, 0.1)])
def test_pallas_lowers_for_a_gpu(length, size, dtype, rate, monkeypatch):
  monkeypatch.setattr(pallas, 'LARGEST_TILE', 64)  # that of the kernels
  with on_a_gpu():
    program = lowered('pallas', 'cuda', packed=True, rate=rate, length=length,
                      size=size, dtype=dtype)
  assert program.count('@__gpu$xla.gpu.triton') == 2  # forward and backward
  assert f'{H}x{length}x{length}' not in program


@pytest.mark.parametrize(('length', 'size', 'dtype', 'rate'), [
    (384, 64, jnp.bfloat16, 0.1), (500, 64, jnp.float32, 0.0)])
def test_pallas_tpu_lowers_for_a_tpu(monkeypatch, length, size, dtype, rate):
  monkeypatch.undo()  # the tiles of a TPU
  with tpu.lowering():
    program = lowered('pallas_tpu', 'tpu', packed=True, rate=rate,
                      length=length, size=size, dtype=dtype)
  assert program.count('@tpu_custom_call') == 2  # forward and backward
  assert f'{H}x{length}x{length}' not in program


@pytest.mark.parametrize('name', ['xla', *KERNELS])
@pytest.mark.parametrize('precision', ['tensorfloat32', 'highest'])
def test_a_gradient_has_the_precision_of_its_call(name, precision):
  """JAX traces the gradient later, when the chosen precision is over."""
  shape = jax.ShapeDtypeStruct
  x, mask = shape((B, H, 32, 16), jnp.float32), shape((B, 32), bool)

  def values_and_gradients(q, k, v, mask):
    with jax.default_matmul_precision(precision):
      y, pull = jax.vjp(lambda *qkv: attention.ATTENTION[name](
          *qkv, attention.Visible(mask), attention.Drop()), q, k, v)
    return y, pull(y)

  with jax.default_matmul_precision('bfloat16'):
    text = str(jax.make_jaxpr(values_and_gradients)(x, x, x, mask))
  chosen = re.findall(r'precision=\((?:Precision\.)?(\w+), ', text)
  assert len(chosen) >= 6
  assert {*chosen} == {{'tensorfloat32': 'HIGH', 'highest': 'HIGHEST'}[
      precision]}


def test_cudnn_lowers_for_a_gpu(monkeypatch):
  monkeypatch.setattr(cudnn_of_jax, 'check_cudnn_version', lambda: 91000)
  program = lowered('cudnn', 'cuda', packed=False)
  assert '@__cudnn$fmhaSoftmax(' in program
  assert '@__cudnn$fmhaSoftmaxBackward(' in program


def test_cudnn_is_asked_for_the_formula(monkeypatch):
  """XLA computes what cuDNN is asked for, in its place."""
  attend = jax.nn.dot_product_attention

  def by_xla(*arrays, implementation, **options):
    assert implementation == 'cudnn'
    return attend(*arrays, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  q, k, v, _ = arrays('bfloat16')
  y = attention.ATTENTION['cudnn'](
      q, k, v, visible_of('padded'), attention.Drop())
  assert y.dtype == jnp.float32
  *rows, padding = expected('padded', 0.0, 'bfloat16')[0]
  # 8 bits of mantissa: rounding of 2^-8 in weights and results.
  np.testing.assert_allclose(y[:-1], rows, atol=2**-8, rtol=2**-7)
  np.testing.assert_array_equal(
      y[-1], np.broadcast_to(v[-1, :, :1], padding.shape))  # its first token


@pytest.mark.parametrize('window', [None, 64])
def test_chunked_has_no_array_of_all_weights(window):
  """Neither has its gradient; the reference has both."""
  shape, length = jax.ShapeDtypeStruct, 8192
  x = shape((1, 1, length, 16), jnp.float32)

  def largest(name):
    total = lambda q, k, v, mask, keys: attention.ATTENTION[name](
        q, k, v, attention.Visible(mask, None, window),
        attention.Drop(keys, 0.1)).sum()
    program = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(
        x, x, x, shape((1, length), bool), drop_of(0.1, 1).keys)
    return max(math.prod(a.shape)
               for a in jaxprs.computed_arrays(program.jaxpr))

  assert largest('xla') == length**2
  assert largest('chunked') == length * (3 * 64 if window else chunked.CHUNK)


# --- Choice and refusal -----------------------------------------------------

USE = attention.Use(platform='cpu', length=384, num_heads=12, head_size=64,
                    dtype=jnp.dtype('bfloat16'), packed=False, training=False)


@pytest.mark.parametrize(('changes', 'name'), [
    ({}, 'xla'),
    ({'training': True, 'packed': True}, 'xla'),
    ({'platform': 'gpu'}, 'cudnn'),
    ({'platform': 'gpu', 'dtype': jnp.dtype('float32')}, 'xla'),
    ({'platform': 'gpu', 'training': True}, 'cudnn'),
    ({'platform': 'gpu', 'dropout': 0.1}, 'cudnn'),
    ({'platform': 'gpu', 'head_size': 128}, 'cudnn'),
    ({'platform': 'gpu', 'head_size': 132}, 'xla'),
    ({'platform': 'gpu', 'head_size': 136}, 'xla'),
    ({'platform': 'gpu', 'training': True, 'dropout': 0.1}, 'pallas'),
    ({'platform': 'gpu', 'training': True, 'dropout': 0.1, 'head_size': 48},
     'xla'),
    ({'platform': 'gpu', 'packed': True}, 'pallas'),
    ({'platform': 'gpu', 'packed': True, 'dtype': jnp.dtype('float32')},
     'pallas'),
    ({'platform': 'gpu', 'packed': True, 'length': 513}, 'xla'),
    ({'platform': 'tpu', 'packed': True, 'training': True}, 'pallas_tpu'),
    ({'platform': 'tpu', 'window': 64, 'length': 1024}, 'pallas_tpu'),
    ({'platform': 'tpu', 'length': 511}, 'pallas_tpu'),
    ({'platform': 'tpu', 'length': 513}, 'xla'),
    ({'platform': 'tpu', 'length': 576}, 'pallas_tpu'),
    ({'platform': 'tpu', 'biased': True}, 'xla'),
    ({'platform': 'tpu', 'num_heads': 11}, 'xla'),
    ({'platform': 'tpu', 'head_size': 96}, 'xla'),
    ({'platform': 'tpu', 'length': 1088}, 'chunked'),
    ({'platform': 'abacus'}, 'xla'),
    ({'length': 1024}, 'xla'),
    ({'length': 1025}, 'chunked'),
    ({'length': 8192, 'platform': 'gpu'}, 'cudnn'),
    ({'length': 8192, 'platform': 'gpu', 'packed': True}, 'chunked'),
    ({'window': 64, 'length': 192}, 'xla'),
    ({'window': 64, 'length': 193}, 'chunked'),
    ({'window': 64, 'platform': 'gpu'}, 'chunked')])
def test_auto_takes_the_fast_implementation_that_fits(changes, name):
  assert attention.choose_attention(dataclasses.replace(USE, **changes)) == name


@pytest.mark.parametrize(('platform', 'shape', 'fields', 'name'), [
    ('gpu', (384, 64), {}, 'cudnn'),
    ('gpu', (384, 20), {}, 'xla'),  # no multiple of 8
    ('gpu', (20, 64), {}, 'cudnn'),
    ('gpu', (384, 64), {'dtype': jnp.float32}, 'xla'),
    ('gpu', (384, 64), {'packed': True}, 'pallas'),
    ('gpu', (384, 64), {'rate': 0.1}, 'pallas'),
    ('gpu', (384, 64), {'window': 64}, 'chunked'),
    ('gpu', (384, 64), {'packed': True, 'biased': True}, 'xla'),
    ('cpu', (384, 64), {}, 'xla'),
    ('cpu', (1025, 64), {}, 'chunked'),
    ('cpu', (64, 1032), {}, 'xla'),
    ('cpu', (1025, 64), {'biased': True}, 'xla')])
def test_auto_chooses_by_the_arrays_that_it_gets(
    platform, shape, fields, name, monkeypatch):
  chosen = []
  for other in attention.ATTENTION.keys() - {'auto'}:
    monkeypatch.setitem(attention.ATTENTION, other,
                        lambda *_, other=other: chosen.append(other))
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  length, _ = shape
  q = jax.ShapeDtypeStruct((2, 3, *shape), fields.get('dtype', jnp.bfloat16))
  ids = np.ones((2, length), np.int32)
  attention.attend(
      'auto', q, q, q, attention.Visible(
          ids > 0, ids if fields.get('packed') else None, fields.get('window')),
      drop_of(fields.get('rate', 0.0), 2),
      np.zeros((1, 3, length, length)) if fields.get('biased') else None)
  assert chosen == [name]


def test_every_entry_has_limits_and_the_reference_has_none():
  assert set(attention.LIMITS) == set(attention.ATTENTION)
  assert not attention.LIMITS['xla'] and not attention.LIMITS['auto']


SIZES = bert.BertConfig(vocab_size=300, hidden_size=128, num_layers=1,
                        num_heads=2, mlp_size=32, attention_dropout=0.1)
GPU, TPU = {'platform': 'gpu'}, {'platform': 'tpu'}


@pytest.mark.parametrize(('name', 'fields', 'sizes', 'where', 'message'), [
    ('cudn', {}, {}, GPU,
     "unknown config.model.attention 'cudn'; did you mean 'cudnn' or "
     "'chunked'?"),
    ('cudnn', {}, {}, {}, 'runs on a GPU, and this is a cpu; those that fit: '
     'auto, xla'),
    ('cudnn', {'data': {'packing': True}}, {}, GPU,
     'takes no packed rows; those that fit: auto, xla, pallas'),
    ('cudnn', {'precision': {'compute_dtype': 'float32'}}, {}, GPU,
     'takes bfloat16, not float32'),
    ('cudnn', {'precision': {'compute_dtype': 'bfloat16'}}, {}, GPU,
     'drops no weights; attention_dropout is 0.1, not 0; those that fit: '
     'auto, xla, pallas'),
    ('pallas', {}, {'hidden_size': 24}, GPU,
     'takes heads of 16, 32, 64, 128, not 12'),
    ('cudnn', {'precision': {'compute_dtype': 'bfloat16'}},
     {'hidden_size': 24}, GPU, 'multiples of 8 up to 128, not 12'),
    ('pallas_tpu', {}, {}, {}, 'runs on a TPU, and this is a cpu'),
    ('pallas_tpu', {}, {'hidden_size': 64}, TPU,
     'heads that have a multiple of 128 numbers together, not 2 heads of 32'),
    ('pallas_tpu', {}, {'hidden_size': 24}, TPU,
     'takes heads of 16, 32, 64, 128, not 12')])
def test_refusal_is_one_line(name, fields, sizes, where, message):
  config = tiny.config(**{**fields, 'model': {
      **tiny.FIELDS['model'], 'attention': name}})
  refusal = refusals.refusal(lambda: build.check_attention(
      config, dataclasses.replace(SIZES, **sizes), training=True, **where))
  assert message in refusal
  assert refusal.startswith(
      ('config.model.attention=', 'unknown config.model.'))


@pytest.mark.parametrize('name', ['cudnn', 'pallas'])
def test_a_local_window_is_refused_by_kernels_without_one(name):
  use = dataclasses.replace(USE, platform='gpu', window=4)
  assert refusals.refusal(attention.check_attention, name, use) == (
      f'attention={name!r} has no local window, and this encoder has one; '
      'those that fit: auto, xla, chunked')


def test_the_local_window_of_an_encoder_counts():
  sizes = modernbert.ModernBertConfig(vocab_size=50, hidden_size=64,
                                      num_layers=2, num_heads=2, mlp_size=64)
  assert 'pallas\' has no local window' in refusals.refusal(
      lambda: build.check_attention(tiny.config(model={
          'attention': 'pallas'}), sizes, training=True, platform='gpu'))


def test_pallas_limits_the_length():
  assert 'up to 512 tokens, not 513' in attention.limitation(
      'pallas', dataclasses.replace(USE, platform='gpu', length=513))


def test_pallas_tpu_limits_the_length(monkeypatch):
  monkeypatch.undo()  # the tiles of a TPU
  use = functools.partial(dataclasses.replace, USE, platform='tpu')
  assert ('up to 512 tokens, or up to 1024 in multiples of 64, not 520'
          in attention.limitation('pallas_tpu', use(length=520)))


def test_training_refuses_before_anything_starts():
  config = tiny.config(model={**tiny.FIELDS['model'], 'attention': 'cudnn'})
  assert 'runs on a GPU' in refusals.refusal(trainer.build_trainer, config)


def test_a_model_refuses_when_it_is_traced():
  q = jnp.zeros((1, 1, 8, 8))
  assert "attention='cudnn' runs on a GPU" in refusals.refusal(
      attention.attend, 'cudnn', q, q, q, visible_of('padded'),
      attention.Drop())


# --- A run ------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Writes a run directory from another machine, with attention by cuDNN."""
  directory = tmp_path_factory.mktemp('runs') / 'cudnn'
  config = tiny.config(model={**tiny.FIELDS['model'], 'attention': 'cudnn'})
  sizes = dataclasses.replace(SIZES, hidden_size=16)
  vocabulary = tokenizer.Tokenizer(
      ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'ada'), lowercase=True)
  RunDirectory(directory).write(config, sizes, vocabulary, {})
  store = manager.Checkpoints(directory / 'checkpoints')
  store.save(1, params=qa.init_params(
      build.build_model(config, sizes), jax.random.key(0)),
             optimizer={'step': jnp.zeros(())}, meta={}, metrics={})
  store.close()
  return directory


QUESTION = {'question': 'who', 'context': 'ada ada who ada'}


def test_a_run_loads_where_its_attention_is_not_available(run, capsys):
  loaded = predict.load(run)
  assert capsys.readouterr().err.splitlines() == [
      "config.model.attention='cudnn' of the run runs on a GPU, and this is a "
      'cpu: auto is used']
  assert loaded.model.attention == 'auto'
  assert RunDirectory(run).read_config().model.attention == 'cudnn'
  assert loaded.answer(**QUESTION).text


def test_attention_can_be_chosen_when_loaded(run, capsys):
  by = {name: predict.load(run, attention=name)
        for name in ('xla', 'auto')}
  assert not capsys.readouterr().err
  assert {k: v.model.attention for k, v in by.items()} == {k: k for k in by}
  assert by['auto'].answer(**QUESTION).score == pytest.approx(
      by['xla'].answer(**QUESTION).score, abs=1e-5)


def test_an_attention_chosen_when_loading_has_no_fallback(run):
  assert 'runs on a GPU' in refusals.refusal(
      lambda: predict.load(run, attention='cudnn'))
