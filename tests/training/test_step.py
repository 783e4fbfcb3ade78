"""The train step: every wrapper makes the update of its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import input_pipeline
from qa_jax import objectives
from qa_jax import span_scores
from qa_jax.data.examples import Example
from qa_jax.models import qa as qa_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import trainer as trainer_lib
from tests.common import random_model
from tests.common import tiny

WRAPPERS = [('jit', 1, {}), ('pmap', 1, {}), ('pmap', 4, {}), ('pmap', 8, {}),
            ('mesh', 8, {'data': 8}),
            ('mesh', 8, {'data': 2, 'fsdp': 4}),
            ('mesh', 4, {'data': 1, 'fsdp': -1})]


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(tiny.config())


@pytest.fixture(scope='module')
def batch(trainer) -> dict[str, np.ndarray]:
  """Builds 16 rows, of which the last 5 are padding.

  The last of 4 or 8 devices has only padding rows.
  """
  rows = np.concatenate([np.arange(11), np.full(5, -1)])
  return {**trainer.windows.gather(rows, 64),
          'row': np.arange(16, dtype=np.int32)}


def loss_fn(trainer, params, batch, key):
  scores = trainer.model.apply(
      {'params': params}, **qa_lib.model_inputs(batch), dropout_key=key,
      rows=batch['row'])
  return {'loss': objectives.cross_entropy().loss(scores, batch)}


def sgd_update(trainer, batch, mode, devices, axes, accumulation=1):
  """Returns loss, gradient norm and new parameters of one SGD step."""
  optimizer = optax.sgd(1.0)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=trainer.state.params,
      opt_state=optimizer.init(trainer.state.params),
      key_data=jax.random.key_data(jax.random.key(5)))
  wrapped = parallel.wrap_step(
      functools.partial(
          step_lib.train_step, loss_fn=functools.partial(loss_fn, trainer),
          optimizer=optimizer, accumulation=accumulation),
      mode=mode, devices=jax.devices()[:devices], axes=axes)
  state = jax.device_put(jax.tree.map(jnp.copy, state),
                         wrapped.state_sharding(state))
  state, values = wrapped.step(state, wrapped.place_batch(batch))
  return jax.device_get((values['loss'], values['grad_norm'], state.params))


@pytest.fixture(scope='module')
def reference(trainer, batch):
  """Computes the update from the 11 real rows only, by its definition."""
  real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
  key = jax.random.fold_in(jax.random.key(5), 0)
  mean = lambda params: loss_fn(trainer, params, real, key)['loss'].mean()
  loss, grads = jax.jit(jax.value_and_grad(mean))(trainer.state.params)
  return jax.device_get((loss, optax.tree.norm(grads), jax.tree.map(
      jnp.subtract, trainer.state.params, grads)))


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'devices', 'axes'), WRAPPERS)
def test_loss_gradient_and_update_do_not_depend_on_the_wrapper(
    trainer, batch, reference, mode, devices, axes):
  update = sgd_update(trainer, batch, mode, devices, axes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), update, reference)


@pytest.mark.parametrize('accumulation', [2, 4])
def test_accumulation_changes_nothing_but_the_rows_at_a_time(
    trainer, batch, reference, accumulation, monkeypatch):
  of_rows, counts = loss_fn, set()

  def counted(trainer, params, rows, key):
    counts.add(len(rows['row']))
    return of_rows(trainer, params, rows, key)

  monkeypatch.setitem(globals(), 'loss_fn', counted)
  update = sgd_update(trainer, batch, 'pmap', 2, {}, accumulation)
  assert counts == {16 // 2 // accumulation}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), update, reference)


def test_rows_stay_on_their_device_in_every_micro_step():
  """Row r is in micro-step r mod 3, wherever the mesh divides the rows."""
  seen = []

  def loss_fn(params, rows, key):
    jax.debug.callback(lambda x: seen.append(x.tolist()), rows['row'])
    return {'loss': params * rows['row']}

  jax.jit(functools.partial(
      step_lib.train_step, loss_fn=loss_fn, accumulation=3,
      optimizer=optax.with_extra_args_support(optax.identity())))(
          step_lib.TrainState(
              step=np.int32(0), params=np.float32(1), opt_state=(),
              key_data=np.zeros(2, np.uint32)),
          {'row': np.arange(12, dtype=np.int32),
           'weight': np.ones(12, np.float32)})
  jax.effects_barrier()
  assert sorted(seen) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_a_batch_of_padding_alone_changes_nothing(trainer, batch):
  empty = {**batch, 'weight': np.zeros(16, np.float32)}
  loss, norm, params = sgd_update(trainer, empty, 'pmap', 2, {})
  assert loss == norm == 0
  jax.tree.map(np.testing.assert_array_equal, params,
               jax.device_get(trainer.state.params))


def test_one_real_row_is_the_mean_of_one(trainer, batch):
  one = {**batch, 'weight': np.eye(16, dtype=np.float32)[3]}
  loss, _, params = sgd_update(trainer, one, 'pmap', 2, {})
  key = jax.random.fold_in(jax.random.key(5), 0)
  real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
  expected, grads = jax.jit(jax.value_and_grad(
      lambda p: loss_fn(trainer, p, real, key)['loss'][3]))(
          trainer.state.params)
  assert loss == pytest.approx(float(expected), rel=1e-6)
  jax.tree.map(lambda a, p, g: np.testing.assert_allclose(
      a, p - g, rtol=1e-6, atol=1e-6), params,
               jax.device_get(trainer.state.params), jax.device_get(grads))


def test_every_step_has_its_dropout_masks(trainer, batch):
  """Compares losses of equal parameters with dropout keys folded by hand."""
  key, losses = jax.random.key(5), []
  for step in (0, 1, 7):
    state = step_lib.TrainState(
        step=jnp.asarray(step, jnp.int32), params=trainer.state.params,
        opt_state=(), key_data=jax.random.key_data(key))
    _, values = jax.jit(functools.partial(
        step_lib.train_step, loss_fn=functools.partial(loss_fn, trainer),
        optimizer=optax.with_extra_args_support(optax.identity())))(
            state, batch)
    real = {k: jnp.asarray(v[:11]) for k, v in batch.items()}
    expected = loss_fn(trainer, trainer.state.params, real,
                       jax.random.fold_in(key, step))['loss'].mean()
    losses.append(float(values['loss']))
    assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
  assert len(set(losses)) == 3


def test_the_schedule_ends_with_the_run(trainer):
  assert float(trainer.schedule(trainer.num_steps)) == 0
  assert float(trainer.schedule(trainer.num_steps - 1)) > 0


@pytest.mark.parametrize('longest', [1, 3, 30])
def test_the_valid_mass_is_of_the_spans_that_decoding_allows(longest):
  qa = random_model.random_qa('independent')
  windows = input_pipeline.make_windows(qa.config, [Example(
      '0', random_model.QUESTION, random_model.CONTEXT)], qa.tokenizer)
  batch = windows.gather(np.arange(1), 32) | {'row': np.zeros(1, np.int32)}
  loss = trainer_lib.build_loss(
      qa.model, objectives.cross_entropy(), dataclasses.replace(
          qa.config.decode, max_answer_length=longest))
  scores = qa.model.apply({'params': qa.params}, **qa_lib.model_inputs(batch))
  np.testing.assert_allclose(
      loss(qa.params, batch, None)['valid_mass'], span_scores.valid_mass(
          scores, batch['context_mask'], max_answer_length=longest))
