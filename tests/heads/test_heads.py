"""Tests that every head of HEADS must pass, and the arguments they refuse.

A new entry of HEADS is tested without new code here.

Glossary of shapes: B windows, L window length, D hidden size, W longest span.
"""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import errors
from qa_jax import heads
from qa_jax import objectives
from qa_jax import registry
from qa_jax.heads import layers
from qa_jax.models import qa
from qa_jax.span_scores import HeadInput
from qa_jax.training import optimizer as optimizer_lib
from tests.common import derivatives
from tests.common import heads as common
from tests.common import jaxprs
from tests.common import search

SPECS = [
    *heads.HEADS,
    'answerability(base="conditional", form="xlnet")',
    'compound(base="length_prior(base=\'mlp_span\')")',
    'transformed(bias=True, dense_bias=True, norm_bias=True)',
]
every_head = pytest.mark.parametrize('spec', SPECS)
every_mode = pytest.mark.parametrize('mode', common.GOLD_STARTS)


@functools.cache
def gradients(spec):
  """Returns the gradients of `sum_of_sines` by mode."""
  by_mode = jax.jit(lambda *args: {
      m: common.score_gradient(spec, m, *args) for m in common.GOLD_STARTS})
  return jax.device_get(
      by_mode(common.random_params(spec), common.head_inputs()))


@every_head
@every_mode
def test_scores_have_their_shapes(spec, mode):
  scores = common.scores_by_mode(spec)[mode]
  for s in (scores, scores.boundary) if scores.boundary else (scores,):
    assert s.start.shape == s.end.shape == (common.BATCH, common.LENGTH)
    assert s.null is None or s.null.shape == (common.BATCH,)
    assert s.null_score.shape == (common.BATCH,)
    assert s.pair is None or s.pair.shape[:2] == s.start.shape
  assert mode == 'training' or not scores.conditional


@every_head
@every_mode
@pytest.mark.parametrize('x64', [False, True])
def test_half_precision_vectors_are_scored_in_float32(spec, mode, x64):
  x = common.head_inputs()
  x = x.replace(layers=tuple(jnp.bfloat16(h) for h in x.layers))
  with jax.enable_x64(x64):
    program = jax.make_jaxpr(functools.partial(
        common.head_scores, spec, mode))(common.random_params(spec), x)
  dtypes = {a.dtype for a in (*jaxprs.computed_arrays(program.jaxpr),
                              *program.out_avals) if a.ndim}
  assert {d for d in dtypes if jnp.issubdtype(d, jnp.floating)} == {
      jnp.dtype('float32')}


@every_head
@every_mode
def test_jit_equals_eager(spec, mode):
  eager = common.head_scores(spec, mode, common.random_params(spec),
                              common.head_inputs())
  jax.tree.map(common.assert_close, eager, common.scores_by_mode(spec)[mode])


@every_head
@every_mode
def test_scores_and_gradients_are_finite_at_masked_rows_too(spec, mode):
  for x in jax.tree.leaves(
      (common.scores_by_mode(spec)[mode], gradients(spec)[mode])):
    assert np.isfinite(x).all()


@every_head
def test_every_parameter_gets_a_gradient_in_training(spec):
  of_params, _ = gradients(spec)['training']
  for name, g in flax.traverse_util.flatten_dict(of_params, sep='/').items():
    assert np.abs(g).max() > 1e-6, name


@every_head
@every_mode
def test_gradients_are_those_of_the_scores(spec, mode):
  if mode == 'decoding' and 'conditional' in spec:
    return  # the starts that a beam keeps change in steps
  # The derivative of mlp_span's relu has jumps.

  def total(arrays):
    params, layers_ = arrays
    return common.sum_of_sines(common.scores_by_mode(
        spec, common.head_inputs().replace(layers=layers_), params)[mode], np)

  derivatives.assert_are_gradients(
      total, (common.random_params(spec), common.head_inputs().layers),
      gradients(spec)[mode], rtol=0.03 if 'mlp_span' in spec else 0.003)


@every_head
@every_mode
def test_masked_and_padding_tokens_change_no_score_of_the_context(spec, mode):
  x, extra = common.head_inputs(), 5
  garbage = common.head_inputs(1, common.LENGTH + extra)
  mask = np.pad(x.context_mask, ((0, 0), (0, extra)))
  domain = (mask | (np.arange(common.LENGTH + extra) == 0))[:, :, None]
  padded = HeadInput(
      tuple(np.where(domain, np.pad(h, ((0, 0), (0, extra), (0, 0))), 10 * g)
            for h, g in zip(x.layers, garbage.layers, strict=True)), mask)
  short = common.scores_by_mode(spec)[mode]
  long = common.scores_by_mode(spec, padded)[mode]
  common.assert_close(short.null_score, long.null_score)
  pairs = [(short, long)]
  if short.boundary:
    pairs.append((short.boundary, long.boundary))
  for a, b in pairs:
    a, b = common.span_table(a), common.span_table(b)
    for row, i, d in np.argwhere(~np.isnan(a)):
      if mask[row, i] and mask[row, i + d]:
        common.assert_close(a[row, i, d], b[row, i, d])


@every_head
@every_mode
def test_rows_do_not_affect_each_other(spec, mode):
  x, other = common.head_inputs(), common.head_inputs(1)
  first = (np.arange(common.BATCH) == 0)[:, None, None]
  changed = x.replace(layers=tuple(
      np.where(first, a, b)
      for a, b in zip(x.layers, other.layers, strict=True)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]),
               common.scores_by_mode(spec)[mode],
               common.scores_by_mode(spec, changed)[mode])


TOKEN_WISE = ['independent', 'biased', 'shared', 'mlp', 'transformed',
              'layer_mix',
              'transformed(bias=True, dense_bias=True, norm_bias=True)']


@every_head
def test_these_heads_are_token_wise(spec):
  assert qa.is_token_wise(common.build_head(spec)) == (spec in TOKEN_WISE)


@pytest.mark.parametrize('spec', TOKEN_WISE)
def test_a_token_wise_head_scores_tokens_in_any_order_and_row(spec):
  head = common.build_head(spec)
  x = common.head_inputs()
  order = np.random.default_rng(0).permutation(common.BATCH * common.LENGTH)
  moved = HeadInput(
      tuple(h.reshape(1, -1, common.SIZE)[:, order] for h in x.layers),
      np.zeros((1, len(order)), bool))
  scores = common.scores_by_mode(spec)['decoding']
  for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(
      head.apply({'params': common.random_params(spec)}, moved)), strict=True):
    common.assert_close(a.reshape(-1)[order], b[0])


@every_head
@pytest.mark.parametrize('name', search.NAMES)
def test_search_is_brute_force(spec, name):
  scores = common.scores_by_mode(spec)['decoding']
  mask = common.head_inputs().context_mask
  starts = mask & (np.arange(common.LENGTH) != 6)[None]
  search.assert_equals_brute_force(
      name, scores.start, scores.end, scores.pair, starts, mask, 5, 40)


@every_head
@every_mode
def test_memory_grows_with_the_band_not_with_all_pairs(spec, mode):
  length = 1024
  params, x = common.random_params(spec), common.head_inputs(length=length)
  scores = jax.eval_shape(common.compiled_scores(spec), params, x)[mode]
  widths = [n for p in jax.tree.leaves(params) for n in p.shape]
  if scores.pair is not None:
    widths.append(scores.pair.shape[-1])
  bound = layers.OFFSETS_AT_ONCE * common.BATCH * length * max(widths)
  if max(widths) <= 64:  # neither all pairs nor a vector for every span
    assert bound < common.BATCH * length * min(length, 30 * common.SIZE)
  function = {'decoding': common.head_scores,
              'training': common.score_gradient}[mode]
  program = jax.make_jaxpr(functools.partial(function, spec, mode))(params, x)
  assert max(math.prod(a.shape)
             for a in jaxprs.computed_arrays(program.jaxpr)) <= bound


@every_head
def test_parameters_are_float32_and_kernels_alone_decay(spec):
  params = {'head': common.random_params(spec)}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  assert {x.dtype for x in flat.values()} == {jnp.dtype('float32')}
  decayed = flax.traverse_util.flatten_dict(
      optimizer_lib.decay_mask(params), sep='/')
  assert decayed == {
      name: name.split('/')[-1] not in ('bias', 'scale') for name in flat}


# Parameters that begin with one value: by their names, or of one head.
CONSTANT = {'bias': 0, 'scale': 1, 'alpha': 0, 'gamma': 1, 'right/kernel': 0}


@every_head
def test_fresh_parameters_are_constants_or_draws_like_those_of_bert(spec):
  """See test_initial_values_are_berts for the deviation of a draw."""
  params = jax.jit(common.build_head(spec).init)(
      jax.random.key(0), common.head_inputs())['params']
  for name, x in flax.traverse_util.flatten_dict(params, sep='/').items():
    value = next((value for end, value in CONSTANT.items()
                  if f'/{name}'.endswith(f'/{end}')), None)
    if value is not None:
      assert (x == value).all(), name
    else:
      off = 4 / (2 * x.size) ** 0.5
      assert x.std() == pytest.approx(0.02 * 0.8796, rel=off), name
      assert abs(x).max() <= 0.04 + 1e-6, name


def span_softmax(scores, batch):
  """Computes -log p(gold span) over null and all spans of the context, [B]."""
  mask = batch['context_mask']
  length = mask.shape[1]
  terms = [scores.null_score[:, None]]
  for d in range(min(scores.pair.shape[-1], length)):
    i, j = slice(length - d), slice(d, length)
    terms.append(jnp.where(
        mask[:, i] & mask[:, j],
        scores.start[:, i] + scores.end[:, j] + scores.pair[:, i, d], -1e30))
  row = np.arange(len(mask))
  start, end = batch['start_positions'], batch['end_positions']
  gold = (scores.start[row, start] + scores.end[row, end]
          + scores.pair[row, start, end - start])
  return jax.nn.logsumexp(jnp.concatenate(terms, axis=1), axis=1) - gold


@pytest.mark.slow
@every_head
def test_head_overfits_eight_windows_and_search_returns_their_spans(spec):
  rng = np.random.default_rng(2)
  count, length, size = 8, 10, 64
  layers = tuple(rng.normal(size=(count, length, size)).astype(np.float32)
                 for _ in range(3))
  mask = np.broadcast_to(np.arange(length) >= 3, (count, length))
  start = np.array([3, 4, 5, 6, 7, 8, 9, 3])
  end = start + np.array([2, 1, 0, 3, 2, 1, 0, 6])
  head, optimizer = common.build_head(spec), optax.adam(5e-2)
  x = HeadInput(layers, jnp.asarray(mask))
  cross_entropy = objectives.cross_entropy().loss

  def loss(params):
    scores = head.apply({'params': params}, x.replace(gold_start=start))
    batch = {'start_positions': start, 'end_positions': end,
             'context_mask': x.context_mask}
    if scores.pair is not None:
      losses = span_softmax(scores, batch)
      if scores.boundary is not None:
        losses += cross_entropy(scores.boundary, batch)
    else:
      # Symmetric scores can learn spans of one token only.
      symmetric = (scores.start == scores.end).all()
      batch['end_positions'] = jnp.where(symmetric, start, end)
      losses = cross_entropy(scores, batch)
    return losses.mean(), batch['end_positions']

  @jax.jit
  def fit():
    def step(carry, _):
      params, state = carry
      out, grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), out
    params = head.init(jax.random.key(1), x)['params']
    (params, _), (losses, ends) = jax.lax.scan(
        step, (params, optimizer.init(params)), length=60)
    return losses[-1], ends[-1], head.apply({'params': params}, x)

  value, end, scores = fit()
  assert value < 0.01
  best = search.compiled('two_stage', 8, 1)(scores, mask, mask)
  assert best.start[:, 0].tolist() == start.tolist()
  assert best.end[:, 0].tolist() == end.tolist()


@pytest.mark.parametrize(('spec', 'message'), [
    ('transformed(eps=0.0)', 'eps=0.0 must be in'),
    ('biaffine(rank=0)', "'biaffine': rank=0 must be at least 1"),
    ('biaffine(width=0)', 'width=0'),
    ('trilinear(width=0)', 'width=0'),
    ('mlp(hidden_size=-1)', 'hidden_size=-1 must be at least 0'),
    ('mlp_span(hidden_size=-1)', 'hidden_size=-1'),
    ('mlp_span(width=0)', 'width=0'),
    ('conditional(form="x")', "form='x'; known: electra, xlnet"),
    ('conditional(beam=0)', 'beam=0'),
    ('conditional(width=-3)', 'width=-3'),
    ('answerability(form="x")', "form='x'; known: cls, xlnet"),
    ('answerability(base="nope")', "unknown base head 'nope'; known: "),
    ('compound(base="biafine")', "did you mean 'biaffine'"),
    ('length_prior(base="mlp(width=3)")', "no argument 'width'"),
    ('length_prior(width=0)', 'width=0'),
    ('length_prior(width=31, base="biaffine")', 'scores 30 lengths'),
    ('length_prior(base="conditional")', 'given the gold start'),
    ('compound(base="answerability(base=\'conditional\')")',
     'given the gold start'),
])
def test_bad_arguments_are_one_line(spec, message):
  with pytest.raises(errors.UserError, match=message) as e:
    registry.build(heads.HEADS, spec, what='head')
  assert '\n' not in str(e.value)
