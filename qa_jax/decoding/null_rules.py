"""Null rules: from the scores of a question's windows to its no-answer score.

Glossary of shapes: N windows, E questions.

A question gets no answer if its no-answer score exceeds the null threshold
`config.decode.null_threshold`. Each rule is scaled so that at score 0 its own
model finds "answer" and "no answer" equally good.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from qa_jax import errors
from qa_jax import registry


@dataclasses.dataclass(frozen=True)
class WindowScores:
  """Scores of windows; question e has first[e], …, first[e + 1] - 1."""

  null: np.ndarray  # [N] float64, null scores
  best: np.ndarray  # [N] float64, score of the window's best span
  first: np.ndarray  # [E]
  normaliser: np.ndarray | None = None  # [N] float64, log-partition of spans


def never(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns -inf, so that every question is answered, as in SQuAD 1.1."""
  return np.full(len(windows.first), -np.inf)


def min_null(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the lowest null score minus the best span score of all windows.

  Every window must prefer null (Devlin et al., 2019, section 4.3, and code).
  """
  return (np.minimum.reduceat(windows.null, windows.first)
          - np.maximum.reduceat(windows.best, windows.first))


def margin(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the lowest difference of null score and best span score.

  Each difference is taken within one window, so that only scores of one
  softmax are compared (Alberti et al., 2019).
  """
  return np.minimum.reduceat(windows.null - windows.best, windows.first)


def classifier(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the lowest null logit of all windows (Yang et al., 2019, XLNet)."""
  return np.minimum.reduceat(windows.null, windows.first)


def product(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the log odds of Π σ(null logit) over the windows of a question.

  The product is the probability that no window holds the answer if windows are
  independent. Unlike in a minimum, many doubtful windows add up to an answer.
  """
  log_p = np.add.reduceat(-np.logaddexp(0, -windows.null), windows.first)
  # p rounds to 1 above a logit of about 700. The bound keeps the odds finite.
  return log_p - np.log(-np.expm1(np.minimum(log_p, -1e-300)))


def posterior(windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the lowest log odds of null in a window's softmax.

  The softmax is over null and all spans, so that spans that share a probable
  answer count together. The log odds are 0 at p(null) = ½.
  """
  return np.minimum.reduceat(windows.null - windows.normaliser, windows.first)


@dataclasses.dataclass(frozen=True)
class NullRule:
  """A null rule and the scores that it requires.

  `needs` may hold 'null' (a trained null logit of the head) and 'normaliser'
  (the log-partition of each window's spans, computed beside the search).
  """

  score: Callable[[WindowScores], np.ndarray]
  needs: frozenset[str] = frozenset()


NEEDS = ('null', 'normaliser')  # the scores that a null rule may require
NULL_RULES: dict[str, NullRule] = {
    'never': NullRule(never), 'min_null': NullRule(min_null),
    'margin': NullRule(margin),
    'classifier': NullRule(classifier, frozenset({'null'})),
    'product': NullRule(product, frozenset({'null'})),
    'posterior': NullRule(posterior, frozenset({'normaliser'})),
}


def find_rule(name: str) -> NullRule:
  """Returns the null rule of a name in NULL_RULES or of an importable spec.

  Raises a UserError if the name is unknown, or the constructor returns no
  NullRule or one that needs unknown scores.
  """
  if registry.is_importable(name):
    rule = registry.build({}, name, what='null rule', kind=NullRule)
    for need in rule.needs:
      errors.check_choice(f'null rule {name!r}', 'needs', need, NEEDS)
    return rule
  errors.check_known('config.decode.null_rule', name, NULL_RULES)
  return NULL_RULES[name]


def no_answer_scores(name: str, windows: WindowScores) -> np.ndarray:  # [E]
  """Returns the no-answer scores by the null rule `name`, in float64.

  Raises a UserError if the rule does not give one finite number a question.
  """
  scores = np.asarray(find_rule(name).score(windows))
  shape = windows.first.shape
  errors.require(
      scores.shape == shape and scores.dtype.kind in 'fiu',
      f'null rule {name!r} returns an array of shape {scores.shape} and type '
      f'{scores.dtype} for {shape[0]} questions with {len(windows.null)} '
      f'windows, expected one number a question, [E] = {shape}')
  finite = np.isfinite(scores)
  errors.require(
      finite.all() or name == 'never',
      f'null rule {name!r} returns NaN or infinity for {(~finite).sum()} of '
      f'{shape[0]} questions, expected finite numbers; -1e9 always gives an '
      'answer, 1e9 none')
  return scores.astype(np.float64, copy=False)
