"""NULL_RULES: window scores → how sure it is that a question has no answer.

Glossary of shapes: N windows, E questions.

A rule's score is higher the surer "no answer" is, and a question gets none iff
it exceeds `decode.null_threshold`. All scores are such that 0 is an even
choice by the rule's own lights.
"""

from collections.abc import Callable
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class WindowScores:
  """What rules read; question e owns windows [first[e], first[e + 1])."""

  null: np.ndarray  # [N] float64
  best: np.ndarray  # [N] float64, of the window's best span
  first: np.ndarray  # [E]
  normaliser: np.ndarray | None = None  # [N] float64, log Σ exp over spans


def never(windows: WindowScores) -> np.ndarray:  # [E]
  """Always answers, as SQuAD 1.1 does."""
  return np.full(len(windows.first), -np.inf)


def min_null(windows: WindowScores) -> np.ndarray:
  """The least null score of any window, less the best span of all windows:
  every window must want null (Devlin et al., 2019, section 4.3, and code)."""
  return (np.minimum.reduceat(windows.null, windows.first)
          - np.maximum.reduceat(windows.best, windows.first))


def margin(windows: WindowScores) -> np.ndarray:
  """The least null - best within one window (Alberti et al., 2019): compares
  scores of one softmax only."""
  return np.minimum.reduceat(windows.null - windows.best, windows.first)


def classifier(windows: WindowScores) -> np.ndarray:
  """The least null logit of any window, whatever the spans score (Yang et
  al., 2019, XLNet)."""
  return np.minimum.reduceat(windows.null, windows.first)


def product(windows: WindowScores) -> np.ndarray:
  """The log odds of Π σ(null): no window holds the answer, each being judged
  on its own; unlike the least, many doubtful windows add up to an answer."""
  log_p = np.add.reduceat(-np.logaddexp(0, -windows.null), windows.first)
  # p rounds to 1 above a logit of about 700; the odds stay finite.
  return log_p - np.log(-np.expm1(np.minimum(log_p, -1e-300)))


def posterior(windows: WindowScores) -> np.ndarray:
  """The least log odds of null in one window's softmax over null and all
  spans, null - log Σ exp(span): the order of log p(null), with 0 at p = ½.

  Spans that share a probable answer count together, not the best one alone.
  """
  return np.minimum.reduceat(windows.null - windows.normaliser, windows.first)


@dataclasses.dataclass(frozen=True)
class NullRule:
  """A rule, and what must be there for it."""

  score: Callable[[WindowScores], np.ndarray]
  # 'null': a logit of the head's own, trained as one. 'normaliser': that of
  # the softmax over spans, which then is computed beside the search.
  needs: frozenset[str] = frozenset()


NULL_RULES: dict[str, NullRule] = {
    'never': NullRule(never),
    'min_null': NullRule(min_null),
    'margin': NullRule(margin),
    'classifier': NullRule(classifier, frozenset({'null'})),
    'product': NullRule(product, frozenset({'null'})),
    'posterior': NullRule(posterior, frozenset({'normaliser'})),
}
