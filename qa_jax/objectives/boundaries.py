"""Objectives over positions: separate losses of the start and of the end.

Glossary of shapes: B batch (windows), L window length, G gold spans.

The loss is the mean of the start loss and the end loss, except for
`cross_entropy` and `conditional` with reduction="sum".
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import span_scores
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Objective
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import softmax_domain

DOMAINS = ('context', 'all')


def cross_entropy(*, domain: str = 'context',
                  reduction: str = 'mean') -> Objective:
  """Computes -log p(start) - log p(end), two softmaxes over positions.

  Devlin et al. (2019), section 4.2. The `domain` of the softmaxes is 'context',
  the context tokens and [CLS] (the paper's "words in the paragraph"), or 'all',
  which includes question and padding, as in the code of BERT and transformers.
  Packed rows have no padding, so 'all' needs padded ones. The `reduction` is
  'mean' (as in the code) or 'sum' (as in the paper).
  """
  errors.check_choice("objective 'cross_entropy'", 'domain', domain, DOMAINS)
  errors.check_choice("objective 'cross_entropy'", 'reduction', reduction,
                      ('mean', 'sum'))

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    mask = _domain(batch, domain)
    total = (position_loss(scores.start, batch['start_positions'], mask)
             + position_loss(scores.end, batch['end_positions'], mask))
    return total / 2 if reduction == 'mean' else total

  return Objective(loss, reads_padding=domain == 'all')


def conditional(*, domain: str = 'context',
                reduction: str = 'mean') -> Objective:
  """Computes -log p(start) - log p(end | gold start).

  Yang et al. (2019, XLNet). This is `cross_entropy` for a head with conditional
  scores: in training its end scores are given the gold start.
  """
  return dataclasses.replace(cross_entropy(domain=domain, reduction=reduction),
                             needs=frozenset({'conditional'}))


def label_smoothing(*, epsilon: float = 0.1,
                    domain: str = 'context') -> Objective:
  """Computes cross-entropy with a share `epsilon` of the target spread evenly.

  Szegedy et al. (2016), section 7. The share is spread over the context tokens
  and [CLS] only, whatever the `domain` of the softmax is, because no other
  position can be an answer.
  """
  errors.require(0 <= epsilon < 1, "objective 'label_smoothing': "
                 f'epsilon={epsilon} is outside [0, 1)')
  errors.check_choice("objective 'label_smoothing'", 'domain', domain, DOMAINS)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    valid = softmax_domain(batch['context_mask']).astype(jnp.float32)
    even = valid / valid.sum(axis=1, keepdims=True)

    def target(positions):
      one_hot = jax.nn.one_hot(positions, valid.shape[1], dtype=jnp.float32)
      return (1 - epsilon) * one_hot + epsilon * even

    return _soft_loss(scores, batch, domain, target)

  return Objective(loss, reads_padding=domain == 'all')


def boundary_kernel(*, temperature: float = 1.0,
                    domain: str = 'context') -> Objective:
  """Computes cross-entropy with a target that decays around the gold position.

  The target is q(i) ∝ exp(-|i - gold| / temperature) over the context tokens,
  so a prediction near the gold position costs less. `temperature` is in tokens.
  In a window without an answer the target is [CLS] alone.
  """
  errors.require(0 < temperature < math.inf, "objective 'boundary_kernel': "
                 f'temperature={temperature} must be above 0 and finite')
  errors.check_choice("objective 'boundary_kernel'", 'domain', domain, DOMAINS)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    context = batch['context_mask']
    column = jnp.arange(context.shape[1])[None]

    def target(positions):
      gold = positions[:, None]
      near = -jnp.abs(column - gold).astype(jnp.float32) / temperature
      kernel = jax.nn.softmax(jnp.where(context, near, span_scores.MASKED),
                              axis=1)
      return jnp.where(gold > 0, kernel, column == 0)

    return _soft_loss(scores, batch, domain, target)

  return Objective(loss, reads_padding=domain == 'all')


def sigmoid() -> Objective:
  """Computes binary cross-entropy: is this position the boundary or not?

  Clark and Gardner (2018). The terms are summed over the context tokens and
  [CLS]; with a mean, as in their code, the weight of a window would depend on
  its padding. This is the only objective over positions in which a bias of the
  head matters, because no softmax cancels it.
  """
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    valid = softmax_domain(batch['context_mask'])

    def boundary_loss(x, positions):
      gold = jax.nn.one_hot(positions, x.shape[1], dtype=jnp.float32)
      return jnp.where(valid, jax.nn.softplus(x) - gold * x, 0.0).sum(axis=1)

    return (boundary_loss(scores.start, batch['start_positions'])
            + boundary_loss(scores.end, batch['end_positions'])) / 2

  return Objective(loss)


def marginal_loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
  """Computes the mean of -log Σ p(gold start) and -log Σ p(gold end).

  The sums are over all gold spans of a window, or over [CLS] if it has none.
  """
  domain = softmax_domain(batch['context_mask'])
  present = batch['gold_spans'][..., 0] >= 0
  answered = present.any(axis=1, keepdims=True)
  null = jnp.arange(domain.shape[1])[None] == 0

  def boundary_loss(x, positions):  # [B, L], [B, G]
    gold = _position_mask(positions, present, x.shape[1])
    gold = jnp.where(answered, gold, null)
    return (span_scores.masked_logsumexp(x, domain, axis=1)
            - span_scores.masked_logsumexp(x, gold, axis=1))

  return (boundary_loss(scores.start, batch['gold_spans'][..., 0])
          + boundary_loss(scores.end, batch['gold_spans'][..., 1])) / 2


def shared_norm() -> Objective:
  """Computes the `marginal_loss` of softmaxes over all windows of a question.

  Clark and Gardner (2018). One softmax makes the scores of the windows of a
  question comparable. Windows overlap, so each token counts once, in the window
  that owns it. A gold span, with its end, counts only in the window that owns
  its start, or in the windows that contain it if none of them owns its start.
  The start or end of a span that counts is no token of another window, even if
  that window owns it; the first window has those that spans of several share.
  The [CLS] of every window is in both softmaxes; these are the gold positions
  of a question without an answer.
  """
  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    same_question = batch['group'][:, None] == batch['group'][None, :]  # [B, B]
    in_question = lambda x: (same_question & x.any(axis=1)[None]).any(
        axis=1, keepdims=True)
    owned, golds = batch['start_mask'], batch['gold_spans']
    present = golds[..., 0] >= 0  # [B, G]
    owns_start = present & jnp.take_along_axis(
        owned, jnp.maximum(golds[..., 0], 0), axis=1)
    # Two windows hold one gold span if it has equal positions in the context.
    context_start = batch['context_start']
    place = golds + context_start[:, None, None]
    same_span = (place[:, :, None, None] == place[None, None]).all(axis=-1)
    same_span &= same_question[:, None, :, None]  # [B, G, B, G]
    elsewhere = (same_span & owns_start[None, None]).any(axis=(2, 3))
    counted = present & (owns_start | ~elsewhere)
    answered = in_question(present)
    null = jnp.arange(owned.shape[1])[None] == 0

    def log_sum(x, mask):  # [B]: over the windows of the question
      row = span_scores.masked_logsumexp(x, mask, axis=1)
      return span_scores.masked_logsumexp(row[None], same_question, axis=1)

    def boundary_loss(x, place):  # [B, L], [B, G]
      # The positions of all counted boundaries in each window, [B, B·G].
      positions = place.reshape(1, -1) - context_start[:, None]
      mask_of = lambda windows: _position_mask(positions, (
          windows[:, :, None] & counted[None]).reshape(len(x), -1), x.shape[1])
      own = jnp.eye(len(x), dtype=bool)
      earlier = same_question & (context_start[None] < context_start[:, None])
      gold = mask_of(own) & ~mask_of(earlier)
      domain = (owned & ~mask_of(same_question)) | gold | null
      return log_sum(x, domain) - log_sum(x, jnp.where(answered, gold, null))

    return (boundary_loss(scores.start, place[..., 0])
            + boundary_loss(scores.end, place[..., 1])) / 2

  return Objective(loss, scores_other_spans=True, needs_whole_questions=True)


def position_loss(scores: jax.Array, positions: jax.Array,  # [B, L], [B] int32
                  mask: jax.Array | None) -> jax.Array:  # [B]
  """Computes -log p(position); without a mask p is over all positions."""
  log_probs = _log_softmax(scores, mask)
  return -jnp.take_along_axis(log_probs, positions[:, None], axis=-1)[:, 0]


def _log_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
  if mask is not None:
    scores = jnp.where(mask, scores, span_scores.MASKED)
  return jax.nn.log_softmax(scores, axis=-1)


def _soft_loss(
    scores: SpanScores, batch: Batch, domain: str,
    target: Callable[[jax.Array], jax.Array]) -> jax.Array:  # [B]
  """Computes cross-entropy with soft labels target(gold positions), [B, L]."""
  mask = _domain(batch, domain)
  start, end = target(batch['start_positions']), target(batch['end_positions'])
  return -(jnp.sum(start * _log_softmax(scores.start, mask), axis=1)
           + jnp.sum(end * _log_softmax(scores.end, mask), axis=1)) / 2


def _domain(batch: Batch, domain: str) -> jax.Array | None:  # [B, L] bool
  return None if domain == 'all' else softmax_domain(batch['context_mask'])


def _position_mask(positions: jax.Array, present: jax.Array,  # [B, G] each
                   length: int) -> jax.Array:  # [B, L] bool
  """Returns the mask of the positions that are present."""
  hit = positions[:, :, None] == jnp.arange(length)[None, None]
  return (hit & present[:, :, None]).any(axis=1)
