"""The trilinear similarity of BiDAF between start and end.

Glossary of shapes: B batch (windows), L window length, D hidden size,
W longest span.

  score(i, j) = w · [q_i; h_j; q_i ⊙ h_j],        q_i = Q h_i
              = w_q · q_i + w_h · h_j + (q_i ⊙ w_m) · h_j

Seo et al. (2017), equation 1, is this similarity between context and question;
Fajcik et al. (2021) use it between start and end (`multi_add` in their code).
The first two terms are `start` and `end`, the third is `pair`. The null score
has no third term. Their biases are left out: one part of the effect of Q's bias
is a change of w_h, and the rest is constant.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Trilinear(nn.Module):
  """The trilinear head: D² + 3D parameters."""

  width: int = 30  # W

  def __post_init__(self):
    errors.check_at_least(1, "head 'trilinear'", width=self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    hidden = inputs.hidden
    query = layers.dense(hidden.shape[-1], 'query')(hidden)  # [B, L, D]
    weights = self.param('product', layers.kernel_init, hidden.shape[-1:])
    left = query * weights[None, None]
    pair = layers.over_band(lambda end: jnp.sum(left * end, axis=-1), hidden,
                            self.width)
    return SpanScores(start=layers.project('start', query),
                      end=layers.project('end', hidden), pair=pair)
