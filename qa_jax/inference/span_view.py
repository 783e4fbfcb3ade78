"""What the vectors do in one window: the numbers that pictures and pages show.

Glossary of shapes: L window length, C context tokens of it, W longest span, N
encoder layers.
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
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.heads import conditional
from qa_jax.models import qa


@dataclasses.dataclass(frozen=True)
class SpanView:
  """One window of one question; probabilities are given an answer in it."""

  tokens: tuple[str, ...]  # L
  offsets: np.ndarray  # [L, 2] characters of the context; 0, 0 outside it
  start: np.ndarray  # [L] scores by S
  end: np.ndarray  # [L] scores by E
  context_mask: np.ndarray  # [L] bool
  # [L, W]: score of the span (i, i + d); -inf if illegal, or a conditional
  # head did not take i into its beam.
  band: np.ndarray
  null_score: float
  joint: bool  # the head scores pairs, and start + end is not the whole score
  # [1 + N, L]: start and end if the head read the embeddings, layer 1, … in
  # place of the last layer. None: the head has no S or no E of its own.
  start_by_layer: np.ndarray | None
  end_by_layer: np.ndarray | None

  @functools.cached_property
  def log_normaliser(self) -> float:
    """log Σ exp of the scores of all legal spans; -inf if there is none."""
    return float(np.logaddexp.reduce(self.band, axis=None, dtype=np.float64))

  @property
  def square(self) -> np.ndarray:
    """[C, C] over the context's tokens: the score of the span (i, j); -inf
    where there is none."""
    keep = np.flatnonzero(self.context_mask)
    square = np.full((len(keep), len(keep)), -np.inf)
    for row, i in enumerate(keep):
      width = min(self.band.shape[1], len(keep) - row)
      square[row, row:row + width] = self.band[i, :width]
    return square

  @property
  def p_start(self) -> np.ndarray:  # [L]
    """softmax(S·h) over the context; of a joint head, the spans' marginal."""
    if self.joint:
      return self._p_band.sum(axis=1)
    return _softmax(self.start, self.context_mask)

  @property
  def p_end(self) -> np.ndarray:  # [L]
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
    """The best span of tokens that covers context[begin:end] exactly."""
    firsts = np.flatnonzero(
        self.context_mask & (self.offsets[:, 0] == begin))
    lasts = np.flatnonzero(self.context_mask & (self.offsets[:, 1] == end))
    pairs = [(int(i), int(j)) for i in firsts for j in lasts
             if 0 <= j - i < self.band.shape[1]]
    return max(pairs, key=lambda p: self.band[p[0], p[1] - p[0]], default=None)


def span_view(model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
              config: config_lib.Config) -> SpanView:
  """Runs encoder and head over the only window there is.

  Raises:
    UserError: question and context need more than one window, or scores are
      not finite.
  """
  if len(windows) > 1:
    raise errors.UserError(
        f'the context needs {len(windows)} windows of '
        f'{config.data.max_length} tokens; shorten it to one')
  length = int(windows.total_lengths[0])
  bucket = next(b for b in input_pipeline.batch_buckets(config) if b >= length)
  batch = windows.gather(np.zeros(1, np.int64), bucket)
  scores, *by_layer = jax.device_get(_scorer(model)(
      params, qa.model_inputs(batch)))
  start, end = scores.start[0, :length], scores.end[0, :length]
  if not (np.isfinite(start).all() and np.isfinite(end).all()):
    raise errors.UserError(
        'the scores are not finite: the checkpoint is damaged, or its training '
        'diverged')
  mask = batch['context_mask'][0, :length]
  width = min(config.decode.max_answer_length, length)
  padded = np.pad(np.where(mask, end, -np.inf), (0, width),
                  constant_values=-np.inf)
  band = np.lib.stride_tricks.sliding_window_view(padded, width)[:length]
  if scores.pair is not None:
    band = band + scores.pair[0, :length, :width]
  band = np.where(mask[:, None], start[:, None] + band, -np.inf)
  band[band < conditional.NEVER / 2] = -np.inf
  offsets = np.zeros((length, 2), np.int64)
  inside = np.flatnonzero(mask)
  offsets[inside] = np.stack(windows.char_spans(
      np.zeros_like(inside), inside, inside), axis=1)
  # A head that scores starts or ends only in pairs leaves these 0.
  own = bool(start.any() and end.any())
  return SpanView(
      tokens=tuple(windows.tokenizer.vocab[i]
                   for i in batch['token_ids'][0, :length]),
      offsets=offsets, start=start, end=end, context_mask=mask, band=band,
      null_score=float(scores.null_score[0]), joint=scores.pair is not None,
      start_by_layer=by_layer[0][:, 0, :length] if own else None,
      end_by_layer=by_layer[1][:, 0, :length] if own else None)


def warm_up(model: qa.QAModel, params: Any, config: config_lib.Config,
            words: tokenizer_lib.Tokenizer) -> int:
  """Compiles what `view` may run, one program for each bucket; how many."""
  windows = input_pipeline.make_windows(config, [Example('0', '', '')], words)
  for length in input_pipeline.batch_buckets(config):
    batch = windows.gather(np.zeros(1, np.int64), length)
    jax.block_until_ready(_scorer(model)(params, qa.model_inputs(batch)))
  return len(input_pipeline.batch_buckets(config))


@functools.cache
def _scorer(model: qa.QAModel) -> Callable[..., Any]:
  return jax.jit(lambda params, inputs: model.apply(
      {'params': params}, **inputs, method='by_layer'))


def _softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:  # [L]
  if not mask.any():
    return np.zeros(len(scores))
  exp = np.exp(np.where(mask, scores - scores[mask].max(), -np.inf))
  return exp / exp.sum()
