"""Windows → n-best → one answer per question → metrics.

Glossary of shapes: B batch, L window length, N windows, K candidates per
window, E questions.

Shared by training, `evaluate` and `predict`. Only [N, K] spans ever leave the
devices, and of these only those of a block of windows are held at a time.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import re
from typing import Any

import jax
import numpy as np

from qa_jax import aggregate
from qa_jax import build
from qa_jax import calibration as calibration_lib
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import features
from qa_jax import files
from qa_jax import kept
from qa_jax import logs
from qa_jax import metrics
from qa_jax import null_rules
from qa_jax import parallel
from qa_jax import processes
from qa_jax import registry
from qa_jax import reliability
from qa_jax import search
from qa_jax.data import plans
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.models import qa

BLOCK = 2**14  # windows whose candidates are held at a time: 5 MB at 20 each


def needs(decode: config_lib.Decode) -> frozenset[str]:
  """What the null rule reads beyond null scores and spans."""
  return null_rules.NULL_RULES[decode.null_rule].needs


def _program(model: qa.QAModel, decode: config_lib.Decode,
             mesh: jax.sharding.Mesh | None = None, *,
             spread: bool = False) -> Callable[..., dict[str, Any]]:
  """The one program that all who ask for the same have in common."""
  return _searcher(
      model, decode.search, decode.max_answer_length, decode.n_best,
      'normaliser' in needs(decode), processes.whole(mesh), spread)


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
    scores = model.apply({'params': params}, **build.model_inputs(batch))
    masks = batch['start_mask'], batch['context_mask']
    found = kept.fields(find, scores, *masks, longest=longest, n_best=n_best,
                        normaliser=normaliser)
    if not search.is_exact(spec):
      found['exact'] = search.two_stage(
          scores, *masks, max_answer_length=longest, n_best=1).score[:, 0]
    if len(temperatures):
      found['mass'] = kept.mass(
          scores, *masks, temperatures, longest=longest)
    if 'gold_spans' in batch:
      found['gold'] = kept.gold_scores(
          scores, *masks, batch['gold_spans'], longest=longest)
    if spread:
      found['spread'] = kept.spread(scores, masks[1], longest=longest)
    return found
  return run


def score_windows(model: qa.QAModel, params: Any,
                  windows: windows_lib.WindowSet, config: config_lib.Config,
                  *, mesh: jax.sharding.Mesh | None = None,
                  progress: str = '', temperatures: Sequence[float] = (),
                  golds: bool = False,
                  spread: bool = False) -> aggregate.WindowSpans:
  """Runs encoder, head and search over every window.

  Rows are sharded over all devices of `mesh`; padding rows fill the last
  batch and are dropped. Each process scores the rows of its devices, and gets
  the spans of all. `progress` names a progress bar, '' shows none. All spans
  are added up at each of `temperatures`; `golds`: with scores of the gold
  spans; `spread`: with what `kept.spread` says of each window.
  """
  decode, count = config.decode, mesh.size if mesh else 1
  normaliser = 'normaliser' in needs(decode)
  run = _program(model, decode, mesh, spread=spread)
  plan = (plans.plan_packed if config.data.packing else plans.plan_eval)(
      windows.total_lengths, batch_size=build.eval_batch_size(config, count),
      buckets=build.buckets(config), multiple=count)
  one = lambda: np.zeros(len(windows), np.float32)
  each = lambda dtype: np.zeros((len(windows), decode.n_best), dtype)
  some = lambda count: np.zeros((len(windows), count), np.float32)
  out = aggregate.WindowSpans(
      start=each(np.int32), end=each(np.int32), score=each(np.float32),
      valid=each(bool), null=one(),
      normaliser=one() if normaliser else None,
      exact=None if search.is_exact(decode.search) else one(),
      temperatures=tuple(temperatures),
      mass=some(len(temperatures)) if len(temperatures) else None,
      gold=some(windows.gold_spans.shape[1]) if golds else None,
      spread=some(len(kept.SPREAD)) if spread else None)
  place = (functools.partial(processes.put_part, mesh=mesh) if mesh
           else jax.device_put)
  bar = logs.Progress(progress, len(plan)) if progress else None
  ahead = parallel.RunAhead(2)
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
      batch = features.rows(windows, rows, length, mesh,
                            packed=config.data.packing)
      inputs = (*build.INPUTS, *build.PACKED, 'start_mask',
                *['gold_spans'] * golds)
      keep(ahead.push((number, rows), run(params, place(
          {k: batch[k] for k in inputs if k in batch}), scales)))
    keep(ahead.drain())
  finally:
    if bar:
      bar.close()
  return out


def warm_up(model: qa.QAModel, params: Any, config: config_lib.Config,
            words: tokenizer_lib.Tokenizer) -> int:
  """Compiles what `answer` may run on one device, unpacked; how many programs.

  They are one for each bucket and each power of two of windows, up to the
  rows that a batch of the bucket has.
  """
  run = _program(model, config.decode)
  buckets, programs = build.buckets(config), 0
  windows = build.make_windows(config, [Example('0', '', '')], words)
  for length in buckets:
    most = plans.eval_rows(
        build.eval_batch_size(config, 1), length, buckets[-1], 1)
    for size in {min(1 << n, most) for n in range(most.bit_length() + 1)}:
      programs += 1
      batch = windows.gather(np.full(size, -1), length)
      jax.block_until_ready(run(params, jax.device_put(
          {k: batch[k] for k in (*build.INPUTS, 'start_mask')}),
                                np.ones(1, np.float32)))
  return programs


def answer(model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
           config: config_lib.Config, *, temperature: float = 1.0,
           mesh: jax.sharding.Mesh | None = None,
           progress: str = '') -> aggregate.Answers:
  """The n-best list of every question, as config.decode says."""
  return answers_at(model, params, windows, config, (temperature,), mesh=mesh,
                    progress=progress)[0]


def answers_at(model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
               config: config_lib.Config, temperatures: Sequence[float], *,
               mesh: jax.sharding.Mesh | None = None, progress: str = '',
               spread: Callable[[np.ndarray], None] | None = None,  # of [N, 3]
               ) -> list[aggregate.Answers]:
  """The same at each of `temperatures`; candidates last as long as a block.

  `spread` is called with what `kept.spread` says of the windows of each.
  """
  decode, done = config.decode, []
  parts = windows.blocks(BLOCK)
  for n, (_, block) in enumerate(parts, 1):
    spans = score_windows(
        model, params, block, config, mesh=mesh, temperatures=temperatures,
        progress=block_name(progress, n, len(parts)),
        spread=spread is not None)
    if spread:
      spread(spans.spread)
    done.append([aggregate.answers(
        block, spans, n_best=decode.n_best, null_rule=decode.null_rule,
        merge=decode.merge, temperature=t) for t in temperatures])
  first = [window for window, _ in parts]
  return [aggregate.join(found, first) for found in zip(*done, strict=True)]


def block_name(progress: str, number: int, count: int) -> str:
  """Of the progress bar of a block; '' shows none."""
  return f'{progress} {number}/{count}' if progress and count > 1 else progress


class Evaluator:
  """Windows of a data set, ready to be scored again and again."""

  def __init__(self, model: qa.QAModel, windows: windows_lib.WindowSet,
               config: config_lib.Config,
               mesh: jax.sharding.Mesh | None = None, *,
               calibration: calibration_lib.Calibration | None = None):
    if not len(windows):
      raise errors.UserError('the evaluation data has no question')
    self.windows = windows
    self._model, self._config, self._mesh = model, config, mesh
    self._calibration = calibration

  def evaluate(self, params: Any, *, output: pathlib.Path | None = None,
               progress: str = '', seal: bool = True,
               show: Callable[[str, np.ndarray], None] | None = None,
               ) -> dict[str, float]:
    """Metrics; writes the files of `output`, metrics.json last if `seal`.

    `show` is called with the columns of `kept.SPREAD`, a value a window.
    """
    examples, decode = self.windows.examples, self._config.decode
    output = output if processes.first() else None
    held_out = self._calibration
    temperature = held_out.temperature if held_out else 1.0
    spreads: list[np.ndarray] = []
    answers, *before = answers_at(
        self._model, params, self.windows, self._config,
        (temperature, 1.0) if held_out else (1.0,), mesh=self._mesh,
        progress=progress, spread=spreads.append if show else None)
    odd = int((~np.isfinite(answers.null_score)).sum())
    if odd:
      raise errors.UserError(
          f'the null score of {odd} of {len(examples)} questions is not finite:'
          ' training went astray; lower config.optim.learning_rate')
    if show:
      for name, values in zip(
          kept.SPREAD, np.concatenate(spreads).T, strict=True):
        show(name, values)
    always = aggregate.texts(examples, answers)
    silent = answers.na_score > decode.null_threshold
    predictions = {e.id: '' if silent[i] else always[e.id]
                   for i, e in enumerate(examples)}
    na_scores = None
    if decode.null_rule != 'never':
      na_scores = {e.id: float(answers.na_score[i])
                   for i, e in enumerate(examples)}
    values = metrics.squad_metrics(
        examples, predictions, na_scores=na_scores, always_answer=always)
    if held_out:
      values |= reliability.report(
          examples, predictions, always, na_scores, held_out,
          before=reliability.confidence(before[0], silent),
          after=reliability.confidence(answers, silent), output=output)
    if answers.regret is not None:
      values |= decode_regret(answers.regret)
    if output:
      if na_scores is not None:
        files.write_json(output / 'na_probs.json', na_scores)
      files.write_json(output / 'predictions.json', predictions)
      count = np.bincount(self.windows.example_of, minlength=len(examples))
      files.write_jsonl(output / 'nbest.jsonl', (
          {'id': e.id, 'null_score': float(answers.null_score[i]),
           'null_probability': float(np.exp(answers.null_log_p[i])),
           'windows': int(count[i]),
           'answers': aggregate.nbest(e, answers, i)}
          for i, e in enumerate(examples)))
      if seal:
        files.write_json(output / 'metrics.json', values)
    return values


def decode_regret(regret: np.ndarray) -> dict[str, float]:  # [E]
  """What an inexact search costs: the mean score missed, over questions where
  it found a span, and the share in percent of questions where it missed any.
  """
  found = regret[np.isfinite(regret)]
  mean = {'decode_regret': float(found.mean())} if len(found) else {}
  return {**mean, 'decode_regret_share': 100.0 * float((regret > 0).mean())}


def data_name(spec: str) -> str:
  """A data SPEC → the folder name of its evaluation; paths by their last part,
  without the ending of their format.
  """
  parts = [spec] if '(' in spec else [
      p.strip().rstrip('/').rsplit('/', 1)[-1] for p in spec.split('+')]
  stem = '_'.join(re.sub(r'\.(jsonl?|csv|parquet|arrow)(\.gz)?$', '', p)
                  for p in parts)
  return re.sub(r'[^A-Za-z0-9.-]+', '_', stem).strip('._-')[:80] or 'data'
