"""Suite evaluate: questions per second from logits to EM and F1.

The logits are noise, higher in the context, with a peak at the gold span, so
that some answers are right. The two sides differ on purpose: the peer keeps the
best 20 starts and ends while qa_jax searches exactly, hence the tolerance.
run_qa lacks BERT's rule that a start counts only in the window with the most
context around it, so qa_jax leaves the rule out here.
"""

import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.session import TARGETS
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search
from qa_jax import config as config_lib
from qa_jax.decoding import answers
from qa_jax.decoding import candidates
from qa_jax.metrics import predictions
from qa_jax.span_scores import SpanScores

BATCH = 256
POINTS = 0.5  # tolerance of EM and F1, on a scale of 100
METRICS = ('exact_match', 'f1', 'best_exact_match', 'best_f1')


class Ours:
  """The calls of the worker of qa_jax."""

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'score': self.score, 'run': self.run}

  def prepare(self, config: dict[str, Any], target: str,
              folder: str) -> dict[str, float]:
    """Writes the logits [N, L] of all windows."""
    checked = config_lib.check_config(config)
    self._windows = windows = search.windows_of(checked)
    windows.tokenizer.save(pathlib.Path(folder))
    count, length = len(windows), checked.data.max_length
    rng = np.random.default_rng(checked.seed)
    self._logits = rng.normal(size=(2, count, length)).astype(np.float32)
    for logits, gold in zip(self._logits, (
        windows.start_positions, windows.end_positions), strict=True):
      logits[np.arange(count), gold] += rng.normal(6, 2, count)
    self._mask = windows.gather(np.arange(count), length)['context_mask']
    self._logits += np.float32(search.CONTEXT) * self._mask
    self._logits[:, :, 0] += search.CONTEXT
    np.savez(target, start=self._logits[0], end=self._logits[1])
    return {'questions': len(self._windows.examples), 'windows': count,
            'tokens': float(windows.total_lengths.sum())}

  def score(self) -> dict[str, float]:
    """Returns EM and F1, also at the best thresholds."""
    spans = self._search()
    examples = self._windows.examples
    merged = answers.merge_windows(self._windows, spans, n_best=search.N_BEST,
                                  null_rule='min_null')
    always = answers.answer_texts(examples, merged)
    na_scores = {e.id: float(merged.na_score[i])
                 for i, e in enumerate(examples)}
    return predictions.Predictions(
        examples, always, na_scores, version='2.0').metrics(0.0)

  def run(self) -> float:
    """Returns the seconds from logits on the host to metrics."""
    began = time.perf_counter()
    self.score()
    return time.perf_counter() - began

  def _search(self) -> candidates.WindowSpans:
    """Searches all windows, padded to whole batches."""
    find = search.program('two_stage', search.CAP)
    count = len(self._windows)
    parts = []
    for begin in range(0, count, BATCH):
      rows = np.arange(begin, begin + BATCH).clip(max=count - 1)
      start, end = self._logits[:, rows]
      parts.append(find(SpanScores(start, end), *[self._mask[rows]] * 2))
    spans = jax.tree.map(lambda *x: np.concatenate(x)[:count],
                         *jax.device_get(parts))
    return candidates.WindowSpans(
        start=spans.start, end=spans.end, score=spans.score,
        valid=spans.valid, null=spans.null_score)


def run(session: Session) -> Outcome:
  """Compares qa_jax with run_qa's post-processing and the official metric."""
  out = Outcome()
  path = session.write_examples('evaluate', session.sizes.evaluate_questions)
  folder = session.scratch / 'evaluate'
  logits = folder / 'logits.npz'
  with session.sides('evaluate') as (ours, peer):
    work = ours.call(
        'prepare', target=str(logits), folder=str(folder),
        config=session.config(**search.vocabulary(session), data__train=path))
    scores = ours.call('score')
    contenders, checks = [harness.Contender(
        'ours', 'search, aggregate, metrics', lambda: ours.call('run'),
        work['questions'], work['tokens'], 'questions')], ()
    if peer:
      theirs = peer.call('load', data=path, folder=str(folder),
                         logits=str(logits))
      checks = (harness.Check('windows', abs(
          theirs['windows'] - work['windows']), 0),)
      if checks[0].passed:
        scored = peer.call('score')
        checks += tuple(harness.Check(key, abs(scores[key] - scored[key]),
                                      POINTS) for key in METRICS)
      contenders.append(harness.Contender(
          'peer', 'run_qa post-processing, official metric',
          lambda: peer.call('run'), work['questions'], work['tokens'],
          'questions'))
    if all(c.passed for c in checks):
      harness.interleave(contenders, session.rounds)
      out.timings += [c.timing for c in contenders]
  timing = {t.side: t for t in out.timings}
  out.rows.append(harness.Row(
      'evaluate', 'logits → EM, F1', timing.get('ours'), timing.get('peer'),
      TARGETS['evaluate'].gate, TARGETS['evaluate'].goal, checks,
      'run_qa post-processing'))
  return out
