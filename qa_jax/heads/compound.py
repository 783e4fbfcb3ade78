"""Any head, with separate start and end scores that only training uses.

  score(i, j) = base(i, j);        boundary: S · h_i and E · h_j

Fajcik et al. (2021), "Rethinking the objectives of extractive question
answering". The objective `compound` adds the losses of both scores. S and E
shape the encoder in training and are never decoded. The two scores have
different scales, so they are not added.
"""

import flax.linen as nn

from qa_jax.heads import layers
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


def build_head(heads: nesting.Heads, *, base: str = 'biaffine') -> 'Compound':
  """Builds the head that the spec string `base` names, with S and E beside it.

  Raises a UserError if `base` is no spec of `heads`, or is conditional.
  """
  head, scores = nesting.build_base(heads, base)
  nesting.refuse_conditional('compound', base, scores)
  return Compound(base=head)


class Compound(nn.Module):
  """The base head with S and E: 2D parameters more than the base has."""

  base: nn.Module

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    return self.base(inputs).replace(boundary=SpanScores(
        start=layers.project('start', inputs.hidden),
        end=layers.project('end', inputs.hidden)))
