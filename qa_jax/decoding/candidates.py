"""What is kept of a batch's scores: best spans, sums over all, their spread.

Glossary of shapes: B batch (windows), L window length, G gold spans,
T temperatures.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import span_scores
from qa_jax.decoding import search
from qa_jax.span_scores import SpanScores

STATISTICS = ('valid_mass', 'start_score', 'end_score')  # columns of `spread`


def window_candidates(find: search.Search, scores: SpanScores,
                      start_mask: jax.Array,  # [B, L] bool
                      context_mask: jax.Array,  # [B, L] bool
                      *, longest: int, n_best: int,
                      normaliser: bool) -> dict[str, jax.Array]:
  """By the names of WindowSpans, what every search is for."""
  spans = find(scores, start_mask, context_mask, max_answer_length=longest,
               n_best=n_best)
  found = {'start': spans.start, 'end': spans.end, 'score': spans.score,
           'valid': spans.valid, 'null': spans.null_score}
  if normaliser:
    found['normaliser'] = search.log_partition(
        scores, context_mask, context_mask, max_answer_length=longest)
  return found


def log_partitions(scores: SpanScores, start_mask: jax.Array,
                   context_mask: jax.Array, temperatures: jax.Array, *,
                   longest: int) -> jax.Array:  # [B, T]
  """log Σ exp(score / temperature) over all spans that a search may return."""
  return jax.lax.map(lambda t: search.log_partition(
      scores, start_mask, context_mask, max_answer_length=longest,
      temperature=t), temperatures).T


def legal_gold_scores(scores: SpanScores, start_mask: jax.Array,
                      context_mask: jax.Array, golds: jax.Array,  # [B, G, 2]
                      *, longest: int) -> jax.Array:  # [B, G]
  """Scores of gold spans; ILLEGAL for those that no search may return."""
  first, last = jnp.maximum(golds[..., 0], 0), jnp.maximum(golds[..., 1], 0)
  legal = ((golds[..., 0] > 0) & (last - first < longest)
           & jnp.take_along_axis(start_mask, first, axis=1)
           & jnp.take_along_axis(context_mask, last, axis=1))
  return jnp.where(legal, span_scores.gold_scores(scores, golds),
                   search.ILLEGAL)


def score_statistics(scores: SpanScores, context_mask: jax.Array, *,
                     longest: int) -> jax.Array:  # [B, 3]
  """What histograms show of a window: the mass that its two softmaxes leave to
  spans, and the best start and end score of context and [CLS]."""
  domain = span_scores.softmax_domain(context_mask)
  best = lambda x: jnp.where(domain, x, search.ILLEGAL).max(axis=1)
  return jnp.stack([
      span_scores.valid_mass(scores, context_mask,
                             max_answer_length=longest),
      best(scores.start), best(scores.end)], axis=1)

NO_SPAN = -1e9  # the best score of a question without any legal span


@dataclasses.dataclass(frozen=True)
class WindowSpans:
  """The best spans of every window, in window positions."""

  start: np.ndarray  # [N, K] int32
  end: np.ndarray  # [N, K] int32, inclusive
  score: np.ndarray  # [N, K] float32, descending
  valid: np.ndarray  # [N, K] bool
  null: np.ndarray  # [N] float32
  normaliser: np.ndarray | None = None  # [N] float32, if the null rule asks
  exact: np.ndarray | None = None  # [N] float32, best by an exact search
  temperatures: tuple[float, ...] = ()
  # [N, T] float32: log Σ exp(score / temperature) of all spans a search of
  # this window may return, so that those of a question's windows add up
  mass: np.ndarray | None = None
  gold: np.ndarray | None = None  # [N, G] float32; ILLEGAL: not to be found
  spread: np.ndarray | None = None  # [N, 3] float32, if histograms ask
