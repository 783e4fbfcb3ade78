"""NaN and infinity in train steps and in metrics."""

import math
import pathlib
import random

import jax.numpy as jnp
import numpy as np

from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.training import train
from qa_jax.training import trainer
from tests.chaos import runs as runs_lib
from tests.common import runs
from tests.common import tiny

# Replacements of a loss x where `hit`; the gradient elsewhere is unchanged.
POISONS = {
    'NaN loss': lambda x, hit: x * jnp.where(hit, jnp.nan, 1.0),
    'Inf loss': lambda x, hit: x + jnp.where(hit, jnp.inf, 0.0),
    'overflowing norm': lambda x, hit: x * jnp.where(hit, 1e30, 1.0),
    'NaN gradient': lambda x, hit: x + 0.0 * jnp.sqrt(
        jnp.where(hit, 0.0 * x, 1.0))}
STEPS, LIMIT = 8, 2  # LIMIT steps in a row are skipped


def non_finite(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R8: steps that are not finite, some more in a row than allowed."""
  draw, skipped, aborted = random.Random(seed), 0, 0
  make = trainer.build_loss
  try:
    for n in range(count):
      kind = [*POISONS][n % len(POISONS)]
      bad = sorted(draw.sample(range(STEPS), draw.randint(1, 3)))
      if n % 2:  # one more in a row than allowed
        first = draw.randrange(STEPS - LIMIT)
        bad = [*range(first, first + LIMIT + 1)]
      trainer.build_loss = lambda *args, kind=kind, bad=bad: _poisoned(
          make(*args), kind, bad)
      aborted += _abort(directory / f'run{n}', bad)
      skipped += len(bad)
  finally:
    trainer.build_loss = make
  return (f'{skipped} poisoned steps ({", ".join(POISONS)}) in {count} runs: '
          f'all skipped, counted, reported with their windows; {aborted} runs '
          f'ended at the one after {LIMIT} in a row; no saved parameter was '
          'ever anything but a number')


def _poisoned(inner, kind, bad):
  def loss(params, batch, key):
    out = inner(params, batch, key)
    hit = jnp.isin(batch['step'], jnp.array(bad))
    return {**out, 'loss': POISONS[kind](out['loss'], hit)}
  return loss


def _abort(workdir: pathlib.Path, bad: list[int]) -> bool:
  """Returns whether the run was aborted; asserts that `bad` predicts it."""
  row = [set(range(n, n + LIMIT + 1)) <= {*bad} for n in range(STEPS)]
  config = tiny.config(
      data={'eval': ''}, parallel={'num_devices': 1}, train={
          'num_steps': STEPS, 'checkpoint_every_steps': 1,
          'max_skipped': LIMIT})
  try:
    train.train(config, workdir)
    assert not any(row), bad
  except errors.UserError as e:
    assert any(row) and 'not finite' in str(e) and '\n' not in str(e), (e, bad)
  rows = runs.rows_of(workdir)
  for entry in rows:
    assert ({'loss', 'grad_norm'} <= {*entry}) == (
        entry['step'] - 1 not in bad), (entry, bad)
    assert entry['skipped'] == sum(s < entry['step'] for s in bad)
  for saved in (workdir / 'checkpoints').iterdir():
    for name, value in runs_lib.arrays_of(saved).items():
      assert np.isfinite(value).all(), (saved, name)
  return any(row)


def best(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R11: metrics that are not numbers among metrics that are."""
  draw, odd = random.Random(seed), 0
  params = {'w': np.zeros((2, 2), np.float32)}
  for n in range(count):
    store = manager.Checkpoints(directory / f'{n}')
    scores: dict[int, float] = {}
    for step in range(1, 7):
      f1 = draw.choice([math.nan, math.inf, -math.inf, draw.uniform(0, 100)])
      odd += not math.isfinite(f1)
      if math.isfinite(f1):
        scores[step] = f1
      store.save(step, params=params, optimizer={
          'step': np.asarray(step, np.int32)}, meta={}, metrics={'f1': f1})
      expected = max(scores, key=lambda s: (scores[s], s), default=None)
      assert store.best == expected and step in store.steps, (scores, step)
      assert expected is None or expected in store.steps
    store.close()
  return (f'{odd} metrics of {6 * count} saves were NaN or infinite: the best '
          'and the latest were kept after each save')
