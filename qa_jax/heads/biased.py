"""The independent head with biases, as in BERT's code: provably a no-op.

  start[i] = S · h_i + b_s        end[j] = E · h_j + b_e

The paper (Devlin et al., 2019, section 4.2) has no bias; its run_squad.py has.
A softmax over positions ignores a constant: ∂loss/∂b = Σ_i p(i) - 1 = 0. A
prediction ignores it too: the null score and every span score shift by
b_s + b_e. So a difference between this head and `independent` is noise. Only a
loss without a softmax, such as the objective `sigmoid`, can train b.
"""

from typing import ClassVar

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


class Biased(nn.Module):
  """The biased head: 2D + 2 parameters; S and E start as in `independent`."""

  token_wise: ClassVar[bool] = True

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    return SpanScores(start=layers.project('start', inputs.hidden, bias=True),
                      end=layers.project('end', inputs.hidden, bias=True))
