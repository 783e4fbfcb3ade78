"""Windows → n-best → one answer per question → metrics.

Glossary of shapes: B batch, L window length, N windows, K candidates per
window, E questions.

Shared by training, `evaluate` and `predict`. Only [N, K] spans ever leave the
devices.
"""

from collections.abc import Callable, Mapping, Sequence
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
from qa_jax import files
from qa_jax import logs
from qa_jax import metrics
from qa_jax import null_rules
from qa_jax import parallel
from qa_jax import registry
from qa_jax import search
from qa_jax.data import packing
from qa_jax.data import plans
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.heads.base import SpanScores
from qa_jax.models import qa


def needs(decode: config_lib.Decode) -> frozenset[str]:
  """What the null rule reads beyond null scores and spans."""
  return null_rules.NULL_RULES[decode.null_rule].needs


@functools.cache
def _searcher(model: qa.QAModel, spec: str, longest: int, n_best: int,
              normaliser: bool) -> Callable[..., dict[str, Any]]:
  """Encoder, head and span search as one program → fields of WindowSpans."""
  find = registry.build(search.SEARCHES, spec, what='search')

  @jax.jit
  def run(params, batch):
    scores = model.apply({'params': params}, **build.model_inputs(batch))
    masks = batch['start_mask'], batch['context_mask']
    found = fields(find, scores, *masks, longest=longest, n_best=n_best,
                   normaliser=normaliser)
    if not search.is_exact(spec):
      found['exact'] = search.two_stage(
          scores, *masks, max_answer_length=longest, n_best=1).score[:, 0]
    return found
  return run


def fields(find: search.Search, scores: SpanScores,
           start_mask: jax.Array,  # [B, L] bool
           context_mask: jax.Array,  # [B, L] bool
           *, longest: int, n_best: int,
           normaliser: bool) -> dict[str, jax.Array]:
  """What is kept of a batch's scores, by the names of WindowSpans."""
  spans = find(scores, start_mask, context_mask, max_answer_length=longest,
               n_best=n_best)
  found = {'start': spans.start, 'end': spans.end, 'score': spans.score,
           'valid': spans.valid, 'null': spans.null_score}
  if normaliser:
    found['normaliser'] = search.log_normaliser(
        scores, context_mask, max_answer_length=longest)
  return found


def score_windows(model: qa.QAModel, params: Any,
                  windows: windows_lib.WindowSet, config: config_lib.Config,
                  *, mesh: jax.sharding.Mesh | None = None,
                  progress: str = '') -> aggregate.WindowSpans:
  """Runs encoder, head and search over every window.

  Rows are sharded over all devices of `mesh`; padding rows fill the last
  batch and are dropped. `progress` names a progress bar, '' shows none.
  """
  decode, count = config.decode, mesh.size if mesh else 1
  normaliser = 'normaliser' in needs(decode)
  run = _searcher(model, decode.search, decode.max_answer_length,
                  decode.n_best, normaliser)
  plan = (plans.plan_packed if config.data.packing else plans.plan_eval)(
      windows.total_lengths, batch_size=config.train.eval_batch_size,
      buckets=build.buckets(config), multiple=count)
  one = lambda: np.zeros(len(windows), np.float32)
  each = lambda dtype: np.zeros((len(windows), decode.n_best), dtype)
  out = aggregate.WindowSpans(
      start=each(np.int32), end=each(np.int32), score=each(np.float32),
      valid=each(bool), null=one(),
      normaliser=one() if normaliser else None,
      exact=None if search.is_exact(decode.search) else one())
  place = functools.partial(jax.device_put, device=(
      jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      if mesh else None))
  bar = logs.Progress(progress, len(plan)) if progress else None
  ahead = parallel.RunAhead(2)

  def keep(done):
    for (number, rows), found in done:
      real = rows >= 0
      for name, value in found.items():
        getattr(out, name)[rows[real]] = value[real]
      if bar:
        bar.update(number)

  for number, (length, rows) in enumerate(plan, 1):
    batch = windows.gather(rows, length)
    if config.data.packing:
      batch = packing.pack(batch, np.arange(len(rows)).reshape(count, -1),
                           length, real=rows >= 0)
    inputs = (*build.INPUTS, *build.PACKED, 'start_mask')
    keep(ahead.push((number, rows), run(params, place(
        {k: batch[k] for k in inputs if k in batch}))))
  keep(ahead.drain())
  if bar:
    bar.close()
  return out


def warm_up(model: qa.QAModel, params: Any, config: config_lib.Config,
            words: tokenizer_lib.Tokenizer) -> int:
  """Compiles what `answer` may run on one device, unpacked; how many programs.

  They are one for each bucket and each power of two of windows, up to the
  rows that a batch of the bucket has.
  """
  decode = config.decode
  run = _searcher(model, decode.search, decode.max_answer_length,
                  decode.n_best, 'normaliser' in needs(decode))
  buckets, programs = build.buckets(config), 0
  windows = build.make_windows(config, [Example('0', '', '')], words)
  for length in buckets:
    most = plans.eval_rows(
        config.train.eval_batch_size, length, buckets[-1], 1)
    for size in {min(1 << n, most) for n in range(most.bit_length() + 1)}:
      programs += 1
      batch = windows.gather(np.full(size, -1), length)
      jax.block_until_ready(run(params, jax.device_put(
          {k: batch[k] for k in (*build.INPUTS, 'start_mask')})))
  return programs


def answer(model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
           config: config_lib.Config, *,
           mesh: jax.sharding.Mesh | None = None,
           progress: str = '') -> aggregate.Answers:
  """The n-best list of every question, as config.decode says."""
  decode = config.decode
  spans = score_windows(model, params, windows, config, mesh=mesh,
                        progress=progress)
  return aggregate.answers(windows, spans, n_best=decode.n_best,
                           null_rule=decode.null_rule, merge=decode.merge)


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
               progress: str = '') -> dict[str, float]:
    """Metrics as metrics.json has them; writes the files under `output`."""
    examples, decode = self.windows.examples, self._config.decode
    answers = answer(self._model, params, self.windows, self._config,
                     mesh=self._mesh, progress=progress)
    odd = int((~np.isfinite(answers.null_score)).sum())
    if odd:
      raise errors.UserError(
          f'the null score of {odd} of {len(examples)} questions is not finite:'
          ' training went astray; lower config.optim.learning_rate')
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
    if na_scores is not None and self._calibration:
      values |= at_thresholds(
          examples, always, na_scores, self._calibration.threshold)
    if answers.regret is not None:
      values |= decode_regret(answers.regret)
    if output:
      if na_scores is not None:
        files.write_json(output / 'na_probs.json', na_scores)
      files.write_json(output / 'predictions.json', predictions)
      count = np.bincount(self.windows.example_of, minlength=len(examples))
      files.write_jsonl(output / 'nbest.jsonl', (
          {'id': e.id, 'null_score': float(answers.null_score[i]),
           'windows': int(count[i]),
           'answers': aggregate.nbest(e, answers, i)}
          for i, e in enumerate(examples)))
      files.write_json(output / 'metrics.json', values)
    return values


def at_thresholds(examples: Sequence[Example], always: Mapping[str, str],
                  na_scores: Mapping[str, float],
                  held_out: float | None) -> dict[str, float]:
  """EM and F1 at threshold 0 and at the held-out one, of predictions that no
  threshold has touched. `best_*` are those of the oracle."""
  if held_out is None:
    return {}
  out = {'held_out_threshold': held_out}
  for name, threshold in (('zero', 0.0), ('held_out', held_out)):
    values = metrics.squad_metrics(
        examples, {k: '' if na_scores[k] > threshold else text
                   for k, text in always.items()})
    out |= {f'at_{name}_{score}': values[score]
            for score in ('exact_match', 'f1')}
  return out


def decode_regret(regret: np.ndarray) -> dict[str, float]:  # [E]
  """What an inexact search costs: the mean score missed, over questions where
  it found a span, and the share in percent of questions where it missed any.
  """
  found = regret[np.isfinite(regret)]
  mean = {'decode_regret': float(found.mean())} if len(found) else {}
  return {**mean, 'decode_regret_share': 100.0 * float((regret > 0).mean())}


def data_name(spec: str) -> str:
  """A data SPEC → the folder name of its evaluation; paths by their last part.
  """
  parts = [spec] if '(' in spec else [
      p.rsplit('/', 1)[-1] for p in spec.split('+')]
  stem = '_'.join(re.sub(r'\.(jsonl|json)(\.gz)?$', '', p) for p in parts)
  return re.sub(r'[^A-Za-z0-9.-]+', '_', stem).strip('._-')[:80] or 'data'
