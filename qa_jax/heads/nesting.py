"""Helpers of the heads that stand on a base head, which a spec string names."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

Heads = Mapping[str, Callable[..., nn.Module]]  # a table such as HEADS


def score_shapes(head: nn.Module, *, training: bool) -> SpanScores:
  """Computes the shapes of the scores of `head`, without running it.

  In training a head gets the gold start.
  """
  hidden = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
  inputs = HeadInput(
      layers=(hidden, hidden), context_mask=jax.ShapeDtypeStruct((1, 2), bool),
      gold_start=jax.ShapeDtypeStruct((1,), jnp.int32) if training else None)
  # The key is made inside eval_shape, so that no array is put on a device.
  scores = jax.eval_shape(lambda inputs: head.init_with_output(
      jax.random.key(0), inputs), inputs)[0]
  # A head that a spec imports is not in the table that the tests run on.
  name = f'{type(head).__module__}:{type(head).__name__}'
  if not isinstance(scores, SpanScores):
    raise errors.UserError(f'head {name!r} returns {type(scores).__name__}, '
                           'expected qa_jax.heads.SpanScores')
  for part in ('start', 'end'):
    shape = getattr(getattr(scores, part), 'shape', None)
    errors.require(
        shape == (1, 2),
        f'head {name!r} returns {part} scores of shape {shape} for one window '
        'of 2 tokens, expected [B, L] = (1, 2)')
  return scores


def build_base(heads: Heads, spec: str) -> tuple[nn.Module, SpanScores]:
  """Builds the base head of `spec`; returns it and its training score shapes.

  Raises a UserError if `spec` is no spec of the table `heads`.
  """
  head = registry.build(heads, spec, what='base head', kind=nn.Module)
  return head, score_shapes(head, training=True)


def refuse_conditional(head: str, base: str, scores: SpanScores) -> None:
  """Raises a UserError if the `base` of `head` has conditional scores."""
  errors.require(
      not scores.conditional,
      f'head {head!r} cannot stand on base={base!r}, whose end scores in '
      'training are given the gold start: no other span has a score there; '
      'choose a base that is not conditional')
