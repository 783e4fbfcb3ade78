"""Helpers of the heads that stand on a base head, which a spec string names."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax import registry
from qa_jax.span_scores import HeadInput
from qa_jax.span_scores import SpanScores

WINDOWS = 2, 8  # [B, L] of the batch whose scores `score_shapes` describes
Heads = Mapping[str, Callable[..., nn.Module]]  # a table such as HEADS


def score_shapes(head: nn.Module, *, training: bool,
                 length: int = WINDOWS[1]) -> SpanScores:
  """Computes the shapes of the scores of `head`, without running it.

  In training a head gets the gold start. The encoder has common sizes, since a
  head may need several layers, or a width that its attention heads divide.

  Raises:
    UserError: a shape is wrong. A head of a user's package is also traced for
      windows twice as long, and refused if a parameter or the longest span
      depends on the window length, or if it draws random numbers or has
      variables that are no parameters.
  """
  inputs = _input_shapes(training, length)
  name = f'{type(head).__module__}:{type(head).__name__}'
  # The key is made inside eval_shape, so that no array is put on a device.
  with errors.naming(f'head {name!r}', [name.partition(':')[0]]):
    scores, variables = jax.eval_shape(lambda inputs: head.init_with_output(
        jax.random.key(0), inputs), inputs)
  _check_shapes(name, scores, (WINDOWS[0], length))
  # A head that a spec imports is not in the table that the tests run on.
  if length == WINDOWS[1] and not name.startswith('qa_jax.'):
    _check_other_length(name, head, variables, scores,
                        _input_shapes(training, 2 * length))
  return scores


def _input_shapes(training: bool, length: int) -> HeadInput:
  windows = WINDOWS[0]
  hidden = jax.ShapeDtypeStruct((windows, length, 768), jnp.float32)
  return HeadInput(
      layers=(hidden,) * 25,  # of 24 layers
      context_mask=jax.ShapeDtypeStruct((windows, length), bool),
      gold_start=(jax.ShapeDtypeStruct((windows,), jnp.int32) if training
                  else None))


def _check_shapes(name: str, scores: Any, shape: tuple[int, int]) -> None:
  """Raises a UserError unless all scores fit windows of `shape`, [B, L]."""
  if not isinstance(scores, SpanScores):
    raise errors.UserError(f'head {name!r} returns {type(scores).__name__}, '
                           'expected qa_jax.heads.SpanScores')
  boundary = scores.boundary
  errors.require(boundary is None or isinstance(boundary, SpanScores),
                 f'head {name!r} returns boundary scores of type '
                 f'{type(boundary).__name__}, expected qa_jax.heads.SpanScores')
  parts = {'start': scores.start, 'end': scores.end}
  if boundary is not None:
    parts |= {'boundary start': boundary.start, 'boundary end': boundary.end}
  expected = {**dict.fromkeys(parts, '[B, L]'), 'null': '[B]',
              'pair': '[B, L, W], indexed by start and end - start,'}
  parts |= {part: x for part in ('null', 'pair')
            if (x := getattr(scores, part)) is not None}
  for part, x in parts.items():
    actual, rank = getattr(x, 'shape', None), 1 if part == 'null' else 2
    errors.require(
        actual is not None and actual[:rank] == shape[:rank]
        and len(actual) == rank + (part == 'pair'),
        f'head {name!r} returns {part} scores of shape {actual} for '
        f'{shape[0]} windows of {shape[1]} tokens, expected {expected[part]} = '
        + {'null': f'({shape[0]},)', 'pair': f'({shape[0]}, {shape[1]}, W)'
           }.get(part, str(shape)))


def _check_other_length(name: str, head: nn.Module, variables: Any,
                        scores: SpanScores, inputs: HeadInput) -> None:
  """Applies the shapes of a head's parameters to windows of another length."""
  try:
    other = jax.eval_shape(head.apply, {'params': variables.get('params', {})},
                           inputs)
  except flax.errors.InvalidRngError:
    raise errors.UserError(
        f'head {name!r} draws random numbers, but heads get no key: dropout is '
        'that of the encoder, config.model.dropout; leave nn.Dropout out, or '
        'set its deterministic=True') from None
  except flax.errors.ScopeParamShapeError as e:
    raise errors.UserError(
        f'head {name!r} has a parameter whose shape depends on the length of a '
        f'window, which varies: {" ".join(str(e).split())}') from None
  except flax.errors.FlaxError as e:
    raise errors.UserError(
        f'head {name!r} has variables that are no parameters, or other '
        f'parameters in windows of another length: {" ".join(str(e).split())}'
    ) from None
  shape = inputs.context_mask.shape
  _check_shapes(name, other, shape)
  if scores.pair is not None:
    widths = scores.pair.shape[2], other.pair.shape[2]
    errors.require(
        widths[0] == widths[1],
        f'head {name!r} returns {widths[0]} pair scores a token in windows of '
        f'{scores.pair.shape[1]} tokens, but {widths[1]} in windows of '
        f'{shape[1]}; pair, [B, L, W], is indexed by start and end - start, '
        'and its width W must not depend on L')


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
