"""A learned score for every length, on top of any head.

Glossary of shapes: B batch (windows), L window length, W longest span.

  score(i, j) = base(i, j) + b_{j - i}

b is the log of a prior over lengths, up to a constant: the soft form of
`max_answer_length`. A span of one token and the null score are different
things: null gets no b. Only an objective over spans trains it.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


def length_prior(*, base: str = 'independent',
                 width: int = 30) -> 'LengthPrior':
  """The prior on the head that the spec string `base` names.

  Raises:
    UserError: a bad or a conditional base, or one that scores fewer lengths.
  """
  layers.check_at_least(1, 'length_prior', width=width)
  head, scores = nesting.build_inner(base)
  nesting.refuse_conditional('length_prior', base, scores)
  if scores.pair is not None and scores.pair.shape[-1] < width:
    raise errors.UserError(
        f"head 'length_prior' has width={width}, but base={base!r} scores "
        f'{scores.pair.shape[-1]} lengths; lower the one or widen the other')
  return LengthPrior(base=head, width=width)


class LengthPrior(nn.Module):
  """W parameters, all 0 at first, and those of the base."""

  base: nn.Module
  width: int

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = self.base(inputs)
    prior = self.param(  # "bias", so that weight decay leaves it alone
        'bias', nn.initializers.zeros, (self.width,))[None, None]
    if scores.pair is None:
      pair = jnp.broadcast_to(prior, (*scores.start.shape, self.width))
    else:
      pair = scores.pair[:, :, :self.width] + prior
    return scores.replace(pair=pair)
