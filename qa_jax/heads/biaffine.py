"""The independent head plus a low-rank product of start and end.

Glossary of shapes: B batch (windows), L window length, D hidden size,
R rank, W longest span.

  score(i, j) = S · h_i + E · h_j + h_iᵀ U h_j,        U = A Bᵀ / √R

Dozat & Manning (2017), with a factored U: 2DR parameters instead of D², and
2·W·R operations per start instead of 2·W·D. The division by √R is that of
scaled dot-product attention (Vaswani et al., 2017) with one attention head. The
null score has no product.

B starts as zero, S and E as those of `independent`: before the first train step
the two heads are equal, so a difference after training comes from U alone. B
changes first, because A gets no gradient while B is zero.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Biaffine(nn.Module):
  """The head with a biaffine pair score: 2D(1 + R) parameters."""

  rank: int = 64  # R
  width: int = 30  # W

  def __post_init__(self):
    errors.check_at_least(1, "head 'biaffine'", rank=self.rank,
                          width=self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden = inputs.hidden
    left = layers.dense(self.rank, 'left')(hidden)  # [B, L, R]: Aᵀ h_i
    left = left / math.sqrt(self.rank)
    # [B, L, R]: Bᵀ h_j
    right = layers.dense(self.rank, 'right', init=nn.initializers.zeros)(hidden)
    pair = layers.over_band(lambda end: jnp.sum(left * end, axis=-1), right,
                            self.width)
    return SpanScores(start=layers.project('start', hidden),
                      end=layers.project('end', hidden), pair=pair)
