"""Suite train: examples per second of fine-tuning at real lengths.

Every contender plans an epoch in its own way (buckets, packing, padding to 384,
padding to the longest, length grouping). It sorts its batches by length and
runs an equal number of them, evenly spread. The seconds of an epoch are the
mean time of these batches times the number of batches in the epoch. Each
contender is thus charged for its own padding and number of batches, over the
same examples.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.session import NAMES
from benchmarks.session import TARGETS
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search
from qa_jax import config as config_lib
from qa_jax.checkpoints import hugging_face as hugging_face_lib
from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.export import hugging_face
from qa_jax.io import files
from qa_jax.runtime import devices
from qa_jax.training import dry_run
from qa_jax.training import trainer as trainer_lib

Checks = dict[str, tuple[harness.Check, ...]]  # checks by contender
CLASSIC = 'float32 pad 384'  # variants of the peer
# Tolerances for rounding: float32 sums in another order, bfloat16 products.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}


def variants(session: Session, replicas: int) -> dict[str, dict[str, Any]]:
  """Returns the ways of qa_jax to train: name → config fields."""
  ways = {f'{dtype} {layout}': {'precision__compute_dtype': dtype,
                                'data__packing': layout == 'packed'}
          for dtype, layout in (('float32', 'buckets'), ('bfloat16', 'buckets'),
                                ('bfloat16', 'packed'))}
  if replicas > 1:
    ways |= {f'{dtype} buckets, {replicas} replicas': {
        **ways[f'{dtype} buckets'], 'parallel__num_devices': replicas}
             for dtype in ('float32', 'bfloat16')}
  return {name: way for name, way in ways.items()
          if dtype_of(name) in session.dtypes}


def replicas_of(session: Session, encoder: str, ours: harness.Worker) -> int:
  """Returns the number of replicas of one thread to compare; 1 for none.

  Two replicas of BERT-base need 3 GB more, and train no faster than one.
  """
  devices = ours.about['devices']
  on_cpu = devices['platform'] == 'cpu'
  return session.threads if on_cpu and encoder == 'minilm_l6' else 1


class Ours:
  """The calls of the worker of qa_jax."""

  def __init__(self):
    self._ways: dict[str, _Way] = {}

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'compare': self.compare,
            'build': self.build, 'run': self.run}

  def prepare(self, config: dict[str, Any], target: str) -> dict[str, Any]:
    """Writes the initial weights of both sides and the windows."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    write_start(trainer, pathlib.Path(target))
    return {'parameters': dry_run.count_parameters(trainer),
            'examples': len(trainer.windows.examples)}

  def compare(self, config: dict[str, Any], target: str) -> dict[str, float]:
    """Makes one update on the only batch and writes the batch to `target`."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    assert trainer.batches.steps_per_epoch == 1, trainer.batches
    batch = next(trainer.batches)
    np.savez(target, **batch)
    _, metrics = trainer.parallel.step(
        placed(trainer), trainer.parallel.place_batch(batch))
    return {key: float(metrics[key]) for key in ('loss', 'grad_norm')}

  def build(self, name: str, config: dict[str, Any],
            steps: int) -> dict[str, Any]:
    """Compiles a variant for the batches that it will be timed on."""
    way = self._ways[name] = _Way(config_lib.check_config(config), steps)
    way.run()
    return {'windows': way.windows, 'tokens': way.tokens}

  def run(self, name: str) -> float:
    return self._ways[name].run()


class _Way:
  """A trainer and the positions of the batches that represent its epoch."""

  def __init__(self, config: config_lib.Config, steps: int):
    self.trainer = trainer_lib.build_trainer(config)
    batches = self.trainer.batches
    count = batches.steps_per_epoch
    sizes = [next(batches)['token_ids'].size for _ in range(count)]
    self._chosen = spread(sizes, steps)
    share = len(self._chosen) / count
    self.windows = len(batches.indices) * share
    self.tokens = float(self.trainer.windows.total_lengths[
        batches.indices].sum()) * share
    self._state = placed(self.trainer)
    self.trainer = dataclasses.replace(self.trainer, state=None)

  def run(self) -> float:
    """Returns the seconds of the chosen batches, host work included."""
    ahead, began = devices.RunAhead(2), time.perf_counter()
    for index in self._chosen:
      self.trainer.batches.seek({'epoch': 0, 'index': index})
      batch = next(self.trainer.batches)
      self._state, metrics = self.trainer.parallel.step(
          self._state, self.trainer.parallel.place_batch(batch))
      ahead.push(index, metrics)
    ahead.drain()
    jax.block_until_ready(self._state)
    return time.perf_counter() - began


def write_start(trainer: trainer_lib.Trainer, folder: pathlib.Path) -> None:
  """Writes weights, vocabulary and training windows for both sides."""
  hugging_face.write_weights(
      hugging_face_lib.to_hugging_face(
          trainer.state.params, ARCHITECTURES['bert']), folder)
  files.write_json(folder / 'config.json', hugging_face.hugging_face_config(
      trainer.model.config, 'BertForQuestionAnswering'))
  trainer.windows.tokenizer.save(folder)
  rows = trainer.batches.indices
  batch = trainer.windows.gather(rows, trainer.config.data.max_length)
  np.savez(folder / 'windows.npz', length=trainer.windows.total_lengths[rows],
           **{key: batch[key] for key in (
               'token_ids', 'token_type_ids', 'start_positions',
               'end_positions', 'start_mask', 'context_mask')})


def spread(sizes: list[int], count: int) -> list[int]:
  """Returns `count` positions, evenly spread over the order by size."""
  order = np.argsort(sizes, kind='stable')
  count = min(count, len(order))
  return [int(order[int((i + 0.5) * len(order) / count)])
          for i in range(count)]


def placed(trainer: trainer_lib.Trainer) -> Any:
  """Returns the train state, placed on the devices of its step."""
  return jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))


def run(session: Session) -> Outcome:
  """Compares qa_jax with the classic and the best peer, for every encoder."""
  out = Outcome()
  for encoder in session.encoders:
    try:
      with session.sides(
          'train', devices=session.threads) as (ours, peer):
        _run(session, encoder, ours, peer, out)
    except harness.WorkerError as e:  # such as out of memory; others go on
      out.rows.append(harness.Row('train', NAMES[encoder], None, None,
                                  note=f'left out: {e}'))
      out.failed.append(f'train {NAMES[encoder]}: {e}')
  return out


def encoder_fields(session: Session, encoder: str) -> dict[str, Any]:
  """Returns the config fields of an encoder before anything is exported."""
  if session.encoder and encoder == 'minilm_l6':
    return {'model__preset': '', 'model__init_from': session.encoder}
  return {'model__preset': encoder, **search.vocabulary(session)}


def _run(session: Session, encoder: str, ours: harness.Worker,
         peer: harness.Worker | None, out: Outcome) -> None:
  batch = session.sizes.train_batch[encoder]
  steps = session.sizes.train_steps[encoder]
  folder = session.scratch / f'train_{encoder}'
  folder.mkdir(exist_ok=True)
  prepared = ours.call('prepare', target=str(folder), config=session.config(
      **encoder_fields(session, encoder), train__batch_size=batch))
  out.notes.append(
      f'train {NAMES[encoder]}: {prepared["parameters"]:,} parameters,'
      f' {prepared["examples"]:,} questions, {batch} windows an '
      f'update, {steps} updates an epoch are timed')
  started = {'model__preset': '', 'model__init_from': str(folder),
             'train__batch_size': batch}
  contenders, checks = _ours(session, ours, peer, folder, started, steps,
                             replicas_of(session, encoder, ours))
  if peer:
    contenders += _peers(session, peer, folder, batch, steps)
  rounds = (session.rounds if encoder == 'minilm_l6'
            else session.fewer_rounds)
  finalists = harness.compete(contenders, rounds, always=(CLASSIC,))
  out.timings += [c.timing for c in contenders]
  add_rows('train', NAMES[encoder], finalists, checks, out)


def _ours(session: Session, ours: harness.Worker, peer: harness.Worker | None,
          folder: pathlib.Path, started: Mapping[str, Any], steps: int,
          replicas: int) -> tuple[list[harness.Contender], Checks]:
  """Returns the variants of qa_jax that agree with the peer, and all checks.

  They are compared on an epoch of one batch, which holds the same examples in
  any layout.
  """
  sample = session.write_examples(
      'sample', max(started['train__batch_size'] // 2, 1))
  still = {**started, 'data__train': sample, 'model__dropout': 0.0,
           'model__attention_dropout': 0.0}
  plain = ours.call(
      'compare', target=str(folder / 'batch.npz'), config=session.config(
          **still, objective='cross_entropy(domain="all")'))
  checks: Checks = {}
  if peer:
    peer.call('build', folder=str(folder))
    theirs = peer.call('compare', batch=str(folder / 'batch.npz'))
    checks['parity'] = _differ('as Hugging Face, float32', plain, theirs,
                               TOLERANCE['float32'])
    context = peer.call('compare_context', batch=str(folder / 'batch.npz'))
  contenders = []
  for name, way in variants(session, replicas).items():
    outcome = ours.call('compare', target=str(folder / 'any.npz'),
                      config=session.config(**still, **way))
    if peer:
      checks[name] = checks['parity'] + _differ(
          name, outcome, context, TOLERANCE[way['precision__compute_dtype']])
      if not all(c.passed for c in checks[name]):
        continue
    built = ours.call('build', name=name, steps=steps,
                      config=session.config(**started, **way))
    contenders.append(harness.Contender(
        'ours', name, lambda name=name: ours.call('run', name=name),
        built['windows'], built['tokens'], group=dtype_of(name)))
  return contenders, checks


def _differ(name: str, ours: Mapping[str, float], theirs: Mapping[str, float],
            tolerance: float) -> tuple[harness.Check, ...]:
  return tuple(harness.Check(
      f'{key} ({name})', abs(ours[key] / theirs[key] - 1), tolerance)
      for key in ('loss', 'grad_norm'))


def peer_variants(session: Session, peer: harness.Worker) -> list[str]:
  """Returns the names of the peer's ways that the session compares."""
  return [name for name in peer.call('variants')
          if dtype_of(name) in session.dtypes]


def _peers(session: Session, peer: harness.Worker, folder: pathlib.Path,
           batch: int, steps: int) -> list[harness.Contender]:
  contenders = []
  for name in peer_variants(session, peer):
    plan = peer.call('plan', name=name, steps=steps, batch_size=batch,
                     windows=str(folder / 'windows.npz'))
    contenders.append(harness.Contender(
        'peer', name, lambda name=name: peer.call('run', name=name),
        plan['windows'], plan['tokens'], group=dtype_of(name)))
  return contenders


def dtype_of(name: str) -> str:
  """Returns the dtype at the start of a contender's name."""
  return name.split()[0]


def add_rows(suite: str, what: str, finalists: list[harness.Contender],
             checks: Checks, out: Outcome) -> None:
  """Adds the rows of the best variant, then the variants that were refused."""
  def best(side: str, group: str = '') -> harness.Timing | None:
    some = [c for c in finalists
            if c.side == side and group in ('', c.group)]
    return harness.fastest(some).timing if some else None

  classic = next((c.timing for c in finalists if c.name == CLASSIC), None)
  for target, ours, peer, against in (
      ('classic', best('ours'), classic, f'torch {CLASSIC}'),
      ('best', best('ours'), best('peer'), 'the best of the peers'),
      ('float32', best('ours', 'float32'), best('peer', 'float32'),
       'the best float32 of the peers')):
    wanted = TARGETS[f'{suite} {target}']
    out.rows.append(harness.Row(
        suite, what, ours, peer, wanted.gate, wanted.goal,
        checks.get(ours.name, ()) if ours else (), against))
  out.rows += [
      harness.Row(suite, f'{what}, {name}', None, None, checks=matching)
      for name, matching in checks.items()
      if not all(c.passed for c in matching)
  ]
