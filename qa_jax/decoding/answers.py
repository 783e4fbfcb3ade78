"""The best spans of all windows → one n-best list per question.

Glossary of shapes: N windows, K candidates per window, E questions, C kept
candidates of all questions together.

Vectorised numpy, no jax.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from qa_jax.data import examples as examples_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import candidates
from qa_jax.decoding import null_rules


@dataclasses.dataclass(frozen=True)
class Answers:
  """The best spans of every question, in characters of its context.

  Candidates lie end to end, best first; question e owns [ptr[e], ptr[e + 1]).
  """

  begin: np.ndarray  # [C]
  end: np.ndarray  # [C], exclusive
  score: np.ndarray  # [C] float64
  window: np.ndarray  # [C]
  ptr: np.ndarray  # [E + 1]
  null_score: np.ndarray  # [E] the minimum over windows
  na_score: np.ndarray  # [E] of the null rule; -inf: always answer
  # [E] what the search missed: exact best - found best. 0 where there is no
  # legal span, inf where there is but none was found. None: it is exact.
  regret: np.ndarray | None = None
  # [C] float64, log posterior among all spans of all windows and null, and [E]
  # that of null; None: spans were not added up.
  log_p: np.ndarray | None = None
  null_log_p: np.ndarray | None = None


def merge_windows(windows: windows_lib.WindowSet,
                  spans: candidates.WindowSpans,
                  *,
                  n_best: int,
                  null_rule: str,
                  merge: str = 'none',
                  temperature: float = 1.0) -> Answers:
  """Merges the windows of each question into one n-best list.

  Order: score descending, then the earlier window, then its search order. Null
  rules and regret are about spans: they come before `merge`, one of MERGES.
  Posteriors are at `temperature`; if the null rule is `never`, without null.
  """
  num = len(windows.examples)
  first = np.searchsorted(windows.example_of, np.arange(num))
  row, column = np.nonzero(spans.valid)
  score = spans.score[row, column].astype(np.float64)
  order = np.lexsort((column, row, -score, windows.example_of[row]))
  row, column, score = row[order], column[order], score[order]
  question = windows.example_of[row]
  ptr = np.searchsorted(question, np.arange(num + 1))
  kept = np.arange(len(row)) - ptr[question] < n_best
  row, column, score = row[kept], column[kept], score[kept]
  question = question[kept]
  begin, end = windows.char_spans(
      row, spans.start[row, column], spans.end[row, column])
  found = Answers(
      begin=begin, end=end, score=score, window=row,
      ptr=np.searchsorted(question, np.arange(num + 1)),
      null_score=np.minimum.reduceat(spans.null, first).astype(np.float64),
      na_score=null_rules.NULL_RULES[null_rule].score(
          _window_scores(spans, first)),
      regret=None if spans.exact is None else _regret(spans, first))
  if spans.mass is not None:
    null_log_p, log_mass = null_and_log_partition(
        spans, first, temperature, with_null=null_rule != 'never')
    found = dataclasses.replace(
        found, null_log_p=null_log_p - log_mass,
        # Sums in float32 may fall short of their largest term.
        log_p=np.minimum(score / temperature - log_mass[question], 0.0))
  return MERGES[merge](windows.examples, found)


def join_answers(parts: Sequence[Answers],
                 first_window: Sequence[int]) -> Answers:
  """The answers of consecutive questions; `first_window` of each part."""
  def end_to_end(name: str) -> np.ndarray | None:
    values = [getattr(part, name) for part in parts]
    return None if values[0] is None else np.concatenate(values)
  sizes = np.cumsum([0, *(part.ptr[-1] for part in parts)])
  named = {field.name: end_to_end(field.name)
           for field in dataclasses.fields(Answers)}
  named |= {
      'window': np.concatenate([part.window + first for part, first in zip(
          parts, first_window, strict=True)]),
      'ptr': np.concatenate([[0], *(part.ptr[1:] + size for part, size in zip(
          parts, sizes, strict=False))])}
  return Answers(**named)


def null_and_log_partition(
    spans: candidates.WindowSpans, first: np.ndarray, temperature: float, *,
    with_null: bool) -> tuple[np.ndarray, np.ndarray]:  # [E] × 2
  """Null's score / temperature, and log Σ exp over null and all spans.

  Null is the least of any window: the one of the null rule `min_null`.
  """
  column = spans.mass[:, spans.temperatures.index(temperature)]
  mass = np.logaddexp.reduceat(column.astype(np.float64), first)
  null = (np.minimum.reduceat(spans.null, first).astype(np.float64)
          / temperature if with_null else np.full(len(first), -np.inf))
  return null, np.logaddexp(null, mass)


def _window_scores(spans: candidates.WindowSpans,
                   first: np.ndarray) -> null_rules.WindowScores:
  floored = lambda x: np.maximum(x.astype(np.float64), candidates.NO_SPAN)
  return null_rules.WindowScores(
      null=spans.null.astype(np.float64), best=floored(spans.score[:, 0]),
      first=first, normaliser=None if spans.normaliser is None
      else floored(spans.normaliser))


def _regret(spans: candidates.WindowSpans,
            first: np.ndarray) -> np.ndarray:  # [E]
  # Scores are search.ILLEGAL, the least of all, where there is no span.
  best, exact = (np.maximum.reduceat(x.astype(np.float64), first)
                 for x in (spans.score[:, 0], spans.exact))
  found = np.logical_or.reduceat(spans.valid[:, 0], first)
  return np.where(found | (exact == best), exact - best, np.inf)


def merge_surface_forms(examples: Sequence[Example], found: Answers) -> Answers:
  """Merges a question's candidates whose normalised texts are equal.

  Their score is the log of their summed exp, so within a window probabilities
  add up; place and text are the best one's, ties go in the order there was.
  """
  question = np.repeat(np.arange(len(examples)), np.diff(found.ptr))
  number: dict[tuple[int, str], int] = {}  # best first within a question
  form = np.array([
      number.setdefault((q, examples_lib.normalize_answer(
          examples[q].context[begin:end])), len(number))
      for q, begin, end in zip(question.tolist(), found.begin.tolist(),
                               found.end.tolist(), strict=True)], np.int64)
  _, best = np.unique(form, return_index=True)
  peak = found.score[best]
  score = peak + np.log(np.bincount(
      form, np.exp(found.score - peak[form]), len(peak)))
  order = np.lexsort((-score, question[best]))  # stable
  if found.log_p is not None:  # at a temperature, so not the merged score's
    log_p = np.full(len(peak), -np.inf)
    np.logaddexp.at(log_p, form, found.log_p)
    found = dataclasses.replace(found, log_p=log_p[order])
  best = best[order]
  return dataclasses.replace(
      found, begin=found.begin[best], end=found.end[best], score=score[order],
      window=found.window[best],
      ptr=np.searchsorted(question[best], np.arange(len(examples) + 1)))


MERGES: dict[str, Callable[[Sequence[Example], Answers], Answers]] = {
    'none': lambda examples, found: found,
    'surface_form': merge_surface_forms,
}


def answer_texts(examples: Sequence[Example], found: Answers) -> dict[str, str]:
  """Question id → its best span's text, '' where there is no legal span."""
  out = {}
  for e, example in enumerate(examples):
    c = found.ptr[e]
    out[example.id] = (
        example.context[found.begin[c]:found.end[c]]
        if c < found.ptr[e + 1] else '')
  return out


def n_best_rows(example: Example, found: Answers,
                e: int) -> list[dict[str, Any]]:
  """The candidates of question e: text, character range, score, probability.

  The last if spans were added up.
  """
  return [{'text': example.context[found.begin[c]:found.end[c]],
           'start': int(found.begin[c]), 'end': int(found.end[c]),
           'score': float(found.score[c]),
           **({} if found.log_p is None else
              {'probability': float(np.exp(found.log_p[c]))})}
          for c in range(found.ptr[e], found.ptr[e + 1])]
