"""OBJECTIVES: SpanScores and gold positions → a loss per window.

Glossary of shapes: B batch (windows), L window length.

An objective's loss is a function (scores, batch) → [B] float32. The caller
weights and averages: a sum of losses over a sum of weights, over all devices.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads.base import SpanScores

Batch = Mapping[str, jax.Array]
Loss = Callable[[SpanScores, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss, and what it asks of a head."""

  loss: Loss
  # Fields of SpanScores that must be there: 'pair', 'null', 'boundary', or
  # 'conditional'.
  needs: frozenset[str] = frozenset()
  # Whether it adds start and end of spans other than the gold one, which the
  # training scores of a conditional head do not allow.
  spans: bool = False


# Finite, so that a row with nothing in the domain has finite gradients.
MASKED = -1e30


def cross_entropy(*, domain: str = 'context',
                  reduction: str = 'mean') -> Objective:
  """-log p(start) - log p(end), two softmaxes over positions.

  Devlin et al. (2019), section 4.2. `domain` of the softmax: 'context', the
  context tokens and [CLS] (the paper's "words in the paragraph"), or 'all',
  question and padding included, as BERT's code and transformers do.
  `reduction` over the two terms: 'mean' (the code) or 'sum' (the paper).
  """
  _choose('domain', domain, ('context', 'all'))
  _choose('reduction', reduction, ('mean', 'sum'))

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    mask = None if domain == 'all' else softmax_domain(batch['context_mask'])
    total = (position_loss(scores.start, batch['start_positions'], mask)
             + position_loss(scores.end, batch['end_positions'], mask))
    return total / 2 if reduction == 'mean' else total

  return Objective(loss)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    'cross_entropy': cross_entropy,
}


def softmax_domain(context_mask: jax.Array) -> jax.Array:
  """[B, L] bool: the context tokens, and [CLS] for "no answer here"."""
  return context_mask.at[:, 0].set(True)


def position_loss(scores: jax.Array,  # [B, L]
                  positions: jax.Array,  # [B] int32
                  mask: jax.Array | None) -> jax.Array:  # [B]
  """Cross-entropy of one softmax over (unmasked) positions, in float32."""
  scores = scores.astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, MASKED)
  log_probs = jax.nn.log_softmax(scores, axis=-1)
  return -jnp.take_along_axis(log_probs, positions[:, None], axis=-1)[:, 0]


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise errors.UserError(
        f'{name}={value!r}{errors.did_you_mean(value, known)}')
