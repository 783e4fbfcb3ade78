"""Conversion of gold answers to token spans, and to spans of windows.

Glossary of shapes: E examples, A gold answers of all examples, N windows, G
gold spans of a window. Spans are inclusive at both ends.
"""

import collections
from collections.abc import Mapping, Sequence
import re

import numpy as np

from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer

FATES = {  # of gold answers
    'exact': 'the token span is the answer, character by character',
    'widened': 'the answer does not begin and end with a token; fitted to them',
    'spaces': 'differs from the context in white space alone',
    'repaired': 'wrong answer_start; the nearest occurrence was taken',
    'located': 'no answer_start; the first occurrence was taken',
    'unrecoverable': 'the answer is not a non-empty part of the context',
    'no_window': 'the span fits in no window',
    'surplus': 'left out of a window that holds MAX_GOLD_SPANS before it',
}
QUESTIONS = {
    'unmarked': 'questions without is_impossible that count as unanswerable, '
                'because their list of answers is empty',
    'unanswered': 'questions that have neither answers nor is_impossible',
    'cut': 'questions of more tokens than data.max_question_length',
}
AUDIT = FATES | QUESTIONS
MAX_EXAMPLES_PER_FAULT = 20
EXAMPLES_PRINTED = 3
AROUND = 20  # characters of the context shown on each side of an answer
MAX_GOLD_SPANS = 16  # of one window


def find_spans(
    examples: Sequence[Example], contexts: tokenizer_lib.Ragged,
    context_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each answer's example [A], token span [A, 2] and fate [A].

  A span counts context tokens. It is (-1, -1) if the answer has none.
  """
  owners, spans, fates = [], [], []
  for e, (example, c) in enumerate(zip(examples, context_of, strict=True)):
    offsets = contexts.offsets[contexts.ptr[c]:contexts.ptr[c + 1]]
    for answer in example.answers:
      a, b, fate = character_span(example.context, answer)
      first = np.searchsorted(offsets[:, 1], a, side='right')
      last = np.searchsorted(offsets[:, 0], b, side='left') - 1
      if a == b or first > last:
        fate, first, last = 'unrecoverable', -1, -1
      elif fate == 'exact' and (
          offsets[first, 0], offsets[last, 1]) != (a, b):
        fate = 'widened'
      owners.append(e)
      spans.append((first, last))
      fates.append(fate)
  return (np.array(owners, np.int64), np.array(spans, np.int64).reshape(-1, 2),
          np.array(fates, object))


def place_spans(
    owners: np.ndarray, spans: np.ndarray, fates: np.ndarray, *,
    count: np.ndarray, begin: np.ndarray, length: np.ndarray,
    offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the gold spans [N, G, 2] of every window and the fates [A].

  The first arguments are the results of `find_spans`. `count` [E] is the number
  of windows of each example, `begin` [N] the first context token of a window,
  `length` [N] the number of its context tokens, and `offset` [E] the position
  of the first one in the window. A window gets the distinct spans that lie in
  it completely, int32 in window positions, in the order of the answers. G is at
  least 1 and at most MAX_GOLD_SPANS; missing spans are -1.
  """
  aligned = np.flatnonzero(spans[:, 0] >= 0)  # answers that have a span
  # One row for every answer and every window of its example.
  windows = count[owners[aligned]]
  answer = np.repeat(aligned, windows)
  first_row = np.repeat(np.cumsum(windows) - windows, windows)
  window = (np.cumsum(count) - count)[owners[answer]] + (
      np.arange(len(answer)) - first_row)
  first, last = spans[answer].T
  inside = (begin[window] <= first) & (last < begin[window] + length[window])
  answer, window = answer[inside], window[inside]
  fates = fates.copy()
  fates[np.setdiff1d(aligned, answer)] = 'no_window'

  # If a window has equal spans, the first answer stays, because the first
  # answer is the training label.
  order = np.lexsort((answer, *spans[answer].T, window))
  row = np.column_stack([window, spans[answer]])[order]
  again = np.zeros(len(row), bool)
  again[1:] = (row[1:] == row[:-1]).all(axis=1)
  answer, window = answer[order[~again]], window[order[~again]]
  order = np.lexsort((answer, window))
  answer, window = answer[order], window[order]
  rank = np.arange(len(answer)) - np.searchsorted(window, window)
  fits = rank < MAX_GOLD_SPANS
  fates[answer[~fits]] = 'surplus'
  answer, window, rank = answer[fits], window[fits], rank[fits]
  gold_spans = np.full((len(begin), rank.max(initial=0) + 1, 2), -1, np.int32)
  gold_spans[window, rank] = spans[answer] + (
      offset[owners[answer]] - begin[window])[:, None]
  return gold_spans, fates


def count_fates(
    examples: Sequence[Example], owners: np.ndarray, fates: np.ndarray,
    cut: np.ndarray) -> tuple[dict[str, int], dict[str, list[str]]]:
  """Counts answers by fate and questions of QUESTIONS.

  `cut` [E] is true for questions of which a part is left out. Returns the
  counts, and a list of example ids for each of them but 'exact'.
  """
  ids = {name: [examples[e].id for e in np.unique(owners[fates == name])]
         for name in FATES if name != 'exact'}
  ids['unmarked'] = [e.id for e in examples if e.unmarked]
  ids['unanswered'] = [e.id for e in examples
                       if not (e.impossible or e.answers)]
  ids['cut'] = [examples[e].id for e in np.flatnonzero(cut)]
  counts = {**dict.fromkeys(FATES, 0), **collections.Counter(fates.tolist()),
            **{name: len(ids[name]) for name in QUESTIONS}}
  return counts, {name: some[:MAX_EXAMPLES_PER_FAULT]
                  for name, some in ids.items()}


def describe_audit(examples: Sequence[Example], counts: Mapping[str, int],
                   faults: Mapping[str, Sequence[str]],
             ) -> tuple[list[str], dict[str, list[dict[str, object]]]]:
  """Returns an audit as lines to print, and its faults with their texts."""
  by_id = {e.id: e for e in examples}
  shown = {fate: [_show(by_id[key]) for key in ids]
           for fate, ids in faults.items()}
  lines = []
  answers = max(sum(counts[fate] for fate in FATES), 1)
  for fate, meaning in AUDIT.items():
    share = (f'{100 * counts[fate] / answers:6.2f} %' if fate in FATES
             else ' ' * 8)
    lines.append(f'{fate:14} {counts[fate]:8,} {share}  {meaning}')
    lines += [f'  {row["id"]}: {row["answers"]}'
              for row in shown.get(fate, ())[:EXAMPLES_PRINTED]]
  return lines, shown


def _show(example: Example) -> dict[str, object]:
  shown = []
  for answer in example.answers:
    # Without answer_start, the place is the occurrence that was taken.
    place = (character_span(example.context, answer)[0] if answer.start < 0
             else answer.start)
    shown.append({
        'text': answer.text, 'answer_start': answer.start,
        'context': example.context[max(place - AROUND, 0):
                                   place + len(answer.text) + AROUND]})
  return {'id': example.id, 'answers': shown}


def character_span(context: str, answer: GoldAnswer) -> tuple[int, int, str]:
  """Returns the range [begin, end) of an answer in the context, and its fate.

  White space around the answer does not count, and white space inside it
  equals any other. The range of an answer that does not occur is empty.
  """
  text = answer.text.strip()
  a = answer.start + len(answer.text) - len(answer.text.lstrip())
  if not text:
    return 0, 0, 'unrecoverable'
  if answer.start >= 0 and context.startswith(text, a):
    return a, a + len(text), 'exact'
  # White space in the pattern equals any other white space.
  spaced = r'\s+'.join(map(re.escape, text.split()))
  if answer.start >= 0 and (match := re.compile(
      rf'\s*({spaced})').match(context, answer.start)):
    return *match.span(1), 'spaces'
  fate = 'repaired'
  if answer.start < 0:
    fate, a = 'located', 0
  if (begin := _nearest(context, text, a)) >= 0:
    return begin, begin + len(text), fate
  # The lookahead also finds occurrences that overlap.
  near = min(re.finditer(f'(?=({spaced}))', context), default=None,
             key=lambda match: abs(match.start() - a))
  return (*near.span(1), fate) if near else (0, 0, 'unrecoverable')


def _nearest(context: str, text: str, near: int) -> int:
  """Returns the offset of `text` nearest to `near`; -1 if it does not occur."""
  after = context.find(text, near)
  before = context.rfind(text, 0, near + len(text))
  hits = [h for h in (before, after) if h >= 0]
  return min(hits, key=lambda h: abs(h - near), default=-1)
