"""An MLP with one hidden layer for the start and another for the end.

Glossary of shapes: B batch (windows), L window length, D hidden size,
H units of the hidden layer.

  start[i] = w_s · LN(gelu(W_s h_i + b_s))        end[j] = w_e · LN(gelu(…))

LN is LayerNorm without scale and shift. The hidden layer is that of BERT's
masked-word head (Devlin et al., 2019, code). If this head is no better than
`independent`, the encoder already separates start and end linearly.
"""

from typing import ClassVar

import flax.linen as nn
import jax

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Mlp(nn.Module):
  """The MLP head: 2H(D + 2) parameters."""

  token_wise: ClassVar[bool] = True

  hidden_size: int = 0  # H; 0 for D

  def __post_init__(self):
    errors.check_at_least(0, "head 'mlp'", hidden_size=self.hidden_size)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    size = self.hidden_size or inputs.hidden.shape[-1]
    return SpanScores(start=_Trunk(size, name='start')(inputs.hidden),
                      end=_Trunk(size, name='end')(inputs.hidden))


class _Trunk(nn.Module):
  hidden_size: int

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:  # [B, L, D] → [B, L]
    x = layers.dense(self.hidden_size, 'hidden', bias=True)(hidden)
    x = layers.normalize(nn.gelu(x, approximate=False))  # [B, L, H]
    return layers.project('output', x)
