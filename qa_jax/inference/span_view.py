"""Scores and probabilities of one window, for pictures and the inspect page.

Glossary of shapes: L window length, C context tokens, W longest span,
N encoder layers. S and E are the start and end vectors of the span head.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.decoding import search
from qa_jax.inference import decode as decode_lib
from qa_jax.models import qa


@dataclasses.dataclass(frozen=True)
class SpanView:
  """The tokens, scores and probabilities of one window of one question.

  Probabilities are the posteriors of `predict.Answer`: a softmax at the
  calibration temperature over null (unless the null rule is `never`) and all
  spans of all windows of the question.
  """

  tokens: tuple[str, ...]  # L
  offsets: np.ndarray  # [L, 2] characters of the context, end exclusive; else 0
  start: np.ndarray  # [L], start scores
  end: np.ndarray  # [L], end scores
  context_mask: np.ndarray  # [L] bool
  # [L, W]: score of the span (i, i + d). It is -inf if the span is illegal in
  # this window, or if a conditional head left start i out of its beam.
  band: np.ndarray
  null_score: float  # the minimum over the windows of the question
  joint: bool  # the head has a pair term beside start and end scores
  # [1 + N, L]: start and end scores that S and E give to the embeddings and to
  # the output of each layer. None: the head lacks S or E.
  start_by_layer: np.ndarray | None
  end_by_layer: np.ndarray | None
  temperature: float
  log_partition: float  # over null and the spans of all windows; -inf: neither
  null_probability: float  # 0 if the null rule is `never`
  null_rule: str
  na_score: float  # no-answer score of the question by the null rule
  window: int  # index of this window among the windows of the question
  windows: int  # number of windows of the question

  @property
  def square(self) -> np.ndarray:
    """The [C, C] scores of spans of context tokens; -inf if illegal."""
    keep = np.flatnonzero(self.context_mask)
    square = np.full((len(keep), len(keep)), -np.inf)
    for row, i in enumerate(keep):
      width = min(self.band.shape[1], len(keep) - row)
      square[row, row:row + width] = self.band[i, :width]
    return square

  @functools.cached_property
  def p_band(self) -> np.ndarray:  # [L, W]
    """The probability of each span, 0 for an illegal one."""
    if not np.isfinite(self.log_partition):
      return np.zeros_like(self.band)
    return np.exp(self.band / self.temperature - self.log_partition)

  @functools.cached_property
  def p_start(self) -> np.ndarray:  # [L]
    """The probability that the answer starts at each token.

    It is the sum over the spans that start there. [CLS], the first token, has
    the probability of null. A sum below 1 leaves the rest to other windows.
    """
    return self._with_null(self.p_band.sum(axis=1))

  @functools.cached_property
  def p_end(self) -> np.ndarray:  # [L]
    """The probability that the answer ends at each token, like `p_start`."""
    i, d = np.nonzero(self.p_band)
    return self._with_null(np.bincount(
        i + d, self.p_band[i, d], len(self.tokens)))

  def _with_null(self, p: np.ndarray) -> np.ndarray:
    return np.concatenate([[self.null_probability], p[1:]])

  def locate(self, begin: int, end: int) -> tuple[int, int] | None:
    """Returns the best span (start, end) of exactly context[begin:end]."""
    firsts = np.flatnonzero(self.context_mask & (self.offsets[:, 0] == begin))
    lasts = np.flatnonzero(self.context_mask & (self.offsets[:, 1] == end))
    pairs = [(int(i), int(j)) for i in firsts for j in lasts
             if 0 <= j - i < self.band.shape[1]]
    return max(pairs, key=lambda p: self.band[p[0], p[1] - p[0]], default=None)


def focus_tokens(views: Sequence[SpanView], most: int = 40,
                 ) -> list[np.ndarray]:
  """Returns for each view the context tokens near the best spans, ascending.

  A token is a number in 0 … C - 1. Spans are added by descending probability
  under any question, with two tokens on each side, as long as there are at most
  `most` tokens. Views of one window get the same tokens. Views of different
  windows get the tokens of their own spans.
  """
  offsets = [view.offsets[view.context_mask] for view in views]
  if not all(np.array_equal(x, offsets[0]) for x in offsets):
    return [focus_tokens([view], most)[0] for view in views]
  count = len(offsets[0])
  chosen = np.full(count, count <= most)
  if count > most:
    width = min(v.band.shape[1] for v in views)
    band = np.max([v.p_band[v.context_mask, :width] for v in views], axis=0)
    for n in np.argsort(-band, axis=None, kind='stable')[:most]:
      first, d = divmod(int(n), band.shape[1])
      # A span of more than `most` tokens is cut.
      near = slice(max(first - 2, 0), min(first + d + 3, first - 2 + most))
      more = chosen.copy()
      more[near] = True
      if more.sum() <= most:
        chosen = more
  return [np.flatnonzero(chosen)] * len(views)


def view_window(
    model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
    config: config_lib.Config, *, temperature: float = 1.0) -> SpanView:
  """Computes the SpanView of a question, for the window of its best span.

  A UserError is raised if scores are not finite.
  """
  spans = decode_lib.score_windows(model, params, windows, config,
                                   temperatures=(temperature,))
  answers = answers_lib.merge_windows(
      windows, spans, n_best=1, null_rule=config.decode.null_rule,
      temperature=temperature)
  has_span = answers.ptr[-1] > 0
  window = int(answers.window[0]) if has_span else 0
  # The posterior of any outcome gives the log-partition of all of them.
  null_log_p = float(answers.null_log_p[0])
  if np.isfinite(null_log_p):
    log_partition = float(answers.null_score[0]) / temperature - null_log_p
  elif has_span:
    log_partition = float(answers.score[0] / temperature - answers.log_p[0])
  else:
    log_partition = -np.inf
  length = int(windows.total_lengths[window])
  bucket = next(b for b in input_pipeline.batch_buckets(config) if b >= length)
  longest = config.decode.max_answer_length
  batch = windows.gather(np.array([window]), bucket,
                         whole_words=config.decode.whole_words)
  scores, band, *by_layer = jax.device_get(_compiled(model, longest)(
      params, *_inputs(batch)))
  start, end = scores.start[0, :length], scores.end[0, :length]
  if not (np.isfinite(start).all() and np.isfinite(end).all()):
    raise errors.NotFiniteError(
        'the scores are not finite: the checkpoint is damaged, or its training '
        'diverged')
  mask = batch['context_mask'][0, :length]
  band = band[0, :length, :min(longest, length)]
  band = np.where(band <= candidates.NO_SPAN / 2, -np.inf, band)
  offsets, inside = np.zeros((length, 2), np.int64), np.flatnonzero(mask)
  offsets[inside] = np.stack(windows.char_spans(
      np.full_like(inside, window), inside, inside), axis=1)
  # A head without S or E leaves its start or end scores 0.
  has_vectors = bool(start.any() and end.any())
  return SpanView(
      tokens=tuple(windows.tokenizer.readable(i)
                   for i in batch['token_ids'][0, :length].tolist()),
      offsets=offsets, start=start, end=end, context_mask=mask, band=band,
      null_score=float(answers.null_score[0]), joint=scores.pair is not None,
      start_by_layer=by_layer[0][:, 0, :length] if has_vectors else None,
      end_by_layer=by_layer[1][:, 0, :length] if has_vectors else None,
      temperature=temperature, log_partition=log_partition,
      null_probability=float(np.exp(null_log_p)),
      null_rule=config.decode.null_rule, na_score=float(answers.na_score[0]),
      window=window, windows=len(windows))


def call_of_bucket(
    model: qa.QAModel, params: Any, config: config_lib.Config,
    windows: windows_lib.WindowSet, length: int
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns the jitted function of a view and its arguments for a bucket.

  The contents of `windows` are not read.
  """
  batch = windows.gather(np.zeros(1, np.int64), length,
                         whole_words=config.decode.whole_words)
  return (_compiled(model, config.decode.max_answer_length),
          (params, *_inputs(batch)))


def _inputs(batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], ...]:
  """Returns the inputs of the model and the masks of legal starts and ends."""
  return qa.model_inputs(batch), {
      k: batch[k] for k in decode_lib.MASKS if k in batch}


# It caches programs, not parameters. Pages compare a few models at a time.
@functools.lru_cache(maxsize=8)
def _compiled(model: qa.QAModel, longest: int) -> Callable[..., Any]:
  """Builds the program that computes scores, span band and layer scores."""
  @jax.jit
  def run(params, inputs, masks):
    starts = masks['start_mask']
    ends = masks.get('end_mask', inputs['context_mask'])
    scores, *by_layer = model.apply(
        {'params': params}, **inputs, method='by_layer',
        start_mask=starts if 'end_mask' in masks else None)
    return scores, search.span_band(
        scores, starts, ends, max_answer_length=longest), *by_layer
  return run

