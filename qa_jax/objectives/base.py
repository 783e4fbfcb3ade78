"""Objective: a loss per window, and what it asks of the head and the batch.

Glossary of shapes: B batch (windows), L window length, G gold spans.

What losses read of a batch (data/windows.py and data/batches.py make it):

  context_mask     [B, L] bool   the context's tokens
  start_mask       [B, L] bool   those with their maximal context here
  start_positions  [B] int32     the first gold span; 0, 0: no answer here
  end_positions    [B] int32
  gold_spans       [B, G, 2] int32  all of them, inclusive; padded with -1
  group            [B] int32     equal in the windows of one question
  step             [B] int32     updates made so far, the same in every row
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax

from qa_jax import errors
from qa_jax.span_scores import SpanScores

Batch = Mapping[str, jax.Array]
Loss = Callable[[SpanScores, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss, and what it asks for."""

  loss: Loss
  # Fields of SpanScores that must be there: 'pair', 'null', 'boundary', or
  # 'conditional'.
  needs: frozenset[str] = frozenset()
  # Whether it adds start and end of spans other than the gold one, which the
  # training scores of a conditional head do not allow.
  spans: bool = False
  # Whether it trains the pair and null scores that a head may have: decoding
  # adds them.
  pairs: bool = False
  # Whether all windows of a question must stand in one batch: the loss is the
  # question's, the same in each of its rows, and one of them has the weight.
  grouped: bool = False


def require(ok: bool, objective: str, problem: str) -> None:
  """Raises a UserError about an argument unless `ok`."""
  if not ok:
    raise errors.UserError(f'objective {objective!r}: {problem}')


def choose(objective: str, name: str, value: str,
           known: tuple[str, ...]) -> None:
  """Raises a UserError with near names unless `value` is known."""
  require(value in known, objective,
          f'{name}={value!r}{errors.did_you_mean(value, known)}')
