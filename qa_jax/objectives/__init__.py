"""OBJECTIVES: SpanScores and gold positions → a loss per window.

Glossary of shapes: B batch (windows).

An objective's loss is a function (scores, batch) → [B] float32. The caller
weights and averages: a sum of losses over a sum of weights, over all devices.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from qa_jax import registry
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Objective
from qa_jax.objectives.base import require
from qa_jax.objectives.boundaries import boundary_kernel
from qa_jax.objectives.boundaries import conditional
from qa_jax.objectives.boundaries import cross_entropy
from qa_jax.objectives.boundaries import label_smoothing
from qa_jax.objectives.boundaries import position_loss
from qa_jax.objectives.boundaries import shared_norm
from qa_jax.objectives.boundaries import sigmoid
from qa_jax.objectives.spans import compound
from qa_jax.objectives.spans import f1_weighted
from qa_jax.objectives.spans import hard_em
from qa_jax.objectives.spans import joint
from qa_jax.objectives.spans import marginal
from qa_jax.objectives.spans import span_softmax
from qa_jax.span_scores import SpanScores

__all__ = ['OBJECTIVES', 'Batch', 'Objective', 'position_loss']


def answerability(*, base: str = 'cross_entropy',
                  weight: float = 0.5) -> Objective:
  """The `base` objective + weight · BCE(null, this window has no answer).

  XLNet (Yang et al., 2019): per *window*. With the question's flag, a window
  that misses the answer would be told both "answerable" and "[CLS]".
  """
  require(0 <= weight < math.inf, 'answerability',
          f'weight={weight} must be at least 0 and finite')
  inner = registry.build(OBJECTIVES, base, what='objective')

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    logit = scores.null.astype(jnp.float32)
    answered = batch['start_positions'] > 0
    extra = jax.nn.softplus(jnp.where(answered, logit, -logit))
    if inner.grouped:  # the mean over the windows of the question
      together = batch['group'][:, None] == batch['group'][None, :]
      extra = jnp.mean(jnp.broadcast_to(extra[None], together.shape), axis=1,
                       where=together)
    return inner.loss(scores, batch) + weight * extra

  return dataclasses.replace(inner, loss=loss, needs=inner.needs | {'null'})


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    'cross_entropy': cross_entropy,
    'label_smoothing': label_smoothing,
    'boundary_kernel': boundary_kernel,
    'sigmoid': sigmoid,
    'conditional': conditional,
    'span_softmax': span_softmax,
    'joint': joint,
    'compound': compound,
    'f1_weighted': f1_weighted,
    'marginal': marginal,
    'hard_em': hard_em,
    'shared_norm': shared_norm,
    'answerability': answerability,
}
