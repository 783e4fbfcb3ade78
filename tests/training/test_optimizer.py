"""The optimizer: schedules, decay mask, clipping, layer-wise rates."""

import dataclasses

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.training import optimizer
from qa_jax.training import trainer
from tests.common import adamw
from tests.common import jaxprs
from tests.common import tiny

PARAMS = {
    'encoder': {
        'embeddings': {'word': {'embedding': jnp.ones(2)},
                       'layer_norm': {'scale': jnp.ones(2),
                                      'bias': jnp.ones(2)}},
        'layer_1': {'mlp': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}},
        'layer_11': {'mlp': {'kernel': jnp.ones(2)}},
    },
    'head': {'start': {'kernel': jnp.ones(2)}},
}


def rates(name, steps=100, peak=2.0, warmup=0.1):
  schedule = optimizer.make_schedule(name, learning_rate=peak, num_steps=steps,
                                     warmup_fraction=warmup)
  return np.array([float(schedule(t)) for t in range(steps + 1)])


@pytest.mark.parametrize('name', sorted(optimizer.SCHEDULES))
@pytest.mark.parametrize('warmup', [0.0, 0.1, 0.137])  # of 50 steps: 0, 5, 6
def test_every_schedule_is_its_formula_at_every_step(name, warmup):
  expected = adamw.learning_rates(
      name, peak=2.0, num_steps=50, warmup_fraction=warmup)
  np.testing.assert_allclose(
      rates(name, steps=50, warmup=warmup)[:50], expected, atol=1e-6)


@pytest.mark.parametrize('name', sorted(optimizer.SCHEDULES))
def test_every_schedule_warms_up_from_zero_and_never_exceeds_the_peak(name):
  values = rates(name)
  assert values[0] == 0
  assert values.max() <= 2.0 + 1e-6
  assert np.isfinite(rates(name, warmup=0.0)).all()


def test_an_update_is_computed_in_float32_where_jax_allows_float64():
  optim = dataclasses.replace(config_lib.Optim(), layer_decay=0.5)
  float32 = jax.tree.map(np.float32, PARAMS)

  def update(params):
    _, tx = trainer.build_optimizer(optim, num_steps=8, num_layers=12)
    return tx.update(params, tx.init(params), params)[0]

  expected = update(float32)
  with jax.enable_x64(True):
    wide = [x for x in jaxprs.computed_arrays(jax.make_jaxpr(update)(
        float32).jaxpr) if x.dtype == 'float64' and x.ndim]
    jax.tree.map(np.testing.assert_array_equal, update(float32), expected)
  assert not wide


def test_unknown_schedule_is_refused():
  with pytest.raises(errors.UserError, match="did you mean 'linear'"):
    rates('liner')


def test_biases_and_layer_norms_alone_escape_decay():
  mask = optimizer.decay_mask(PARAMS)
  assert mask == {
      'encoder': {
          'embeddings': {'word': {'embedding': True},
                         'layer_norm': {'scale': False, 'bias': False}},
          'layer_1': {'mlp': {'kernel': True, 'bias': False}},
          'layer_11': {'mlp': {'kernel': True}}},
      'head': {'start': {'kernel': True}}}


def test_layer_rates_are_powers_counted_from_the_head():
  scales = optimizer.layer_scales(PARAMS, 0.5, 12)
  assert scales['head']['start']['kernel'] == 1
  assert scales['encoder']['layer_11']['mlp']['kernel'] == 0.5
  assert scales['encoder']['layer_1']['mlp']['kernel'] == 0.5**11
  assert scales['encoder']['embeddings']['word']['embedding'] == 0.5**13


class FlaxHead(nn.Module):
  """The modules of a user's head, with names that an encoder has too."""

  @nn.compact
  def __call__(self, x):
    x = nn.MultiHeadDotProductAttention(2, name='layer_0')(x)
    return nn.Dense(1, name='embeddings')(nn.LayerNorm()(x))


@pytest.fixture(scope='module')
def head_params():
  return {'head': FlaxHead().init(jax.random.key(0), jnp.ones((1, 3, 4)))[
      'params']}


def test_a_head_trains_at_the_full_rate_whatever_its_modules_are_called(
    head_params):
  assert {'layer_0', 'embeddings'} <= head_params['head'].keys()
  scales = optimizer.layer_scales(head_params, 0.5, 12)
  assert set(jax.tree.leaves(scales)) == {1.0}


def test_the_layer_norm_of_flax_escapes_decay(head_params):
  mask = optimizer.decay_mask(head_params)['head']
  assert mask['LayerNorm_0'] == {'scale': False, 'bias': False}
  assert mask['embeddings'] == {'kernel': True, 'bias': False}


def test_an_encoder_parameter_without_a_rate_is_refused_at_the_start():
  params = {'encoder': {'pooler': {'kernel': jnp.ones(2)}}}
  tx = lambda decay: optimizer.adamw(
      optax.constant_schedule(0.1), layer_decay=decay, num_layers=2)
  with pytest.raises(errors.UserError, match=(
      r'layer_decay=0.5 gives no rate to the parameter encoder/pooler/kernel.* '
      'set layer_decay to 1')):
    tx(0.5).init(params)
  tx(1.0).init(params)


def test_first_update_is_adamw_by_hand():
  """Clipping has no part in it: the first direction is that of any length."""
  grads = {'kernel': jnp.array([3.0, -4.0])}
  params = {'kernel': jnp.array([1.0, 3.0])}
  tx = optimizer.adamw(optax.constant_schedule(0.1), weight_decay=0.5,
                       clip_norm=0.0)
  updates, _ = tx.update(grads, tx.init(params), params)
  # With bias correction, the first Adam update is the sign of the gradient.
  expected = -0.1 * (np.array([1.0, -1.0]) + 0.5 * np.array([1.0, 3.0]))
  np.testing.assert_allclose(updates['kernel'], expected, atol=1e-6)


def config(**changes) -> config_lib.Optim:
  return dataclasses.replace(config_lib.Optim(
      learning_rate=0.1, warmup_fraction=0.25, weight_decay=0.5), **changes)


def trained(optim: config_lib.Optim, gradients) -> dict[str, np.ndarray]:
  """Returns PARAMS after the updates of the optimizer of a config, by path."""
  _, tx = trainer.build_optimizer(optim, num_steps=8, num_layers=12)
  params, state = PARAMS, tx.init(PARAMS)
  for grads in gradients:
    updates, state = tx.update(
        traverse_util.unflatten_dict(grads, sep='/'), state, params)
    params = optax.apply_updates(params, updates)
  return traverse_util.flatten_dict(params, sep='/')


@pytest.mark.parametrize('changes', [
    {}, {'weight_decay': 0.0}, {'clip_norm': 0.0}, {'clip_norm': 0.2},
    {'layer_decay': 0.5}, {'bias_correction': False}, {'eps': 0.1},
    {'bias_correction': False, 'eps': 0.1}, {'learning_rate': 0.3},
    {'warmup_fraction': 0.5}, {'schedule': 'cosine'}, {'schedule': 'bert'}])
def test_updates_of_a_config_are_adamw_in_float64(changes):
  """The gradients have unequal norms below and above both bounds."""
  rng = np.random.default_rng(0)
  start = traverse_util.flatten_dict(PARAMS, sep='/')
  gradients = [{k: np.float32(length * rng.normal(size=2)) for k in start}
               for length in (1.0, 0.03, 5.0, 0.5)]
  optim = config(**changes)
  expected = adamw.train(
      start, gradients, adamw.learning_rates(
          optim.schedule, peak=optim.learning_rate, num_steps=8,
          warmup_fraction=optim.warmup_fraction),
      weight_decay=optim.weight_decay, clip_norm=optim.clip_norm,
      layer_decay=optim.layer_decay, num_layers=12, eps=optim.eps,
      bias_correction=optim.bias_correction)
  for name, value in trained(optim, gradients).items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)
  if changes:  # the field has an effect that the tolerance does not hide
    default = trained(config(), gradients)
    assert max(np.abs(default[k] - expected[k]).max() for k in expected) > 1e-2


def test_without_bias_correction_it_is_the_code_of_bert():
  """Compares three updates with AdamWeightDecayOptimizer of google-research.
  """
  rng = np.random.default_rng(0)
  params = {'kernel': jnp.asarray(rng.normal(size=3), jnp.float32)}
  tx = optimizer.adamw(optax.constant_schedule(0.1), weight_decay=0.01,
                       clip_norm=0.0, bias_correction=False, eps=1e-6)
  state = tx.init(params)
  weight, m, v = np.asarray(params['kernel'], np.float64), 0.0, 0.0
  for _ in range(3):
    grad = rng.normal(size=3)
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    weight = weight - 0.1 * (m / (np.sqrt(v) + 1e-6) + 0.01 * weight)
    updates, state = tx.update(
        {'kernel': jnp.asarray(grad, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params['kernel'], weight, rtol=1e-5)


@pytest.mark.parametrize('fields', [
    {}, {'layer_decay': 0.5, 'clip_norm': 1.0, 'bias_correction': False}])
def test_the_initial_state_of_the_optimizer_is_that_of_optax(fields):
  config = tiny.config(optim=fields)
  state = trainer.build_trainer(config).state
  _, built = trainer.build_optimizer(config.optim, num_steps=7, num_layers=1)
  wanted = built.init(state.params)
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(wanted),
                  strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
