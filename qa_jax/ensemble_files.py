"""Runs and n-best files by name → an ensemble, its files and what it gains."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from qa_jax import assess
from qa_jax import build as runs
from qa_jax import calibrate
from qa_jax import calibration
from qa_jax import ensemble
from qa_jax import errors
from qa_jax import files
from qa_jax import logs
from qa_jax import metrics
from qa_jax import page
from qa_jax import predict
from qa_jax import reliability
from qa_jax import significance
from qa_jax.data import sources

N_BEST = 20  # candidates of an ensemble that are written


@dataclasses.dataclass(frozen=True)
class Result:
  """An ensemble on the data, beside each of its candidates for membership."""

  names: Sequence[str]  # [M]
  pool: ensemble.Pool
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
    return ensemble.scores_of(
        self.pool, ensemble.combine(self.pool, members), threshold)


def build(members: Sequence[str], data: str, *, held_out: str = '',
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
    if runs.is_run(pathlib.Path(name)):
      calibrate.check_untrained(pathlib.Path(name), held_out, known.examples)
  seen = {e.context for e in known.examples} & {
      e.context for e in on_data.examples}
  if seen:
    logs.say('warning: members are selected on contexts that they are scored '
             f'on, {len(seen)} of them')
  taken = ensemble.select(known)
  at = lambda found: ensemble.threshold_of(known, found)
  singles = [ensemble.combine(known, [m]) for m in everyone]
  chosen = [m for m, _ in taken]
  return Result(
      members, on_data, chosen, [at(s) for s in singles],
      at(ensemble.combine(known, chosen)),
      [100 * float(ensemble.scores_of(known, s, at(s))[1].mean())
       for s in singles], [f1 for _, f1 in taken])


def _pool(members: Sequence[str], data: str) -> ensemble.Pool:
  examples = sources.load(data)
  return ensemble.pool(examples, [
      ensemble.read(_nbest(pathlib.Path(name), data), examples)
      for name in members])


def _nbest(member: pathlib.Path, data: str) -> pathlib.Path:
  """The n-best list of a member; a run that lacks it, or that was calibrated
  since, is evaluated."""
  if not member.exists():
    raise errors.UserError(
        f'member {member}: no such run, evaluation or nbest.jsonl')
  folder = assess.place(member, data)
  if folder is None:
    return member / 'nbest.jsonl' if member.is_dir() else member
  found = calibration.read(member)
  metrics_file = folder / 'metrics.json'
  then = files.read_object(metrics_file).get(
      'temperature') if metrics_file.is_file() else None
  if not (folder / 'nbest.jsonl').is_file() or then != (
      found and found.temperature):
    logs.say(f'{member}: evaluated on {data}')
    assess.on(predict.load(member), data, output=folder,
              progress=member.name)
  return folder / 'nbest.jsonl'


def write(result: Result, output: pathlib.Path, *,
          seed: int = 0) -> list[page.Block]:
  """Writes what an evaluation writes, and ensemble.{json,md}; its parts."""
  pool = result.pool
  found = ensemble.combine(pool, result.chosen)
  always = {e.id: e.context[pool.begin[c]:pool.end[c]] if c >= 0 else ''
            for e, c in zip(pool.examples, found.best, strict=True)}
  na_scores = {e.id: float(s) for e, s in zip(
      pool.examples, found.na_score, strict=True)} if pool.nulls else None
  predictions = always if na_scores is None else {
      k: '' if na_scores[k] > result.threshold else text
      for k, text in always.items()}
  values = metrics.squad_metrics(pool.examples, predictions,
                                 na_scores=na_scores, always_answer=always)
  if na_scores is not None:
    files.write_json(output / 'na_probs.json', na_scores)
    if result.alone is not None:
      values |= reliability.at_thresholds(
          pool.examples, always, na_scores, result.threshold)
  files.write_json(output / 'predictions.json', predictions)
  files.write_jsonl(output / 'nbest.jsonl', (
      ensemble.nbest(pool, found, e, N_BEST)
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
  files.write_text(output / 'ensemble.md', page.markdown(blocks))
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
    low, high = significance.hierarchical(x[None], articles, seed=seed)
    out[f'{name}_gain'] = {
        'mean': float(x.mean()), 'low': low, 'high': high,
        'p': significance.sign_flip(x, seed=seed),
        'p_articles': significance.sign_flip(
            significance.article_sums(x, articles), seed=seed)}
  return out


def _blocks(result: Result, values: Mapping[str, float],
            told: Mapping[str, Any]) -> list[page.Block]:
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
      page.Title(1, f'An ensemble of {len(result.chosen)} of '
                 f'{len(result.names)} on {len(result.pool.examples)} '
                 'questions'),
      page.Table(['member', 'taken', *['F1, held out'] * held, 'EM', 'F1'],
                 rows),
      page.Title(2, f'Over its best member, {told["best_member"]}'),
      page.Table(['', 'difference', '95 % interval', 'p', 'p (articles)'],
                 gains),
      page.Text('The best member is the one of the best F1 on '
                + ('held-out questions.' if held else
                   'these very questions: give --held_out to choose before.')
                + ' The interval is over articles and their questions.')]
