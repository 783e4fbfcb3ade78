"""Windows → n-best → one answer per question → metrics.

Glossary of shapes: N windows, K candidates per window, E questions, C kept
candidates of all questions together.

Shared by training, `evaluate` and `predict`. Only [N, K] spans ever leave the
devices; what follows is vectorised numpy.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import pathlib
import re
from typing import Any

import jax
import numpy as np

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import files
from qa_jax import logs
from qa_jax import metrics
from qa_jax import parallel
from qa_jax import search
from qa_jax.data import batches
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.models import qa

NO_SPAN = -1e9  # the best score of a question without any legal span


@dataclasses.dataclass(frozen=True)
class WindowSpans:
  """The best spans of every window, in window positions."""

  start: np.ndarray  # [N, K] int32
  end: np.ndarray  # [N, K] int32, inclusive
  score: np.ndarray  # [N, K] float32
  valid: np.ndarray  # [N, K] bool
  null: np.ndarray  # [N] float32


@dataclasses.dataclass(frozen=True)
class Answers:
  """The best spans of every question, in characters of its context.

  Candidates lie end to end, best first; question e owns [ptr[e], ptr[e + 1]).
  """

  begin: np.ndarray  # [C]
  end: np.ndarray  # [C], exclusive
  score: np.ndarray  # [C] float64
  window: np.ndarray  # [C]
  ptr: np.ndarray  # [E + 1]
  null_score: np.ndarray  # [E] the minimum over windows
  null_minus_best: np.ndarray  # [E] by the null rule; -inf: always answer


def never(null: np.ndarray, best: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Always answers, as SQuAD 1.1 does."""
  del null, best
  return np.full(len(first), -np.inf)


def min_null(null: np.ndarray,  # [N]
             best: np.ndarray,  # [N]
             first: np.ndarray) -> np.ndarray:  # [E]
  """The least null score of any window, less the best span of all windows:
  every window must want null (Devlin et al., 2019, section 4.3, and code)."""
  return np.minimum.reduceat(null, first) - np.maximum.reduceat(best, first)


def margin(null: np.ndarray, best: np.ndarray,
           first: np.ndarray) -> np.ndarray:
  """The least null - best within one window (Alberti et al., 2019): compares
  scores of one softmax only."""
  return np.minimum.reduceat(null - best, first)


NULL_RULES: dict[str, Callable[..., np.ndarray]] = {
    'never': never, 'min_null': min_null, 'margin': margin}


def check_decode(decode: config_lib.Decode) -> None:
  """Raises a UserError for a search or null rule that does not exist."""
  for name, table in (('search', search.SEARCHES),
                      ('null_rule', NULL_RULES)):
    value = getattr(decode, name)
    if value not in table:
      raise errors.UserError(f'unknown config.decode.{name} {value!r}'
                             f'{errors.did_you_mean(value, table)}')


@functools.cache
def _searcher(model: qa.QAModel, name: str, max_answer_length: int,
              n_best: int) -> Callable[..., search.Spans]:
  """Encoder, head and span search as one program."""

  @jax.jit
  def run(params, batch):
    scores = model.apply({'params': params}, **build.model_inputs(batch))
    return search.SEARCHES[name](
        scores, batch['start_mask'], batch['context_mask'],
        max_answer_length=max_answer_length, n_best=n_best)
  return run


def score_windows(model: qa.QAModel, params: Any,
                  windows: windows_lib.WindowSet, config: config_lib.Config,
                  *, mesh: jax.sharding.Mesh | None = None,
                  progress: str = '') -> WindowSpans:
  """Runs encoder, head and search over every window.

  Rows are sharded over all devices of `mesh`; padding rows fill the last
  batch and are dropped. `progress` names a progress bar, '' shows none.
  """
  decode, count = config.decode, mesh.size if mesh else 1
  run = _searcher(model, decode.search, decode.max_answer_length,
                  decode.n_best)
  size = -(-min(config.train.eval_batch_size, max(len(windows), 1))
           // count) * count
  plan = batches.plan_eval(windows.total_lengths, batch_size=size,
                           buckets=build.buckets(config))
  shape = (len(windows), decode.n_best)
  out = WindowSpans(
      np.zeros(shape, np.int32), np.zeros(shape, np.int32),
      np.zeros(shape, np.float32), np.zeros(shape, bool),
      np.zeros(len(windows), np.float32))
  place = functools.partial(jax.device_put, device=(
      jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      if mesh else None))
  bar = logs.Progress(progress, len(plan)) if progress else None
  ahead = parallel.RunAhead(2)

  def keep(done):
    for (number, rows), spans in done:
      real = rows >= 0
      for name, value in (('start', spans.start), ('end', spans.end),
                          ('score', spans.score), ('valid', spans.valid),
                          ('null', spans.null_score)):
        getattr(out, name)[rows[real]] = value[real]
      if bar:
        bar.update(number)

  for number, (length, rows) in enumerate(plan, 1):
    batch = windows.gather(rows, length)
    inputs = {k: batch[k] for k in (
        'token_ids', 'token_type_ids', 'attention_mask', 'context_mask',
        'start_mask')}
    keep(ahead.push((number, rows), run(params, place(inputs))))
  keep(ahead.drain())
  if bar:
    bar.close()
  return out


def aggregate(windows: windows_lib.WindowSet, spans: WindowSpans,
              decode: config_lib.Decode) -> Answers:
  """Merges the windows of each question into one n-best list.

  Order: score descending, then the earlier window, then its search order.
  """
  num = len(windows.examples)
  if not num:
    none = np.zeros(0)
    return Answers(none, none, none, none, np.zeros(1, np.int64), none, none)
  first = np.searchsorted(windows.example_of, np.arange(num))
  row, column = np.nonzero(spans.valid)
  score = spans.score[row, column].astype(np.float64)
  order = np.lexsort((column, row, -score, windows.example_of[row]))
  row, column, score = row[order], column[order], score[order]
  question = windows.example_of[row]
  ptr = np.searchsorted(question, np.arange(num + 1))
  kept = np.arange(len(row)) - ptr[question] < decode.n_best
  row, column, score = row[kept], column[kept], score[kept]
  question = question[kept]
  begin, end = windows.char_spans(
      row, spans.start[row, column], spans.end[row, column])
  best = np.where(spans.valid, spans.score, NO_SPAN).max(axis=1)
  return Answers(
      begin=begin, end=end, score=score, window=row,
      ptr=np.searchsorted(question, np.arange(num + 1)),
      null_score=np.minimum.reduceat(spans.null, first).astype(np.float64),
      null_minus_best=NULL_RULES[decode.null_rule](
          spans.null.astype(np.float64), best.astype(np.float64), first))


def texts(examples: Sequence[Example], answers: Answers) -> dict[str, str]:
  """Question id → its best span's text, '' where there is no legal span."""
  out = {}
  for e, example in enumerate(examples):
    c = answers.ptr[e]
    out[example.id] = (
        example.context[answers.begin[c]:answers.end[c]]
        if c < answers.ptr[e + 1] else '')
  return out


class Evaluator:
  """Windows of a data set, ready to be scored again and again."""

  def __init__(self, model: qa.QAModel, windows: windows_lib.WindowSet,
               config: config_lib.Config,
               mesh: jax.sharding.Mesh | None = None):
    if not len(windows):
      raise errors.UserError('the evaluation data has no question')
    self.windows = windows
    self._model, self._config, self._mesh = model, config, mesh

  def evaluate(self, params: Any, *, output: pathlib.Path | None = None,
               progress: str = '') -> dict[str, float]:
    """Metrics as metrics.json has them; writes the files under `output`."""
    examples, decode = self.windows.examples, self._config.decode
    spans = score_windows(self._model, params, self.windows, self._config,
                          mesh=self._mesh, progress=progress)
    answers = aggregate(self.windows, spans, decode)
    always = texts(examples, answers)
    null = answers.null_minus_best > decode.null_threshold
    predictions = {e.id: '' if null[i] else always[e.id]
                   for i, e in enumerate(examples)}
    na_scores = None
    if decode.null_rule != 'never':
      na_scores = {e.id: float(answers.null_minus_best[i])
                   for i, e in enumerate(examples)}
    values = metrics.squad_metrics(
        examples, predictions, na_scores=na_scores, always_answer=always)
    if output:
      if na_scores is not None:
        files.write_json(output / 'na_probs.json', na_scores)
      files.write_json(output / 'predictions.json', predictions)
      files.write_jsonl(output / 'nbest.jsonl', (
          {'id': e.id, 'null_score': float(answers.null_score[i]),
           'answers': nbest(e, answers, i)}
          for i, e in enumerate(examples)))
      files.write_json(output / 'metrics.json', values)
    return values


def nbest(example: Example, answers: Answers, e: int) -> list[dict[str, Any]]:
  """The candidates of question e: text, character range, score."""
  return [{'text': example.context[answers.begin[c]:answers.end[c]],
           'start': int(answers.begin[c]), 'end': int(answers.end[c]),
           'score': float(answers.score[c])}
          for c in range(answers.ptr[e], answers.ptr[e + 1])]


def data_name(spec: str) -> str:
  """A data SPEC → the folder name of its evaluation."""
  stem = re.sub(r'\.(jsonl|json)(\.gz)?$', '', spec.rsplit('/', 1)[-1]
                if '(' not in spec else spec)
  return re.sub(r'[^A-Za-z0-9.-]+', '_', stem).strip('._-')[:80] or 'data'


def fingerprint(examples: Sequence[Example]) -> str:
  """sha256 over ids, questions, contexts and gold answers."""
  digest = hashlib.sha256()
  for e in examples:
    digest.update(repr((e.id, e.question, e.context, e.answers)).encode())
  return digest.hexdigest()
