"""Objectives over spans: one softmax over the legal spans and the null answer.

Glossary of shapes: B batch (windows), L window length, G gold spans.

span_scores.py defines V⁺, the legal spans and the null answer. A gold span that
is longer than `max_answer_length` is not in V⁺. It is then added to the
log-partition, so that every loss is finite and not negative. A span that is
longer than the head scores has no pair term.
"""

from collections.abc import Callable
import math
import operator

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import span_scores
from qa_jax.objectives import boundaries
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Loss
from qa_jax.objectives.base import Objective
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import softmax_domain

LONGEST = 30  # tokens of a span, by default
# (scores, context mask [B, L], gold spans [B, G, 2]) → log-partition, [B].
LogPartition = Callable[[SpanScores, jax.Array, jax.Array], jax.Array]


def _span_objective(loss: Loss, max_answer_length: int,
                    constrained: bool = True, **demands) -> Objective:
  return Objective(
      loss, scores_other_spans=True, trains_pair_and_null=True,
      max_answer_length=max_answer_length if constrained else None, **demands)


def span_softmax(*, constrained: bool = True,
                 max_answer_length: int = LONGEST) -> Objective:
  """Computes -log p(gold span), with one softmax p over V⁺.

  If the head has neither pair nor null scores, this is CE(start) + CE(end) +
  log `valid_mass`, where CE is cross-entropy: probability of pairs that are no
  legal span costs nothing. Clark and Gardner (2018) report in their code that
  this objective hurts exact match.

  If `constrained` is False, p is over all pairs of context tokens and [CLS], in
  any order and of any length. That is CE(start) + CE(end) again.
  """
  log_partition = _log_partition('span_softmax', constrained, max_answer_length)
  return _span_objective(_loss(_first_gold, log_partition), max_answer_length,
                         constrained)


def joint(*, constrained: bool = True,
          max_answer_length: int = LONGEST) -> Objective:
  """Computes `span_softmax` with pair scores (Fajcik et al., 2021)."""
  log_partition = _log_partition('joint', constrained, max_answer_length)
  return _span_objective(_loss(_first_gold, log_partition), max_answer_length,
                         constrained, needs=frozenset({'pair'}))


def compound(*, constrained: bool = True,
             max_answer_length: int = LONGEST) -> Objective:
  """Computes the mean of a start loss, an end loss and a joint loss.

  Fajcik et al. (2021). The start and end losses are those of
  `SpanScores.boundary`, which shares the encoder and is not decoded.
  """
  joint_loss = _loss(_first_gold, _log_partition(
      'compound', constrained, max_answer_length))

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    boundary, domain = scores.boundary, softmax_domain(batch['context_mask'])
    start = boundaries.position_loss(
        boundary.start, batch['start_positions'], domain)
    end = boundaries.position_loss(
        boundary.end, batch['end_positions'], domain)
    return (joint_loss(scores, batch) + start + end) / 3

  return _span_objective(loss, max_answer_length, constrained,
                         needs=frozenset({'boundary'}))


def marginal(*, over: str = 'span', constrained: bool = True,
             max_answer_length: int = LONGEST) -> Objective:
  """Computes the marginal loss: -log of the probability of *any* gold span.

  With `over` = 'span' that is -log Σ p(span), with p as in `span_softmax`. With
  'boundary' it is the mean of -log Σ p(start) and -log Σ p(end), with the
  softmaxes of `cross_entropy` (Clark and Gardner, 2018), and takes no other
  argument. This also rewards the start of one mention with the end of another.
  """
  errors.check_choice(
      "objective 'marginal'", 'over', over, ('span', 'boundary'))
  log_partition = _log_partition('marginal', constrained, max_answer_length)
  if over == 'boundary':
    errors.require(
        constrained and max_answer_length == LONGEST,
        "objective 'marginal': constrained and max_answer_length have no "
        "effect with over='boundary'; leave them out")
    return Objective(boundaries.marginal_loss, scores_other_spans=True)
  return _span_objective(_loss(_all_golds, log_partition), max_answer_length,
                         constrained)


def hard_em(*, tau: float = 4000.0, cap: float = 0.8, constrained: bool = True,
            max_answer_length: int = LONGEST) -> Objective:
  """Computes -log p of the most probable gold span: hard EM (Min et al., 2019).

  As in their code, a train step uses this loss with probability
  min(t / tau, cap), where t is the number of steps before it, and the loss
  `marginal` otherwise. The random draw of a step depends on the seed of the run
  and on t only, so all devices and micro-steps agree. Their p is that of
  `constrained=False`; their tau is 4000 (TriviaQA) or 8000 (Natural Questions).
  """
  errors.require(0 < tau < math.inf,
                 f"objective 'hard_em': tau={tau} must be above 0 and finite")
  errors.require(0 <= cap <= 1,
                 f"objective 'hard_em': cap={cap} is outside [0, 1]")
  log_partition = _log_partition('hard_em', constrained, max_answer_length)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    hard = batch['draw'][0] < jnp.minimum(batch['step'][0] / tau, cap)
    combine = lambda golds, axis: jnp.where(
        hard, golds.max(axis), jax.nn.logsumexp(golds, axis))
    return _loss(_all_golds, log_partition, combine)(scores, batch)

  return _span_objective(loss, max_answer_length, constrained)


def f1_weighted(*, weight: float = 0.5,
                max_answer_length: int = LONGEST) -> Objective:
  """Computes -log Σ p(i, j) · [weight · F1(i, j) + (1 - weight) · 1{gold}].

  F1 is the token F1 of (i, j) with its best gold span, so a span that overlaps
  an answer has a partial credit (the code of Clark and Gardner, 2018). In a
  window without an answer only the null answer has credit.
  """
  errors.require(0 <= weight <= 1,
                 f"objective 'f1_weighted': weight={weight} is outside [0, 1]")
  log_partition = _log_partition('f1_weighted', True, max_answer_length)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    mask, golds = batch['context_mask'], batch['gold_spans']
    band = span_scores.band(scores, mask, max_answer_length)
    f1 = span_scores.overlap_f1(golds, band.shape[1:])
    gold = f1 > 1 - 1e-6  # a GPU divides to 2 units in the last place
    credit = weight * f1 + (1 - weight) * gold.astype(f1.dtype)
    has_credit = credit > 0
    weighted = band + jnp.log(jnp.where(has_credit, credit, 1.0))
    log_sum = jnp.logaddexp(
        span_scores.masked_logsumexp(weighted, has_credit, axis=(1, 2)),
        span_scores.log_sum_beyond(scores, golds, max_answer_length))
    answered = (golds[..., 0] >= 0).any(axis=1)
    return log_partition(scores, mask, golds) - jnp.where(
        answered, log_sum, scores.null_score)

  return _span_objective(loss, max_answer_length)


def _loss(golds_of: Callable[[Batch], jax.Array], log_partition: LogPartition,
          combine: Callable[..., jax.Array] = jax.nn.logsumexp) -> Loss:
  """Returns the loss -log p(gold spans), or -log p(null) without a gold span.

  `combine` makes one score of the scores of the gold spans of a window.
  """
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    golds = golds_of(batch)
    gold = jnp.where((golds[..., 0] >= 0).any(axis=1),
                     combine(span_scores.gold_scores(scores, golds), axis=1),
                     scores.null_score)
    return log_partition(scores, batch['context_mask'], golds) - gold
  return loss


_all_golds = operator.itemgetter('gold_spans')  # [B, G, 2]


def _first_gold(batch: Batch) -> jax.Array:  # [B, 1, 2]
  span = jnp.stack([batch['start_positions'], batch['end_positions']], axis=1)
  return jnp.where(span[:, :1] > 0, span, -1)[:, None]


def _log_partition(objective: str, constrained: bool,
                   max_answer_length: int) -> LogPartition:
  """Returns the log-partition over V⁺ and the gold spans, or over all pairs."""
  errors.check_at_least(1, f'objective {objective!r}',
                        max_answer_length=max_answer_length)
  errors.require(
      constrained or max_answer_length == LONGEST,
      f'objective {objective!r}: max_answer_length={max_answer_length} has no '
      'effect with constrained=False; leave one of them out')

  def over_spans(scores, mask, golds):
    return jnp.logaddexp(
        span_scores.log_sum_of_spans(scores, mask, max_answer_length),
        span_scores.log_sum_beyond(scores, golds, max_answer_length))

  return over_spans if constrained else (  # all pairs include the gold spans
      lambda scores, mask, golds: span_scores.log_sum_of_pairs(scores, mask))
