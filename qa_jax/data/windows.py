"""Windows of examples: [CLS] question [SEP] part of the context [SEP].

Glossary of shapes: E examples, N windows, G gold spans of a window, T tokens of
the contexts.

The tokenizer names the special tokens, the number of separators between
question and context, and the token type of the context: RoBERTa's windows are
<s> question </s></s> part of the context </s>.

Each distinct context is tokenised once, and windows are ranges of its tokens,
so a data set of SQuAD's size is prepared in seconds. Positions inside a window
count from its [CLS]. Spans are inclusive at both ends.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import itertools

import numpy as np

from qa_jax import errors
from qa_jax.data import alignment
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class WindowSet:
  """The windows of a sequence of examples, as flat arrays."""

  examples: Sequence[Example]
  questions: tokenizer_lib.Ragged  # [E] rows, already cut
  contexts: tokenizer_lib.Ragged  # one row a distinct context
  context_of: np.ndarray  # [E] row of `contexts`
  example_of: np.ndarray  # [N]
  begin: np.ndarray  # [N] first context token, counted within its context
  length: np.ndarray  # [N] context tokens in the window
  best_begin: np.ndarray  # [N] tokens [best_begin, best_end) of the context
  best_end: np.ndarray  # [N]   have their maximal context in this window
  gold_spans: np.ndarray  # [N, G, 2] int32, see alignment.place_spans
  trainable: np.ndarray  # [N] bool: False where the gold span was lost
  audit: dict[str, int]  # gold spans by fate, see alignment.AUDIT
  faults: dict[str, list[str]]  # ids of some examples of each fate but exact
  tokenizer: tokenizer_lib.Tokenizer

  def __len__(self) -> int:
    return len(self.example_of)

  @property
  def start_positions(self) -> np.ndarray:
    """Returns the starts [N] of the first gold spans; 0 ([CLS]) is none."""
    return np.maximum(self.gold_spans[:, 0, 0], 0)

  @property
  def end_positions(self) -> np.ndarray:
    return np.maximum(self.gold_spans[:, 0, 1], 0)

  @functools.cached_property
  def context_offset(self) -> np.ndarray:
    """Returns the positions [N] of the first context token of each window."""
    return (self.questions.lengths[self.example_of]
            + 1 + self.tokenizer.separators)

  @functools.cached_property
  def total_lengths(self) -> np.ndarray:
    """Returns the token counts [N] of windows, special tokens included."""
    return self.context_offset + self.length + 1

  @functools.cached_property
  def continues_word(self) -> np.ndarray:  # [T] bool
    """Whether a token of the contexts is a later piece of its word.

    Contexts without an example in this set keep False.
    """
    out = np.zeros(len(self.contexts.ids), bool)
    for c, e in zip(*np.unique(self.context_of, return_index=True),
                    strict=True):
      row = slice(self.contexts.ptr[c], self.contexts.ptr[c + 1])
      out[row] = self.tokenizer.continues_word(
          self.examples[e].context, self.contexts.ids[row],
          self.contexts.offsets[row])
    return out

  @functools.cached_property
  def is_blank(self) -> np.ndarray | None:  # [T] bool, None: no blank token
    """Whether a token of the contexts has no character but spaces."""
    begin, end = self.contexts.offsets.T
    return None if self.tokenizer.is_wordpiece else begin >= end

  def train_indices(self, without_answer: str) -> np.ndarray:
    """Returns the indices of the windows to train on.

    `without_answer` decides about windows of answerable questions that do not
    contain the answer: 'cls' labels them with the span at [CLS] (Devlin et al.,
    2019), 'drop' leaves them out.
    """
    check_without_answer(without_answer)
    keep = self.trainable
    if without_answer == 'drop':
      impossible = np.array([e.impossible for e in self.examples], bool)
      keep = keep & (
          (self.start_positions > 0) | impossible[self.example_of])
    return np.flatnonzero(keep)

  def gather(self, indices: np.ndarray, length: int, *,
             whole_words: bool = False) -> dict[str, np.ndarray]:
    """Returns the batch of the windows `indices`, of static length.

    It has int32 arrays [B, `length`] of tokens and [B] of labels. A negative
    index is a padding row: one [CLS], weight 0. The label is the first gold
    span of the window, or (0, 0). A span may start only at an owned token
    (BERT's rule of maximal context), so that no span occurs in two windows, and
    not at a token of spaces alone. If `whole_words`, it may start only at the
    first token of a word, and there is an `end_mask` [B, L] bool of the last
    tokens of words.
    """
    row = np.maximum(indices, 0)[:, None]  # [B, 1]
    column = np.arange(length)[None, :]  # [1, L]
    real_row = (indices >= 0)[:, None]
    example = self.example_of[row]
    first = self.context_offset[row]
    local = column - first  # context token, counted within the window
    in_context = (local >= 0) & (local < self.length[row]) & real_row
    in_question = ((column >= 1) & real_row
                   & (column < first - self.tokenizer.separators))
    total = np.where(real_row, first + self.length[row] + 1, 1)
    errors.require(
        (total <= length).all(),
        f'length={length} of a batch is below {total.max(initial=0)}, the '
        'tokens of its longest window (WindowSet.total_lengths)')

    context = self.contexts.ptr[self.context_of[example]] + self.begin[row]
    question = self.questions.ptr[example]
    ids = np.full(in_context.shape, self.tokenizer.pad_id, np.int32)
    ids = np.where(column < total, self.tokenizer.sep_id, ids)
    ids[:, 0] = self.tokenizer.cls_id
    ids[in_context] = self.contexts.ids[(context + local)[in_context]]
    ids[in_question] = self.questions.ids[(question + column - 1)[in_question]]
    token = self.begin[row] + local
    owned = (token >= self.best_begin[row]) & (token < self.best_end[row])
    golds = np.where(real_row[:, :, None], self.gold_spans[row[:, 0]], -1)
    words = {}
    if self.is_blank is not None:
      owned[in_context] &= ~self.is_blank[(context + local)[in_context]]
    if whole_words:
      inside = self.continues_word
      owned[in_context] &= ~inside[(context + local)[in_context]]
      # The token that follows a window's last one may continue its word.
      row_end = self.contexts.ptr[self.context_of[example] + 1] - 1
      after = np.minimum(context + local + 1, row_end)
      last = in_context & (context + local == row_end)
      last[in_context] |= ~inside[after[in_context]]
      words = {'end_mask': last}
    return {
        'token_ids': ids,
        'token_type_ids': (
            self.tokenizer.context_type * ((column >= first) & (column < total)
                                           & real_row)).astype(np.int32),
        'attention_mask': (column < total).astype(np.int32),
        'context_mask': in_context,
        'start_mask': in_context & owned,
        **words,
        'start_positions': np.maximum(golds[:, 0, 0], 0),
        'end_positions': np.maximum(golds[:, 0, 1], 0),
        'gold_spans': golds,
        'context_start': (self.begin[row] - first)[:, 0].astype(np.int32),
        'weight': real_row[:, 0].astype(np.float32),
    }

  def part(self, first: int, last: int) -> 'WindowSet':
    """Returns the windows of examples [first, last), as views."""
    a, b = np.searchsorted(self.example_of, (first, last))
    cut = {name: getattr(self, name)[a:b] for name in (
        'begin', 'length', 'best_begin', 'best_end', 'gold_spans', 'trainable')}
    return dataclasses.replace(
        self, examples=self.examples[first:last], questions=dataclasses.replace(
            self.questions, ptr=self.questions.ptr[first:last + 1]),
        context_of=self.context_of[first:last],
        example_of=self.example_of[a:b] - first, **cut)

  def blocks(self, most: int) -> list[tuple[int, 'WindowSet']]:
    """Divides the windows into blocks: (first window index, windows) each.

    A block has whole questions, and about `most` windows or one question.
    Blocks are about equal, so that all have the same compiled programs.
    """
    count, questions = len(self), len(self.examples)
    parts = -(-count // most)
    if parts <= 1:
      return [(0, self)]
    starts = np.searchsorted(self.example_of, np.arange(questions))
    cuts = np.searchsorted(starts, np.arange(1, parts) * count // parts)
    edges = np.unique([0, *cuts, questions]).tolist()
    return [(int(starts[a]), self.part(a, b))
            for a, b in itertools.pairwise(edges)]

  def char_spans(self, window: np.ndarray, start: np.ndarray,
                 end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Converts spans of windows to character ranges [begin, end) of context.

    The ends are int64. Raises a UserError if a span is not within the context
    tokens, as that of [CLS], which stands for no answer.
    """
    first = self.context_offset[window]
    outside = (start < first) | (end >= first + self.length[window])
    if outside.any():
      window, start, end = (np.broadcast_to(x, outside.shape)[outside][0]
                            for x in (window, start, end))
      raise errors.UserError(
          f'the span ({start}, {end}) of window {window} is not within its '
          f'context tokens, {self.context_offset[window]} … '
          f'{self.total_lengths[window] - 2}; leave out spans of [CLS] and '
          'those with valid=False')
    base = (self.contexts.ptr[self.context_of[self.example_of[window]]]
            + self.begin[window] - first)
    offsets = self.contexts.offsets
    return (offsets[base + start, 0].astype(np.int64),
            offsets[base + end, 1].astype(np.int64))


def make_windows(examples: Iterable[Example],
                 tokenizer: tokenizer_lib.Tokenizer, *, max_length: int,
                 window_overlap: int, max_question_length: int,
                 progress: Callable[[int, int], None] | None = None,
                 ) -> WindowSet:
  """Cuts every example into windows of at most `max_length` tokens.

  Neighbouring windows share `window_overlap` context tokens (the "stride" of
  Hugging Face; the doc_stride of BERT is the step). `progress` is called with
  the number of tokenised texts and the number of all texts.

  Raises:
    UserError: the longest question leaves no room for the context.
  """
  check_lengths(max_length, window_overlap, max_question_length,
                tokenizer.outer_length)
  if not isinstance(examples, Sequence):  # a generator is read only once
    examples = [*examples]
  distinct: dict[str, int] = {}
  context_of = np.array([distinct.setdefault(e.context, len(distinct))
                         for e in examples], np.int64)
  done = lambda before: progress and (lambda count: progress(
      before + count, len(distinct) + len(examples)))
  contexts = tokenizer.encode(list(distinct), done(0))
  # Spaces before a question are tokens of byte-level BPE; run_qa.py of
  # transformers removes them, too.
  whole = tokenizer.encode([e.question.lstrip() for e in examples],
                           done(len(distinct)))
  questions = _cut(whole, max_question_length)

  tokens = contexts.lengths[context_of]  # [E]
  room = max_length - questions.lengths - tokenizer.outer_length
  step = room - window_overlap
  count = 1 + np.maximum(0, -(-(tokens - room) // step))
  example_of = np.repeat(np.arange(len(examples)), count)
  ordinal = np.arange(len(example_of)) - np.repeat(
      np.cumsum(count) - count, count)
  begin = ordinal * step[example_of]
  length = np.minimum(room[example_of], tokens[example_of] - begin)
  best_begin, best_end = _max_context(
      begin, length, ordinal == 0, ordinal == count[example_of] - 1)

  owners, spans, fates = alignment.find_spans(examples, contexts, context_of)
  gold_spans, fates = alignment.place_spans(
      owners, spans, fates, count=count, begin=begin, length=length,
      offset=questions.lengths + 1 + tokenizer.separators)
  lost = np.array([not e.impossible for e in examples], bool)
  lost[example_of[gold_spans[:, 0, 0] > 0]] = False
  audit, faults = alignment.count_fates(
      examples, owners, fates, cut=whole.lengths > max_question_length)
  return WindowSet(
      examples=examples, questions=questions, contexts=contexts,
      context_of=context_of, example_of=example_of, begin=begin, length=length,
      best_begin=best_begin, best_end=best_end, gold_spans=gold_spans,
      trainable=~lost[example_of], audit=audit, faults=faults,
      tokenizer=tokenizer)


def check_lengths(max_length: int, window_overlap: int,
                  max_question_length: int, outer_length: int = 3) -> None:
  """Raises a UserError if a window leaves no room for a step.

  `outer_length` is that of the tokenizer: the number of special tokens.
  """
  errors.check_at_least(1, 'windows', max_length=max_length,
                        max_question_length=max_question_length)
  errors.check_at_least(0, 'windows', window_overlap=window_overlap)
  room = max_length - max_question_length - outer_length
  if window_overlap >= room:
    raise errors.UserError(
        f'window_overlap {window_overlap} leaves no step: max_length '
        f'{max_length} - max_question_length {max_question_length} - '
        f'{outer_length} special tokens = {room} context tokens; ' + (
            f'lower the overlap below {room}' if room > 0 else
            f'raise max_length above {max_question_length + outer_length} or '
            'lower max_question_length'))


def check_without_answer(choice: str) -> None:
  """Raises a UserError if WindowSet.train_indices does not know `choice`."""
  if choice not in ('cls', 'drop'):
    raise errors.UserError(
        f'data.windows_without_answer={choice!r}; choose cls or drop')


def check_limit(max_length: int, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises a UserError if windows exceed the tokenizer's model_max_length."""
  limit = tokenizer.max_length or max_length
  errors.require(
      max_length <= limit,
      f'data.max_length={max_length} exceeds {limit}, the model_max_length of '
      f'the tokenizer; set data.max_length to at most {limit}')


def _cut(rows: tokenizer_lib.Ragged, longest: int) -> tokenizer_lib.Ragged:
  """Keeps the first `longest` tokens of each row."""
  ordinal = np.arange(len(rows.ids)) - np.repeat(rows.ptr[:-1], rows.lengths)
  keep = ordinal < longest
  lengths = np.minimum(rows.lengths, longest)
  return tokenizer_lib.Ragged(rows.ids[keep], rows.offsets[keep],
                              np.append(0, np.cumsum(lengths)))


def _max_context(begin: np.ndarray, length: np.ndarray, is_first: np.ndarray,
                 is_last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first and last + 1 [N] of the tokens that a window owns.

  The score of token t in a window is min(left, right) + 0.01 * length (BERT);
  the earlier window wins a tie. Each score has one peak over t, so one cut
  separates the tokens of neighbours a and b. Bisection finds the cuts of all
  pairs of neighbours at once.
  """
  cut = begin + length  # right for the last window of an example
  a = np.flatnonzero(~is_last)
  b = a + 1
  end_a, end_b = cut[a], cut[b]
  bonus = length[a] - length[b]  # in hundredths of a token

  def prefers_a(token):
    score_a = 100 * np.minimum(token - begin[a], end_a - 1 - token) + bonus
    score_b = 100 * np.minimum(token - begin[b], end_b - 1 - token)
    return (token < end_a) & ((token < begin[b]) | (score_a >= score_b))

  low, high = begin[b], end_a  # prefers_a holds below low, fails from high on
  while (low < high).any():
    middle = (low + high) // 2
    keep = prefers_a(middle)
    low = np.where(keep & (low < high), middle + 1, low)
    high = np.where(~keep & (low < high), middle, high)
  cut[a] = low
  return np.where(is_first, 0, np.concatenate([[0], cut[:-1]])), cut
