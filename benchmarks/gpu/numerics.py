"""Stages of the GPU check: the device, exact searches and attention.

Glossary of shapes: B rows, H attention heads, L row length, K head size.
"""

import functools
import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.gpu import results as results_lib
from qa_jax.decoding import search
from qa_jax.models import attention
from qa_jax.models import dropout
from qa_jax.span_scores import SpanScores

TINY = results_lib.TINY
LONGEST_ANSWER, N_BEST = 30, 20
# Largest relative errors: float32 sums in another order, TF32, bfloat16.
BOUNDS = {('float32', 'highest'): 2e-5, ('float32', 'tensorfloat32'): 2e-3,
          ('bfloat16', 'highest'): 1.5e-2}


def seconds_of(run) -> float:
  """Returns the seconds of a call of `run`, after a first one."""
  jax.block_until_ready(run())
  repeats = 2 if TINY else 20
  began = time.perf_counter()
  for _ in range(repeats):
    y = run()
  jax.block_until_ready(y)
  return (time.perf_counter() - began) / repeats


def difference(found, expected) -> float:
  """Returns the norm of the difference, relative to the expected array."""
  found, expected = np.float64(found), np.float64(expected)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def device(results: results_lib.Results) -> None:
  """Measures products and copies, and float32 products against float64."""
  first = jax.devices()[0]
  memory = (first.memory_stats() or {}).get('bytes_limit', 0)
  results.record('device', kind=first.device_kind, jax=jax.__version__,
                 cores=os.cpu_count(), gibibytes=memory / 2**30,
                 ok=TINY or first.platform == 'gpu')
  n, count = (256, 2**20) if TINY else (8192, 2**30)
  square = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
  results.attempt('bfloat16 product', lambda: dict(
      size=n, tflop_per_s=2e-12 * n**3 / seconds_of(functools.partial(
          jax.jit(jnp.dot), square, square))))
  results.attempt('copy', lambda: dict(
      tb_per_s=8e-12 * count / seconds_of(functools.partial(
          jax.jit(lambda x: x + 1), jnp.ones(count, jnp.float32)))))
  a, b = np.random.default_rng(0).normal(size=(2, 512, 512)).astype(np.float32)
  for precision, bound in (('highest', 1e-6), ('tensorfloat32', 1e-3)):
    y = jax.jit(functools.partial(jnp.dot, precision=precision))(a, b)
    error = difference(y, np.float64(a) @ np.float64(b))
    results.record(f'float32 product, {precision}', error=error,
                   ok=error <= bound)


def searches(results: results_lib.Results) -> None:
  """Compares the exact searches with an enumeration of spans, with ties."""
  for name in ('two_stage', 'banded', 'dense'):
    results.attempt(f'{name} = an enumeration', _search, name)


def _search(name: str):
  rows, length = (8, 64) if TINY else (64, 384)
  rng = np.random.default_rng(0)
  # Multiples of 0.5, so that many spans have equal scores.
  start, end = rng.integers(-8, 9, (2, rows, length)).astype(np.float32) / 2
  column, lengths = np.arange(length), rng.integers(1, length + 1, rows)
  mask = (column >= 12) & (column < lengths[:, None])
  starts = mask & (rng.uniform(size=mask.shape) < 0.9)
  run = functools.partial(
      jax.jit(functools.partial(
          search.SEARCHES[name](), max_answer_length=LONGEST_ANSWER,
          n_best=N_BEST)),
      SpanScores(jnp.asarray(start), jnp.asarray(end)), starts, mask)
  found, wrong = jax.tree.map(np.asarray, run()), 0
  for b in range(rows):
    spans = sorted((-(start[b, i] + end[b, j]), i, j)
                   for i in np.flatnonzero(starts[b])
                   for j in range(i, min(i + LONGEST_ANSWER, length))
                   if mask[b, j])[:N_BEST]
    n = int(found.valid[b].sum())
    wrong += spans != [*zip(-found.score[b, :n], found.start[b, :n],
                            found.end[b, :n], strict=True)]
  return dict(rows=rows, wrong=wrong, ms=1e3 * seconds_of(run), ok=not wrong)


def attentions(results: results_lib.Results) -> None:
  """Compares every attention with xla in float32, and xla with NumPy.

  The values and the gradients of q, k and v are compared, on padded and packed
  rows, with and without dropout. The times are those of values and gradients.
  """
  if jax.default_backend() != 'gpu':
    attention.LIMITS['pallas'] = ()  # a rehearsal: the kernels are interpreted
  for shape, packed, rate in itertools.product(
      ((2, 2, 48, 16),) if TINY else ((4, 12, 384, 64), (4, 12, 112, 32)),
      (False, True), (0.0, 0.1)):
    inputs = _inputs(*shape, packed)
    run = functools.partial(
        _program('xla', 'float32', 'highest', rate), *inputs)
    exact = run()
    where = f'{"packed" if packed else "padded"} {shape} dropout {rate}'
    if not rate:
      results.attempt(f'xla, NumPy {where}', _compare, run,
                      _by_numpy(*inputs), 1e-5)
    for name, (dtype, precision) in itertools.product(
        ('xla', 'pallas', 'cudnn'), BOUNDS):
      _, heads, length, size = shape
      use = attention.Use(
          jax.default_backend(), length, heads, size, jnp.dtype(dtype), packed,
          training=True, dropout=rate)
      if not attention.limitation(name, use):
        results.attempt(
            f'{name} {dtype} {precision} {where}', _compare, functools.partial(
                _program(name, dtype, precision, rate), *inputs), exact,
            BOUNDS[dtype, precision])


def _compare(run, expected, bound: float):
  error = harness.largest(map(difference, run(), expected))
  return dict(error=error, ms=1e3 * seconds_of(run), ok=error <= bound)


def _inputs(B, H, L, K, packed):
  rng = np.random.default_rng(0)
  arrays = rng.normal(size=(4, B, H, L, K)).astype(np.float32)
  mask = np.arange(L) < rng.integers(L // 3, L + 1, (B, 1))
  cut = rng.integers(1, L // 3, (B, 1))
  ids = np.where(mask, 1 + (np.arange(L) >= cut), 0).astype(np.int32)
  return *arrays, mask, ids if packed else None


def _program(name, dtype, precision, rate):
  """Returns (q, k, v, g, mask, ids) → y, dq, dk, dv; padding has no share."""
  @jax.jit
  def run(q, k, v, g, mask, ids):
    drop = attention.Drop(dropout.DropoutKeys.from_rows(
        jax.random.key(7), jnp.arange(len(q))), rate)
    real = mask[:, None, :, None]
    with jax.default_matmul_precision(precision):
      y, pull = jax.vjp(
          lambda *x: attention.ATTENTION[name](
              *(a.astype(dtype) for a in x), attention.Visible(mask, ids),
              drop), q, k, v)
      return jnp.where(real, y, 0), *pull(jnp.where(real, g, 0))
  return run


def _by_numpy(q, k, v, g, mask, ids):
  """Computes y, dq, dk and dv by the definition, in float64."""
  q, k, v, g = map(np.float64, (q, k, v, g))
  seen = (mask[:, None, None, :] if ids is None
          else (ids[:, :, None] == ids[:, None, :])[:, None])
  scale = q.shape[-1] ** -0.5
  s = np.where(seen, np.einsum('bhqk,bhsk->bhqs', q, k) * scale, -1e9)
  w = np.exp(s - s.max(-1, keepdims=True))
  w /= w.sum(-1, keepdims=True)
  real = mask[:, None, :, None]
  g = np.where(real, g, 0)
  dw = np.einsum('bhqk,bhsk->bhqs', g, v)
  ds = np.where(seen, w * (dw - (w * dw).sum(-1, keepdims=True)), 0) * scale
  y = np.where(real, np.einsum('bhqs,bhsk->bhqk', w, v), 0)
  return (y, np.einsum('bhqs,bhsk->bhqk', ds, k),
          np.einsum('bhqs,bhqk->bhsk', ds, q),
          np.einsum('bhqs,bhqk->bhsk', w, g))
