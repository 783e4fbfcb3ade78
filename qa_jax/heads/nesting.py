"""Helpers of the heads that stand on a base head, which a spec string names."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

WINDOWS = 2, 8  # [B, L] of the batch whose scores `score_shapes` describes
Heads = Mapping[str, Callable[..., nn.Module]]  # a table such as HEADS


def score_shapes(head: nn.Module, *, training: bool) -> SpanScores:
  """Computes the shapes of the scores of `head`, without running it.

  In training a head gets the gold start. The encoder has common sizes, since a
  head may need several layers, or a width that its attention heads divide.
  """
  windows, length = WINDOWS
  hidden = jax.ShapeDtypeStruct((windows, length, 768), jnp.float32)
  inputs = HeadInput(
      layers=(hidden,) * 25,  # of 24 layers
      context_mask=jax.ShapeDtypeStruct(WINDOWS, bool),
      gold_start=(jax.ShapeDtypeStruct((windows,), jnp.int32) if training
                  else None))
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
        shape == WINDOWS,
        f'head {name!r} returns {part} scores of shape {shape} for {windows} '
        f'windows of {length} tokens, expected [B, L] = {WINDOWS}')
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
