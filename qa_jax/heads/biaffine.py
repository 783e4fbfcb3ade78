"""The independent pair plus a product of start and end of low rank.

Glossary of shapes: B batch (windows), L window length, D hidden size,
R rank, W longest span.

  score(i, j) = S · h_i + E · h_j + h_iᵀ U h_j,        U = A Bᵀ / √R

Dozat & Manning (2017), with U factored: 2DR parameters for D², and
2·W·R operations a start for 2·W·D. The division is that of scaled dot-product
attention (Vaswani et al., 2017), which this is with one head. The null score
has no product.

B starts as zero, S and E as those of `independent`: before the first step the
two heads are one, and what training makes of U is the whole difference. B
moves first, since A gets no gradient from a zero B.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Biaffine(nn.Module):
  """2D(1 + R) parameters."""

  rank: int = 64
  width: int = 30

  def __post_init__(self):
    layers.check_at_least(1, 'biaffine', rank=self.rank, width=self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden = inputs.hidden
    left = layers.dense(self.rank, 'left')(hidden)  # [B, L, R]: Aᵀ h_i
    right = layers.dense(  # Bᵀ h_j
        self.rank, 'right', init=nn.initializers.zeros)(hidden)
    left = left / math.sqrt(self.rank)
    return SpanScores(
        start=layers.project('start', hidden),
        end=layers.project('end', hidden),
        pair=layers.over_band(lambda end: jnp.sum(left * end, axis=-1), right,
                              self.width))
