"""Tests that every objective must pass, and their definitions in float64.

Glossary of shapes: B batch (windows), L window length.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import errors
from qa_jax import objectives
from qa_jax import registry
from qa_jax import span_scores
from qa_jax.span_scores import SpanScores
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from tests.common import batches
from tests.common import derivatives
from tests.common import jaxprs

NAMES = sorted(objectives.OBJECTIVES)
FIELDS = ('pair', 'null', 'boundary')
BATCH, LENGTH, WIDTH = 7, 12, 30
# Of each window: context (first, last), gold spans, number of the question. The
# last window is a padding row.
ROWS = [
    ((4, 9), [(5, 7)], 0),
    ((4, 10), [(9, 10), (4, 4), (5, 9)], 0),
    ((3, 10), [], 2),
    ((6, 6), [(6, 6)], 3),
    ((3, 9), [(3, 9)], 4),
    ((3, 10), [], 4),
    ((1, 0), [], 6),
]
ONE_GOLD = [(c, spans[:1], question) for c, spans, question in ROWS]


def build(spec):
  return registry.build(objectives.OBJECTIVES, spec, what='objective')


def batch_of(rows, length=LENGTH, owned=None):
  """Builds the batch that losses read.

  `owned` are ranges of owned tokens; by default that is the whole context.
  """
  column = np.arange(length)[None]
  within = lambda ranges: (column >= np.array(ranges)[:, :1]) & (
      column <= np.array(ranges)[:, 1:])
  most = max(3, *(len(spans) for _, spans, _ in rows))
  golds = np.array([[*spans, *[(-1, -1)] * (most - len(spans))]
                    for _, spans, _ in rows], np.int32)
  context = within([c for c, _, _ in rows])
  return {
      'context_mask': context,
      'start_mask': context & within(owned or [c for c, _, _ in rows]),
      'start_positions': np.maximum(golds[:, 0, 0], 0),
      'end_positions': np.maximum(golds[:, 0, 1], 0),
      'gold_spans': golds,
      'context_start': np.array([-c[0] for c, _, _ in rows], np.int32),
      'group': np.array([g for _, _, g in rows], np.int32),
      'step': np.full(len(rows), 5000, np.int32),
      'draw': np.full(len(rows), 0.5, np.float32),
  }


def draw(seed=0, batch=BATCH, length=LENGTH, width=WIDTH, fields=FIELDS,
         scale=2.0, conditional=False):
  """Draws random scores of the given sizes, with the optional `fields`."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(0, scale, shape).astype(np.float32)
  optional = {'pair': normal(batch, length, width), 'null': normal(batch),
              'boundary': SpanScores(normal(batch, length),
                                     normal(batch, length))}
  return SpanScores(normal(batch, length), normal(batch, length),
                    conditional=conditional,
                    **{k: optional[k] for k in fields if k in optional})


@pytest.fixture(scope='module')
def batch():
  # The second window owns only a part of its context.
  return batch_of(ROWS, owned=[(0, 8), (7, 11), *[(0, 11)] * 5])


@functools.cache
def losses_of(name):
  """Returns the compiled function of a loss [B] and its gradient in scores."""
  objective = build(name)
  def total(scores, batch):
    losses = objective.loss(scores, batch)
    return losses.sum(), losses
  return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(name, scores, batch):
  (_, losses), grads = losses_of(name)(scores, batch)
  return np.asarray(losses), jax.device_get(grads)


def on_device(*trees):
  return jax.tree.map(jnp.asarray, trees)


def full(name, **kwargs):
  return draw(conditional='conditional' in build(name).needs, **kwargs)


@pytest.mark.parametrize('name', [*NAMES, 'marginal(over="boundary")'])
def test_gradients_are_those_of_the_loss(name, batch):
  scores = full(name, scale=1.0)
  derivatives.assert_are_gradients(
      lambda moved: np.float64(run(name, moved, batch)[0]).sum(), scores,
      run(name, scores, batch)[1])


@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradient_are_finite_float32_with_and_without_jit(name, batch):
  scores, objective = full(name), build(name)
  losses, grads = run(name, scores, batch)
  assert losses.shape == (BATCH,) and losses.dtype == np.float32
  assert np.isfinite(losses).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  eager = objective.loss(*on_device(scores, batch))
  np.testing.assert_allclose(losses, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_computed_in_float64_where_jax_allows_it(name, batch):
  scores = full(name)
  expected, _ = run(name, scores, batch)
  with jax.enable_x64(True):
    losses, _ = run(name, scores, batch)
    program = jax.make_jaxpr(losses_of(name))(scores, batch)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  wide = [x for x in jaxprs.computed_arrays(program.jaxpr)
          if x.dtype == 'float64' and x.ndim]
  assert not wide


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('value', [-1e30, -1e4, 0.0, 1e4])
def test_extreme_scores_stay_finite(name, batch, value):
  rng = np.random.default_rng(1)
  scores = jax.tree.map(
      lambda x: np.where(rng.random(x.shape) < 0.5, np.float32(value), x),
      full(name))
  losses, grads = run(name, scores, batch)
  assert np.isfinite(losses).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', NAMES)
def test_an_objective_reads_no_score_but_those_it_needs(name, batch):
  objective = build(name)
  scores = draw(fields=objective.needs,
                conditional='conditional' in objective.needs)
  assert np.isfinite(objective.loss(*on_device(scores, batch))).all()


@pytest.mark.parametrize('name', NAMES)
def test_an_objective_says_whether_it_trains_pair_and_null_scores(name, batch):
  objective, grads = build(name), run(name, full(name), batch)[1]
  for part in ('pair', 'null'):
    assert np.any(getattr(grads, part)) == (
        objective.trains_pair_and_null or part in objective.needs), part


@pytest.mark.parametrize('name', NAMES)
def test_no_loss_is_negative(name, batch):
  assert (run(name, full(name), batch)[0] >= -1e-6).all()


@pytest.mark.parametrize('name', NAMES)
def test_padding_columns_change_nothing(name, batch):
  scores = full(name)
  longer = jax.tree.map(
      lambda x: x if x.ndim == 1 else np.pad(
          x, ((0, 0), (0, 4), (0, 0))[:x.ndim], constant_values=7), scores)
  padded = {k: np.pad(v, ((0, 0), (0, 4))) if 'mask' in k else v
            for k, v in batch.items()}
  np.testing.assert_allclose(
      run(name, scores, batch)[0], jax.jit(build(name).loss)(longer, padded),
      rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_question_and_padding_get_no_gradient(name, batch):
  grads = run(name, full(name), batch)[1]
  outside = ~batch['context_mask']
  outside[:, 0] = False
  for leaf in jax.tree.leaves(grads):
    if leaf.ndim > 1:
      assert not leaf[outside].any()


@pytest.mark.parametrize('name', NAMES)
def test_a_row_depends_on_no_other_question(name, batch):
  scores = full(name)
  other = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]),
                       full(name, seed=1), scores)
  before, after = run(name, scores, batch)[0], run(name, other, batch)[0]
  independent = np.arange(BATCH) != 0
  if build(name).needs_whole_questions:
    independent = batch['group'] != batch['group'][0]
  np.testing.assert_array_equal(before[independent], after[independent])
  assert before[0] != after[0]


@pytest.mark.parametrize('name', NAMES)
def test_losses_follow_the_order_of_rows(name, batch):
  order = np.array([6, 2, 4, 1, 0, 5, 3])
  scores = full(name)
  moved = run(name, jax.tree.map(lambda x: x[order], scores),
              {k: v[order] for k, v in batch.items()})[0]
  np.testing.assert_allclose(run(name, scores, batch)[0][order], moved,
                             rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_loss_falls_when_the_gold_scores_rise(name):
  batch, rows = batch_of(ONE_GOLD), np.arange(BATCH)
  null = batch['start_positions'] == 0

  def raised(scores):
    start, end = scores.start.copy(), scores.end.copy()
    start[rows, batch['start_positions']] += 0.1
    end[rows, batch['end_positions']] += 0.1
    return start, end

  scores = full(name, seed=2, scale=0.5)
  start, end = raised(scores)
  better = dataclasses.replace(
      scores, start=start, end=end,
      null=scores.null + np.where(null, 0.1, -0.1).astype(np.float32),
      boundary=SpanScores(*raised(scores.boundary)))
  before, after = run(name, scores, batch)[0], run(name, better, batch)[0]
  # Not rows 5 and 6. Row 5 has no answer, but its question has one in row 4; a
  # loss over whole questions then has no gold position in row 5. Row 6 is a
  # padding row.
  assert (after < before)[:5].all()


@pytest.mark.parametrize(
    'name', [n for n in NAMES if not build(n).scores_other_spans])
def test_start_and_end_losses_add_unless_other_spans_are_scored(name, batch):
  one, two = full(name, seed=3), full(name, seed=4)
  loss = lambda a, b: run(name, dataclasses.replace(
      one, start=a.start, end=b.end), batch)[0]
  np.testing.assert_allclose(loss(one, one) + loss(two, two),
                             loss(one, two) + loss(two, one), rtol=1e-5)


@pytest.mark.parametrize('name', sorted(
    set(NAMES) - {'marginal', 'hard_em', 'shared_norm', 'f1_weighted'}))
def test_only_objectives_of_many_golds_read_more_than_the_label(name, batch):
  label = {k: batch[k] for k in (
      'context_mask', 'start_positions', 'end_positions')}
  assert jax.eval_shape(build(name).loss, full(name), label).shape == (BATCH,)


@pytest.mark.parametrize('name', NAMES)
def test_memory_is_that_of_a_band(name):
  rows = [((3, 500), [(i, i + 3) for i in range(9, 25)], r) for r in range(2)]
  program = jax.make_jaxpr(losses_of(name))(
      full(name, batch=2, length=512), batch_of(rows, 512))
  largest = max(x.size for x in jaxprs.computed_arrays(program.jaxpr))
  assert largest <= 2 * (512 + WIDTH) * (WIDTH + 1)


# --- The definitions, in float64 and in plain loops -------------------------

def legal(row, scores, longest, gold=()):
  """Returns {(i, j): score} of the legal spans of a window, `gold` and null."""
  (first, last), _, _ = ROWS[row]
  spans = {(i, j) for i in range(first, last + 1)
           for j in range(i, min(i + longest, last + 1))}
  return {**{s: cell(row, scores, *s) for s in spans | set(gold)},
          'null': null_of(row, scores)}


def everything(row, scores):
  """Returns {(i, j): score} of all pairs of context tokens and [CLS]."""
  (first, last), _, _ = ROWS[row]
  domain = [0, *range(first, last + 1)]
  cells = {(i, j): cell(row, scores, i, j) for i in domain for j in domain}
  return {**cells, (0, 0): null_of(row, scores)}


def cell(row, scores, i, j):
  value = float(scores.start[row, i]) + float(scores.end[row, j])
  if scores.pair is not None and 0 < i <= j < i + scores.pair.shape[2]:
    value += float(scores.pair[row, i, j - i])
  return value


def null_of(row, scores):
  if scores.null is not None:
    return float(scores.null[row])
  return float(scores.start[row, 0]) + float(scores.end[row, 0])


def log_sum(values):
  values = np.array(list(values), np.float64)
  return values.max() + np.log(np.exp(values - values.max()).sum())


def domain_of(row):
  (first, last), _, _ = ROWS[row]
  return [0, *range(first, last + 1)]


def log_prob(x, row, i, domain=None):
  x = x[row].astype(np.float64)
  return x[i] - log_sum(x[domain if domain else domain_of(row)])


def first_gold(row):
  return ROWS[row][1][0] if ROWS[row][1] else (0, 0)


def check(spec, scores, expected, batch=None):
  """Checks the losses of `spec`; `expected(row)` is the loss of a window."""
  batch = batch or batch_of(ROWS)
  losses = jax.jit(build(spec).loss)(scores, batch)
  np.testing.assert_allclose(
      losses, [expected(r) for r in range(len(losses))], rtol=1e-5, atol=1e-5)


def cross_entropy(scores, row, domain=None):
  start, end = first_gold(row)
  return (-log_prob(scores.start, row, start, domain)
          - log_prob(scores.end, row, end, domain))


@pytest.mark.parametrize('spec', ['cross_entropy', 'conditional'])
def test_cross_entropy_is_its_definition(spec):
  scores = draw()
  check(spec, scores, lambda r: cross_entropy(scores, r) / 2)
  check(f'{spec}(reduction="sum", domain="all")', scores,
        lambda r: cross_entropy(scores, r, list(range(LENGTH))))


@pytest.mark.parametrize('longest', [1, 3, 30])
def test_span_softmax_is_cross_entropy_plus_log_valid_mass(longest):
  scores, batch = draw(fields=()), batch_of(ROWS)
  mass = np.array([sum(
      np.exp(log_prob(scores.start, r, i) + log_prob(scores.end, r, j))
      for i, j in [*set(legal(r, scores, longest)) - {'null'}, (0, 0)])
      for r in range(BATCH)])
  for fields in ((), FIELDS):  # pair and null scores do not count
    valid_mass = jax.jit(functools.partial(
        span_scores.valid_mass, max_answer_length=longest))(
            draw(fields=fields)
            .replace(start=scores.start, end=scores.end), batch['context_mask'])
    np.testing.assert_allclose(valid_mass, mass, rtol=1e-5)
  assert (mass[:-1] < 1).all() and mass[-1] == valid_mass[-1] == 1
  losses = jax.jit(build(
      f'span_softmax(max_answer_length={longest})').loss)(scores, batch)
  fits = [r for r in range(BATCH)
          if first_gold(r)[1] - first_gold(r)[0] < longest]
  assert len(fits) >= 4
  for r in fits:
    np.testing.assert_allclose(
        losses[r], cross_entropy(scores, r) + np.log(mass[r]), rtol=1e-5,
        atol=1e-5)


def test_span_softmax_over_all_pairs_is_cross_entropy():
  scores = draw(fields=())
  check('span_softmax(constrained=False)', scores,
        lambda r: cross_entropy(scores, r))


@pytest.mark.parametrize('fields', [(), ('pair',), ('null',), ('pair', 'null')])
@pytest.mark.parametrize('longest', [2, 30])
def test_span_softmax_is_brute_force(fields, longest):
  scores = draw(fields=fields)
  def expected(row):
    gold = [first_gold(row)] if ROWS[row][1] else []
    cells = legal(row, scores, longest, gold)
    return log_sum(cells.values()) - cells[gold[0] if gold else 'null']
  name = 'joint' if 'pair' in fields else 'span_softmax'
  check(f'{name}(max_answer_length={longest})', scores, expected)


@pytest.mark.parametrize(('fields', 'width'), [
    (('null',), 3), (('pair',), 1), (('pair', 'null'), 3), (('pair',), 30)])
def test_span_softmax_over_all_pairs_is_brute_force(fields, width):
  scores = draw(fields=fields, width=width)
  def expected(row):
    cells = everything(row, scores)
    return log_sum(cells.values()) - cells[first_gold(row)]
  check('span_softmax(constrained=False)', scores, expected)


def test_a_gold_span_beyond_what_the_head_scores_has_no_pair_term():
  scores = draw(fields=('pair',), width=2)
  def expected(row):
    gold = [first_gold(row)] if ROWS[row][1] else []
    cells = legal(row, scores, 2, gold)
    return log_sum(cells.values()) - cells[gold[0] if gold else 'null']
  check('joint(max_answer_length=2)', scores, expected)


def test_a_head_narrower_than_the_objective_is_refused():
  with pytest.raises(errors.UserError, match='exceeds the 4 lengths') as e:
    build('joint(max_answer_length=5)').loss(
        *on_device(draw(width=4), batch_of(ROWS)))
  assert '\n' not in str(e.value)


def test_compound_is_the_mean_of_three_losses():
  scores = draw()
  apart = scores.boundary
  joint = run('joint', scores, batch_of(ROWS))[0]
  check('compound', scores,
        lambda r: (cross_entropy(apart, r) + float(joint[r])) / 3)


@pytest.mark.parametrize('longest', [2, 30])
@pytest.mark.parametrize(('spec', 'combine'), [
    ('marginal(', log_sum), ('hard_em(tau=1.0, cap=1.0, ', max),
    ('hard_em(cap=0.0, ', log_sum)])
def test_marginal_and_hard_em_are_their_definitions(spec, combine, longest):
  scores = draw()
  def expected(row):
    golds = ROWS[row][1]
    cells = legal(row, scores, longest, golds)
    return log_sum(cells.values()) - combine(
        [cells[g] for g in golds or ['null']])
  check(f'{spec}max_answer_length={longest})', scores, expected)


def test_marginal_over_boundaries_is_its_definition():
  scores = draw()
  def expected(row):
    golds = ROWS[row][1] or [(0, 0)]
    starts, ends = ({g[k] for g in golds} for k in (0, 1))
    return -(log_sum(log_prob(scores.start, row, i) for i in starts)
             + log_sum(log_prob(scores.end, row, j) for j in ends)) / 2
  check('marginal(over="boundary")', scores, expected)


@pytest.mark.parametrize(('spec', 'same'), [
    ('marginal', 'span_softmax'), ('hard_em', 'span_softmax'),
    ('hard_em(cap=1.0, tau=1.0)', 'span_softmax'),
    ('f1_weighted(weight=0.0)', 'span_softmax'),
    ('marginal(constrained=False)', 'cross_entropy(reduction="sum")'),
    ('hard_em(constrained=False)', 'cross_entropy(reduction="sum")'),
    ('span_softmax(constrained=False)', 'cross_entropy(reduction="sum")'),
    ('marginal(over="boundary")', 'cross_entropy'),
    ('label_smoothing(epsilon=0.0)', 'cross_entropy'),
    ('label_smoothing(epsilon=0.0, domain="all")',
     'cross_entropy(domain="all")'),
    ('boundary_kernel(temperature=1e-3)', 'cross_entropy'),
    ('answerability(weight=0.0)', 'cross_entropy'),
    ('conditional', 'cross_entropy')])
def test_with_one_gold_span_or_at_its_limit_it_is_a_simpler_loss(spec, same):
  scores = draw(fields=('null',))
  if same.startswith('cross_entropy'):
    scores = dataclasses.replace(scores, null=(
        scores.null if spec.startswith('answerability') else None))
  one, two = (jax.jit(build(s).loss)(scores, batch_of(ONE_GOLD))
              for s in (spec, same))
  np.testing.assert_allclose(one, two, rtol=1e-6, atol=2e-6)


def test_boundary_marginal_credits_a_start_with_the_end_of_another_mention():
  # The mentions are (4, 5) and (8, 9). The probability is on start 4 and end 9,
  # which is no mention.
  batch = batch_of([((4, 9), [(4, 5), (8, 9)], 0)])
  start, end = np.zeros((2, 1, LENGTH), np.float32)
  start[0, 4] = end[0, 9] = 30
  scores = SpanScores(start, end)
  assert jax.jit(build('marginal(over="boundary")').loss)(scores, batch) < 1e-6
  assert jax.jit(build('marginal').loss)(scores, batch) > 25


def test_hard_em_is_hard_if_the_draw_is_below_its_probability():
  rows = [((4, 9), [(4, 5), (8, 9)], r) for r in range(3)]
  batch, scores = batch_of(rows), draw(batch=3, fields=())
  soft, hard = (jax.jit(build(f'hard_em(tau=1.0, cap={cap})').loss)(
      scores, batch) for cap in (0.0, 1.0))
  steps = np.arange(0, 4000, 50)
  draws = np.random.default_rng(0).random(len(steps), np.float32)
  step_loss = lambda step, number: build('hard_em(tau=1000.0)').loss(
      scores, {**batch, 'step': jnp.full(3, step), 'draw': jnp.full(3, number)})
  losses = jax.jit(jax.vmap(step_loss))(steps, draws)
  is_hard = draws < np.minimum(steps / 1000, 0.8)
  assert 10 < is_hard.sum() < 70
  np.testing.assert_allclose(
      losses, np.where(is_hard[:, None], hard, soft), rtol=1e-6)


def step_draws(seed, steps, devices=1, accumulation=1):
  """Returns the `draw` of each of 8 rows in train steps, [steps, 8]."""
  def loss_fn(params, batch, key):
    del key
    column = jnp.arange(8)[None] == batch['row'][:, None]
    draws = jnp.where(column, batch['draw'][:, None], 0.0)  # [rows, 8]
    return {'loss': 0 * batch['weight'] * params['x'],
            **{str(r): draws[:, r] for r in range(8)}}

  optimizer = optax.sgd(0.0)
  params = {'x': jnp.zeros(())}
  step = functools.partial(step_lib.train_step, loss_fn=loss_fn,
                           optimizer=optimizer, accumulation=accumulation)
  batch = {'row': np.arange(8, dtype=np.int32),
           'weight': np.ones(8, np.float32)}
  if devices > 1:
    batch = {k: v.reshape(devices, -1) for k, v in batch.items()}
    step = jax.pmap(functools.partial(step, axis_name='batch'),
                    axis_name='batch', in_axes=(None, 0), out_axes=None,
                    devices=jax.devices()[:devices])
  else:
    step = jax.jit(step)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      opt_state=optimizer.init(params),
      key_data=jax.random.key_data(jax.random.key(seed)))
  draws = []
  for number in steps:  # any order: a resumed run begins at a later step
    values = step(state.replace(step=jnp.int32(number)), batch)[1]
    draws.append([8 * values[str(r)] for r in range(8)])  # mean → value
  return np.array(draws)


def test_the_draw_of_a_step_depends_on_seed_and_step_alone():
  draws = step_draws(0, range(200))
  assert (draws == draws[:, :1]).all()
  assert (draws >= 0).all() and (draws < 1).all()
  assert len(np.unique(draws)) == 200 and abs(draws.mean() - 0.5) < 0.1
  np.testing.assert_array_equal(step_draws(0, [150, 151]), draws[150:152])
  other = step_draws(1, range(200))
  assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 0.3
  # The schedules of hard EM at its cap differ too.
  assert ((draws < 0.8) != (other < 0.8)).any()


def test_devices_and_micro_steps_share_the_draw_of_a_step():
  for fields in ({'devices': 4}, {'accumulation': 2},
                 {'devices': 2, 'accumulation': 2}):
    np.testing.assert_array_equal(step_draws(0, [0, 7], **fields),
                                  step_draws(0, [0, 7]))


def test_shared_norm_with_one_window_is_cross_entropy():
  rows = [(c, spans[:1], r) for r, (c, spans, _) in enumerate(ROWS)]
  scores = draw()
  check('shared_norm', scores, lambda r: cross_entropy(scores, r) / 2,
        batch_of(rows))


def shared(scores, rows, start, end):
  """Computes the loss of `shared_norm` by its definition.

  `start` and `end` are {(row, position): is gold} of all counted positions.
  """
  total = 0.0
  for x, cells in ((scores.start, start), (scores.end, end)):
    value = lambda c, x=x: float(x[c])
    total += (log_sum(map(value, cells))
              - log_sum(value(c) for c, gold in cells.items() if gold))
  return total / 2


@pytest.mark.parametrize(('spans', 'start', 'end'), [
    # Gold span (8, 10) of window 1 is (4, 6) of window 2. Window 2 owns its
    # start, so the end counts there only, even though window 1 owns token 10.
    (([(8, 10)], [(4, 6)]), {(1, 4)}, {(1, 6)}),
    # No window that contains the span owns its start, so it counts there.
    (([(9, 9)], []), {(0, 9)}, {(0, 9)}),
    # Two spans of two windows share an end, which counts in the first.
    (([(6, 9), (8, 9)], [(4, 5)]), {(0, 6), (1, 4)}, {(0, 9)}),
    # The second window owns the end, but does not hold the span.
    (([(7, 9)], []), {(0, 7)}, {(0, 9)}),
    # No answer in any window.
    (([], []), {(0, 0), (1, 0)}, {(0, 0), (1, 0)}),
    # Another answer in the first window.
    (([(4, 5), (8, 10)], [(4, 6)]), {(0, 4), (1, 4)}, {(0, 5), (1, 6)}),
    # The first window owns the start of a span that only the second holds, and
    # has an answer that it owns.
    (([(4, 5)], [(6, 7)]), {(0, 4), (1, 6)}, {(0, 5), (1, 7)}),
    # Equal positions in two windows are two spans.
    (([(6, 7)], [(6, 7)]), {(0, 6), (1, 6)}, {(0, 7), (1, 7)})])
def test_shared_norm_counts_each_token_once(spans, start, end):
  # The second window begins 4 tokens later. The first window owns its tokens
  # 4 … 7 and 10; the second owns the others.
  rows = [((4, 10), spans[0], 5), ((4, 9), spans[1], 5)]
  batch = batch_of(rows)
  batch['context_start'] = np.array([-4, 0], np.int32)
  owned = [(0, 4), (0, 5), (0, 6), (0, 7), (0, 10),
           (1, 4), (1, 5), (1, 7), (1, 8), (1, 9)]
  batch['start_mask'] = np.zeros((2, LENGTH), bool)
  batch['start_mask'][tuple(zip(*owned, strict=True))] = True
  scores = draw(batch=2)
  cells = {*owned, (0, 0), (1, 0)}
  place = lambda cell: cell[1] - 4 * (cell[0] == 0)

  def counted(golds):
    taken = {place(gold) for gold in golds if gold[1]}
    return {c: c in golds for c in cells | golds
            if c in golds or not c[1] or place(c) not in taken}
  loss = shared(scores, rows, counted(start), counted(end))
  check('shared_norm', scores, lambda r: loss, batch)


def test_shared_norm_of_grouped_batches_does_not_depend_on_the_devices():
  """Compares train steps of 2 devices and 2 micro-steps with whole batches."""
  stream = batches.stream(**batches.GROUPING[3])
  loss, optimizer = build('shared_norm').loss, optax.sgd(0.0)

  def loss_fn(scores, rows, key):
    del key
    return {'loss': loss(jax.tree.map(lambda x: x[rows['row']], scores), rows)}

  wrapped = parallel.wrap_step(functools.partial(
      step_lib.train_step, loss_fn=loss_fn, optimizer=optimizer,
      accumulation=stream.accumulation), mode='pmap',
                               devices=jax.devices()[:stream.devices], axes={})
  for batch in itertools.islice(stream, 3):
    scores = draw(batch=16, length=batch['token_ids'].shape[1], fields=())
    state = step_lib.TrainState(
        step=jnp.zeros((), jnp.int32), params=scores,
        opt_state=optimizer.init(scores),
        key_data=jax.random.key_data(jax.random.key(0)))
    _, values = wrapped.step(
        jax.device_put(state, wrapped.state_sharding(state)),
        wrapped.place_batch(batch))
    np.testing.assert_allclose(values['loss'], np.average(
        jax.jit(loss)(scores, batch), weights=batch['weight']), rtol=1e-6)


@pytest.mark.parametrize(('domain', 'columns'), [
    ('context', None), ('all', list(range(LENGTH)))])
def test_label_smoothing_spreads_over_valid_positions(domain, columns):
  scores = draw()
  def expected(row):
    total = 0.0
    for x, gold in zip((scores.start, scores.end), first_gold(row),
                       strict=True):
      valid = domain_of(row)
      even = np.mean([log_prob(x, row, i, columns) for i in valid])
      total -= 0.9 * log_prob(x, row, gold, columns) + 0.1 * even
    return total / 2
  check(f'label_smoothing(domain="{domain}")', scores, expected)


@pytest.mark.parametrize(('options', 'temperature', 'columns'), [
    ('', 1.0, None), ('temperature=1.5', 1.5, None),
    ('domain="all"', 1.0, list(range(LENGTH)))])
def test_boundary_kernel_is_its_definition(options, temperature, columns):
  scores = draw()
  def expected(row):
    total = 0.0
    for x, gold in zip((scores.start, scores.end), first_gold(row),
                       strict=True):
      near = {i: np.exp(-abs(i - gold) / temperature)
              for i in domain_of(row)[1:]}
      if not ROWS[row][1]:
        near = {0: 1.0}
      total -= sum(q / sum(near.values()) * log_prob(x, row, i, columns)
                   for i, q in near.items())
    return total / 2
  check(f'boundary_kernel({options})', scores, expected)


def test_sigmoid_is_its_definition():
  scores = draw()
  def expected(row):
    total = 0.0
    for x, gold in zip((scores.start, scores.end), first_gold(row),
                       strict=True):
      for i in domain_of(row):
        p = 1 / (1 + np.exp(-float(x[row, i])))
        total -= np.log(p if i == gold else 1 - p)
    return total / 2
  check('sigmoid', scores, expected)


@pytest.mark.parametrize('weight', [0.3, 1.0])
@pytest.mark.parametrize('longest', [2, 30])
def test_f1_weighted_is_its_definition(weight, longest):
  scores = draw()
  def f1(span, gold):
    a, b = (set(range(s[0], s[1] + 1)) for s in (span, gold))
    return 2 * len(a & b) / (len(a) + len(b))
  def expected(row):
    golds = ROWS[row][1]
    cells = legal(row, scores, longest, golds)
    if not golds:
      return log_sum(cells.values()) - cells['null']
    credit = {s: weight * max(f1(s, g) for g in golds)
              + (1 - weight) * (s in golds) for s in set(cells) - {'null'}}
    return log_sum(cells.values()) - log_sum(
        cells[s] + np.log(c) for s, c in credit.items() if c)
  check(f'f1_weighted(weight={weight}, max_answer_length={longest})', scores,
        expected)


@pytest.mark.parametrize(('spec', 'weight'), [
    ('answerability(weight=0.3)', 0.3),
    ('answerability', 0.5)])  # of XLNet's code
def test_answerability_is_judged_per_window(spec, weight):
  # Windows 4 and 5 belong to one question; only window 4 contains its answer.
  scores = draw()
  def expected(row):
    p = 1 / (1 + np.exp(-float(scores.null[row])))
    return cross_entropy(scores, row) / 2 - weight * np.log(
        1 - p if ROWS[row][1] else p)
  check(spec, scores, expected)


def test_answerability_of_a_grouped_loss_is_the_mean_over_its_windows():
  scores, batch = draw(), batch_of(ROWS)
  base = run('shared_norm', scores, batch)[0]
  def expected(row):
    windows = [r for r in range(BATCH) if ROWS[r][2] == ROWS[row][2]]
    return float(base[row]) + np.mean([
        np.log1p(np.exp((1 if ROWS[r][1] else -1) * float(scores.null[r])))
        for r in windows])
  check('answerability(base="shared_norm", weight=1.0)', scores, expected)


def test_answerability_needs_all_that_its_base_needs():
  objective = build('answerability(base="joint(max_answer_length=5)")')
  assert objective.needs == {'null', 'pair'} and objective.scores_other_spans
  assert build('answerability(base="shared_norm")').needs_whole_questions
  assert not build('answerability').scores_other_spans


@pytest.mark.parametrize(('spec', 'message'), [
    ('cross_entropy(domain="al")', "did you mean 'all'"),
    ('conditional(reduction="avg")', 'known: mean, sum'),
    ('span_softmax(max_answer_length=0)', 'must be at least 1'),
    ('joint(max_answer_length=-1)', "'joint': max_answer_length=-1"),
    ('compound(max_answer_length=0)', "'compound'"),
    ('marginal(over="spam")', "did you mean 'span'"),
    ('marginal(max_answer_length=0)', "'marginal'"),
    ('hard_em(tau=0.0)', 'tau=0.0 must be above 0'),
    ('hard_em(tau=1e999)', 'finite'),
    ('hard_em(cap=1.5)', r'outside \[0, 1\]'),
    ('f1_weighted(weight=2.0)', r'outside \[0, 1\]'),
    ('label_smoothing(epsilon=1.0)', r'outside \[0, 1\)'),
    ('label_smoothing(domain="contex")', "did you mean 'context'"),
    ('boundary_kernel(temperature=0.0)', 'must be above 0'),
    ('boundary_kernel(domain="x")', 'known: all, context'),
    ('answerability(weight=-1.0)', 'at least 0'),
    ('answerability(weight=1e999)', 'finite'),
    ('answerability(base="joynt")', "did you mean 'joint'"),
    ('shared_norm(x=1)', 'takes none')])
def test_a_bad_argument_is_one_line(spec, message):
  with pytest.raises(errors.UserError, match=message) as e:
    build(spec)
  assert '\n' not in str(e.value)
