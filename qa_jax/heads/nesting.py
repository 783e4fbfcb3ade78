"""Heads that stand on another head: the base, from its spec string."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import heads
from qa_jax import registry
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores


def score_shapes(head: nn.Module, *, training: bool) -> SpanScores:
  """What a head returns with or without a gold start, as shapes."""
  hidden = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
  inputs = HeadInput(
      layers=(hidden, hidden),
      context_mask=jax.ShapeDtypeStruct((1, 2), jnp.bool_),
      gold_start=jax.ShapeDtypeStruct((1,), jnp.int32) if training else None)
  return jax.eval_shape(  # with the key made there: nothing goes to a device
      lambda inputs: head.init_with_output(jax.random.key(0), inputs),
      inputs)[0]


def build_inner(spec: str) -> tuple[nn.Module, SpanScores]:
  """The base head, and the shapes of what it returns in training.

  Raises:
    UserError: an unknown head or argument.
  """
  head = registry.build(heads.HEADS, spec, what='base head')
  return head, score_shapes(head, training=True)


def refuse_conditional(head: str, base: str, scores: SpanScores) -> None:
  """Raises a UserError for a base that scores ends for one start alone."""
  if scores.conditional:
    raise errors.UserError(
        f'head {head!r} cannot stand on base={base!r}, whose end scores in '
        'training are given the gold start: no other span has a score there; '
        'choose a base that is not conditional')
