"""Batches gathered on the device are those of the host, and train the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import build
from qa_jax import errors
from qa_jax import features
from qa_jax import gather
from qa_jax import heads
from qa_jax import objectives
from qa_jax import parallel
from qa_jax import update
from qa_jax.data import batches
from qa_jax.data import cache
from qa_jax.models import qa
from tests import test_windows
from tests import tiny

BUCKETS = (48, 56, 64)
LAYOUTS = [
    {'buckets': BUCKETS}, {'buckets': BUCKETS, 'group_questions': True},
    {'packing': True}, {'packing': True, 'group_questions': True},
    {'buckets': BUCKETS, 'devices': 2, 'accumulation': 2},
    {'packing': True, 'devices': 2, 'accumulation': 2},
    {'packing': True, 'devices': 1, 'accumulation': 4}]


@pytest.fixture(scope='module')
def windows():
  """Of one to three windows a question, some without an answer."""
  return features.load(
      tiny.config(), 'synthetic(size=41, sentences=6, impossible=0.3)',
      cache.Learned(300, True))[0]


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_the_device_gathers_what_the_host_gathers(windows, layout):
  assert windows.example_of.max() + 8 < len(windows)
  made = batches.TrainBatches(
      windows, np.arange(len(windows)), 16, seed=3,
      **{'buckets': BUCKETS[-1:], **layout})
  tokens = jax.device_put(features.token_store(windows))
  run = jax.jit(lambda tokens, rows: gather.gather(
      tokens, rows, accumulation=made.accumulation))
  padding = 0
  for _ in range(made.steps_per_epoch):
    length, rows = made.next_rows()
    expected = made.gather(length, rows)
    found = jax.device_get(run(tokens, gather.Rows(rows, length)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(
          found[name], value, strict=True, err_msg=name)
    padding += (rows['window'] < 0).sum()
  assert padding


def test_windows_without_tokens_are_gathered_too():
  windows = test_windows.cut(test_windows.example(0))
  found = jax.device_get(gather.gather(
      jax.device_put(features.token_store(windows)),
      gather.Rows({'window': np.array([0, -1], np.int32),
                   'row': np.arange(2, dtype=np.int32)}, 12),
      accumulation=1))
  for name, value in windows.gather(np.array([0, -1]), 12).items():
    np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.fixture(scope='module')
def model():
  """Embeddings and a head: what reads a batch, and compiles in no time."""
  config = build.bert_config(tiny.config(model={'hidden_size': 8}), 300, None)
  return qa.QAModel(dataclasses.replace(config, num_layers=0),
                    heads.HEADS['independent']())


@pytest.mark.parametrize(('mode', 'devices', 'accumulation', 'layout'), [
    ('jit', 1, 1, {'buckets': (48, 64)}),
    ('pmap', 4, 2, {'buckets': (48, 64)}),
    ('pmap', 2, 2, {'packing': True}),
    ('mesh', 4, 1, {'buckets': (48, 64)}),
    ('mesh', 4, 2, {'packing': True})])
def test_losses_and_gradients_are_those_of_host_batches(
    windows, model, mode, devices, accumulation, layout):
  made = batches.TrainBatches(
      windows, np.arange(21), 16, seed=3, devices=devices,
      accumulation=accumulation, **{'buckets': (64,), **layout})
  optimizer = optax.sgd(1.0)
  step = functools.partial(
      update.train_step, optimizer=optimizer, accumulation=accumulation,
      loss_fn=build.loss(model, objectives.OBJECTIVES['cross_entropy'](),
                         tiny.config().decode))
  placing = dict(mode=mode, devices=jax.devices()[:devices],
                 axes={'data': -1, 'fsdp': 2} if mode == 'mesh' else None)
  made.index = next(  # the batch with padding
      i for i, (_, rows) in enumerate(made._plan) if -1 in rows)
  length, rows = made.next_rows()
  params = qa.init_params(model, jax.random.key(0))
  found = []
  for wrapped, batch in (
      (parallel.wrap(step, **placing), made.gather(length, rows)),
      (parallel.wrap(gather.inside(step, accumulation), **placing,
                     resident=features.token_store(windows)),
       gather.Rows(rows, length))):
    state = update.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key_data=jax.random.key_data(jax.random.key(5)))
    state, values = wrapped.step(
        jax.device_put(state, wrapped.state_sharding(state)),
        wrapped.place_batch(batch))
    found.append(jax.device_get((values, state.params)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), *found)


class Device:
  """One that says how much memory it has."""

  def __init__(self, stats):
    self.memory_stats = lambda: stats


def test_a_store_that_would_not_fit_is_refused(windows):
  tokens = features.token_store(windows)
  size = sum(x.nbytes for x in jax.tree.leaves(tokens))
  for stats in (None, {}, {'bytes_limit': 4 * size}):
    parallel.check_fits(tokens, Device(stats))
  with pytest.raises(errors.UserError, match=(
      r'data.on_device=True.* more than 25% of its .* set it to False')) as e:
    parallel.check_fits(tokens, Device({'bytes_limit': 4 * size - 4}))
  assert '\n' not in str(e.value)
