"""Inputs, parameters, scores and gradients of the heads under test.

Glossary of shapes: B windows, L window length, D hidden size, W longest span.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import heads
from qa_jax import registry
from qa_jax.span_scores import HeadInput

BATCH, LENGTH, SIZE = 3, 12, 32
GOLD_START = np.array([5, 4, 0])
GOLD_STARTS = {'decoding': None, 'training': GOLD_START}  # by mode


@functools.cache
def build_head(spec):
  return registry.build(heads.HEADS, spec, what='head')


@functools.cache
def random_params(spec):
  """Returns random parameters, so that none has a special initial value."""
  shapes = jax.eval_shape(
      build_head(spec).init, jax.random.key(0), head_inputs())['params']
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(7)
  return jax.tree.unflatten(tree, [
      0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def head_inputs(seed=0, length=LENGTH):
  """Returns a full, a padded and a wholly masked row, with three layers."""
  rng = np.random.default_rng(seed)
  layers = tuple(rng.normal(size=(BATCH, length, SIZE)).astype(np.float32)
                 for _ in range(3))
  column = np.arange(length)[None]
  return HeadInput(
      layers, (column >= 4) & (column < np.array([[length], [9], [0]])))


def head_scores(spec, mode, params, x):
  return build_head(spec).apply(
      {'params': params}, x.replace(gold_start=GOLD_STARTS[mode]))


@functools.cache
def compiled_scores(spec):
  """Returns the compiled function (parameters, inputs) → scores by mode."""
  return jax.jit(
      lambda *args: {m: head_scores(spec, m, *args) for m in GOLD_STARTS})


def scores_by_mode(spec, x=None, params=None):
  """Returns the scores by mode, on the host, under `random_params` if None."""
  return jax.device_get(compiled_scores(spec)(
      random_params(spec) if params is None else params, x or head_inputs()))


def sum_of_sines(scores, numpy=jnp):
  """Computes a loss with a gradient at every score, whatever its scale.

  With the module numpy it is in float64.
  """
  return sum(numpy.sin(x + 0.1 * numpy.arange(x.size).reshape(x.shape)).sum()
             for x in jax.tree.leaves(scores))


def score_gradient(spec, mode, params, x):
  """Computes the gradient of `sum_of_sines` in parameters and layers."""
  return jax.grad(lambda params, layers: sum_of_sines(
      head_scores(spec, mode, params, x.replace(layers=layers))),
                  argnums=(0, 1))(params, x.layers)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def span_table(scores):
  """Returns score(i, i + d), [B, L, W], by its definition; NaN beyond L."""
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
