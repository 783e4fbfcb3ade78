"""A classifier "no answer in this window" beside the spans of any head.

Glossary of shapes: B batch (windows), L window length, D hidden size.

  null = v · h_[CLS] + c                                             'cls'
  null = v · tanh(V [h_[CLS]; Σ_i p(i) h_i] + u) + c                 'xlnet'

where p is the softmax of the start scores over context tokens and [CLS]. The
second is in the code of Yang et al. (2019, XLNet: get_qa_outputs); ELECTRA's
(Clark et al., 2020) has a gelu of 512 units. The constant c counts here: the
loss is a sigmoid's, which sees what a softmax does not.
"""

import flax.linen as nn
import jax.numpy as jnp

from qa_jax.heads import layers
from qa_jax.heads import nesting
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

FORMS = ('cls', 'xlnet')


def answerability(*, base: str = 'independent',
                  form: str = 'cls') -> 'Answerability':
  """The classifier beside the head that the spec string `base` names.

  Raises:
    UserError: a bad base or an unknown form.
  """
  layers.choose('answerability', 'form', form, FORMS)
  head, _ = nesting.build_inner(base)
  return Answerability(base=head, form=form)


class Answerability(nn.Module):
  """D + 1 or D(2D + 2) + 1 parameters, and those of the base."""

  base: nn.Module
  form: str

  @nn.compact
  def __call__(self, inputs: HeadInput) -> SpanScores:
    scores = self.base(inputs)
    features = inputs.hidden[:, 0]  # [B, D]
    if self.form == 'xlnet':
      p = jnp.exp(layers.log_softmax(scores.start, inputs.context_mask))
      start = jnp.einsum('bl,bld->bd', p, inputs.hidden)
      features = jnp.tanh(layers.dense(
          features.shape[-1], 'hidden', bias=True)(
              jnp.concatenate([features, start], axis=-1)))
    return scores.replace(null=layers.project('null', features, bias=True))
