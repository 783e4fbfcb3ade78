"""Several n-best lists of one data set → one, in spans of characters.

Glossary of shapes: M members, E questions, C different candidates of all
questions together.

Members may differ in seed, head and tokenizer: what they share is the text.
A span's score is the mean over members of its log posterior, as nbest.jsonl
has it: the geometric mean of probabilities that are each over all spans of a
question, and so comparable between members. Numpy alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from qa_jax import calibration
from qa_jax import errors
from qa_jax import files
from qa_jax import metrics
from qa_jax.data.examples import Example

TINY = 1e-9  # the least mass that is left to spans not in an n-best list
LEAST = 1e-300  # a probability that is 0 in a file


@dataclasses.dataclass(frozen=True)
class Listed:
  """What a member says of a question."""

  null: float  # log posterior of no answer
  spans: Mapping[tuple[int, int], float]  # log posterior by characters
  windows: int  # of the question

  @property
  def floor(self) -> float:
    """Of a span that is not listed: it is no better than the worst that is,
    nor than all of what is left."""
    left = 1.0 - np.exp(self.null) - np.exp([*self.spans.values()]).sum()
    return min([*self.spans.values(), float(np.log(max(left, TINY)))])


@dataclasses.dataclass(frozen=True)
class Pool:
  """The candidates of all members; question e owns [ptr[e], ptr[e + 1])."""

  examples: Sequence[Example]
  begin: np.ndarray  # [C] characters, ascending within a question
  end: np.ndarray  # [C]
  ptr: np.ndarray  # [E + 1]
  log_p: np.ndarray  # [M, C]
  null_log_p: np.ndarray  # [M, E]
  windows: np.ndarray  # [E] the most of any member

  @functools.cached_property
  def nulls(self) -> bool:
    """Whether no answer is an answer, as the official scripts have it."""
    return any(e.impossible for e in self.examples)

  @functools.cached_property
  def silent(self) -> np.ndarray:
    """[E]: the score of no answer, 0 or 1."""
    return np.array([float(not e.gold_texts) for e in self.examples])

  @functools.cached_property
  def scores(self) -> np.ndarray:
    """[2, C]: exact match and F1 of answering each candidate, 0 … 1."""
    version = '2.0' if self.nulls else '1.1'
    out = [metrics.score_answer(
        e.context[self.begin[c]:self.end[c]], e.gold_texts, version=version)
           for i, e in enumerate(self.examples)
           for c in range(self.ptr[i], self.ptr[i + 1])]
    return np.array(out, np.float64).reshape(-1, 2).T


@dataclasses.dataclass(frozen=True)
class Combined:
  """The mean of some members of a pool."""

  log_p: np.ndarray  # [C] mean log posterior, not normalised
  null_log_p: np.ndarray  # [E]
  best: np.ndarray  # [E] candidate; -1: none there is

  @property
  def na_score(self) -> np.ndarray:  # [E]
    """No answer's lead over the best span; 0 is an even choice."""
    best = np.where(self.best >= 0, np.append(self.log_p, 0.0)[self.best],
                    np.log(LEAST))
    return self.null_log_p - best


def read(path: pathlib.Path, examples: Sequence[Example]) -> dict[str, Listed]:
  """An nbest.jsonl that has every one of these questions, and no other.

  Raises:
    UserError: unreadable, of another shape, without probabilities, an id that
      is twice, missing or unknown, or a text that is not the context's.
  """
  by_id = {e.id: e for e in examples}
  found: dict[str, Listed] = {}
  for where, row in files.read_rows(path):
    key = row.get('id')
    if key not in by_id:
      raise errors.UserError(
          f'{where}: question {key!r} is not in the data; give --data what was '
          'evaluated on')
    if key in found:
      raise errors.UserError(f'{where}: question {key!r} stands there twice')
    found[key] = _listed(row, by_id[key].context, where)
  missing = [e.id for e in examples if e.id not in found]
  if missing:
    raise errors.UserError(
        f'{path}: {len(missing)} of {len(examples)} questions are missing, the '
        f'first is {missing[0]!r}; evaluate on the whole data')
  if any(e.impossible for e in examples) and all(
      x.null <= np.log(LEAST) for x in found.values()):
    raise errors.UserError(
        f'{path}: no answer has no probability there (decode.null_rule never); '
        'evaluate with another null rule')
  return found


def _listed(row: Mapping[str, Any], context: str, where: str) -> Listed:
  answers = row.get('answers')
  if not isinstance(answers, list) or not all(
      isinstance(a, dict) for a in answers):
    raise errors.UserError(f"{where}: expected 'id' and 'answers'")
  spans = {}
  for answer in answers:
    begin, end = answer.get('start'), answer.get('end')
    if not (type(begin) is type(end) is int
            and context[begin:end] == answer.get('text')):
      raise errors.UserError(
          f'{where}: {answer.get("text")!r} does not stand at its place in the '
          'context; give --data what was evaluated on')
    spans[begin, end] = _log_p(answer.get('probability'), where)
  windows = row.get('windows')
  return Listed(_log_p(row.get('null_probability'), where), spans,
                windows if type(windows) is int else 0)


def _log_p(value: Any, where: str) -> float:
  if not (type(value) in (int, float) and 0 <= value <= 1):
    raise errors.UserError(
        f'{where}: a probability is {value!r}, expected a number in 0 … 1; '
        'evaluate anew')
  return float(np.log(max(value, LEAST)))


def pool(examples: Sequence[Example],
         members: Sequence[Mapping[str, Listed]]) -> Pool:
  """Their candidates side by side; what a member does not list has its floor.

  Raises:
    UserError: questions that cannot be scored.
  """
  metrics.per_question(examples, {})
  spans, counts, log_p = [], [], []
  for example in examples:
    lists = [member[example.id] for member in members]
    union = sorted({span for one in lists for span in one.spans})
    floors = [one.floor for one in lists]
    spans += union
    counts.append(len(union))
    log_p += [[one.spans.get(span, floor)
               for one, floor in zip(lists, floors, strict=True)]
              for span in union]
  begin, end = np.array(spans, np.int64).reshape(-1, 2).T
  return Pool(
      examples=examples, begin=begin, end=end,
      ptr=np.concatenate([[0], np.cumsum(counts)]),
      log_p=np.array(log_p, np.float64).reshape(-1, len(members)).T,
      null_log_p=np.array([[member[e.id].null for e in examples]
                           for member in members]),
      windows=np.array([max(member[e.id].windows for member in members)
                        for e in examples]))


def combine(pool: Pool, members: Sequence[int]) -> Combined:
  """The mean over some members; of equal candidates, the first in the text."""
  log_p = pool.log_p[list(members)].mean(axis=0)
  question = np.repeat(np.arange(len(pool.examples)), np.diff(pool.ptr))
  order = np.lexsort((-log_p, question))  # stable
  best = np.full(len(pool.examples), -1)
  has = pool.ptr[:-1] < pool.ptr[1:]
  best[has] = order[pool.ptr[:-1][has]]
  return Combined(log_p, pool.null_log_p[list(members)].mean(axis=0), best)


def scores_of(pool: Pool, found: Combined,
              threshold: float) -> np.ndarray:  # [2, E]
  """Exact match and F1 of every question, 0 … 1, at a threshold."""
  nothing = pool.silent if pool.nulls else np.zeros(len(pool.examples))
  answered = np.where(found.best >= 0, np.append(
      pool.scores, np.zeros((2, 1)), axis=1)[:, found.best], nothing)
  if not pool.nulls:
    return answered
  return np.where(found.na_score > threshold, nothing, answered)


def threshold_of(pool: Pool, found: Combined) -> float:
  """That of the best F1 on these questions; 0 where all have an answer."""
  if not pool.nulls:
    return 0.0
  return calibration.choose_threshold(
      found.na_score, scores_of(pool, found, np.inf)[1], pool.silent)[0]


def select(pool: Pool) -> list[tuple[int, float]]:
  """[(member, F1 in percent with it)]: greedily, the best one first.

  Adds the member that gains most until none gains (Caruana et al., 2004,
  "Ensemble selection from libraries of models", without replacement). F1 is
  that at the best threshold of the same questions.
  """
  chosen: list[tuple[int, float]] = []
  left = list(range(len(pool.log_p)))
  while left:
    reached = []
    for member in left:
      found = combine(pool, [m for m, _ in chosen] + [member])
      reached.append(100 * float(scores_of(
          pool, found, threshold_of(pool, found))[1].mean()))
    best = int(np.argmax(reached))
    if chosen and reached[best] <= chosen[-1][1] + 1e-9:
      break
    chosen.append((left.pop(best), reached[best]))
  return chosen


def nbest(pool: Pool, found: Combined, e: int, count: int) -> dict[str, Any]:
  """A line of nbest.jsonl; probabilities are normalised over the pool's
  candidates and no answer."""
  part = slice(pool.ptr[e], pool.ptr[e + 1])
  log_p, null = found.log_p[part], found.null_log_p[e]
  total = np.logaddexp.reduce(np.append(log_p, null))
  context = pool.examples[e].context
  answers = []
  for c in np.argsort(-log_p, kind='stable')[:count] + pool.ptr[e]:
    begin, end = int(pool.begin[c]), int(pool.end[c])
    answers.append({
        'text': context[begin:end], 'start': begin, 'end': end,
        'score': float(found.log_p[c]),
        'probability': float(np.exp(found.log_p[c] - total))})
  return {'id': pool.examples[e].id, 'null_score': float(null),
          'null_probability': float(np.exp(null - total)),
          'windows': int(pool.windows[e]),
          'answers': answers}
