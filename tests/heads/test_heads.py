"""One battery over every head, and what is refused.

A new entry of HEADS passes the battery with no new code here.

Glossary of shapes: B windows, L window length, D hidden size, W longest span.
"""

import functools
import math

import flax.traverse_util
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import errors
from qa_jax import heads
from qa_jax import objectives
from qa_jax import registry
from qa_jax.span_scores import HeadInput
from qa_jax.training import optimizer as optimizer_lib
from tests.common import heads as heads_lib
from tests.common import search

EVERY = [
    *heads.HEADS,
    'answerability(base="conditional", form="xlnet")',
    'compound(base="length_prior(base=\'mlp_span\')")',
]
every_head = pytest.mark.parametrize('spec', EVERY)
every_mode = pytest.mark.parametrize('mode', heads_lib.GOLD_STARTS)


@functools.cache
def gradients(spec):
  return jax.device_get(
      jax.jit(
          lambda *a:
          {m: heads_lib.gradient(spec, m, *a) for m in heads_lib.GOLD_STARTS})(
              heads_lib.params_of(spec), heads_lib.inputs()))


def arrays(jaxpr):
  """What the equations of a program compute, inner programs included."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars)
  for inner in jax.extend.core.subjaxprs(jaxpr):
    yield from arrays(inner)


@every_head
@every_mode
def test_scores_have_their_shapes(spec, mode):
  scores = heads_lib.run(spec)[mode]
  for s in (scores, scores.boundary) if scores.boundary else (scores,):
    assert s.start.shape == s.end.shape == (heads_lib.BATCH, heads_lib.LENGTH)
    assert s.null is None or s.null.shape == (heads_lib.BATCH,)
    assert s.null_score.shape == (heads_lib.BATCH,)
    if s.pair is not None:
      assert s.pair.shape == (heads_lib.BATCH, heads_lib.LENGTH,
                              s.pair.shape[-1])
  assert scores.conditional <= (mode == 'training')


@every_head
@every_mode
def test_half_precision_vectors_are_scored_in_float32(spec, mode):
  x = heads_lib.inputs()
  x = x.replace(layers=tuple(jnp.bfloat16(h) for h in x.layers))
  program = jax.make_jaxpr(functools.partial(heads_lib.scores_of, spec, mode))(
      heads_lib.params_of(spec), x)
  dtypes = {a.dtype for a in arrays(program.jaxpr)}
  assert {d for d in dtypes if jnp.issubdtype(d, jnp.floating)} == {
      jnp.dtype('float32')}


@every_head
@every_mode
def test_jit_equals_eager(spec, mode):
  eager = heads_lib.scores_of(spec, mode, heads_lib.params_of(spec),
                              heads_lib.inputs())
  jax.tree.map(heads_lib.close, eager, heads_lib.run(spec)[mode])


@every_head
@every_mode
def test_scores_and_gradients_are_finite_at_masked_rows_too(spec, mode):
  for x in jax.tree.leaves((heads_lib.run(spec)[mode], gradients(spec)[mode])):
    assert np.isfinite(x).all()


@every_head
def test_every_parameter_gets_a_gradient_in_training(spec):
  of_params, _ = gradients(spec)['training']
  for name, g in flax.traverse_util.flatten_dict(of_params, sep='/').items():
    assert np.abs(g).max() > 1e-6, name


@every_head
@every_mode
def test_what_is_no_context_changes_no_score_of_the_context(spec, mode):
  x, extra = heads_lib.inputs(), 5
  garbage = heads_lib.inputs(1, heads_lib.LENGTH + extra)
  mask = np.pad(x.context_mask, ((0, 0), (0, extra)))
  kept = (mask | (np.arange(heads_lib.LENGTH + extra) == 0))[:, :, None]
  padded = HeadInput(
      tuple(np.where(kept, np.pad(h, ((0, 0), (0, extra), (0, 0))), 10 * g)
            for h, g in zip(x.layers, garbage.layers, strict=True)), mask)
  short, long = heads_lib.run(spec)[mode], heads_lib.run(spec, padded)[mode]
  heads_lib.close(short.null_score, long.null_score)
  pairs = [(short, long)]
  if short.boundary:
    pairs.append((short.boundary, long.boundary))
  for a, b in pairs:
    a, b = heads_lib.band(a), heads_lib.band(b)
    for row, i, d in np.argwhere(~np.isnan(a)):
      if mask[row, i] and mask[row, i + d]:
        heads_lib.close(a[row, i, d], b[row, i, d])


@every_head
@every_mode
def test_rows_do_not_affect_each_other(spec, mode):
  x, other = heads_lib.inputs(), heads_lib.inputs(1)
  first = (np.arange(heads_lib.BATCH) == 0)[:, None, None]
  changed = x.replace(layers=tuple(
      np.where(first, a, b)
      for a, b in zip(x.layers, other.layers, strict=True)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]),
               heads_lib.run(spec)[mode], heads_lib.run(spec, changed)[mode])


@every_head
@pytest.mark.parametrize('name', search.NAMES)
def test_search_is_brute_force(spec, name):
  scores, mask = heads_lib.run(
      spec)['decoding'], heads_lib.inputs().context_mask
  starts = mask & (np.arange(heads_lib.LENGTH) != 6)[None]
  search.check(name, scores.start, scores.end, scores.pair, starts, mask,
               5, 40)


@every_head
@every_mode
def test_memory_grows_with_the_band_not_with_all_pairs(spec, mode):
  length = 1024
  params, x = heads_lib.params_of(spec), heads_lib.inputs(length=length)
  scores = jax.eval_shape(heads_lib.compiled(spec), params, x)[mode]
  widths = [n for p in jax.tree.leaves(params) for n in p.shape]
  if scores.pair is not None:
    widths.append(scores.pair.shape[-1])
  bound = 3 * heads_lib.BATCH * length * max(widths)
  if max(widths) <= 64:  # neither all pairs nor a vector for every span
    assert bound < heads_lib.BATCH * length * min(length, 30 * heads_lib.SIZE)
  program = jax.make_jaxpr(
      functools.partial({
          'decoding': heads_lib.scores_of,
          'training': heads_lib.gradient
      }[mode], spec, mode))(params, x)
  assert max(math.prod(a.shape) for a in arrays(program.jaxpr)) <= bound


@every_head
def test_parameters_have_names_that_export_and_optimiser_know(spec):
  params = {'head': heads_lib.params_of(spec)}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  assert len(flat) == len(jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, params,
               flax.traverse_util.unflatten_dict(flat, sep='/'))
  assert {x.dtype for x in flat.values()} == {jnp.dtype('float32')}
  assert set(jax.tree.leaves(optimizer_lib.layer_scales(params, 0.5,
                                                        12))) == {1.0}
  decayed = flax.traverse_util.flatten_dict(
      optimizer_lib.decay_mask(params), sep='/')
  assert decayed == {name: not name.endswith('bias') for name in flat}


def span_softmax(scores, batch):
  """-log p(gold span) over null and all spans of the context, [B]."""
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


@every_head
def test_head_overfits_eight_windows_and_search_finds_them_all(spec):
  rng = np.random.default_rng(2)
  count, length, size = 8, 10, 64
  layers = tuple(rng.normal(size=(count, length, size)).astype(np.float32)
                 for _ in range(3))
  mask = np.broadcast_to(np.arange(length) >= 3, (count, length))
  start = np.array([3, 4, 5, 6, 7, 8, 9, 3])
  end = start + np.array([2, 1, 0, 3, 2, 1, 0, 6])
  head, optimizer = heads_lib.build(spec), optax.adam(5e-2)
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
      # Scores that are symmetric can learn spans of one token only.
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
  found = search.compiled('two_stage', 8, 1)(scores, mask, mask)
  assert found.start[:, 0].tolist() == start.tolist()
  assert found.end[:, 0].tolist() == end.tolist()


@pytest.mark.parametrize(('spec', 'message'), [
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
