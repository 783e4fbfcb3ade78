"""The training objectives, and OBJECTIVES, the table that names them.

Glossary of shapes: B batch (windows).

The loss of an objective maps (SpanScores, batch) to a loss per window, [B]
float32. The train step computes the weighted mean: the sum of the weighted
losses over all devices, divided by the sum of the weights.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.objectives.base import Batch
from qa_jax.objectives.base import Objective
from qa_jax.objectives.boundaries import boundary_kernel
from qa_jax.objectives.boundaries import conditional
from qa_jax.objectives.boundaries import cross_entropy
from qa_jax.objectives.boundaries import label_smoothing
from qa_jax.objectives.boundaries import shared_norm
from qa_jax.objectives.boundaries import sigmoid
from qa_jax.objectives.spans import compound
from qa_jax.objectives.spans import f1_weighted
from qa_jax.objectives.spans import hard_em
from qa_jax.objectives.spans import joint
from qa_jax.objectives.spans import marginal
from qa_jax.objectives.spans import span_softmax
from qa_jax.span_scores import SpanScores


def answerability(*, base: str = 'cross_entropy',
                  weight: float = 0.5) -> Objective:
  """Adds weight · BCE(null score, "no answer") to the objective `base`.

  XLNet (Yang et al., 2019). BCE is the binary cross-entropy. Its label is that
  of the *window*: with the label of the question, a window without the answer
  would have to learn both "answerable" and a gold span at [CLS].
  """
  errors.require(0 <= weight < math.inf, "objective 'answerability': "
                 f'weight={weight} must be at least 0 and finite')
  inner = registry.build(OBJECTIVES, base, what='objective', kind=Objective)

  def loss(scores: SpanScores, batch: Batch) -> jax.Array:  # [B]
    answered = batch['start_positions'] > 0
    extra = jax.nn.softplus(jnp.where(answered, scores.null, -scores.null))
    if inner.needs_whole_questions:  # the mean over the question's windows
      same_question = batch['group'][:, None] == batch['group'][None, :]
      extra = jnp.mean(jnp.broadcast_to(extra[None], same_question.shape),
                       axis=1, where=same_question)
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
