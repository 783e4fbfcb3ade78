"""Suite input: batches per second from windows in memory to the device.

qa_jax gathers a whole batch at the length of its bucket from ragged arrays. The
peer's DataLoader stacks rows that were padded to 384, one at a time.
"""

import pathlib
import time
from typing import Any

import jax

from benchmarks import harness
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search
from benchmarks.suites import train
from qa_jax import config as config_lib
from qa_jax.training import trainer as trainer_lib

BATCH = 16


class Ours:
  """The calls of the worker of qa_jax."""

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'run': self.run}

  def prepare(self, config: dict[str, Any], target: str) -> dict[str, float]:
    """Writes the windows and counts tokens and windows of an epoch."""
    self._trainer = trainer = trainer_lib.build_trainer(
        config_lib.check_config(config))
    train.write_start(trainer, pathlib.Path(target))
    tokens = windows = 0.0
    for _ in range(trainer.batches.steps_per_epoch):
      mask = next(trainer.batches)['attention_mask'].astype(bool)
      real = mask.sum(axis=1) > 1  # a padding row is one [CLS]
      tokens, windows = tokens + mask[real].sum(), windows + real.sum()
    return {'windows': float(windows), 'tokens': float(tokens),
            'expected': len(trainer.batches.indices),
            'batches': trainer.batches.steps_per_epoch}

  def run(self, batches: int) -> float:
    """Returns the seconds until `batches` batches are on the device."""
    trainer = self._trainer
    began = time.perf_counter()
    for _ in range(batches):
      jax.block_until_ready(
          trainer.parallel.place_batch(next(trainer.batches)))
    return time.perf_counter() - began


def run(session: Session) -> Outcome:
  """Compares qa_jax with DataLoaders with and without worker processes."""
  out = Outcome()
  batches = session.sizes.input_batches
  folder = session.scratch / 'input'
  folder.mkdir(exist_ok=True)
  with session.sides('input') as (ours, peer):
    prepared = ours.call('prepare', target=str(folder), config=session.config(
        **search.vocabulary(session), model__preset='tiny',
        train__batch_size=BATCH))
    share = batches / prepared['batches']
    work = dict(items=prepared['windows'] * share,
                tokens=prepared['tokens'] * share)
    checks = (harness.Check('windows of an epoch', abs(
        prepared['windows'] - prepared['expected']), 0),)
    contenders = [harness.Contender(
        'ours', 'gathered buckets', lambda: ours.call('run', batches=batches),
        **work)]
    if peer:
      theirs = peer.call('load', windows=str(folder / 'windows.npz'),
                         batch_size=BATCH)
      checks += (harness.Check('real tokens of an epoch', abs(
          prepared['tokens'] - theirs['tokens']), 0),)
      contenders += [harness.Contender(
          'peer', name, lambda name=name: peer.call(
              'run', name=name, batches=batches), **work)
          for name in theirs['variants']]
    finalists = harness.compete(contenders, session.rounds)
  out.timings += [c.timing for c in contenders]
  best = {c.side: c.timing for c in finalists}  # one a side
  out.rows.append(harness.Row(
      'input', f'batches of {BATCH} to the device', best['ours'],
      best.get('peer'), checks=checks, against='torch DataLoader'))
  return out
