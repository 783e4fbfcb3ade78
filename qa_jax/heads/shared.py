"""One vector for both boundaries: the sanity floor.

  start[i] = S · h_i        end[j] = S · h_j

The score is symmetric, so start and end cannot be told apart: cross-entropy
on a span of several tokens stays above log 2 a boundary, and the best span
tends to be one token long. A head that is no better than this has not learned
what an end is.
"""

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Shared(nn.Module):
  """D parameters."""

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = layers.project('start', inputs.hidden)
    return SpanScores(start=scores, end=scores)
