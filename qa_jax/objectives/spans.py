"""Objectives over spans: one softmax over the masked outer sum.

Glossary of shapes: B batch (windows), G gold spans.

table.py says what V⁺ is. A gold span that is longer than `max_answer_length`
is not in it; it is then added to the sum, so that every loss is finite and not
negative. Beyond the lengths that a head scores, spans have no pair term.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.objectives import base
from qa_jax.objectives import boundaries
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Objective
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import softmax_domain

# (scores, context mask [B, L], golds [B, G, 2]) → log of the sum, [B].
Normaliser = Callable[[SpanScores, jax.Array, jax.Array], jax.Array]
# The scores of gold spans, [B, G], and axis=1 → one score, [B].
Combine = Callable[..., jax.Array]


def span_softmax(*, constrained: bool = True,
                 max_answer_length: int = 30) -> Objective:
  """-log p(span), p one softmax over V⁺.

  With no pair term and no null score of its own it is CE(start) + CE(end) +
  log `valid_mass`: cross-entropy in which mass on no span costs nothing. Clark
  and Gardner (2018) report in code that it hurts exact match.

  Unless `constrained`, p is over all pairs of context tokens and [CLS], in any
  order and of any length. That is CE(start) + CE(end) again.
  """
  normaliser = _normaliser('span_softmax', constrained, max_answer_length)
  return Objective(_loss(_first_gold, normaliser), spans=True, pairs=True)


def joint(*, constrained: bool = True,
          max_answer_length: int = 30) -> Objective:
  """`span_softmax` of a head that scores pairs (Fajcik et al., 2021)."""
  normaliser = _normaliser('joint', constrained, max_answer_length)
  return Objective(_loss(_first_gold, normaliser),
                   needs=frozenset({'pair'}), spans=True, pairs=True)


def compound(*, constrained: bool = True,
             max_answer_length: int = 30) -> Objective:
  """The mean of start, end and joint loss (Fajcik et al., 2021).

  Start and end losses are of scores of their own, which share the encoder with
  those of the joint loss and are not decoded.
  """
  joint_loss = _loss(_first_gold, _normaliser(
      'compound', constrained, max_answer_length))

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    apart, domain = scores.boundary, softmax_domain(batch['context_mask'])
    return (joint_loss(scores, batch)
            + boundaries.position_loss(
                apart.start, batch['start_positions'], domain)
            + boundaries.position_loss(
                apart.end, batch['end_positions'], domain)) / 3

  return Objective(loss, needs=frozenset({'boundary'}), spans=True,
                   pairs=True)


def marginal(*, over: str = 'span', constrained: bool = True,
             max_answer_length: int = 30) -> Objective:
  """-log of the probability of *any* gold span: marginal likelihood.

  `over` 'span': Σ p(span), p as in `span_softmax`. 'boundary': Σ p(start) and
  Σ p(end) apart, by cross-entropy's softmaxes (Clark and Gardner, 2018); it
  also credits the start of one mention with the end of another. The other
  arguments have no part in it.
  """
  base.choose('marginal', 'over', over, ('span', 'boundary'))
  normaliser = _normaliser('marginal', constrained, max_answer_length)
  if over == 'boundary':
    return Objective(boundaries.marginal_loss, spans=True)
  return Objective(_loss(_all_golds, normaliser), spans=True, pairs=True)


def hard_em(*, tau: float = 4000.0, cap: float = 0.8, constrained: bool = True,
            max_answer_length: int = 30) -> Objective:
  """-log p of the likeliest gold span: hard EM (Min et al., 2019).

  As in their code, a whole update does so with probability min(t / tau, cap)
  after t updates, and takes `marginal` else; the draw is a function of t. Their
  p is that of `constrained=False`, their tau 4000 (TriviaQA) or 8000 (Natural
  Questions).
  """
  base.require(0 < tau < math.inf, 'hard_em',
               f'tau={tau} must be above 0 and finite')
  base.require(0 <= cap <= 1, 'hard_em', f'cap={cap} is outside [0, 1]')
  normaliser = _normaliser('hard_em', constrained, max_answer_length)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    step = batch['step'][0]
    draw = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step))
    hard = draw < jnp.minimum(step / tau, cap)

    def combine(cells, axis):
      return jnp.where(hard, cells.max(axis), jax.nn.logsumexp(cells, axis))

    return _loss(_all_golds, normaliser, combine)(scores, batch)

  return Objective(loss, spans=True, pairs=True)


def f1_weighted(*, weight: float = 0.5,
                max_answer_length: int = 30) -> Objective:
  """-log Σ p(i, j) · [weight · F1(i, j) + (1 - weight) · 1{gold}].

  F1 is the overlap in tokens with the best gold span: a span that shares words
  with an answer earns a part (the code of Clark and Gardner, 2018). In a window
  without an answer only null earns anything.
  """
  base.require(0 <= weight <= 1, 'f1_weighted',
               f'weight={weight} is outside [0, 1]')
  normaliser = _normaliser('f1_weighted', True, max_answer_length)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    mask, golds = batch['context_mask'], batch['gold_spans']
    cells = span_scores.band(scores, mask, max_answer_length)
    f1 = span_scores.overlap_f1(golds, cells.shape[1:])
    credit = weight * f1 + (1 - weight) * (f1 == 1)
    earns = credit > 0
    earned = jnp.logaddexp(
        span_scores.masked_logsumexp(
            cells + jnp.log(jnp.where(earns, credit, 1.0)), earns, axis=(1, 2)),
        span_scores.log_sum_beyond(scores, golds, max_answer_length))
    answered = (golds[..., 0] >= 0).any(axis=1)
    return normaliser(scores, mask, golds) - jnp.where(
        answered, earned, scores.null_score)

  return Objective(loss, spans=True, pairs=True)


def _loss(golds_of: Callable[[Batch], jax.Array], normaliser: Normaliser,
          combine: Combine = jax.nn.logsumexp) -> base.Loss:
  """-log of the combined probability of the gold spans, else of null."""
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    golds = golds_of(batch)
    gold = jnp.where((golds[..., 0] >= 0).any(axis=1),
                     combine(span_scores.gold_scores(scores, golds), axis=1),
                     scores.null_score)
    return normaliser(scores, batch['context_mask'], golds) - gold
  return loss


def _all_golds(batch: Batch) -> jax.Array:  # [B, G, 2]
  return batch['gold_spans']


def _first_gold(batch: Batch) -> jax.Array:  # [B, 1, 2]
  span = jnp.stack([batch['start_positions'], batch['end_positions']], axis=1)
  return jnp.where(span[:, :1] > 0, span, -1)[:, None]


def _normaliser(objective: str, constrained: bool,
                max_answer_length: int) -> Normaliser:
  base.require(max_answer_length >= 1, objective,
               f'max_answer_length={max_answer_length} must be at least 1')

  def legal(scores, mask, golds):
    return jnp.logaddexp(
        span_scores.log_sum_of_spans(scores, mask, max_answer_length),
        span_scores.log_sum_beyond(scores, golds, max_answer_length))

  def everything(scores, mask, golds):
    del golds  # they are among all pairs
    return span_scores.log_sum_of_pairs(scores, mask)

  return legal if constrained else everything
