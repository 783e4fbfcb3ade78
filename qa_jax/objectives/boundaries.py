"""Objectives over positions: the start and the end, each on its own.

Glossary of shapes: B batch (windows), L window length, G gold spans.

All but cross-entropy's sum take the mean of the start's and the end's loss.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qa_jax import span_scores
from qa_jax.objectives import base
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Objective
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import softmax_domain

DOMAINS = ('context', 'all')


def cross_entropy(*, domain: str = 'context',
                  reduction: str = 'mean') -> Objective:
  """-log p(start) - log p(end), two softmaxes over positions.

  Devlin et al. (2019), section 4.2. `domain` of the softmax: 'context', the
  context tokens and [CLS] (the paper's "words in the paragraph"), or 'all',
  question and padding included, as BERT's code and transformers do.
  `reduction` over the two terms: 'mean' (the code) or 'sum' (the paper).
  """
  base.choose('cross_entropy', 'domain', domain, DOMAINS)
  base.choose('cross_entropy', 'reduction', reduction, ('mean', 'sum'))

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    mask = _domain(batch, domain)
    total = (position_loss(scores.start, batch['start_positions'], mask)
             + position_loss(scores.end, batch['end_positions'], mask))
    return total / 2 if reduction == 'mean' else total

  return Objective(loss)


def conditional(*, domain: str = 'context',
                reduction: str = 'mean') -> Objective:
  """-log p(start) - log p(end | gold start), as XLNet (Yang et al., 2019).

  Cross-entropy as it is: while training, the end scores of a conditional head
  are those given the gold start.
  """
  return dataclasses.replace(
      cross_entropy(domain=domain, reduction=reduction),
      needs=frozenset({'conditional'}))


def label_smoothing(*, epsilon: float = 0.1,
                    domain: str = 'context') -> Objective:
  """Cross-entropy with a share `epsilon` of the target spread evenly.

  Szegedy et al. (2016), section 7; only over the context and [CLS], whatever
  the `domain` of the softmax: no other position can be an answer.
  """
  base.require(0 <= epsilon < 1, 'label_smoothing',
               f'epsilon={epsilon} is outside [0, 1)')
  base.choose('label_smoothing', 'domain', domain, DOMAINS)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    valid = softmax_domain(batch['context_mask']).astype(jnp.float32)
    even = valid / valid.sum(axis=1, keepdims=True)

    def target(positions):
      one_hot = jax.nn.one_hot(positions, valid.shape[1])
      return (1 - epsilon) * one_hot + epsilon * even

    return _soft_loss(scores, _domain(batch, domain),
                      target(batch['start_positions']),
                      target(batch['end_positions']))

  return Objective(loss)


def boundary_kernel(*, temperature: float = 1.0,
                    domain: str = 'context') -> Objective:
  """Cross-entropy with target q(i) ∝ exp(-|i - gold| / temperature).

  Over context tokens, `temperature` in tokens: a near miss costs less. The
  label [CLS] has no neighbours and stays one-hot.
  """
  base.require(0 < temperature < math.inf, 'boundary_kernel',
               f'temperature={temperature} must be above 0 and finite')
  base.choose('boundary_kernel', 'domain', domain, DOMAINS)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    context = batch['context_mask']
    column = jnp.arange(context.shape[1])[None]

    def target(positions):
      gold = positions[:, None]
      near = -jnp.abs(column - gold) / temperature
      kernel = jax.nn.softmax(jnp.where(context, near, span_scores.MASKED),
                              axis=1)
      return jnp.where(gold > 0, kernel, column == 0)

    return _soft_loss(scores, _domain(batch, domain),
                      target(batch['start_positions']),
                      target(batch['end_positions']))

  return Objective(loss)


def sigmoid() -> Objective:
  """Binary cross-entropy of every position being the boundary, or not.

  Clark and Gardner (2018). Summed over the context and [CLS]; a
  mean, as in their code, would weigh a window by its padding. Here alone a
  bias in the head matters: no softmax cancels it.
  """
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    valid = softmax_domain(batch['context_mask'])

    def one(x, positions):
      gold = jax.nn.one_hot(positions, x.shape[1])
      return jnp.where(valid, jax.nn.softplus(x) - gold * x, 0.0).sum(axis=1)

    return (one(scores.start, batch['start_positions'])
            + one(scores.end, batch['end_positions'])) / 2

  return Objective(loss)


def marginal_loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
  """-log Σ p(start) - log Σ p(end), halved, over all gold starts and ends."""
  domain = softmax_domain(batch['context_mask'])
  present = batch['gold_spans'][..., 0] >= 0
  answered = present.any(axis=1, keepdims=True)
  null = jnp.arange(domain.shape[1])[None] == 0

  def one(x, positions):  # [B, L], [B, G]
    gold = jnp.where(answered, _members(positions, present, x.shape[1]), null)
    return (span_scores.masked_logsumexp(x, domain, axis=1)
            - span_scores.masked_logsumexp(x, gold, axis=1))

  return (one(scores.start, batch['gold_spans'][..., 0])
          + one(scores.end, batch['gold_spans'][..., 1])) / 2


def shared_norm() -> Objective:
  """-log Σ p(start) - log Σ p(end), halved: softmaxes over all windows of one
  question, which makes the scores of its windows comparable.

  Clark and Gardner (2018). Windows overlap, so each token counts
  once, in the window of its maximal context, where the search may start; a
  gold span counts in the window that owns its start, and its end in that
  window only. (If no window that holds a whole gold span owns its start, all
  of them count.) Every window's [CLS] is in both softmaxes; for a question
  without an answer they are the gold positions.
  """
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    together = batch['group'][:, None] == batch['group'][None, :]  # [B, B]
    of_question = lambda x: (together & x.any(axis=1)[None]).any(
        axis=1, keepdims=True)
    owned, golds = batch['start_mask'], batch['gold_spans']
    present = golds[..., 0] >= 0  # [B, G]
    owns_start = present & jnp.take_along_axis(
        owned, jnp.maximum(golds[..., 0], 0), axis=1)
    used = jnp.where(of_question(owns_start), owns_start, present)
    answered = of_question(present)
    null = jnp.arange(owned.shape[1])[None] == 0

    def log_sum(x, members):  # [B]: over the question's windows
      row = span_scores.masked_logsumexp(x, members, axis=1)
      return span_scores.masked_logsumexp(row[None], together, axis=1)

    def one(x, positions):  # [B, L], [B, G]
      gold = _members(positions, used, x.shape[1])
      elsewhere = _members(positions, present & ~used, x.shape[1])
      domain = (owned & ~elsewhere) | gold | null
      return (log_sum(x, domain)
              - log_sum(x, jnp.where(answered, gold, null)))

    return (one(scores.start, golds[..., 0])
            + one(scores.end, golds[..., 1])) / 2

  return Objective(loss, spans=True, grouped=True)


def position_loss(scores: jax.Array,  # [B, L]
                  positions: jax.Array,  # [B] int32
                  mask: jax.Array | None) -> jax.Array:  # [B]
  """Cross-entropy of one softmax over (unmasked) positions, in float32."""
  log_probs = _log_softmax(scores, mask)
  return -jnp.take_along_axis(log_probs, positions[:, None], axis=-1)[:, 0]


def _log_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
  scores = scores.astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, span_scores.MASKED)
  return jax.nn.log_softmax(scores, axis=-1)


def _soft_loss(scores: SpanScores, mask: jax.Array | None,
               start: jax.Array, end: jax.Array) -> jax.Array:  # [B]
  """Cross-entropy with target distributions [B, L], 0 where masked."""
  return -(jnp.sum(start * _log_softmax(scores.start, mask), axis=1)
           + jnp.sum(end * _log_softmax(scores.end, mask), axis=1)) / 2


def _domain(batch: Batch, domain: str) -> jax.Array | None:
  return None if domain == 'all' else softmax_domain(batch['context_mask'])


def _members(positions: jax.Array,  # [B, G]
             present: jax.Array,  # [B, G] bool
             length: int) -> jax.Array:  # [B, L] bool
  hit = positions[:, :, None] == jnp.arange(length)[None, None]
  return (hit & present[:, :, None]).any(axis=1)
