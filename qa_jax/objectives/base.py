"""Objective: a loss per window, and its demands on the head and the batch.

Glossary of shapes: B batch (windows), L window length, G gold spans.

A loss reads these arrays of a batch (data/windows.py and data/batches.py make
all but `step` and `draw`, which the train step adds):

  context_mask     [B, L] bool      the context tokens
  start_mask       [B, L] bool      owned context tokens with a character that
                                    is no space
  start_positions  [B] int32        start of the first gold span; 0: no answer
  end_positions    [B] int32        end of the first gold span, inclusive
  gold_spans       [B, G, 2] int32  all gold spans, inclusive; padded with -1
  context_start    [B] int32        position in the context of token 0 ([CLS]);
                                    negative in the first window of a question
  group            [B] int32        equal in the windows of one question; only
                                    if the objective needs_whole_questions
  step             [B] int32        number of train steps before this one
  draw             [B] float32      random number in [0, 1) of this train step

`step` and `draw` have the same value in every row of a batch.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax

from qa_jax.span_scores import SpanScores

Batch = Mapping[str, jax.Array]
# The fields of SpanScores that an objective may need.
NEEDS = ('pair', 'null', 'boundary', 'conditional')
Loss = Callable[[SpanScores, Batch], jax.Array]  # → [B] float32


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss function and its demands on the head and the batch."""

  loss: Loss
  # The fields of SpanScores that the head must return, of NEEDS.
  needs: frozenset[str] = frozenset()
  # True if the loss adds start and end scores of spans other than the gold
  # span. In training, a conditional head has no scores for them.
  scores_other_spans: bool = False
  # True if the loss sends a gradient into the pair and null scores of a head
  # that has them. Without it they would stay random, and decoding adds them.
  trains_pair_and_null: bool = False
  # True if all windows of a question must be in one batch. Each of them then
  # has the loss of the question, and only one of them has a weight.
  needs_whole_questions: bool = False
  # True if the loss depends on the scores of padding, which packed rows lack.
  reads_padding: bool = False
  # Longest span, in tokens, whose score a window without such a gold span
  # trains. None: the loss has no such limit.
  max_answer_length: int | None = None
