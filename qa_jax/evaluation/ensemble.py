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

from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.evaluation import calibrate
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from qa_jax.runtime import console

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
    out = [squad.score_answer(
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


def read_member(path: pathlib.Path,
                examples: Sequence[Example]) -> dict[str, Listed]:
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


def pool_members(examples: Sequence[Example],
                 members: Sequence[Mapping[str, Listed]]) -> Pool:
  """Their candidates side by side; what a member does not list has its floor.

  Raises:
    UserError: questions that cannot be scored.
  """
  squad.per_question(examples, {})
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


def combine_members(pool: Pool, members: Sequence[int]) -> Combined:
  """The mean over some members; of equal candidates, the first in the text."""
  log_p = pool.log_p[list(members)].mean(axis=0)
  question = np.repeat(np.arange(len(pool.examples)),
                       np.diff(pool.ptr))
  order = np.lexsort((-log_p, question))  # stable
  best = np.full(len(pool.examples), -1)
  has = pool.ptr[:-1] < pool.ptr[1:]
  best[has] = order[pool.ptr[:-1][has]]
  return Combined(log_p, pool.null_log_p[list(members)].mean(axis=0),
                  best)


def scores_of(pool: Pool, found: Combined,
              threshold: float) -> np.ndarray:  # [2, E]
  """Exact match and F1 of every question, 0 … 1, at a threshold."""
  nothing = pool.silent if pool.nulls else np.zeros(
      len(pool.examples))
  answered = np.where(found.best >= 0, np.append(
      pool.scores, np.zeros((2, 1)), axis=1)[:, found.best], nothing)
  if not pool.nulls:
    return answered
  return np.where(found.na_score > threshold, nothing, answered)


def threshold_of(pool: Pool, found: Combined) -> float:
  """That of the best F1 on these questions; 0 where all have an answer."""
  if not pool.nulls:
    return 0.0
  return calibration.choose_threshold(found.na_score,
                                      scores_of(pool, found, np.inf)[1],
                                      pool.silent)[0]


def select_members(pool: Pool) -> list[tuple[int, float]]:
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
      found = combine_members(pool, [m for m, _ in chosen] + [member])
      reached.append(100 * float(scores_of(
          pool, found, threshold_of(pool, found))[1].mean()))
    best = int(np.argmax(reached))
    if chosen and reached[best] <= chosen[-1][1] + 1e-9:
      break
    chosen.append((left.pop(best), reached[best]))
  return chosen


def n_best_row(pool: Pool, found: Combined, e: int,
               count: int) -> dict[str, Any]:
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

N_BEST = 20  # candidates of an ensemble that are written


@dataclasses.dataclass(frozen=True)
class Result:
  """An ensemble on the data, beside each of its candidates for membership."""

  names: Sequence[str]  # [M]
  pool: Pool
  chosen: Sequence[int]  # members, in the order they were taken
  thresholds: Sequence[float]  # [M] of each alone
  threshold: float
  # Of each alone, and as each was taken: F1 on held-out questions, in percent.
  alone: Sequence[float] | None
  steps: Sequence[float] | None

  @property
  def best(self) -> int:
    """The best member, by held-out questions; without, by these: an oracle."""
    return int(np.argmax(self.alone if self.alone is not None else [
        self.of([m])[1].mean() for m in range(len(self.names))]))

  def of(self, members: Sequence[int]) -> np.ndarray:  # [2, E] EM and F1
    """Scores of one member, or of the ensemble."""
    threshold = (self.thresholds[members[0]] if len(members) == 1
                 else self.threshold)
    return scores_of(
        self.pool, combine_members(self.pool, members), threshold)


def build_ensemble(members: Sequence[str], data: str, *, held_out: str = '',
                   held_out_members: Sequence[str] = ()) -> Result:
  """Reads members, evaluating runs that have not been; selects on `held_out`.

  Without it all are members and the threshold is 0.

  Raises:
    UserError: a member that is neither a run nor an evaluation, that is of
      other questions, or a run that was trained on held-out ones.
  """
  if len(members) < 2:
    raise errors.UserError('an ensemble needs two members; give --members=A,B')
  if len(set(members)) < len(members):
    raise errors.UserError('a member is named twice in --members')
  on_data = _pool(members, data)
  everyone = range(len(members))
  if not held_out:
    return Result(members, on_data, list(everyone), [0.0] * len(members), 0.0,
                  None, None)
  known = _pool(held_out_members or members, held_out)
  for name in members:
    if RunDirectory(pathlib.Path(name)).is_run():
      calibrate.check_untrained(pathlib.Path(name), held_out, known.examples)
  seen = {e.context for e in known.examples} & {
      e.context for e in on_data.examples}
  if seen:
    console.say(
        'warning: members are selected on contexts that they are scored '
        f'on, {len(seen)} of them')
  taken = select_members(known)
  at = lambda found: threshold_of(known, found)
  singles = [combine_members(known, [m]) for m in everyone]
  chosen = [m for m, _ in taken]
  return Result(
      members, on_data, chosen, [at(s) for s in singles],
      at(combine_members(known, chosen)),
      [100 * float(scores_of(known, s, at(s))[1].mean())
       for s in singles], [f1 for _, f1 in taken])


def _pool(members: Sequence[str], data: str) -> Pool:
  examples = sources.load_examples(data)
  return pool_members(examples, [
      read_member(_nbest(pathlib.Path(name), data), examples)
      for name in members])


def _nbest(member: pathlib.Path, data: str) -> pathlib.Path:
  """The n-best list of a member; a run that lacks it, or that was calibrated
  since, is evaluated."""
  if not member.exists():
    raise errors.UserError(
        f'member {member}: no such run, evaluation or nbest.jsonl')
  if not RunDirectory(member).is_run():
    return member / 'nbest.jsonl' if member.is_dir() else member
  folder = RunDirectory(member).evaluation(data)
  found = calibration.read_calibration(member)
  metrics_file = folder / 'metrics.json'
  then = files.read_object(metrics_file).get(
      'temperature') if metrics_file.is_file() else None
  if not (folder / 'nbest.jsonl').is_file() or then != (
      found and found.temperature):
    console.say(f'{member}: evaluated on {data}')
    evaluator.evaluate_data(predict.load(member), data, output=folder,
                            progress=member.name)
  return folder / 'nbest.jsonl'


def write_ensemble(result: Result, output: pathlib.Path, *,
                   seed: int = 0) -> list[documents.Block]:
  """Writes what an evaluation writes, and ensemble.{json,md}; its parts."""
  pool = result.pool
  found = combine_members(pool, result.chosen)
  always = {e.id: e.context[pool.begin[c]:pool.end[c]] if c >= 0 else ''
            for e, c in zip(pool.examples, found.best, strict=True)}
  na_scores = {e.id: float(s) for e, s in zip(
      pool.examples, found.na_score, strict=True)} if pool.nulls else None
  predictions = always if na_scores is None else {
      k: '' if na_scores[k] > result.threshold else text
      for k, text in always.items()}
  values = squad.squad_metrics(pool.examples, predictions,
                               na_scores=na_scores, always_answer=always)
  if na_scores is not None:
    files.write_json(output / 'na_probs.json', na_scores)
    if result.alone is not None:
      values |= evaluator.at_thresholds(
          pool.examples, always, na_scores, result.threshold)
  files.write_json(output / 'predictions.json', predictions)
  files.write_jsonl(output / 'nbest.jsonl', (
      n_best_row(pool, found, e, N_BEST)
      for e in range(len(pool.examples))))
  files.write_json(output / 'metrics.json', values)
  told = _gain(result, seed)
  files.write_json(output / 'ensemble.json', {
      'members': [result.names[m] for m in result.chosen],
      'held_out_f1': result.steps, 'threshold': result.threshold,
      'alone': {name: {'held_out_f1': result.alone and result.alone[m],
                       **_mean(result.of([m]))}
                for m, name in enumerate(result.names)}, **told})
  blocks = _blocks(result, values, told)
  files.write_text(output / 'ensemble.md', documents.to_markdown(blocks))
  return blocks


def _mean(scores: np.ndarray) -> dict[str, float]:
  em, f1 = 100 * scores.mean(axis=1)
  return {'exact_match': float(em), 'f1': float(f1)}


def _gain(result: Result, seed: int) -> dict[str, Any]:
  """What the ensemble has over its best member, on the same questions."""
  out: dict[str, Any] = {'best_member': result.names[result.best]}
  articles = [e.article for e in result.pool.examples]
  differences = 100 * (result.of(result.chosen) - result.of([result.best]))
  for name, x in zip(('exact_match', 'f1'), differences, strict=True):
    low, high = significance.hierarchical_interval(x[None], articles, seed=seed)
    out[f'{name}_gain'] = {
        'mean': float(x.mean()), 'low': low, 'high': high,
        'p': significance.sign_flip(x, seed=seed),
        'p_articles': significance.sign_flip(
            significance.article_sums(x, articles), seed=seed)}
  return out


def _blocks(result: Result, values: Mapping[str, float],
            told: Mapping[str, Any]) -> list[documents.Block]:
  held = result.alone is not None
  rows = []
  for m, name in enumerate(result.names):
    scores = _mean(result.of([m]))
    order = result.chosen.index(m) + 1 if m in result.chosen else None
    rows.append([name, str(order or '–'), *(
        [f'{result.alone[m]:.2f}'] if held else []),
                 f'{scores["exact_match"]:.2f}', f'{scores["f1"]:.2f}'])
  rows.append(['ensemble', str(len(result.chosen)), *(
      [f'{result.steps[-1]:.2f}'] if held else []),
               f'{values["exact_match"]:.2f}', f'{values["f1"]:.2f}'])
  gains = [[title, f'{g["mean"]:+.2f}', f'{g["low"]:+.2f} … {g["high"]:+.2f}',
            f'{g["p"]:.4f}', f'{g["p_articles"]:.4f}'] for title, g in (
                ('exact match', told['exact_match_gain']),
                ('F1', told['f1_gain']))]
  return [
      documents.Title(
          1, f'An ensemble of {len(result.chosen)} of '
          f'{len(result.names)} on {len(result.pool.examples)} '
          'questions'),
      documents.Table(['member', 'taken', *['F1, held out'] * held, 'EM', 'F1'],
                      rows),
      documents.Title(2, f'Over its best member, {told["best_member"]}'),
      documents.Table(['', 'difference', '95 % interval', 'p', 'p (articles)'],
                      gains),
      documents.Text('The best member is the one of the best F1 on ' + (
          'held-out questions.' if held else
          'these very questions: give --held_out to choose before.') +
                     ' The interval is over articles and their questions.')
  ]
