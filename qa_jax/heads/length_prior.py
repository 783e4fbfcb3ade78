"""Any head, plus a learned score for every span length.

Glossary of shapes: W longest span.

  score(i, j) = base(i, j) + b_{j - i}

b is the logarithm of a prior over lengths, up to a constant: a soft form of
`max_answer_length`. The null score gets no b, because a null answer is not a
span of one token. Only an objective over spans trains b.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


def build_head(heads: nesting.Heads, *, base: str = 'independent',
               width: int = 30) -> 'LengthPrior':
  """Builds the prior on top of the head that the spec string `base` names.

  Raises a UserError if `base` is no spec of `heads`, is conditional, or scores
  fewer than `width` lengths; or if `width` is below 1.
  """
  errors.check_at_least(1, "head 'length_prior'", width=width)
  head, scores = nesting.build_base(heads, base)
  nesting.refuse_conditional('length_prior', base, scores)
  if scores.pair is not None and scores.pair.shape[-1] < width:
    raise errors.UserError(
        f"head 'length_prior' has width={width}, but base={base!r} scores "
        f'{scores.pair.shape[-1]} lengths; lower width or widen the base')
  return LengthPrior(base=head, width=width)


class LengthPrior(nn.Module):
  """The base head and the prior: W parameters more, which start at 0."""

  base: nn.Module
  width: int  # W

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = self.base(inputs)
    # Its name is 'bias', because weight decay spares parameters of that name.
    prior = self.param('bias', nn.initializers.zeros, (self.width,))[None, None]
    if scores.pair is None:
      pair = jnp.broadcast_to(prior, (*scores.start.shape, self.width))
    else:
      pair = scores.pair[:, :, :self.width] + prior
    return scores.replace(pair=pair)
