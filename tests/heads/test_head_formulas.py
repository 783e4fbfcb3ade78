"""Each head against its published formula, computed densely in float64.

Glossary of shapes: B windows, L window length, D hidden size.
"""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from qa_jax import objectives
from qa_jax.heads import conditional
from qa_jax.heads import layers
from tests.common import heads as common
from tests.common import platforms
from tests.common import search

BATCH, LENGTH, GOLD_START = common.BATCH, common.LENGTH, common.GOLD_START
assert_close = common.assert_close


def formula_inputs(spec, mode='decoding', x=None):
  """Returns scores, and parameters by name and last layer in float64."""
  params = flax.traverse_util.flatten_dict(common.random_params(spec), sep='/')
  return (common.scores_by_mode(spec, x)[mode],
          {k: np.asarray(v, np.float64) for k, v in params.items()},
          np.asarray(common.head_inputs().hidden, np.float64))


def gelu(x):
  return x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2)))


def layer_norm(x):
  return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def assert_table(scores, table):
  """Compares score(i, j) with a [B, L, L] table for all j >= i."""
  for i in range(LENGTH):
    assert_close(common.span_table(scores)[:, i, :LENGTH - i], table[:, i, i:])


def test_biased_is_its_formula():
  scores, p, h = formula_inputs('biased')
  assert_close(scores.start, h @ p['start/kernel'][:, 0] + p['start/bias'])
  assert_close(scores.end, h @ p['end/kernel'][:, 0] + p['end/bias'])


@pytest.mark.parametrize('domain', ['context', 'all'])
def test_bias_gets_no_gradient_from_cross_entropy(domain):
  loss = objectives.cross_entropy(domain=domain).loss
  x = common.head_inputs()
  batch = {'context_mask': jnp.asarray(x.context_mask),
           'start_positions': GOLD_START,
           'end_positions': GOLD_START + 1}
  grads = jax.grad(lambda params: loss(common.head_scores(
      'biased', 'training', params, x), batch)[:2].sum())(
          common.random_params('biased'))
  for side in ('start', 'end'):
    assert np.abs(grads[side]['kernel']).max() > 0.1
    assert np.abs(grads[side]['bias']) < 1e-6


def test_bias_changes_no_prediction():
  x = common.head_inputs()
  mask = x.context_mask
  kernels = {k: {'kernel': v['kernel']}
             for k, v in common.random_params('biased').items()}
  find = search.compiled('two_stage', 5, 10)
  a = find(common.scores_by_mode('biased')['decoding'], mask, mask)
  b = find(common.compiled_scores('independent')(kernels, x)['decoding'],
           mask, mask)
  np.testing.assert_array_equal(a.start, b.start)
  np.testing.assert_array_equal(a.end, b.end)
  real = np.asarray(a.valid)
  np.testing.assert_allclose(
      (a.null_score[:, None] - a.score)[real],
      (b.null_score[:, None] - b.score)[real], rtol=0, atol=2e-6)


def test_shared_scores_are_symmetric():
  scores, p, h = formula_inputs('shared')
  s = h @ p['start/kernel'][:, 0]
  assert_table(scores, s[:, :, None] + s[:, None, :])
  np.testing.assert_array_equal(scores.start, scores.end)


def test_equal_units_are_normalised_to_zero_with_a_gradient():
  """All units of a relu may be 0."""
  y, pull = jax.vjp(layers.normalize, jnp.array([[0.0] * 4, [3.0] * 4]))
  assert not y.any()
  assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


@pytest.mark.parametrize('width', [4, 6, 8])
def test_a_band_of_several_offsets_at_once_is_its_loops(width, monkeypatch):
  platforms.leave_the_cpu(monkeypatch)
  assert 4 < layers.OFFSETS_AT_ONCE < 8
  left, right = np.random.default_rng(0).normal(size=(2, 2, 9, 3)).astype(
      np.float32)
  band = layers.over_band(
      lambda end: (left * end).sum(axis=-1), jnp.asarray(right), width)
  assert band.shape == (2, 9, width)
  for i in range(9):
    for d in range(min(width, 9 - i)):
      assert_close(band[:, i, d], (left[:, i] * right[:, i + d]).sum(axis=-1))


def test_mlp_is_its_formula():
  scores, p, h = formula_inputs('mlp')
  for name, value in (('start', scores.start), ('end', scores.end)):
    x = h @ p[f'{name}/hidden/kernel'] + p[f'{name}/hidden/bias']
    assert_close(value, layer_norm(gelu(x)) @ p[f'{name}/output/kernel'][:, 0])


def test_layer_mix_is_its_formula():
  scores, p, _ = formula_inputs('layer_mix')
  layers = np.asarray(common.head_inputs().layers, np.float64)
  weights = np.exp(p['alpha']) / np.exp(p['alpha']).sum()
  h = p['gamma'] * np.einsum('n,nbld->bld', weights, layers)
  assert_close(scores.start, h @ p['start/kernel'][:, 0])
  assert_close(scores.end, h @ p['end/kernel'][:, 0])


def test_layer_mix_begins_as_the_pair_on_the_mean_of_all_layers():
  x, key = common.head_inputs(), jax.random.key(3)
  mean = x.replace(layers=(np.mean(x.layers, axis=0),))
  mixed, _ = jax.jit(common.build_head('layer_mix').init_with_output)(key, x)
  plain, _ = jax.jit(common.build_head('independent').init_with_output)(
      key, mean)
  assert_close(mixed.start, plain.start)
  assert_close(mixed.end, plain.end)


def test_biaffine_is_its_formula():
  scores, p, h = formula_inputs('biaffine')
  u = p['left/kernel'] @ p['right/kernel'].T / math.sqrt(64)
  assert_table(scores, (h @ p['start/kernel'] + (h @ p['end/kernel']).mT
                       + np.einsum('bid,de,bje->bij', h, u, h)))


def test_biaffine_begins_as_independent_bit_for_bit():
  x, key = common.head_inputs(), jax.random.key(3)
  product, variables = jax.jit(
      common.build_head('biaffine').init_with_output)(key, x)
  plain, _ = jax.jit(common.build_head('independent').init_with_output)(key, x)
  np.testing.assert_array_equal(product.start, plain.start)
  np.testing.assert_array_equal(product.end, plain.end)
  assert not product.pair.any()
  grads, _ = jax.jit(functools.partial(
      common.score_gradient, 'biaffine', 'training'))(variables['params'], x)
  assert np.abs(grads['right']['kernel']).max() > 0.01


def test_trilinear_is_its_formula():
  scores, p, h = formula_inputs('trilinear')
  q = h @ p['query/kernel']
  i, j = q[:, :, None], h[:, None]
  i, j = np.broadcast_arrays(i, j)
  w = np.concatenate(
      [p['start/kernel'][:, 0], p['end/kernel'][:, 0], p['product']])
  assert_table(scores, np.concatenate([i, j, i * j], axis=-1) @ w)


@pytest.mark.parametrize(('spec', 'eps'), [('transformed', 1e-5), (
    'transformed(bias=True, dense_bias=True, norm_bias=True, eps=0.1)', 0.1)])
def test_transformed_is_its_formula(spec, eps):
  scores, p, h = formula_inputs(spec)
  x = gelu(h @ p['dense/kernel'] + p.get('dense/bias', 0))
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + eps)
  x = x * p['layer_norm/scale'] + p.get('layer_norm/bias', 0)
  for end in ('start', 'end'):
    assert_close(getattr(scores, end),
                 x @ p[f'{end}/kernel'][:, 0] + p.get(f'{end}/bias', 0))


def test_mlp_span_is_its_formula():
  scores, p, h = formula_inputs('mlp_span')
  x = ((h @ p['start/kernel'] + p['start/bias'])[:, :, None]
       + (h @ p['end/kernel'])[:, None])
  table = layer_norm(np.maximum(x, 0)) @ p['output']
  assert_table(scores, table)
  assert_close(scores.null, table[:, 0, 0])


def test_length_prior_adds_one_number_per_length():
  scores, p, h = formula_inputs('length_prior')
  length = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]
  assert_table(scores, (
      h @ p['base/start/kernel'] + (h @ p['base/end/kernel']).mT
      + p['bias'][np.maximum(length, 0)]))
  assert_close(scores.null_score, h[:, 0] @ (
      p['base/start/kernel'] + p['base/end/kernel'])[:, 0])


def test_length_prior_narrows_a_wider_base():
  spec = 'length_prior(base="biaffine(rank=2)", width=3)'
  params = common.random_params(spec)
  pair = common.scores_by_mode(spec)['decoding'].pair
  base = common.build_head('biaffine(rank=2)').apply(
      {'params': params['base']}, common.head_inputs()).pair
  assert pair.shape == (BATCH, LENGTH, 3)
  assert_close(pair, base[:, :, :3] + params['bias'][None, None])


def test_compound_has_joint_scores_and_separate_boundary_scores():
  scores, p, h = formula_inputs('compound')
  assert_close(scores.boundary.start, h @ p['start/kernel'][:, 0])
  assert_close(scores.boundary.end, h @ p['end/kernel'][:, 0])
  joint = common.compiled_scores('biaffine')(
      common.random_params('compound')['base'], common.head_inputs())
  jax.tree.map(assert_close, scores.replace(boundary=None), joint['decoding'])


def test_answerability_of_cls_is_its_formula():
  scores, p, h = formula_inputs('answerability')
  assert_close(scores.null, h[:, 0] @ p['null/kernel'][:, 0] + p['null/bias'])


def log_probs(x, mask):
  """Computes log softmax over `mask` and [CLS] in float64; -inf elsewhere."""
  domain = mask | (np.arange(x.shape[-1]) == 0)
  x = np.where(domain, x, -np.inf)
  return x - scipy.special.logsumexp(x, axis=-1, keepdims=True)


def test_answerability_of_expected_start_is_its_formula():
  scores, p, h = formula_inputs('answerability(form="xlnet")')
  mean = np.einsum('bl,bld->bd', np.exp(log_probs(
      h @ p['base/start/kernel'][:, 0], common.head_inputs().context_mask)), h)
  x = np.tanh(np.concatenate([h[:, 0], mean], axis=-1) @ p['hidden/kernel']
              + p['hidden/bias'])
  assert_close(scores.null, x @ p['null/kernel'][:, 0] + p['null/bias'])


def conditional_table(p, h, mask, form):
  """Computes log p(i), [B, L], and log p(j | i), [B, L, L], in float64."""
  j, i = np.broadcast_arrays(h[:, None], h[:, :, None])
  kernel = np.concatenate([p['end_token/kernel'], p['given_start/kernel']])
  x = np.concatenate([j, i], axis=-1) @ kernel + p['given_start/bias']
  x = layer_norm(np.tanh(x)) if form == 'xlnet' else gelu(x)
  return (log_probs(h @ p['start/kernel'][:, 0], mask),
          log_probs(x @ p['end'], mask[:, None]))


forms = pytest.mark.parametrize('form', sorted(conditional.FORMS))


@forms
def test_conditional_decodes_a_distribution_over_spans(form):
  # A beam is at most as wide as the window is long.
  spec = f'conditional(form="{form}", beam={LENGTH + 1}, width={LENGTH})'
  everything = np.ones((BATCH, LENGTH), bool)
  scores, p, h = formula_inputs(
      spec, x=common.head_inputs().replace(context_mask=everything))
  start, end = conditional_table(p, h, everything, form)
  table = start[:, :, None] + end
  assert_table(scores, table)
  assert_close(scores.null, table[:, 0, 0])
  legal = np.nansum(np.exp(common.span_table(scores)), axis=(1, 2))
  assert (legal < 1).all()
  backwards = np.tril(np.exp(table), -1).sum(axis=(1, 2))
  assert_close(legal + backwards, np.ones(BATCH))


@forms
def test_conditional_decodes_only_the_best_starts(form):
  scores, p, h = formula_inputs(f'conditional(form="{form}", beam=3)')
  mask = common.head_inputs().context_mask
  start, end = conditional_table(p, h, mask, form)
  assert_close(scores.null, start[:, 0] + end[:, 0, 0])
  for row in range(BATCH):
    context = np.flatnonzero(mask[row])
    best = sorted(context, key=lambda i: -start[row, i])[:3]
    for i in range(LENGTH):
      d = np.array([j - i for j in context if j >= i], int)
      expected = end[row, i, i + d] if i in best else np.full(
          len(d), conditional.NEVER)
      assert_close(scores.pair[row, i, d], expected)
      if i in context:
        assert_close(scores.start[row, i], start[row, i])
  assert not scores.end.any()


@forms
def test_cross_entropy_of_conditional_is_the_joint_log_probability(form):
  scores, p, h = formula_inputs(f'conditional(form="{form}")', 'training')
  mask = common.head_inputs().context_mask
  ends = np.array([7, 4, 0])
  loss = objectives.cross_entropy(reduction='sum').loss(scores, {
      'context_mask': jnp.asarray(mask), 'start_positions': GOLD_START,
      'end_positions': ends})
  start, end = conditional_table(p, h, mask, form)
  row = np.arange(BATCH)
  assert_close(loss, -start[row, GOLD_START] - end[row, GOLD_START, ends])
  assert scores.conditional and scores.pair is None
