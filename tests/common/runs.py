"""Helpers that kill tiny runs and read their metrics and checkpoints."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import dispatch


def rows_of(workdir: pathlib.Path) -> list[dict]:
  """Returns the rows of metrics.jsonl without times and memory."""
  rows = [json.loads(line) for line in
          RunDirectory(workdir).metrics_file.read_text().splitlines()]
  return [{k: v for k, v in row.items()
           if not k.endswith(('_second', '_seconds', 'megabytes'))}
          for row in rows]


@functools.cache
def _state_shapes(fields: str):
  """Returns shapes of the train state of the config with these JSON fields."""
  config = config_lib.check_config(json.loads(fields))
  state = trainer_lib.build_trainer(config).state
  return jax.eval_shape(lambda: state)


def state_of(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Returns every array of a checkpoint by name, and the data position."""
  run = RunDirectory(workdir)
  store = manager.Checkpoints(run.checkpoints, read_only=True)
  shapes = _state_shapes(json.dumps(run.read_config().to_dict()))
  place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(
          jax.devices()[0])), tree)
  params, optimizer, meta = store.restore(
      step, params=place(shapes.params), optimizer=place(
          {'opt_state': shapes.opt_state, 'step': shapes.step}))
  store.close()
  leaves = jax.tree_util.tree_leaves_with_path((params, optimizer))
  return {**{jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves},
          'position': meta['position']}


class Killed(BaseException):
  """An error that no code of a run handles, in place of a fatal signal."""


def train_until_killed(config, workdir, step):
  """Trains until `step` is dispatched, and raises Killed with it in flight."""
  def die():
    raise Killed

  with dispatch.fault_at(step, die), pytest.raises(Killed):
    train.train(config, workdir)
