"""Encoder, head and span search over a data set, as one compiled program."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import input_pipeline
from qa_jax import registry
from qa_jax.data import batch_plans
from qa_jax.data import tokenizer
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.models import qa
from qa_jax.runtime import console
from qa_jax.runtime import devices

BLOCK = 2**14  # windows whose candidates are held at a time: 5 MB at 20 each


def null_rule_needs(decode: config_lib.Decode) -> frozenset[str]:
  """What the null rule reads beyond null scores and spans."""
  return null_rules.NULL_RULES[decode.null_rule].needs


def _program(model: qa.QAModel, decode: config_lib.Decode,
             mesh: jax.sharding.Mesh | None = None, *,
             spread: bool = False) -> Callable[..., dict[str, Any]]:
  """The one program that all who ask for the same have in common."""
  return _searcher(model, decode.search, decode.max_answer_length,
                   decode.n_best, 'normaliser' in null_rule_needs(decode),
                   devices.replicated_sharding(mesh), spread)


@functools.cache
def _searcher(model: qa.QAModel, spec: str, longest: int, n_best: int,
              normaliser: bool, result: jax.sharding.Sharding | None,
              spread: bool) -> Callable[..., dict[str, Any]]:
  """Encoder, head and span search as one program → fields of WindowSpans.

  `mass` is there if there are temperatures, `gold` if the batch has golds.
  """
  find = registry.build(search.SEARCHES, spec, what='search')

  @functools.partial(jax.jit, out_shardings=result)
  def run(params, batch, temperatures):  # [T]
    scores = model.apply({'params': params}, **qa.model_inputs(batch))
    masks = batch['start_mask'], batch['context_mask']
    found = candidates.window_candidates(find,
                                         scores,
                                         *masks,
                                         longest=longest,
                                         n_best=n_best,
                                         normaliser=normaliser)
    if not search.is_exact(spec):
      found['exact'] = search.two_stage(
          scores, *masks, max_answer_length=longest, n_best=1).score[:, 0]
    if len(temperatures):
      found['mass'] = candidates.log_partitions(
          scores, *masks, temperatures, longest=longest)
    if 'gold_spans' in batch:
      found['gold'] = candidates.legal_gold_scores(
          scores, *masks, batch['gold_spans'], longest=longest)
    if spread:
      found['spread'] = candidates.score_statistics(scores,
                                                    masks[1],
                                                    longest=longest)
    return found
  return run


def score_windows(model: qa.QAModel, params: Any,
                  windows: windows_lib.WindowSet, config: config_lib.Config,
                  *, mesh: jax.sharding.Mesh | None = None,
                  progress: str = '', temperatures: Sequence[float] = (),
                  golds: bool = False,
                  spread: bool = False) -> candidates.WindowSpans:
  """Runs encoder, head and search over every window.

  Rows are sharded over all devices of `mesh`; padding rows fill the last
  batch and are dropped. Each process scores the rows of its devices, and gets
  the spans of all. `progress` names a progress bar, '' shows none. All spans
  are added up at each of `temperatures`; `golds`: with scores of the gold
  spans; `spread`: with what `kept.spread` says of each window.
  """
  decode, count = config.decode, mesh.size if mesh else 1
  normaliser = 'normaliser' in null_rule_needs(decode)
  run = _program(model, decode, mesh, spread=spread)
  plan = (batch_plans.plan_packed if config.data.packing else
          batch_plans.plan_eval)(windows.total_lengths,
                                 batch_size=input_pipeline.eval_batch_size(
                                     config, count),
                                 buckets=input_pipeline.batch_buckets(config),
                                 multiple=count)
  one = lambda: np.zeros(len(windows), np.float32)
  each = lambda dtype: np.zeros((len(windows), decode.n_best), dtype)
  some = lambda count: np.zeros((len(windows), count), np.float32)
  out = candidates.WindowSpans(
      start=each(np.int32), end=each(np.int32), score=each(np.float32),
      valid=each(bool), null=one(),
      normaliser=one() if normaliser else None,
      exact=None if search.is_exact(decode.search) else one(),
      temperatures=tuple(temperatures),
      mass=some(len(temperatures)) if len(temperatures) else None,
      gold=some(windows.gold_spans.shape[1]) if golds else None,
      spread=some(len(candidates.STATISTICS)) if spread else None)
  place = (functools.partial(devices.put_rows, mesh=mesh) if mesh
           else jax.device_put)
  bar = console.Progress(progress, len(plan)) if progress else None
  ahead = devices.RunAhead(2)
  scales = np.asarray(temperatures, np.float32)

  def keep(done):
    for (number, rows), found in done:
      real = rows >= 0
      for name, value in found.items():
        getattr(out, name)[rows[real]] = value[real]
      if bar:
        bar.update(number)

  try:
    for number, (length, rows) in enumerate(plan, 1):
      batch = input_pipeline.evaluation_batch(windows, rows, length, mesh,
                                              packed=config.data.packing)
      inputs = (*qa.INPUTS, *qa.PACKED, 'start_mask',
                *['gold_spans'] * golds)
      keep(ahead.push((number, rows), run(params, place(
          {k: batch[k] for k in inputs if k in batch}), scales)))
    keep(ahead.drain())
  finally:
    if bar:
      bar.close()
  return out


def warm_up(model: qa.QAModel, params: Any, config: config_lib.Config,
            words: tokenizer.Tokenizer) -> int:
  """Compiles what `answer` may run on one device, unpacked; how many programs.

  They are one for each bucket and each power of two of windows, up to the
  rows that a batch of the bucket has.
  """
  run = _program(model, config.decode)
  buckets, programs = input_pipeline.batch_buckets(config), 0
  windows = input_pipeline.make_windows(config, [Example('0', '', '')], words)
  for length in buckets:
    most = batch_plans.eval_rows(
        input_pipeline.eval_batch_size(config, 1), length, buckets[-1], 1)
    for size in {min(1 << n, most) for n in range(most.bit_length() + 1)}:
      programs += 1
      batch = windows.gather(np.full(size, -1), length)
      jax.block_until_ready(run(params, jax.device_put(
          {k: batch[k] for k in (*qa.INPUTS, 'start_mask')}),
                                np.ones(1, np.float32)))
  return programs


def answer_questions(model: qa.QAModel,
                     params: Any,
                     windows: windows_lib.WindowSet,
                     config: config_lib.Config,
                     *,
                     temperature: float = 1.0,
                     mesh: jax.sharding.Mesh | None = None,
                     progress: str = '') -> answers_lib.Answers:
  """The n-best list of every question, as config.decode says."""
  return answer_at_temperatures(model,
                                params,
                                windows,
                                config, (temperature,),
                                mesh=mesh,
                                progress=progress)[0]


def answer_at_temperatures(
    model: qa.QAModel,
    params: Any,
    windows: windows_lib.WindowSet,
    config: config_lib.Config,
    temperatures: Sequence[float],
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: str = '',
    spread: Callable[[np.ndarray], None] | None = None,  # of [N, 3]
) -> list[answers_lib.Answers]:
  """The same at each of `temperatures`; candidates last as long as a block.

  `spread` is called with what `kept.spread` says of the windows of each.
  """
  decode, done = config.decode, []
  first_windows = []
  for first, block, label in numbered_blocks(windows, progress):
    first_windows.append(first)
    spans = score_windows(
        model, params, block, config, mesh=mesh, temperatures=temperatures,
        progress=label, spread=spread is not None)
    if spread:
      spread(spans.spread)
    done.append([answers_lib.merge_windows(
        block, spans, n_best=decode.n_best, null_rule=decode.null_rule,
        merge=decode.merge, temperature=t) for t in temperatures])
  return [answers_lib.join_answers(found, first_windows)
          for found in zip(*done, strict=True)]


def numbered_blocks(
    windows: windows_lib.WindowSet, progress: str
    ) -> Iterator[tuple[int, windows_lib.WindowSet, str]]:
  """Yields the first window, the windows and the progress label of each block.

  The label is `progress`, with the number of the block if there are several.
  """
  blocks = windows.blocks(BLOCK)
  for number, (first, block) in enumerate(blocks, 1):
    yield first, block, (f'{progress} {number}/{len(blocks)}'
                         if progress and len(blocks) > 1 else progress)
