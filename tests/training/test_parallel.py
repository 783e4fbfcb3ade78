"""Checkpoints restore on other devices than they were saved on."""

import dataclasses
import math
import re
from unittest import mock

import jax
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.training import checkpointing
from qa_jax.training import parallel
from qa_jax.training import trainer as trainer_lib
from tests.common import tiny

MODES = {'pmap': {}, 'data': {'data': -1, 'fsdp': 1},
         'fsdp': {'data': 1, 'fsdp': -1}}
DOWN = [((a, 8), (b, n)) for a in MODES for b in MODES for n in (1, 4)]
UP = [((mode, n), (mode, 8)) for mode in MODES for n in (1, 4)]


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  """Builds a trainer whose state has no two equal arrays or parts of arrays."""
  trainer = trainer_lib.build_trainer(tiny.config(data={'eval': ''}))
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(x.dtype), trainer.state)
  return dataclasses.replace(trainer, state=drawn.replace(
      step=np.asarray(7, np.int32),
      key_data=np.asarray(trainer.state.key_data)))


def wrap_step(trainer: trainer_lib.Trainer, mode: str,
              count: int) -> parallel.Parallel:
  return parallel.wrap_step(
      trainer.step, mode='pmap' if mode == 'pmap' else 'mesh',
      devices=jax.devices()[:count], axes=MODES[mode])


@pytest.fixture(scope='module')
def saved(trainer, tmp_path_factory):
  """Returns a function (mode, devices) → the checkpoints saved on them."""
  stores: dict[tuple[str, int], manager.Checkpoints] = {}

  def save(mode: str, count: int) -> manager.Checkpoints:
    if (mode, count) not in stores:
      state = jax.device_put(
          trainer.state, wrap_step(trainer, mode, count).state_sharding(
              trainer.state))
      stores[mode, count] = manager.Checkpoints(
          tmp_path_factory.mktemp(f'{mode}-{count}'))
      stores[mode, count].save(
          7, params=state.params, metrics={},
          optimizer={'opt_state': state.opt_state, 'step': state.step},
          meta={'position': {'epoch': 0, 'index': 3}, 'devices': count})
    return stores[mode, count]

  yield save
  for store in stores.values():
    store.close()


@pytest.mark.parametrize('batch_size', range(1, 13))
def test_a_batch_divides_into_equal_micro_steps_of_all_devices(batch_size):
  for devices in range(1, 5):
    for accumulation in range(1, 4):
      parts = [[*range(batch_size)][i::devices * accumulation]
               for i in range(devices * accumulation)]
      if len({len(part) for part in parts}) == 1:
        parallel.check_batch(batch_size, devices, accumulation)
      else:
        with pytest.raises(errors.UserError, match='not divisible'):
          parallel.check_batch(batch_size, devices, accumulation)


@pytest.mark.parametrize(('before', 'after'), DOWN + UP)
def test_a_checkpoint_restores_on_other_devices(
    trainer, saved, before, after):
  wrapped = wrap_step(trainer, *after)
  state, counts, position = checkpointing.restore_state(
      dataclasses.replace(trainer, parallel=wrapped, num_steps=8,
                          devices=jax.devices()[:after[1]]),
      saved(*before), 7)
  assert (counts, position) == ({}, {'epoch': 0, 'index': 3})
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state),
               trainer.state)
  jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or (
      pytest.fail(f'{x.sharding} is not {s}')), state,
               wrapped.state_sharding(trainer.state))
  kernel = state.params['encoder']['layer_0']['mlp']['output']['kernel']
  assert len(kernel.sharding.device_set) == after[1]
  shard = kernel.addressable_shards[0].data
  assert shard.size * (after[1] if after[0] == 'fsdp' else 1) == kernel.size


def test_split_parameters_move_once_and_activations_never(trainer):
  """An update gathers parameters and adds gradients, as in ZeRO."""
  wrapped = wrap_step(trainer, 'fsdp', 8)
  state = jax.device_put(trainer.state, wrapped.state_sharding(trainer.state))
  program = wrapped.compile(state, wrapped.place_batch(
      next(iter(trainer.batches)))).as_text()
  moved = [math.prod(int(n) for n in shape.split(',') if n)
           for results in re.findall(
               r'= (.*?) (?:all-|reduce-scatter|collective-)[a-z-]*\(', program)
           for shape in re.findall(r'\w\[([\d,]*)\]', results)]
  params = sum(x.size for x in jax.tree.leaves(trainer.state.params))
  assert params <= sum(moved) < 2.5 * params


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('mode', parallel.MODES)
def test_a_step_frees_the_state_that_it_got(trainer, mode, deterministic):
  """Two states at a time would not fit on a device that one state fills."""
  wrapped = parallel.wrap_step(
      trainer.step, mode=mode, devices=jax.devices(),
      deterministic=deterministic)
  state = jax.device_put(trainer.state, wrapped.state_sharding(trainer.state))
  wrapped.step(state, wrapped.place_batch(next(iter(trainer.batches))))
  kept = [x for x in jax.tree.leaves(state) if not x.is_deleted()]
  assert not kept


def test_a_run_that_is_over_needs_no_devices_of_its_batches(trainer, saved):
  """No batch follows the last step."""
  ended = dataclasses.replace(
      trainer, parallel=wrap_step(trainer, 'pmap', 1),
      devices=jax.devices()[:1],
      batches=mock.Mock(depends_on_devices=True, packing='rows'))
  assert ended.num_steps == 7
  state, *_ = checkpointing.restore_state(ended, saved('pmap', 8), 7)
  assert int(state.step) == 7
  with pytest.raises(errors.UserError, match='8 devices before, 1 now'):
    checkpointing.restore_state(
        dataclasses.replace(ended, num_steps=8), saved('pmap', 8), 7)
