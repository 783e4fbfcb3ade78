"""A "no answer in this window" classifier beside the span scores of any head.

Glossary of shapes: B batch (windows), L window length, D hidden size.

  null = v · h_[CLS] + c                                             'cls'
  null = v · tanh(V [h_[CLS]; Σ_i p(i) h_i] + u) + c                 'xlnet'

where p is the softmax of the start scores over the context tokens and [CLS].
The second form is in the code of Yang et al. (2019, XLNet: get_qa_outputs);
ELECTRA (Clark et al., 2020) has a hidden layer of 512 GELU units instead. The
constant c matters here, because the loss of the null score is a sigmoid
cross-entropy; a softmax would not see it.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.heads import layers
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

FORMS = ('cls', 'xlnet')


def build_head(heads: nesting.Heads, *, base: str = 'independent',
               form: str = 'cls') -> 'Answerability':
  """Builds the classifier beside the head that the spec string `base` names.

  Raises a UserError if `base` is no spec of `heads`, or `form` is unknown.
  """
  errors.check_choice("head 'answerability'", 'form', form, FORMS)
  return Answerability(base=nesting.build_base(heads, base)[0], form=form)


class Answerability(nn.Module):
  """The base head and D + 1 ('cls') or D(2D + 2) + 1 ('xlnet') parameters."""

  base: nn.Module
  form: str

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = self.base(inputs)
    features = inputs.hidden[:, 0]  # [B, D]
    if self.form == 'xlnet':
      p = jnp.exp(layers.log_softmax(scores.start, inputs.context_mask))
      start = jnp.einsum('bl,bld->bd', p, inputs.hidden)
      features = jnp.tanh(layers.dense(features.shape[-1], 'hidden', bias=True)(
          jnp.concatenate([features, start], axis=-1)))
    return scores.replace(null=layers.project('null', features, bias=True))
