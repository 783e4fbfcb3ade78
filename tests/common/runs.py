"""Tiny runs, killed and read back."""

import json
import pathlib

import jax
import numpy as np
import pytest

from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import devices as devices_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib


def rows_of(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what the machine has a part in."""
  rows = [json.loads(line) for line in (
      workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items()
           if not k.endswith(('_second', '_seconds', 'megabytes'))}
          for row in rows]


def state_of(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, by name."""
  store = manager.Checkpoints(workdir / 'checkpoints')
  trainer = trainer_lib.build_trainer(RunDirectory(workdir).read_config())
  shapes = jax.eval_shape(lambda: trainer.state)
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
  """Stands for a signal: nothing but the process's end handles it."""


def train_until_killed(config, workdir, step, monkeypatch):
  """Trains, and dies with steps in flight."""
  push = devices_lib.RunAhead.push

  def dying(self, item, metrics):
    if item == step:
      raise Killed
    return push(self, item, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(devices_lib.RunAhead, 'push', dying)
    with pytest.raises(Killed):
      train.train(config, workdir)
