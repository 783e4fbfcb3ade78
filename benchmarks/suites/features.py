"""Suite features: questions per second from text to windows with labels.

A cold run tokenises and labels; a warm run opens the windows that an earlier
run left in the feature cache. Windows are compared token by token and label by
label. The timed data have as many questions as SQuAD 1.1 has for training.
"""

import pathlib
import time
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.session import TARGETS
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search
from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import input_pipeline
from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.data import windows as windows_lib
from qa_jax.runtime import console

WAYS = ('cold', 'warm')
CLASSIC = 'pad 384'  # variants of the peer
# Share of windows whose label may differ: qa_jax repairs or drops gold spans
# and cuts questions to data.max_question_length.
LABELS = 0.005


class Ours:
  """The calls of the worker of qa_jax."""

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'warm_up': self.warm_up,
            'write': self.write, 'run': self.run}

  def prepare(self, config: dict[str, Any], folder: str) -> None:
    """Reads the data, and reads or learns a vocabulary."""
    self._cache = pathlib.Path(folder) / 'cache'
    self._config = config_lib.check_config(config)
    self._examples = sources.load_examples(self._config.data.train)
    self._tokenizer = input_pipeline.load_tokenizer(
        self._config, build.init_source(self._config), self._examples)
    self._tokenizer.save(pathlib.Path(folder))

  def warm_up(self) -> dict[str, float]:
    """Fills the cache and returns the amount of work of a run."""
    windows = self._make('warm')
    return {'questions': len(windows.examples),
            'tokens': float(windows.total_lengths.sum())}

  def write(self, name: str, target: str) -> None:
    """Writes the windows for comparison."""
    windows = self._make(name)
    batch = windows.gather(np.arange(len(windows)),
                           self._config.data.max_length)
    np.savez(target, **{key: batch[key] for key in (
        'token_ids', 'token_type_ids', 'start_positions', 'end_positions')})

  def run(self, name: str) -> float:
    """Returns the seconds from text, or from a cache entry, to windows."""
    began = time.perf_counter()
    self._make(name)
    return time.perf_counter() - began

  def _make(self, name: str) -> windows_lib.WindowSet:
    data = self._config.data
    lengths = dict(max_length=data.max_length,
                   window_overlap=data.window_overlap,
                   max_question_length=data.max_question_length)
    if name == 'cold':
      return windows_lib.make_windows(
          self._examples, self._tokenizer, **lengths)
    return cache.cached_windows(data.train, self._tokenizer, where=self._cache,
                                say=console.say, **lengths)


def run(session: Session) -> Outcome:
  """Compares qa_jax with prepare_train_features, padded and unpadded."""
  out = Outcome()
  folder = session.scratch / 'features'
  with session.sides('features') as (ours, peer):
    checks = _checks(session, folder, ours, peer)
    path = session.write_examples(
        'all_features', at_least=session.sizes.feature_questions)
    _load(session, folder, path, ours, peer)
    work = ours.call('warm_up')
    contenders = [
        harness.Contender(
            side, name, lambda worker=worker, name=name: worker.call(
                'run', name=name),
            work['questions'], work['tokens'], 'questions')
        for side, worker, names in (
            ('ours', ours, WAYS), ('peer', peer, (CLASSIC, 'unpadded')))
        if worker for name in names]
    harness.interleave(contenders, session.fewer_rounds)
  timing = {c.name: c.timing for c in contenders}
  out.timings += timing.values()
  target = TARGETS['features cold']
  # Torch's data sets have caches too, so a warm run has no peer.
  for name, other, gate, goal, against in (
      ('cold', CLASSIC, target.gate, target.goal, 'prepare_train_features'),
      ('cold', 'unpadded', 0, 0, 'the same, unpadded'),
      ('warm', 'cold', 0, 0, 'without cache')):
    out.rows.append(harness.Row(
        'features', name, timing[name], timing.get(other), gate, goal,
        checks.get(name, ()), against))
  return out


def _load(session: Session, folder: pathlib.Path, path: str,
          ours: harness.Worker, peer: harness.Worker | None) -> None:
  ours.call('prepare', folder=str(folder), config=session.config(
      **search.vocabulary(session), data__train=path))
  if peer:
    peer.call('load', data=path, folder=str(folder))


def _checks(session: Session, folder: pathlib.Path, ours: harness.Worker,
            peer: harness.Worker | None
            ) -> dict[str, tuple[harness.Check, ...]]:
  """Compares cold and warm windows with the peer's."""
  if not peer:
    return {}
  _load(session, folder, session.write_examples('features'), ours, peer)
  ours.call('warm_up')
  peer.call('write', target=str(folder / 'peer.npz'))
  checks = {}
  for name in WAYS:
    ours.call('write', name=name, target=str(folder / f'{name}.npz'))
    checks[name] = compare(np.load(folder / f'{name}.npz'),
                           np.load(folder / 'peer.npz'))
  return checks


def compare(ours: Any, theirs: Any) -> tuple[harness.Check, ...]:
  """Compares the windows [N, L] of both sides, in the order of questions."""
  if ours['token_ids'].shape != theirs['token_ids'].shape:
    return (harness.Check('windows', abs(
        len(ours['token_ids']) - len(theirs['token_ids'])), 0),)
  other = lambda *keys: np.any([
      (ours[k] != theirs[k]).reshape(len(ours[k]), -1).any(axis=1)
      for k in keys], axis=0)
  return (
      harness.Check('windows of other tokens', float(
          other('token_ids', 'token_type_ids').sum()), 0),
      harness.Check('share of other labels', float(
          other('start_positions', 'end_positions').mean()), LABELS))
