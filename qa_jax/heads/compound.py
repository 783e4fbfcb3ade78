"""Joint scores to decode by, and a start and end of their own beside them.

  score(i, j) = base(i, j);        boundary: S · h_i and E · h_j

Fajcik et al. (2021), "Rethinking the objectives of extractive question
answering". The compound objective adds their losses: S and E are
there to shape the encoder, and are not read again. The two scores are not on
one scale, so they are not added.
"""

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


def compound(*, base: str = 'biaffine') -> 'Compound':
  """The head that the spec string `base` names, with S and E beside it.

  Raises:
    UserError: a bad or a conditional base.
  """
  head, scores = nesting.build_inner(base)
  nesting.refuse_conditional('compound', base, scores)
  return Compound(base=head)


class Compound(nn.Module):
  """2D parameters and those of the base."""

  base: nn.Module

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    return self.base(inputs).replace(boundary=SpanScores(
        start=layers.project('start', inputs.hidden),
        end=layers.project('end', inputs.hidden)))
