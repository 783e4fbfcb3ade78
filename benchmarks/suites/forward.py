"""Suite forward: windows per second over a held-out set, at real lengths.

qa_jax runs its evaluation program of encoder, head and span search; the peer
stops at the logits. Both see all windows in every run.
"""

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.session import NAMES
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import train
from qa_jax import config as config_lib
from qa_jax.inference import decode
from qa_jax.training import trainer as trainer_lib

# Tolerances of scores, in standard deviations of the peer's float32 logits.
TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.2}
REFERENCE = 'float32 pad to longest'


class Ours:
  """The calls of the worker of qa_jax."""

  def __init__(self):
    self._trainers: dict[str, trainer_lib.Trainer] = {}

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'build': self.build, 'run': self.run}

  def prepare(self, config: dict[str, Any], target: str) -> dict[str, Any]:
    """Writes the initial weights of both sides and the windows."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    train.write_start(trainer, pathlib.Path(target))
    self._rows = trainer.batches.indices
    return {'windows': len(self._rows), 'tokens': float(
        trainer.windows.total_lengths[self._rows].sum())}

  def build(self, name: str, config: dict[str, Any], target: str) -> None:
    """Compiles a variant and writes its best spans."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    self._trainers[name] = dataclasses.replace(
        trainer, state=train.placed(trainer))
    spans, rows = self._score(name), self._rows
    np.savez(target, start=spans.start[rows], end=spans.end[rows],
             score=spans.score[rows], valid=spans.valid[rows],
             null=spans.null[rows],
             longest=trainer.config.decode.max_answer_length)

  def run(self, name: str) -> float:
    """Returns the seconds of encoder, head and search over all windows."""
    began = time.perf_counter()
    self._score(name)
    return time.perf_counter() - began

  def _score(self, name: str) -> Any:
    trainer = self._trainers[name]
    return decode.score_windows(
        trainer.model, trainer.state.params, trainer.windows, trainer.config,
        mesh=trainer.parallel.mesh)


def run(session: Session) -> Outcome:
  """Compares qa_jax with the classic and the best peer, for one encoder."""
  out = Outcome()
  with session.sides('forward', devices=session.threads) as (ours, peer):
    _run(session, session.encoders[0], ours, peer, out)
  return out


def _run(session: Session, encoder: str, ours: harness.Worker,
         peer: harness.Worker | None, out: Outcome) -> None:
  folder = session.scratch / f'forward_{encoder}'
  folder.mkdir(exist_ok=True)
  sample = session.write_examples('forward', session.sizes.forward_questions)
  prepared = ours.call('prepare', target=str(folder), config=session.config(
      **train.encoder_fields(session, encoder), data__train=sample))
  contenders, checks = [], {}
  reference = None
  if peer:
    peer.call('build', folder=str(folder))
    peer.call('logits', name=REFERENCE, target=str(folder / 'logits.npz'))
    reference = np.load(folder / 'logits.npz')
  replicas = train.replicas_of(session, encoder, ours)
  for name, way in train.variants(session, replicas).items():
    spans = folder / 'spans.npz'
    ours.call('build', name=name, target=str(spans), config=session.config(
        model__preset='', model__init_from=str(folder), data__train=sample,
        **way))
    if reference is not None:
      checks[name] = compare_spans(
          name, np.load(spans), np.load(folder / 'windows.npz'), reference,
          TOLERANCE[way['precision__compute_dtype']])
      if not all(c.passed for c in checks[name]):
        continue
    contenders.append(harness.Contender(
        'ours', name, lambda name=name: ours.call('run', name=name),
        prepared['windows'], prepared['tokens'],
        group=train.dtype_of(name)))
  if peer:
    contenders += _peers(session, peer, folder, prepared, reference, checks,
                         out)
  finalists = harness.compete(
      contenders, session.rounds, always=(train.CLASSIC,))
  out.timings += [c.timing for c in contenders]
  train.add_rows('forward', NAMES[encoder], finalists, checks, out)


def _peers(session: Session, peer: harness.Worker, folder: pathlib.Path,
           prepared: dict[str, Any], reference: Any,
           checks: dict[str, tuple[harness.Check, ...]],
           out: Outcome) -> list[harness.Contender]:
  """Returns the peer's variants that agree with its float32 logits."""
  contenders = []
  for name in train.peer_variants(session, peer):
    try:
      peer.call('logits', name=name, target=str(folder / 'other.npz'))
    except harness.WorkerError as e:
      out.notes.append(f'forward: {name} left out: {e}')
      continue
    other, real = np.load(folder / 'other.npz'), np.isfinite(reference['start'])
    check = harness.Check(f'logits ({name})', harness.largest(
        np.abs(other[side] - reference[side])[real].max() / spread(reference)
        for side in ('start', 'end')), TOLERANCE[train.dtype_of(name)])
    if not check.passed:
      checks[name] = (check,)
      continue
    contenders.append(harness.Contender(
        'peer', name, lambda name=name: peer.call('run', name=name),
        prepared['windows'], prepared['tokens'],
        group=train.dtype_of(name)))
  return contenders


def spread(logits: Any) -> float:
  """Returns the standard deviation of start and end logits of real tokens."""
  values = np.stack([logits['start'], logits['end']])
  return float(values[np.isfinite(values)].std())


def compare_spans(name: str, spans: Any, windows: Any, logits: Any,
                  tolerance: float) -> tuple[harness.Check, ...]:
  """Compares the spans of qa_jax with the peer's logits [N, L].

  Checks the score of each span, the null score, and by a plain loop over widths
  that no legal span is better than the best. The logits are NaN where there is
  no token.
  """
  start, end = (np.where(windows[mask], logits[side], -np.inf)
                for side, mask in (('start', 'start_mask'),
                                   ('end', 'context_mask')))
  row = np.arange(len(start))[:, None]
  claimed = start[row, spans['start']] + end[row, spans['end']]
  best = np.full(len(start), -np.inf)
  for width in range(min(int(spans['longest']), start.shape[1])):
    stop = start.shape[1] - width
    best = np.maximum(best, (start[:, :stop] + end[:, width:]).max(axis=1))
  null = logits['start'][:, 0] + logits['end'][:, 0]
  valid, unit = spans['valid'], spread(logits)
  span_scores = spans['score'][:, 0]
  return tuple(harness.Check(f'{what} ({name})', harness.largest(
      np.abs(difference).ravel()) / unit, tolerance)
      for what, difference in (
          ('span scores', (spans['score'] - claimed)[valid]),
          ('best span', (span_scores - best)[valid[:, 0]]),
          ('null', spans['null'] - null)))
