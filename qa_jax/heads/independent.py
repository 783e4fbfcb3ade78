"""The pair of Dense(1, use_bias=False): start vector S and end vector E.

Glossary of shapes: B batch (windows), L window length, D hidden size.

  start[i] = S · h_i        end[j] = E · h_j

Devlin et al. (2019), section 4.2. One S serves every (question, context) pair
because h_i is not the token's vector but the token's vector *given the
question*: self-attention has already compared the two. S only reads that out.
"""

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Independent(nn.Module):
  """2D parameters; start and end are scored apart and added."""

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    return SpanScores(start=layers.project('start', inputs.hidden),
                      end=layers.project('end', inputs.hidden))
