"""The n-best spans of single windows, with the sums and statistics of scores.

Glossary of shapes: B batch (windows), N windows of a data set, L window
length, K n-best candidates, G gold spans, T temperatures.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import span_scores
from qa_jax.decoding import search
from qa_jax.span_scores import SpanScores

# Stands for the best score of a window without any legal span. It is much
# higher than search.ILLEGAL, so that no-answer scores stay finite. Spans that
# score less than half of it are no candidates: a conditional head gives about
# this score to spans whose start is not in its beam.
NO_SPAN = -1e9
STATISTICS = ('valid_mass', 'start_score', 'end_score')


@dataclasses.dataclass(frozen=True)
class WindowSpans:
  """The n-best spans of every window, in window positions."""

  start: np.ndarray  # [N, K] int32
  end: np.ndarray  # [N, K] int32, inclusive
  score: np.ndarray  # [N, K] float32, descending; search.ILLEGAL if invalid
  valid: np.ndarray  # [N, K] bool
  null: np.ndarray  # [N] float32, null scores
  # [N] float32: log-partition over all spans of the window, for null rules.
  normaliser: np.ndarray | None = None
  exact: np.ndarray | None = None  # [N] float32, best score of an exact search
  temperatures: tuple[float, ...] = ()
  # [N, T] float32: log-partition over the spans that start at an owned token.
  # A span does so in one window only, so that windows can be summed.
  log_partition: np.ndarray | None = None
  # [N, G] float32; search.ILLEGAL where no search may return the gold span.
  gold_scores: np.ndarray | None = None
  statistics: np.ndarray | None = None  # [N, 3] float32, columns STATISTICS


def window_candidates(
    find: search.Search, scores: SpanScores, start_mask: jax.Array,
    end_mask: jax.Array, *, longest: int, n_best: int,
    softmax_mask: jax.Array | None = None) -> dict[str, jax.Array]:
  """Returns the n-best spans of each window as fields of WindowSpans.

  The masks are [B, L] bool. `longest` counts tokens, both ends included. With
  `softmax_mask`, the context mask, the fields have the normaliser.
  """
  spans = find(scores, start_mask, end_mask, max_answer_length=longest,
               n_best=n_best)
  # An invalid span scores ILLEGAL. A score that is NaN stays, to be refused.
  valid = ~(spans.score <= NO_SPAN / 2)
  fields = {'start': spans.start, 'end': spans.end, 'valid': valid,
            'score': jnp.where(valid, spans.score, search.ILLEGAL),
            'null': spans.null_score}
  if softmax_mask is not None:
    fields['normaliser'] = search.log_partition(
        scores, softmax_mask, softmax_mask, max_answer_length=longest)
  return fields


def log_partitions(scores: SpanScores, start_mask: jax.Array,
                   end_mask: jax.Array, temperatures: jax.Array, *,
                   longest: int) -> jax.Array:  # [B, T]
  """Returns the log-partition over all legal spans at each temperature."""
  return jax.lax.map(lambda t: search.log_partition(
      scores, start_mask, end_mask, max_answer_length=longest,
      temperature=t), temperatures).T


def legal_gold_scores(scores: SpanScores, start_mask: jax.Array,
                      end_mask: jax.Array, golds: jax.Array,  # [B, G, 2]
                      *, longest: int) -> jax.Array:  # [B, G]
  """Returns the scores of the gold spans, search.ILLEGAL for illegal ones."""
  first, last = jnp.maximum(golds[..., 0], 0), jnp.maximum(golds[..., 1], 0)
  legal = ((golds[..., 0] > 0) & (last - first < longest)
           & jnp.take_along_axis(start_mask, first, axis=1)
           & jnp.take_along_axis(end_mask, last, axis=1))
  return jnp.where(legal, span_scores.gold_scores(scores, golds),
                   search.ILLEGAL)


def score_statistics(scores: SpanScores, context_mask: jax.Array, *,
                     longest: int) -> jax.Array:  # [B, 3]
  """Returns STATISTICS, with the best scores of context tokens and [CLS]."""
  domain = span_scores.softmax_domain(context_mask)
  best = lambda x: jnp.where(domain, x, search.ILLEGAL).max(axis=1)
  return jnp.stack([
      span_scores.valid_mass(scores, context_mask, max_answer_length=longest),
      best(scores.start), best(scores.end)], axis=1)
