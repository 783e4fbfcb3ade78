"""Suite search: microseconds per window of the exact search for 20 spans.

The scores of real windows are random but higher in the context, as a trained
model's are; most of the 400 pairs that the peer tries then lie in the context.
The peer is run_qa's loop between logits and text: the 20 best starts times the
20 best ends of all positions. It can miss the best span. It is therefore
compared with the program of qa_jax for the same heuristic, and the exact
searches are compared with an enumeration.
"""

import functools
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.session import TARGETS
from benchmarks.session import Outcome
from benchmarks.session import Session
from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import input_pipeline
from qa_jax.data import sources
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import search
from qa_jax.span_scores import SpanScores

CAP, N_BEST = 30, 20
CONTEXT = 3.0  # standard deviations that scores in the context are higher


def windows_of(config: config_lib.Config) -> windows_lib.WindowSet:
  """Makes the windows of data.train; learns a vocabulary if none is given."""
  examples = sources.load_examples(config.data.train)
  return input_pipeline.make_windows(
      config, examples,
      input_pipeline.load_tokenizer(config, build.init_source(config),
                                    examples))


class Ours:
  """The calls of the worker of qa_jax."""

  def calls(self) -> dict[str, Any]:
    return {'prepare': self.prepare, 'find': self.find, 'run': self.run}

  def prepare(self, config: dict[str, Any], windows: int,
              target: str) -> int:
    """Writes random scores [N, L] and masks of N windows, and returns N."""
    checked = config_lib.check_config(config)
    window_set = windows_of(checked)
    rng = np.random.default_rng(checked.seed)
    rows = rng.permutation(len(window_set))[:windows]
    mask = window_set.gather(rows, checked.data.max_length)['context_mask']
    noise = rng.normal(size=(2, *mask.shape))
    start, end = (noise + CONTEXT * mask).astype(np.float32)
    np.savez(target, start=start, end=end, mask=mask)
    self._start, self._end, self._mask = jax.device_put((start, end, mask))
    return len(rows)

  def find(self, name: str, windows: int, target: str) -> None:
    """Writes the best spans of the first windows."""
    best_spans = self._search(name, windows)
    np.savez(target,
             start=best_spans.start,
             end=best_spans.end,
             score=best_spans.score,
             valid=best_spans.valid)

  def run(self, name: str, windows: int, repeats: int) -> float:
    """Returns the seconds of `repeats` searches of the first windows."""
    began = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(self._search(name, windows))
    return time.perf_counter() - began

  def _search(self, name: str, windows: int) -> search.Spans:
    mask = self._mask[:windows]
    return program(name, CAP)(
        SpanScores(self._start[:windows], self._end[:windows]), mask, mask)


@functools.cache
def program(name: str, cap: int) -> Any:
  """Compiles a search of SEARCHES."""
  return jax.jit(functools.partial(
      search.SEARCHES[name](), max_answer_length=cap, n_best=N_BEST))


def run(session: Session) -> Outcome:
  """Compares two_stage with the peer's loop and with the dense search."""
  out, sizes = Outcome(), session.sizes
  scores = str(session.scratch / 'scores.npz')
  with session.sides('search') as (ours, peer):
    count = ours.call('prepare', windows=sizes.search_windows, target=scores,
                      config=session.config(
                          **vocabulary(session), data__buckets=[]))
    few = min(sizes.dense_windows, count)
    spans = {}
    for name, windows in (('two_stage', count), ('top_k', count),
                          ('dense', few)):
      path = session.scratch / f'{name}.npz'
      ours.call('find', name=name, windows=windows, target=str(path))
      spans[name] = np.load(path)
    same = (harness.Check('two_stage = dense, differing slots', float(sum(
        (spans['two_stage'][k][:few] != spans['dense'][k]).sum()
        for k in ('start', 'end', 'score', 'valid'))), 0),)
    repeats = sizes.search_repeats
    contenders = {
        'two_stage': harness.Contender(
            'ours', 'two_stage', lambda: ours.call(
                'run', name='two_stage', windows=count, repeats=repeats),
            count * repeats),
        'dense': harness.Contender(
            'ours', 'dense', lambda: ours.call(
                'run', name='dense', windows=few, repeats=1),
            few)}
    loop = same
    if peer:
      theirs = session.scratch / 'loop.npz'
      peer.call('load', path=scores)
      missed = peer.call('find', target=str(theirs))['missed']
      loop = same + _compare(spans, np.load(theirs))
      out.notes.append(f'search: the peer misses the best span of {missed} of '
                       f'{count} windows; ours is exact')
      contenders['peer'] = harness.Contender(
          'peer', 'run_qa loop, 20 x 20', lambda: peer.call('run'), count)
    harness.interleave(list(contenders.values()), session.rounds)
  timing = {name: c.timing for name, c in contenders.items()}
  out.timings += timing.values()
  for target, other, checks, against in (
      ('search loop', timing.get('peer'), loop, 'run_qa loop'),
      ('search dense', timing['dense'], same, 'our dense')):
    out.rows.append(harness.Row(
        'search', 'exact top-20', timing['two_stage'], other,
        TARGETS[target].gate, TARGETS[target].goal, checks, against))
  return out


def vocabulary(session: Session) -> dict[str, str]:
  """Returns the config fields of the checkpoint's vocabulary, if any."""
  return {'data__vocab': session.encoder} if session.encoder else {}


def _compare(program_spans: dict[str, Any],
             theirs: Any) -> tuple[harness.Check, ...]:
  """Compares scores [N, 20] with the enumeration and the best with the loop."""
  exact, ours = theirs['exact'], program_spans['two_stage']
  legal = np.isfinite(exact)
  heuristic = np.where(program_spans['top_k']['valid'][:, 0],
                       program_spans['top_k']['score'][:, 0], -np.inf)
  return (
      harness.Check('legal slots', float((legal != ours['valid']).sum()), 0),
      harness.Check('scores = an enumeration', harness.largest(
          np.abs(ours['score'] - exact)[legal & ours['valid']]), 1e-5),
      harness.Check('top_k = the loop', harness.largest(
          np.where(heuristic == theirs['loop'], 0,
                   np.abs(heuristic - theirs['loop']))), 1e-5))
