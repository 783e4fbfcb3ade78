"""What is kept of a batch's scores: best spans, sums over all, their spread.

Glossary of shapes: B batch (windows), L window length, G gold spans,
T temperatures.
"""

import jax
import jax.numpy as jnp

from qa_jax import objectives
from qa_jax import search
from qa_jax.heads.base import SpanScores
from qa_jax.objectives import table

SPREAD = ('valid_mass', 'start_score', 'end_score')  # columns of `spread`


def fields(find: search.Search, scores: SpanScores,
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
    found['normaliser'] = search.log_normaliser(
        scores, context_mask, context_mask, max_answer_length=longest)
  return found


def mass(scores: SpanScores, start_mask: jax.Array, context_mask: jax.Array,
         temperatures: jax.Array, *, longest: int) -> jax.Array:  # [B, T]
  """log Σ exp(score / temperature) over all spans that a search may return."""
  return jax.lax.map(lambda t: search.log_normaliser(
      scores, start_mask, context_mask, max_answer_length=longest,
      temperature=t), temperatures).T


def gold_scores(scores: SpanScores, start_mask: jax.Array,
                context_mask: jax.Array, golds: jax.Array,  # [B, G, 2]
                *, longest: int) -> jax.Array:  # [B, G]
  """Scores of gold spans; ILLEGAL for those that no search may return."""
  first, last = jnp.maximum(golds[..., 0], 0), jnp.maximum(golds[..., 1], 0)
  legal = ((golds[..., 0] > 0) & (last - first < longest)
           & jnp.take_along_axis(start_mask, first, axis=1)
           & jnp.take_along_axis(context_mask, last, axis=1))
  return jnp.where(legal, table.gold_scores(scores, golds), search.ILLEGAL)


def spread(scores: SpanScores, context_mask: jax.Array, *,
           longest: int) -> jax.Array:  # [B, 3]
  """What histograms show of a window: the mass that its two softmaxes leave to
  spans, and the best start and end score of context and [CLS]."""
  domain = objectives.softmax_domain(context_mask)
  best = lambda x: jnp.where(domain, x, search.ILLEGAL).max(axis=1)
  return jnp.stack([
      objectives.valid_mass(scores, {'context_mask': context_mask},
                            max_answer_length=longest),
      best(scores.start), best(scores.end)], axis=1)
