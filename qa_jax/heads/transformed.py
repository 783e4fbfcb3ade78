"""A layer of width D before S and E, as in ModernBERT for question answering.

Glossary of shapes: B batch (windows), L window length, D hidden size.

  g_i = LN(gelu(W h_i (+ b)))        start[i] = S · g_i        end[j] = E · g_j

LN is LayerNorm with a scale. Warner et al. (2024, code:
ModernBertForQuestionAnswering) take the layer from the masked-word head of the
checkpoint. S and E share it; in `mlp` each has its own.
"""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Transformed(nn.Module):
  """The transformed head: D(D + 3) parameters without biases."""

  token_wise: ClassVar[bool] = True

  bias: bool = False  # of S and E; no prediction depends on it, as in `biased`
  dense_bias: bool = False
  norm_bias: bool = False
  eps: float = 1e-5  # of LN

  def __post_init__(self):
    errors.require(0 < self.eps < 1,
                   f"head 'transformed': eps={self.eps} must be in (0, 1)")
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden = inputs.hidden
    x = layers.dense(hidden.shape[-1], 'dense', bias=self.dense_bias)(hidden)
    x = nn.LayerNorm(self.eps, use_bias=self.norm_bias, dtype=jnp.float32,
                     name='layer_norm')(nn.gelu(x, approximate=False))
    return SpanScores(start=layers.project('start', x, bias=self.bias),
                      end=layers.project('end', x, bias=self.bias))
