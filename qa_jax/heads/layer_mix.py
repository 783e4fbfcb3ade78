"""The independent head on a learned mixture of all encoder layers.

Glossary of shapes: D hidden size, N layers, the embeddings included.

  h_i = γ Σ_n softmax(α)_n h_i^(n)        start[i] = S · h_i, end[j] = E · h_j

Peters et al. (2018, ELMo), section 3.2, equation 1. The mixture starts as the
mean of the layers. After training, α shows which layers contain the answer.
"""

from typing import ClassVar

import flax.linen as nn
import jax

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class LayerMix(nn.Module):
  """The head on a mixture of layers: 2D + N + 1 parameters."""

  token_wise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    alpha = self.param('alpha', nn.initializers.zeros, (len(inputs.layers),))
    gamma = self.param('gamma', nn.initializers.ones, ())
    weights = jax.nn.softmax(alpha)
    hidden = gamma * sum(
        weights[n] * layer for n, layer in enumerate(inputs.layers))
    return SpanScores(start=layers.project('start', hidden),
                      end=layers.project('end', hidden))
