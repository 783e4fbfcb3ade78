"""Ensembles: several n-best lists of one data set → one, in character spans.

Glossary of shapes: M members, E questions, C candidates of all questions.

Members may differ in seed, head and tokenizer, but not in the text. The score
of a span is the mean over members of its log posterior in nbest.jsonl. These
are over all spans of a question, and so comparable between members.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.evaluation import calibrate
from qa_jax.evaluation import error_report
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import selective
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from qa_jax.runtime import console

MIN_REST = 1e-9  # least probability of all spans outside an n-best list
MIN_PROBABILITY = 1e-300  # stands for a probability that is 0 in a file
N_BEST = 20  # candidates of a question that an ensemble writes by default


@dataclasses.dataclass(frozen=True)
class MemberCandidates:
  """The n-best candidates of one member for one question."""

  null: float  # log posterior of no answer
  spans: Mapping[tuple[int, int], float]  # characters → log posterior
  windows: int  # number of windows of the question

  @property
  def floor(self) -> float:
    """The upper bound of the log posterior of a span that is not listed.

    Its probability is at most that of the worst listed span, and at most what
    null and the listed spans leave.
    """
    rest = 1.0 - np.exp(self.null) - np.exp([*self.spans.values()]).sum()
    return min([*self.spans.values(), float(np.log(max(rest, MIN_REST)))])


@dataclasses.dataclass(frozen=True)
class Pool:
  """The candidates of all members; question e owns [ptr[e], ptr[e + 1])."""

  examples: Sequence[Example]
  begin: np.ndarray  # [C] characters, ascending within a question
  end: np.ndarray  # [C]
  ptr: np.ndarray  # [E + 1]
  log_p: np.ndarray  # [M, C]
  null_log_p: np.ndarray  # [M, E]
  windows: np.ndarray  # [E] the largest number of windows of any member
  never: bool = False  # decode.null_rule of all members: all are answered

  @property
  def may_decline(self) -> bool:
    """Whether a null threshold decides which questions are answered."""
    return self.has_null and not self.never

  @functools.cached_property
  def has_null(self) -> bool:
    """Whether '' can be right, as in the official script of version 2.0."""
    return any(e.impossible for e in self.examples)

  @functools.cached_property
  def empty_scores(self) -> np.ndarray:  # [2, E]
    """Exact match and F1 of no answer, 0 or 1."""
    return squad.empty_scores(
        self.examples, '2.0' if self.has_null else '1.1')

  @functools.cached_property
  def scores(self) -> np.ndarray:  # [2, C]
    """Exact match and F1 of each candidate, 0 … 1."""
    version = '2.0' if self.has_null else '1.1'
    scores = [squad.score_answer(
        e.context[self.begin[c]:self.end[c]], e.gold_texts, version=version)
              for i, e in enumerate(self.examples)
              for c in range(self.ptr[i], self.ptr[i + 1])]
    return np.array(scores, np.float64).reshape(-1, 2).T

  def combine(self, members: Sequence[int]) -> 'Combination':
    """Averages members; of equal candidates, the first in the text is best."""
    log_p = self.log_p[list(members)].mean(axis=0)
    question = np.repeat(np.arange(len(self.examples)), np.diff(self.ptr))
    order = np.lexsort((-log_p, question))  # stable
    first, end = self.ptr[:-1], self.ptr[1:]
    best = np.full(len(self.examples), -1)
    best[first < end] = order[first[first < end]]
    return Combination(
        self, log_p, self.null_log_p[list(members)].mean(axis=0), best)


@dataclasses.dataclass(frozen=True)
class Combination:
  """The mean of some members of a pool."""

  pool: Pool
  log_p: np.ndarray  # [C] mean log posterior, not normalised
  null_log_p: np.ndarray  # [E]
  best: np.ndarray  # [E] candidate; -1: the question has none

  @property
  def na_score(self) -> np.ndarray:  # [E]
    """The log posterior of null minus that of the best span."""
    best = np.where(self.best >= 0, np.append(self.log_p, 0.0)[self.best],
                    np.log(MIN_PROBABILITY))
    return self.null_log_p - best

  def scores(self, threshold: float) -> np.ndarray:  # [2, E]
    """Computes exact match and F1 at a null threshold, 0 … 1."""
    empty = self.pool.empty_scores
    answered = np.where(self.best >= 0, np.append(
        self.pool.scores, np.zeros((2, 1)), axis=1)[:, self.best], empty)
    return answered if not self.pool.may_decline else np.where(
        selective.declines(self.na_score, threshold), empty, answered)

  def best_threshold(self) -> float:
    """Returns the null threshold of the best F1; 0 if none may be declined."""
    if not self.pool.may_decline:
      return 0.0
    return calibration.choose_threshold(
        self.na_score, self.scores(np.inf)[1], self.pool.empty_scores[1])[0]

  def n_best_row(self, e: int, count: int) -> dict[str, Any]:
    """Returns the row of question e in nbest.jsonl, with `count` candidates.

    Probabilities are normalised over null and the candidates of the pool.
    """
    pool = self.pool
    part = slice(pool.ptr[e], pool.ptr[e + 1])
    log_p, null = self.log_p[part], self.null_log_p[e]
    total = np.logaddexp.reduce(np.append(log_p, null))
    context = pool.examples[e].context
    answers = [{'text': context[pool.begin[c]:pool.end[c]],
                'start': int(pool.begin[c]), 'end': int(pool.end[c]),
                'score': float(self.log_p[c]),
                'probability': float(np.exp(self.log_p[c] - total))}
               for c in np.argsort(-log_p, kind='stable')[:count] + pool.ptr[e]]
    return {'id': pool.examples[e].id, 'null_score': float(null),
            'null_probability': float(np.exp(null - total)),
            'windows': int(pool.windows[e]), 'answers': answers}


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """The selected members of a pool, and the scores that selected them."""

  names: Sequence[str]  # [M]
  pool: Pool
  members: Sequence[int]  # in the order of their selection
  threshold: float  # null threshold of the ensemble
  thresholds: Sequence[float]  # [M] null threshold of each member alone
  # F1 on held-out questions in percent: [M] of each member alone, and after
  # each selection. None without held-out questions.
  alone: Sequence[float] | None = None
  steps: Sequence[float] | None = None
  n_best: int = N_BEST  # candidates of a question that are written

  @functools.cached_property
  def member_scores(self) -> Sequence[np.ndarray]:  # M times [2, E]
    """Exact match and F1 of each member alone, 0 … 1."""
    return [self.pool.combine([m]).scores(threshold)
            for m, threshold in enumerate(self.thresholds)]

  @property
  def best_member(self) -> int:
    """The member of the best F1 on held-out questions, else on the pool."""
    return int(np.argmax(self.alone if self.alone is not None else [
        f1.mean() for _, f1 in self.member_scores]))


def build_ensemble(members: Sequence[str], data: str, *, held_out: str = '',
                   held_out_members: Sequence[str] = (),
                   **options: Any) -> Ensemble:
  """Reads the candidates of members on `data`, and selects on `held_out`.

  A member is a run, the directory of an evaluation or an nbest.jsonl. A run
  without the evaluation is evaluated. Without `held_out`, all are members of
  the ensemble and the threshold is `null_threshold`, or 0.

  `options` are those of `predict.load`, for all members: `checkpoint`,
  `calibrated` and fields of config.decode and config.data. `null_threshold` is
  that of the ensemble and of each member alone; `n_best` also counts the
  ensemble's candidates.

  Raises:
    UserError: a member is neither a run nor an evaluation, is of other
      questions, or is a run that was trained on held-out questions; or
      an option is wrong, or is given and a member is no run.
  """
  if len(members) < 2:
    raise errors.UserError('an ensemble needs two members; give --workdir=A,B')
  paths = [pathlib.Path(m).resolve() for m in members]
  paths = [p.parent if p.name == predictions_lib.N_BEST else p for p in paths]
  for i, path in enumerate(paths):
    errors.require(path not in paths[:i],
                   f'--workdir names the member {members[i]} twice')
  if held_out_members and (
      not held_out or len(held_out_members) != len(members)):
    raise errors.UserError('--held_out_members goes with --held_out, one for '
                           f'each of the {len(members)} members')
  fixed = options.pop('null_threshold', None)
  if fixed is not None:
    if held_out:
      raise errors.UserError(
          f'null_threshold={fixed} and --held_out contradict each other: '
          'held-out questions choose the threshold; give one of them')
    config_lib.check_config({'decode': {'null_threshold': fixed},
                             'train': {'num_steps': 1}})
  examples = sources.load_answered(data)
  held_out_examples = sources.load_answered(held_out) if held_out else []
  if held_out and not held_out_members:
    for path in members:
      errors.require(RunDirectory(pathlib.Path(path)).is_run(), (
          f'member {path} is no run, so it cannot answer --held_out; give '
          '--held_out_members: for each member the run, or its evaluation on '
          '--held_out'))
  # Before the first one is evaluated.
  stored, held_out_stored = (
      [_read_stored(pathlib.Path(name), asked, options) for name in names]
      for names, asked in ((members, examples),
                           (held_out_members, held_out_examples)))
  for path in map(pathlib.Path, dict.fromkeys(
      [*members, *held_out_members] if held_out else ())):
    if RunDirectory(path).is_run():
      calibrate.check_untrained(path, held_out, held_out_examples)
  pool = _read_pool(members, stored, data, examples, options)
  everyone = range(len(members))
  n_best = options.get('n_best', N_BEST)
  if not held_out:
    threshold = float(fixed or 0.0)
    return Ensemble(members, pool, list(everyone), threshold,
                    [threshold] * len(members), n_best=n_best)
  held_out_pool = _read_pool(
      held_out_members or members, held_out_stored or [None] * len(members),
      held_out, held_out_examples, options)
  seen = ({e.context for e in held_out_pool.examples}
          & {e.context for e in pool.examples})
  if seen:
    console.say('warning: members are selected on contexts that they are scored'
                f' on, {len(seen)} of them')
  selected, steps = zip(*select_members(held_out_pool), strict=True)
  singles = [held_out_pool.combine([m]) for m in everyone]
  thresholds = [single.best_threshold() for single in singles]
  alone = [100 * float(single.scores(threshold)[1].mean())
           for single, threshold in zip(singles, thresholds, strict=True)]
  threshold = held_out_pool.combine(selected).best_threshold()
  return Ensemble(members, pool, selected, threshold, thresholds, alone, steps,
                  n_best)


def write_ensemble(ensemble: Ensemble, output: pathlib.Path, *,
                   seed: int = 0) -> list[documents.Block]:
  """Writes the files of `write_evaluation` and ensemble.{json,md}.

  Returns the blocks of ensemble.md. `seed` is that of the resampling.
  """
  pool = ensemble.pool
  combination = pool.combine(ensemble.members)
  texts = {e.id: e.context[pool.begin[c]:pool.end[c]] if c >= 0 else ''
           for e, c in zip(pool.examples, combination.best, strict=True)}
  predictions = predictions_lib.Predictions(
      pool.examples, texts, {e.id: s for e, s in zip(
          pool.examples, combination.na_score.tolist(), strict=True)}
      if pool.may_decline else None)
  metrics = predictions.metrics(ensemble.threshold)
  if pool.may_decline and ensemble.alone is not None:
    metrics |= predictions.held_out_metrics(ensemble.threshold)
  predictions_lib.write_evaluation(
      output, predictions, threshold=ensemble.threshold, metrics=metrics,
      n_best=(combination.n_best_row(e, ensemble.n_best)
              for e in range(len(pool.examples))))
  best = ensemble.best_member
  gain = 100 * (combination.scores(ensemble.threshold)
                - ensemble.member_scores[best])
  difference = {name: significance.paired_difference(
      x[None], [e.article for e in pool.examples], seed=seed)
                for name, x in zip(error_report.SCORES, gain, strict=True)}
  alone = [dict(zip(error_report.SCORES, (100 * x.mean(axis=1)).tolist(),
                    strict=True)) for x in ensemble.member_scores]
  files.write_json(output / 'ensemble.json', {
      'members': [ensemble.names[m] for m in ensemble.members],
      'held_out_f1': ensemble.steps, 'threshold': ensemble.threshold,
      'alone': {name: {'held_out_f1': ensemble.alone and ensemble.alone[m],
                       **alone[m]}
                for m, name in enumerate(ensemble.names)},
      'best_member': ensemble.names[best],
      **{f'{name}_gain': value for name, value in difference.items()}})
  blocks = _blocks(ensemble, metrics, alone, difference)
  files.write_text(output / 'ensemble.md', documents.to_markdown(blocks))
  return blocks


def read_member(path: pathlib.Path, examples: Sequence[Example], *,
                never: bool = False) -> dict[str, MemberCandidates]:
  """Reads an nbest.jsonl that has exactly the questions of `examples`.

  `never` says that the null rule is never, so that no answer has probability 0.

  Raises:
    UserError: the file is unreadable, has another shape or no probabilities, a
      question is there twice, missing or unknown, or the text of a candidate is
      not the context's.
  """
  rows = predictions_lib.read_n_best(path)
  unknown = rows.keys() - {e.id for e in examples}
  if unknown:
    raise errors.UserError(f'{path}: question {min(unknown)!r} is not in the '
                           'data; give --data what was evaluated on')
  missing = [e.id for e in examples if e.id not in rows]
  if missing:
    raise errors.UserError(
        f'{path}: {len(missing)} of {len(examples)} questions are missing, the '
        f'first is {missing[0]!r}; evaluate on the whole data')
  member = {e.id: _member_candidates(
      rows[e.id], e.context, f'{path}: question {e.id!r}') for e in examples}
  if not never and any(e.impossible for e in examples) and all(
      x.null <= np.log(MIN_PROBABILITY) for x in member.values()):
    raise errors.UserError(
        f'{path}: no answer has no probability there (decode.null_rule never); '
        'evaluate with another null rule')
  return member


def _member_candidates(row: Mapping[str, Any], context: str,
                       where: str) -> MemberCandidates:
  spans = {}
  for answer in row['answers']:
    begin, end = answer['start'], answer['end']
    if context[begin:end] != answer['text']:
      raise errors.UserError(
          f'{where}: {answer["text"]!r} does not stand at its place in the '
          'context; give --data what was evaluated on')
    spans[begin, end] = _log_probability(answer.get('probability'), where)
  null = _log_probability(row.get('null_probability'), where)
  return MemberCandidates(null, spans, row['windows'])


def _log_probability(value: Any, where: str) -> float:
  if not (type(value) in (int, float) and 0 <= value <= 1):
    raise errors.UserError(
        f'{where}: a probability is {value!r}, expected a number in 0 … 1; '
        'evaluate anew')
  return float(np.log(max(value, MIN_PROBABILITY)))


def pool_members(examples: Sequence[Example],
                 members: Sequence[Mapping[str, MemberCandidates]], *,
                 never: bool = False) -> Pool:
  """Joins the candidates of members; a span a member lacks gets its floor.

  `never` is that of Pool.

  Raises:
    UserError: a question cannot be scored.
  """
  squad.per_question(examples, {})  # raises if a question cannot be scored
  spans, counts, log_p = [], [], []
  for example in examples:
    lists = [member[example.id] for member in members]
    union = sorted({span for one in lists for span in one.spans})
    floors = [one.floor for one in lists]
    spans += union
    counts.append(len(union))
    log_p += [[one.spans.get(span, floor) for one, floor in zip(
        lists, floors, strict=True)] for span in union]
  begin, end = np.array(spans, np.int64).reshape(-1, 2).T
  return Pool(
      examples=examples, begin=begin, end=end,
      ptr=np.concatenate([[0], np.cumsum(counts)]),
      log_p=np.array(log_p, np.float64).reshape(-1, len(members)).T,
      null_log_p=np.array([[member[e.id].null for e in examples]
                           for member in members]),
      windows=np.array([max(member[e.id].windows for member in members)
                        for e in examples]), never=never)


def select_members(pool: Pool) -> list[tuple[int, float]]:
  """Selects members greedily: [(member, F1 in percent after its selection)].

  The first member is the best one. Each step adds the member that gains most,
  until none gains (Caruana et al., 2004, "Ensemble selection from libraries of
  models", without replacement). F1 is at the best threshold of the pool.
  """
  selection: list[tuple[int, float]] = []
  rest = list(range(len(pool.log_p)))
  while rest:
    f1 = []
    for member in rest:
      combination = pool.combine([m for m, _ in selection] + [member])
      f1.append(100 * float(combination.scores(
          combination.best_threshold())[1].mean()))
    best = int(np.argmax(f1))
    if selection and f1[best] <= selection[-1][1] + 1e-9:
      break
    selection.append((rest.pop(best), f1[best]))
  return selection


def _read_pool(members: Sequence[str],
               stored: Sequence[dict[str, MemberCandidates] | None], data: str,
               examples: Sequence[Example], options: Mapping[str, Any]) -> Pool:
  """Reads the candidates of the members of which `_read_stored` has none."""
  never = options.get('null_rule') == 'never'
  return pool_members(examples, [
      read_member(_n_best_file(pathlib.Path(member), data, options), examples,
                  never=never) if candidates is None else candidates
      for member, candidates in zip(members, stored, strict=True)], never=never)


def _read_stored(path: pathlib.Path, examples: Sequence[Example],
                 options: Mapping[str, Any]
                 ) -> dict[str, MemberCandidates] | None:
  """Reads the candidates of a member that is no run; returns None for a run.

  Raises:
    UserError: the member has no candidates and cannot get them.
  """
  if not path.exists():
    raise errors.UserError(
        f'member {path}: no such run, evaluation or nbest.jsonl')
  run = RunDirectory(path)
  if run.is_run():
    errors.require(
        'null_rule' in options or not any(e.impossible for e in examples)
        or run.read_config().decode.null_rule != 'never',
        f'member {path} has the null rule never, but some questions are '
        'unanswerable; give --decode.null_rule=min_null, or never for all '
        'members')
    return None
  if options:
    raise errors.UserError(
        f'member {path} is no run, so it has no model to decode; leave out '
        f'{", ".join(options)}')
  if path.is_dir() and not (path / predictions_lib.N_BEST).is_file():
    raise errors.UserError(
        f'member {path} is neither a run nor an evaluation: it has no '
        f'{predictions_lib.N_BEST}; evaluate it (python -m experiments.evaluate'
        f' --workdir={path} --data=… --output=DIR) and give DIR')
  return read_member(
      path / predictions_lib.N_BEST if path.is_dir() else path, examples)


def _n_best_file(member: pathlib.Path, data: str,
                 options: Mapping[str, Any]) -> pathlib.Path:
  """Returns the nbest.jsonl of a run.

  If it has none for `data`, these options and their checkpoint, or was
  calibrated since, it is evaluated.
  """
  run = RunDirectory(member)
  label = run_directory.evaluation_label(options)
  folder = run.evaluation(data, label)
  n_best_file = folder / predictions_lib.N_BEST
  metrics_file = folder / predictions_lib.METRICS
  metrics = (predictions_lib.read_metrics(metrics_file)
             if metrics_file.is_file() else {})
  step = run_directory.read_step(folder)
  if (not n_best_file.is_file()
      or (step is not None and step != _step(run, options))
      or metrics.get('temperature') != _temperature(run, options)):
    console.say(f'{member}: evaluated on {data}')
    evaluator.evaluate_data(predict.load(member, **options), data, run=run,
                            label=label, progress=member.name)
  else:
    console.say(f'{member}: its evaluation in {folder} is used' + (
        f', calibrated at temperature {metrics["temperature"]:.3g}'
        if 'temperature' in metrics else ''))
  return n_best_file


def _step(run: RunDirectory, options: Mapping[str, Any]) -> int:
  """Returns the step of the checkpoint that `options` choose."""
  return run.resolve_step(options.get('checkpoint', 'best'))


def _temperature(run: RunDirectory,
                 options: Mapping[str, Any]) -> float | None:
  """Returns the temperature of an evaluation now; None if not calibrated."""
  current = (calibration.read_calibration(run.path)
             if options.get('calibrated', True) else None)
  if current is None or current.misfit(_step(run, options), {
      **dataclasses.asdict(run.read_config().decode), **options}):
    return None
  return current.temperature


def _blocks(ensemble: Ensemble, metrics: Mapping[str, float],
            alone: Sequence[Mapping[str, float]],
            difference: Mapping[str, Any]) -> list[documents.Block]:
  held_out = ensemble.alone is not None
  number = '{:.2f}'.format
  best = ensemble.names[ensemble.best_member]
  rows = [[name, str(ensemble.members.index(m) + 1)
           if m in ensemble.members else '–',
           *([number(ensemble.alone[m])] if held_out else []),
           number(alone[m]['exact_match']), number(alone[m]['f1'])]
          for m, name in enumerate(ensemble.names)]
  rows.append(['ensemble', str(len(ensemble.members)),
               *([number(ensemble.steps[-1])] if held_out else []),
               number(metrics['exact_match']), number(metrics['f1'])])
  return [
      documents.Title(
          1, f'An ensemble of {len(ensemble.members)} of '
          f'{len(ensemble.names)} on {len(ensemble.pool.examples)} questions'),
      documents.Table(
          ['member', 'taken', *['F1, held out'] * held_out, 'EM', 'F1'], rows),
      documents.Title(2, f'Gain over the best member, {best}'),
      error_report.difference_table(difference),
      documents.Text('The best member has the best F1 on ' + (
          'held-out questions.' if held_out else
          'these very questions: give --held_out to choose on others.') +
                     ' The interval is over articles and their questions.')]
