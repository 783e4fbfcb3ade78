"""Inputs, scores and gradients of the heads under test."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from qa_jax import heads
from qa_jax import registry
from qa_jax.span_scores import HeadInput

BATCH, LENGTH, SIZE = 3, 12, 32
GOLD_START = np.array([5, 4, 0])
GOLD_STARTS = {'decoding': None, 'training': GOLD_START}


@functools.cache
def build(spec):
  return registry.build(heads.HEADS, spec, what='head')


@functools.cache
def params_of(spec):
  """Random parameters, so that none is at a special value."""
  shapes = jax.eval_shape(
      build(spec).init, jax.random.key(0), inputs())['params']
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(7)
  return jax.tree.unflatten(tree, [
      0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def inputs(seed=0, length=LENGTH):
  """Full, padded and wholly masked rows; three layers."""
  rng = np.random.default_rng(seed)
  layers = tuple(rng.normal(size=(BATCH, length, SIZE)).astype(np.float32)
                 for _ in range(3))
  column = np.arange(length)[None]
  return HeadInput(
      layers, (column >= 4) & (column < np.array([[length], [9], [0]])))


def scores_of(spec, mode, params, x):
  return build(spec).apply(
      {'params': params}, x.replace(gold_start=GOLD_STARTS[mode]))


@functools.cache
def compiled(spec):
  return jax.jit(lambda *a: {m: scores_of(spec, m, *a) for m in GOLD_STARTS})


def run(spec, x=None):
  """The scores of every mode under `params_of(spec)`, on the host."""
  return jax.device_get(compiled(spec)(params_of(spec), x or inputs()))


def every_score(scores):
  """A loss with a gradient at every score, whatever their scale."""
  return sum(jnp.sin(x + 0.1 * jnp.arange(x.size).reshape(x.shape)).sum()
             for x in jax.tree.leaves(scores))


def gradient(spec, mode, params, x):
  """Of a loss over every score; with respect to parameters and layers."""
  return jax.grad(lambda params, layers: every_score(
      scores_of(spec, mode, params, x.replace(layers=layers))),
                  argnums=(0, 1))(params, x.layers)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def band(scores):
  """score(i, i + d), [B, L, W], as SpanScores is defined; NaN beyond L."""
  start, end = np.asarray(scores.start), np.asarray(scores.end)
  length = start.shape[1]
  width = length if scores.pair is None else scores.pair.shape[-1]
  table = np.full((*start.shape, width), np.nan)
  for i in range(length):
    for j in range(i, min(i + width, length)):
      table[:, i, j - i] = start[:, i] + end[:, j]
      if scores.pair is not None:
        table[:, i, j - i] += scores.pair[:, i, j - i]
  return table
