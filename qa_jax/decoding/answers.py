"""N-best answers of questions, merged from the spans of their windows.

Glossary of shapes: E questions, C n-best candidates of all questions together.
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
  """The n-best candidates of every question, in characters of its context.

  The candidates of question e are at ptr[e], …, ptr[e + 1] - 1, best first.
  """

  begin: np.ndarray  # [C]
  end: np.ndarray  # [C], exclusive
  score: np.ndarray  # [C] float64
  window: np.ndarray  # [C]
  ptr: np.ndarray  # [E + 1]
  null_score: np.ndarray  # [E], the minimum over windows
  na_score: np.ndarray  # [E], by the null rule; -inf: always answer
  # [E]: score of the exact best span minus score of the best candidate. It is
  # 0 without any legal span, and inf if an inexact search missed all of them.
  # None if the search is exact.
  regret: np.ndarray | None = None
  # [C] float64: log posterior of each candidate among null and all spans of
  # all windows; [E] float64: log posterior of null. None if WindowSpans has no
  # log-partitions.
  log_p: np.ndarray | None = None
  null_log_p: np.ndarray | None = None


def merge_windows(
    windows: windows_lib.WindowSet, spans: candidates.WindowSpans, *,
    n_best: int, null_rule: str, merge: str = 'none', temperature: float = 1.0,
) -> Answers:
  """Merges the spans of each question's windows into one n-best list.

  Candidates are ordered by descending score, then by window, then by their
  rank in the window. No-answer scores and regret are computed from single
  spans, before `merge` (a name in MERGES) joins candidates. Posteriors are at
  `temperature`; they leave out null if the null rule is `never`.
  """
  num = len(windows.examples)
  first = np.searchsorted(windows.example_of, np.arange(num))
  row, column = np.nonzero(spans.valid)
  score = spans.score[row, column].astype(np.float64)
  order = np.lexsort((column, row, -score, windows.example_of[row]))
  question = windows.example_of[row[order]]
  ptr = np.searchsorted(question, np.arange(num + 1))
  order = order[np.arange(len(row)) - ptr[question] < n_best]
  row, column, score = row[order], column[order], score[order]
  question = windows.example_of[row]
  begin, end = windows.char_spans(
      row, spans.start[row, column], spans.end[row, column])
  answers = Answers(
      begin=begin, end=end, score=score, window=row,
      ptr=np.searchsorted(question, np.arange(num + 1)),
      null_score=np.minimum.reduceat(spans.null, first).astype(np.float64),
      na_score=null_rules.no_answer_scores(
          null_rule, _window_scores(spans, first)),
      regret=None if spans.exact is None else _regret(spans, first))
  if spans.log_partition is not None:
    # The log-partition is over null, as in `min_null`, and all windows' spans.
    null = (np.full(num, -np.inf) if null_rule == 'never'
            else answers.null_score / temperature)
    column = spans.log_partition[:, spans.temperatures.index(temperature)]
    with np.errstate(invalid='ignore'):  # callers refuse NaN in one line
      total = np.logaddexp(null, np.logaddexp.reduceat(
          column.astype(np.float64), first))
    answers = dataclasses.replace(
        answers, null_log_p=null - total,
        # A log-partition in float32 may be below its largest term.
        log_p=np.minimum(score / temperature - total[question], 0.0))
  return MERGES[merge](windows.examples, answers)


def join_answers(parts: Sequence[Answers],
                 first_window: Sequence[int]) -> Answers:
  """Concatenates the answers of blocks, given the first window of each."""
  sizes = np.cumsum([0, *(part.ptr[-1] for part in parts)])
  fields = {name: None if value is None
            else np.concatenate([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()}
  fields['window'] = np.concatenate([part.window + first for part, first in zip(
      parts, first_window, strict=True)])
  fields['ptr'] = np.concatenate([[0], *(part.ptr[1:] + size for part, size
                                         in zip(parts, sizes, strict=False))])
  return Answers(**fields)


def _window_scores(spans: candidates.WindowSpans,
                   first: np.ndarray) -> null_rules.WindowScores:
  floor = lambda x: np.maximum(x.astype(np.float64), candidates.NO_SPAN)
  return null_rules.WindowScores(
      spans.null.astype(np.float64), floor(spans.score[:, 0]), first,
      None if spans.normaliser is None else floor(spans.normaliser))


def _regret(spans: candidates.WindowSpans,
            first: np.ndarray) -> np.ndarray:  # [E]
  # Without a legal span both scores are search.ILLEGAL, the lowest of all.
  best, exact = (np.maximum.reduceat(x.astype(np.float64), first)
                 for x in (spans.score[:, 0], spans.exact))
  has_span = np.logical_or.reduceat(spans.valid[:, 0], first)
  return np.where(has_span | (exact == best), exact - best, np.inf)


def merge_surface_forms(examples: Sequence[Example],
                        answers: Answers) -> Answers:
  """Merges a question's candidates whose normalised texts are equal.

  The merged score is log Σ exp of the candidates' scores, so that within a
  window probabilities add up. Place and text are those of the best candidate;
  equal merged scores stay in the order of their best candidates.
  """
  question = np.repeat(np.arange(len(examples)), np.diff(answers.ptr))
  number: dict[tuple[int, str], int] = {}  # best first within a question
  form = np.array([
      number.setdefault((q, examples_lib.normalize_answer(
          examples[q].context[begin:end])), len(number))
      for q, begin, end in zip(question.tolist(), answers.begin.tolist(),
                               answers.end.tolist(), strict=True)], np.int64)
  _, best = np.unique(form, return_index=True)
  peak = answers.score[best]
  score = peak + np.log(np.bincount(
      form, np.exp(answers.score - peak[form]), len(peak)))
  order = np.lexsort((-score, question[best]))  # stable
  best, log_p = best[order], None
  if answers.log_p is not None:
    # Unlike scores, posteriors are at the calibration temperature.
    log_p = np.full(len(peak), -np.inf)
    np.logaddexp.at(log_p, form, answers.log_p)
    log_p = np.minimum(log_p[order], 0.0)  # a sum may round to above 1
  return dataclasses.replace(
      answers, begin=answers.begin[best], end=answers.end[best],
      score=score[order], window=answers.window[best], log_p=log_p,
      ptr=np.searchsorted(question[best], np.arange(len(examples) + 1)))


MERGES: dict[str, Callable[[Sequence[Example], Answers], Answers]] = {
    'none': lambda examples, answers: answers,
    'surface_form': merge_surface_forms,
}


def answer_texts(examples: Sequence[Example],
                 answers: Answers) -> dict[str, str]:
  """Returns {question id: text of the best candidate, or '' without any}."""
  return {e.id: e.context[answers.begin[c]:answers.end[c]] if c < after else ''
          for e, c, after in zip(examples, answers.ptr[:-1], answers.ptr[1:],
                                 strict=True)}


def n_best_rows(example: Example, answers: Answers,
                e: int) -> list[dict[str, Any]]:
  """Returns the candidates of question e as JSON rows.

  `end` is exclusive. `probability` is there if `answers` has posteriors.
  """
  return [{'text': example.context[answers.begin[c]:answers.end[c]],
           'start': int(answers.begin[c]), 'end': int(answers.end[c]),
           'score': float(answers.score[c]),
           **({} if answers.log_p is None else
              {'probability': float(np.exp(answers.log_p[c]))})}
          for c in range(answers.ptr[e], answers.ptr[e + 1])]
