"""Skipped updates: they are counted and reported; too many end the run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import errors
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import optimizer as optimizer_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer
from tests.common import runs
from tests.common import tiny

PARAMS = {'head': {'kernel': np.float32([1.0, 0.5, -2.0])}}


def loss_fn(params, rows, key):
  del key
  w = params['head']['kernel']
  return {'loss': rows['x'] @ w + rows['root'] * jnp.sqrt(jnp.abs(w[0]))}


def optimizer() -> optax.GradientTransformation:
  return optimizer_lib.adamw(
      optax.constant_schedule(0.1), weight_decay=0.1, clip_norm=1.0,
      layer_decay=1.0, bias_correction=True, eps=1e-8, num_layers=1)


def rows(**changes) -> dict[str, np.ndarray]:
  """Builds a batch of four rows; `changes` replace values of the last row."""
  batch = {'x': np.random.default_rng(0).normal(size=(4, 3)),
           'root': np.zeros(4), 'weight': np.ones(4)}
  for name, value in changes.items():
    batch[name][3] = value
  return {**{k: v.astype(np.float32) for k, v in batch.items()},
          'row': np.arange(4, dtype=np.int32)}


def step(batch, mode, count):
  """Makes two steps; returns the states before and after the second, and its
  metrics. Adam has moments by then.
  """
  def one(state, rows, axis_name=None):
    return step_lib.train_step(state, rows, axis_name, loss_fn=loss_fn,
                               optimizer=optimizer())
  wrapped = parallel.wrap_step(one, mode=mode, devices=jax.devices()[:count])
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=jax.tree.map(jnp.asarray, PARAMS),
      opt_state=optimizer().init(PARAMS),
      key_data=jax.random.key_data(jax.random.key(0)))
  state = jax.device_put(state, wrapped.state_sharding(state))
  state, values = wrapped.step(state, wrapped.place_batch(rows()))
  assert values['skipped'] == 0
  before = jax.device_get(state)
  after, values = wrapped.step(state, wrapped.place_batch(batch))
  return before, *jax.device_get((after, values))


@pytest.mark.parametrize(('mode', 'count'), [('jit', 1), ('pmap', 4)])
@pytest.mark.parametrize('change', [
    {'x': np.nan}, {'x': np.inf}, {'weight': np.nan},
    {'x': 1e30},  # the gradient is finite, but its norm overflows
    {'x': [3e38, -3e38, 3e38]}])
def test_an_update_that_is_not_finite_changes_nothing(mode, count, change):
  before, after, values = step(rows(**change), mode, count)
  assert values['skipped'] == 1 and after.step == before.step + 1 == 2
  assert not all(np.isfinite(v) for v in values.values())
  jax.tree.map(np.testing.assert_array_equal,
               (after.params, after.opt_state),
               (before.params, before.opt_state))


def test_a_gradient_alone_that_is_not_finite_is_skipped():
  # √|w| has no gradient at 0.
  params = {'head': {'kernel': np.float32([0, 1, 2])}}
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      opt_state=optimizer().init(PARAMS),
      key_data=jax.random.key_data(jax.random.key(0)))
  after, values = step_lib.train_step(
      state, rows(root=1.0), loss_fn=loss_fn, optimizer=optimizer())
  assert np.isfinite(values['loss']) and values['skipped'] == 1
  jax.tree.map(np.testing.assert_array_equal, after.params, params)


@pytest.mark.parametrize(('share', 'skipped'), [(0.99, 1), (1.0, 0), (0, 0)])
def test_a_longer_gradient_than_skip_norm_is_skipped(share, skipped):
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=PARAMS,
      opt_state=optimizer().init(PARAMS),
      key_data=jax.random.key_data(jax.random.key(0)))
  run = lambda norm: step_lib.train_step(
      state, rows(), loss_fn=loss_fn, optimizer=optimizer(), skip_norm=norm)
  _, values = run(0.0)
  after, values = run(share * float(values['grad_norm']))
  assert values['skipped'] == skipped
  assert np.array_equal(after.params['head']['kernel'],
                        PARAMS['head']['kernel']) == skipped


@pytest.mark.parametrize(('changes', 'clipped'), [({}, False),
                                                  ({'x': 9.0}, True)])
def test_an_ordinary_update_is_the_plain_update(changes, clipped):
  before, after, values = step(rows(**changes), 'jit', 1)
  assert values['skipped'] == 0 and (values['grad_norm'] > 1) == clipped

  @jax.jit
  def plain(params, opt_state, batch):
    grads = jax.grad(lambda p: jnp.sum(
        loss_fn(p, batch, None)['loss'] * batch['weight']))(params)
    grads = jax.tree.map(lambda g: g / batch['weight'].sum(), grads)
    updates, _ = optimizer().update(grads, opt_state, params)
    return optax.apply_updates(params, updates)

  expected = plain(before.params, before.opt_state, rows(**changes))
  # The norm of the step is that of the sums, rounded before the division.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6 if clipped else 0), after.params, expected)
  assert not np.array_equal(after.params['head']['kernel'],
                            before.params['head']['kernel'])


def test_the_logged_rate_is_applied_and_reaches_0_after_skipped_updates():
  config = tiny.config(optim={
      'learning_rate': 1.0, 'warmup_fraction': 0.2, 'weight_decay': 0.0,
      'clip_norm': 0.0})
  make_step = trainer.build_step(
      config, lambda params, rows, key: {
          'loss': rows['x'] * params['head']['kernel'][0]},
      num_steps=10, num_layers=1)
  params = {'head': {'kernel': jnp.ones(1)}}
  _, optimizer = trainer.build_optimizer(
      config.optim, num_steps=10, num_layers=1)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      opt_state=optimizer.init(params),
      key_data=jax.random.key_data(jax.random.key(0)))
  # The direction of Adam is 1 if all gradients are equal. The tolerance is for
  # its bias correction in float32.
  for t in range(10):
    bad = t in (0, 3, 4, 5)
    before = float(state.params['head']['kernel'][0])
    state, values = make_step(state, {
        'x': jnp.full(1, np.nan if bad else 1.0), 'weight': jnp.ones(1),
        'row': jnp.arange(1)})
    rate = t / 2 if t < 2 else (10 - t) / 8
    assert values['learning_rate'] == pytest.approx(rate)
    assert before - float(state.params['head']['kernel'][0]) == pytest.approx(
        0 if bad else rate, abs=1e-4)


def feed(meter, *finite: bool) -> None:
  """Adds steps 1 … n to the meter; step k has windows 10·k and 10·k + 1."""
  for number, good in enumerate(finite, 1):
    meter.add_batch(np.array([10 * number, -1, 10 * number + 1]), np.ones(2))
    meter.add_steps([(number, {
        'loss': 1.0 if good else np.nan, 'grad_norm': 2.0,
        'skipped': 0.0 if good else 1.0})])


@pytest.fixture
def meter(tmp_path):
  log = metrics_log_lib.MetricsLog(tmp_path, 0)
  yield metrics_log_lib.StepMetrics(
      log, metrics_log_lib.Costs(), every_steps=1, steps_per_epoch=4,
      devices=jax.devices(), max_skipped=2)
  log.close()


def test_skipped_updates_are_counted_and_reported(meter, tmp_path, capsys):
  feed(meter, True, False, False, True, False)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split('. ')[1] for line in lines] == [
      'Its windows: 20 21', 'Its windows: 30 31', 'Its windows: 50 51']
  assert '2 in a row' in lines[1] and '1 in a row' in lines[2]

  def no_constant(name):
    raise AssertionError(name)
  written = [json.loads(line, parse_constant=no_constant)
             for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['skipped'] for row in written] == [0, 1, 2, 2, 3]
  assert ['loss' in row for row in written] == [True, False, False, True, False]


def test_a_long_gradient_is_reported_as_above_skip_norm(meter, capsys):
  meter.add_batch(np.array([7]), np.ones(1))
  meter.add_steps([(1, {'loss': 1.0, 'grad_norm': 99.0, 'skipped': 1.0})])
  line, = capsys.readouterr().err.splitlines()
  assert 'gradient norm 99.0 at step 1: above config.optim.skip_norm' in line
  assert line.endswith('Its windows: 7')


def test_gradient_norms_of_every_step_are_in_one_histogram(
    tmp_path, monkeypatch):
  histograms = []
  monkeypatch.setattr(metrics_log_lib.MetricsLog, 'histogram',
                      lambda self, *arguments: histograms.append(arguments))
  log = metrics_log_lib.MetricsLog(tmp_path, 0)
  meter = metrics_log_lib.StepMetrics(
      log, metrics_log_lib.Costs(), every_steps=3, steps_per_epoch=4,
      devices=jax.devices(), max_skipped=2)
  for step, norm in enumerate([1.0, np.nan, 3.0, 4.0, 5.0, 6.0, 7.0], 1):
    meter.add_batch(np.arange(2), np.ones(2))
    meter.add_steps([(step, {'loss': 1.0, 'grad_norm': norm,
                             'skipped': float(np.isnan(norm))})])
  log.close()
  assert histograms == [
      (3, 'train/grad_norm_of_steps', [1.0, 3.0]),
      (6, 'train/grad_norm_of_steps', [4.0, 5.0, 6.0])]


def test_too_many_in_a_row_end_the_run(meter):
  feed(meter, False, False, True, False, False)
  with pytest.raises(errors.UserError, match=(
      'not finite, after 2 skipped in a row of the 2')) as e:
    feed(meter, False)
  assert '\n' not in str(e.value)


def test_skips_survive_a_kill(tmp_path, monkeypatch):
  """A run with bad batches also ends with finite parameters."""
  make = trainer.build_loss

  def poisoned(*args):
    inner = make(*args)

    def loss(params, batch, key):
      out = inner(params, batch, key)
      bad = (batch['step'] == 1) | (batch['step'] == 4)
      return {**out, 'loss': jnp.where(bad, jnp.nan, out['loss'])}
    return loss
  monkeypatch.setattr(trainer, 'build_loss', poisoned)
  config = tiny.config(data={'eval': ''}, train={'num_steps': 6})
  train.train(config, tmp_path / 'whole')
  runs.train_until_killed(config, tmp_path / 'killed', 5)
  train.train(config, tmp_path / 'killed')
  whole, killed = (runs.rows_of(tmp_path / w)
                   for w in ('whole', 'killed'))
  assert whole == killed
  assert [row['skipped'] for row in whole] == [0, 1, 1, 1, 2, 2]
  states = [runs.state_of(tmp_path / w, 6) for w in ('whole', 'killed')]
  for name, value in states[0].items():
    np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    assert name == 'position' or np.isfinite(value).all()
