"""Scores and probabilities of one window, for pictures and the inspect page.

Glossary of shapes: L window length, C context tokens, W longest span,
N encoder layers. S and E are the start and end vectors of the span head.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import search
from qa_jax.heads import conditional
from qa_jax.models import qa


@dataclasses.dataclass(frozen=True)
class SpanView:
  """The tokens, scores and probabilities of one window of one question.

  Probabilities are conditional on an answer in this window.
  """

  tokens: tuple[str, ...]  # L
  offsets: np.ndarray  # [L, 2] characters of the context, end exclusive; else 0
  start: np.ndarray  # [L], start scores
  end: np.ndarray  # [L], end scores
  context_mask: np.ndarray  # [L] bool
  # [L, W]: score of the span (i, i + d). It is -inf if the span is illegal, or
  # if a conditional head left start i out of its beam.
  band: np.ndarray
  null_score: float
  joint: bool  # the head has a pair term beside start and end scores
  # [1 + N, L]: start and end scores that S and E give to the embeddings and to
  # the output of each layer. None: the head lacks S or E.
  start_by_layer: np.ndarray | None
  end_by_layer: np.ndarray | None

  @functools.cached_property
  def log_normaliser(self) -> float:
    """The log-partition over all legal spans; -inf if there is none."""
    return float(np.logaddexp.reduce(self.band, axis=None, dtype=np.float64))

  @property
  def square(self) -> np.ndarray:
    """The [C, C] scores of spans of context tokens; -inf if illegal."""
    keep = np.flatnonzero(self.context_mask)
    square = np.full((len(keep), len(keep)), -np.inf)
    for row, i in enumerate(keep):
      width = min(self.band.shape[1], len(keep) - row)
      square[row, row:row + width] = self.band[i, :width]
    return square

  @property
  def p_start(self) -> np.ndarray:  # [L]
    """The probability of each token as start of the answer.

    It is the softmax of the start scores over the context tokens or, for a
    joint head, the marginal of the softmax over all spans.
    """
    if self.joint:
      return self._p_band.sum(axis=1)
    return _softmax(self.start, self.context_mask)

  @property
  def p_end(self) -> np.ndarray:  # [L]
    """The probability of each token as end of the answer, like `p_start`."""
    if not self.joint:
      return _softmax(self.end, self.context_mask)
    i, d = np.nonzero(self._p_band)
    return np.bincount(i + d, self._p_band[i, d], len(self.tokens))

  @property
  def _p_band(self) -> np.ndarray:  # [L, W]
    if not np.isfinite(self.log_normaliser):
      return np.zeros_like(self.band)
    return np.exp(self.band - self.log_normaliser)

  def locate(self, begin: int, end: int) -> tuple[int, int] | None:
    """Returns the best span (start, end) of exactly context[begin:end]."""
    firsts = np.flatnonzero(self.context_mask & (self.offsets[:, 0] == begin))
    lasts = np.flatnonzero(self.context_mask & (self.offsets[:, 1] == end))
    pairs = [(int(i), int(j)) for i in firsts for j in lasts
             if 0 <= j - i < self.band.shape[1]]
    return max(pairs, key=lambda p: self.band[p[0], p[1] - p[0]], default=None)


def view_window(
    model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
    config: config_lib.Config) -> SpanView:
  """Computes the SpanView of a question with a single window.

  A UserError is raised if there are more windows or scores are not finite.
  """
  if len(windows) > 1:
    raise errors.UserError(
        f'the context needs {len(windows)} windows of '
        f'{config.data.max_length} tokens; shorten it to one')
  length = int(windows.total_lengths[0])
  bucket = next(b for b in input_pipeline.batch_buckets(config) if b >= length)
  longest = config.decode.max_answer_length
  batch = windows.gather(np.zeros(1, np.int64), bucket)
  scores, band, *by_layer = jax.device_get(_compiled(model, longest)(
      params, qa.model_inputs(batch)))
  start, end = scores.start[0, :length], scores.end[0, :length]
  if not (np.isfinite(start).all() and np.isfinite(end).all()):
    raise errors.UserError(
        'the scores are not finite: the checkpoint is damaged, or its training '
        'diverged')
  mask = batch['context_mask'][0, :length]
  band = band[0, :length, :min(longest, length)]
  band = np.where(band < conditional.NEVER / 2, -np.inf, band)
  offsets, inside = np.zeros((length, 2), np.int64), np.flatnonzero(mask)
  offsets[inside] = np.stack(windows.char_spans(
      np.zeros_like(inside), inside, inside), axis=1)
  # A head without S or E leaves its start or end scores 0.
  has_vectors = bool(start.any() and end.any())
  return SpanView(
      tokens=tuple(windows.tokenizer.vocab[i]
                   for i in batch['token_ids'][0, :length]),
      offsets=offsets, start=start, end=end, context_mask=mask, band=band,
      null_score=float(scores.null_score[0]), joint=scores.pair is not None,
      start_by_layer=by_layer[0][:, 0, :length] if has_vectors else None,
      end_by_layer=by_layer[1][:, 0, :length] if has_vectors else None)


def warm_up(model: qa.QAModel, params: Any, config: config_lib.Config,
            windows: windows_lib.WindowSet, length: int) -> None:
  """Compiles the program for a bucket; the contents of `windows` are unused."""
  batch = windows.gather(np.zeros(1, np.int64), length)
  jax.block_until_ready(_compiled(model, config.decode.max_answer_length)(
      params, qa.model_inputs(batch)))


# It caches programs, not parameters. Pages compare a few models at a time.
@functools.lru_cache(maxsize=8)
def _compiled(model: qa.QAModel, longest: int) -> Callable[..., Any]:
  """Builds the program that computes scores, span band and layer scores."""
  @jax.jit
  def run(params, inputs):
    scores, *by_layer = model.apply({'params': params}, **inputs,
                                    method='by_layer')
    mask = inputs['context_mask']
    return scores, search.span_band(
        scores, mask, mask, max_answer_length=longest), *by_layer
  return run


def _softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:  # [L]
  if not mask.any():
    return np.zeros(len(scores))
  exp = np.exp(np.where(mask, scores - scores[mask].max(), -np.inf))
  return exp / exp.sum()
