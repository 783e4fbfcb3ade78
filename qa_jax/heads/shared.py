"""One vector for both boundaries: the lower bound that any head should beat.

  start[i] = S · h_i        end[j] = S · h_j

The score is symmetric, so it cannot distinguish start and end: cross-entropy on
a span of several tokens stays above log 2 per boundary, and the best span tends
to be one token long. A head that is no better than this one has not learned to
find the end.
"""

from typing import ClassVar

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Shared(nn.Module):
  """The shared head: D parameters."""

  token_wise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = layers.project('start', inputs.hidden)
    return SpanScores(start=scores, end=scores)
