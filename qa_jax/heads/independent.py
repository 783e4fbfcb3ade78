"""The pair of Dense(1, use_bias=False): a start vector S and an end vector E.

  start[i] = S · h_i        end[j] = E · h_j

Devlin et al. (2019), section 4.2. One S serves every (question, context) pair
because h_i is not the vector of a token alone, but of the token *given the
question*: self-attention has already compared the two. S only reads out the
result.
"""

from typing import ClassVar

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Independent(nn.Module):
  """The independent head: 2D parameters; D is the hidden size."""

  token_wise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    return SpanScores(start=layers.project('start', inputs.hidden),
                      end=layers.project('end', inputs.hidden))
