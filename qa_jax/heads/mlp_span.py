"""An MLP over start and end together, computed for every span of the band.

Glossary of shapes: B batch (windows), L window length, D hidden size,
H units of the hidden layer, W longest span.

  score(i, j) = w · LN(relu(W_s h_i + W_e h_j + b))

Lee et al. (2016, RaSoR); with LN, LayerNorm without scale and shift, Lee et al.
(2019, ORQA, code: orqa_model). The score is no sum of a start and an end score:
`start` and `end` are zero and `pair` has the whole score, so cross-entropy on
start and end cannot train this head. The null score is score(0, 0).

This is the most expensive head: a window takes about 10·L·W·H operations
outside matrix products, and about four times as many in training, which repeats
them. At L = 384, W = 30, H = 768 the hidden units of a window take 453 MB in
float32 over all pairs, 35 MB over the band, and 1.2 MB at one offset. Only
those of one offset are in memory.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class MlpSpan(nn.Module):
  """The MLP head over spans: 2H(D + 1) parameters."""

  hidden_size: int = 0  # H; 0 for D
  width: int = 30  # W

  def __post_init__(self):
    errors.check_at_least(0, "head 'mlp_span'", hidden_size=self.hidden_size)
    errors.check_at_least(1, "head 'mlp_span'", width=self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden = inputs.hidden
    size = self.hidden_size or hidden.shape[-1]
    left = layers.dense(size, 'start', bias=True)(hidden)  # [B, L, H]
    right = layers.dense(size, 'end')(hidden)
    w = self.param('output', layers.kernel_init, (size,))
    score = lambda end: layers.normalize(nn.relu(left + end)) @ w  # [B, L]
    pair = layers.over_band(score, right, self.width)
    zeros = jnp.zeros(hidden.shape[:2], jnp.float32)
    return SpanScores(start=zeros, end=zeros, pair=pair, null=pair[:, 0, 0])
