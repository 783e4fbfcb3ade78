"""Comparison of variants with the default variant on equal questions.

All inputs are read from run directories. Runs that differ only in the seed form
one variant. The variant of the first run is the default. Shapes: S seeds, N
questions, C scores.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import math
import pathlib
import shlex
from typing import Any

import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import significance
from qa_jax.metrics import squad as squad_lib
from qa_jax.sweeps import plan

SCORES = ('exact_match', 'f1')  # [C], the compared scores
MIN_SEEDS = 3  # common seeds without which no difference counts


@dataclasses.dataclass(frozen=True)
class Run:
  """The config, scores and costs of a complete run."""

  path: pathlib.Path
  config: config_lib.Config
  metrics: Mapping[str, float]  # of metrics.json
  scores: np.ndarray  # [C, N], of every question in percent
  curve: Sequence[tuple[int, float]]  # (step, F1) while training
  # NaN: not recorded, or not trained.
  examples_per_second: float
  peak_megabytes: float
  device_seconds: float
  compile_seconds: float
  # 'step 2 of 4' if the evaluation is known to be of an earlier checkpoint than
  # the last one, else ''.
  earlier: str = ''


@dataclasses.dataclass(frozen=True)
class Delta:
  """The difference variant - default in points, over their common seeds."""

  seeds: int  # common seeds
  mean: float
  sd: float  # of the difference over seeds; NaN: one seed
  # The difference that seeds alone cause: sd of the difference of two means
  # over equally many seeds of the default. NaN: the default has one seed.
  floor: float
  low: float  # 95 % interval over seeds, articles and their questions
  high: float
  p: float  # paired sign-flip test over questions
  p_articles: float  # paired sign-flip test over articles
  p_seeds: float  # paired t-test over seeds; NaN: one seed
  # The larger of p and p_seeds, corrected for the number of variants.
  p_holm: float = math.nan

  @property
  def counts(self) -> bool:
    """Returns whether seeds, questions and floor agree on a difference."""
    return (self.seeds >= MIN_SEEDS and self.p_holm < 0.05
            and abs(self.mean) > self.floor and not self.low <= 0 <= self.high)

  @property
  def verdict(self) -> str:
    """Returns 'too few seeds', 'no', 'better' or 'worse'."""
    if self.seeds < MIN_SEEDS:
      return 'too few seeds'
    if not self.counts:
      return 'no'
    return 'better' if self.mean > 0 else 'worse'


@dataclasses.dataclass(frozen=True)
class Variant:
  """The runs of one config with several seeds."""

  label: str  # the fields in which it differs from the default
  runs: Sequence[Run]  # at least one
  deltas: Mapping[str, Delta]  # {} for the default, or without a common seed

  def _values(self, name: str) -> list[float]:
    return [run.metrics.get(name, math.nan) for run in self.runs]

  def mean(self, name: str) -> float:
    """Returns the mean of a metric over seeds; NaN if a run lacks it."""
    return float(np.mean(self._values(name)))

  def sd(self, name: str) -> float:
    return _sd(self._values(name))

  def half_width(self, name: str) -> float:
    """Returns half the 95 % interval of the mean over seeds."""
    return significance.half_width(self._values(name))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All variants, compared on the questions of one data SPEC."""

  variants: Sequence[Variant]  # the default is the first
  default: str  # its fields that others change
  data: str  # SPEC of the questions
  questions: int
  left_out: Mapping[str, str]  # run → why it is not compared
  planned: int  # comparisons with the default once the study is complete


def detectable_difference(comparison: Comparison, score: str,
                          seeds: int) -> float:
  """Computes the true difference that each test finds with 80 % power, points.

  The estimate is for `seeds` seeds of each variant, from the seeds of the
  default: a variant is taken to differ from it in the mean alone, with
  independent seeds. The larger of two differences is returned, that of the test
  over seeds and that of the test over questions. NaN: the default has one seed.
  """
  scores = np.stack([run.scores[SCORES.index(score)]
                     for run in comparison.variants[0].runs])
  if len(scores) < 2:
    return math.nan
  # A difference of two independent seeds has twice the variance of one.
  sds = ((2**0.5 * _sd(scores.mean(axis=1)), seeds),
         ((2 * scores.var(axis=0, ddof=1).mean() / seeds)**0.5,
          scores.shape[1]))
  return max(significance.detectable_difference(
      float(sd), count, comparisons=comparison.planned) for sd, count in sds)


def compare(workdirs: Sequence[pathlib.Path], *, data: str = '',
            planned: int = 0) -> Comparison:
  """Reads runs and sweeps and compares their variants with the default.

  `data` is the SPEC of an evaluation by experiments.evaluate, '' that of
  config.data.eval. `planned` is the number of comparisons of the whole study,
  for its power; 0 takes those so far.

  Raises:
    UserError: a directory is not a run, the default has no complete run, or
      runs have other questions.
  """
  reasons = {path: _incomplete(path, log, data)
             for path, log in _directories(workdirs).items()}
  keys = {path: _key(RunDirectory(path).read_config()) for path in reasons
          if RunDirectory(path).config_file.is_file()}
  chosen: dict[str, pathlib.Path] = {}  # config and seed → complete run
  for path, reason in reasons.items():
    if not reason:
      first = chosen.setdefault(
          config_lib.key(RunDirectory(path).read_config()), path)
      if first != path:
        reasons[path] = f'has the config and the seed of {first}'
  complete = [path for path, reason in reasons.items() if not reason]
  first = _default(reasons, keys)
  groups: dict[str, list[Run]] = {keys.get(first, ''): []}
  if not any(keys[path] in groups for path in complete):
    raise errors.UserError(
        f'the default has no complete run; {first}: {reasons[first]}')
  runs, data, articles = _read(complete, data)
  for run in runs:
    groups.setdefault(keys[run.path], []).append(run)
  default, *others = groups.values()
  base = {**default[0].config.to_dict(), 'seed': None}
  changes = [config_lib.differences(
      base, {**group[0].config.to_dict(), 'seed': None}) for group in others]
  original = {field: old for change in changes for field, old, _ in change}
  return Comparison(
      variants=[Variant('default', default, {}), *map(
          Variant,
          [_label({field: new for field, _, new in c}) for c in changes],
          others, _deltas(default, others, articles))],
      default=_label(original), data=data, questions=runs[0].scores.shape[1],
      left_out={str(path): reason for path, reason in reasons.items()
                if reason}, planned=planned or max(len(others), 1))


def _default(paths: Iterable[pathlib.Path],
             begun: Collection[pathlib.Path]) -> pathlib.Path:
  """Returns the first run of the default.

  If it failed before its config was written, this is the first of its other
  seeds that has begun.
  """
  first, *others = paths
  label = lambda path: str(path).rsplit('.seed-', 1)[0]
  return first if first in begun else next(
      (path for path in others if path in begun and label(path) == label(first)
       ), first)


def _key(config: config_lib.Config) -> str:
  return config_lib.key(config, without=('seed',))


def _label(fields: Mapping[str, Any]) -> str:
  return ', '.join(f'{field.rpartition(".")[2]}={value}'
                   for field, value in fields.items())


def _deltas(default: Sequence[Run], others: Sequence[Sequence[Run]],
            articles: Sequence[str]) -> list[dict[str, Delta]]:
  """Returns the deltas of each variant; p is corrected over variants."""
  deltas: list[dict[str, Delta]] = [{} for _ in others]
  for c, score in enumerate(SCORES):
    of_seed = {run.config.seed: run.scores[c] for run in default}
    spread, compared = _sd([x.mean() for x in of_seed.values()]), []
    for group, out in zip(others, deltas, strict=True):
      pairs = [run.scores[c] - of_seed[run.config.seed] for run in group
               if run.config.seed in of_seed]
      if pairs:
        out[score] = _delta(np.stack(pairs), articles, spread)
        compared.append(out)
    # Both tests must find a difference, so the larger p-value is that of both.
    adjusted = significance.holm_adjust([float(np.fmax(
        out[score].p, out[score].p_seeds)) for out in compared])
    for out, p in zip(compared, adjusted, strict=True):
      out[score] = dataclasses.replace(out[score], p_holm=float(p))
  return deltas


def _delta(differences: np.ndarray,  # [S, N] in points
           articles: Sequence[str], spread: float) -> Delta:
  values = significance.paired_difference(differences, articles, seed=0)
  return Delta(
      seeds=len(differences), sd=_sd(differences.mean(axis=1)),
      floor=spread * math.sqrt(2 / len(differences)),
      **{'p_seeds': math.nan, **values})


def _sd(values: Sequence[float] | np.ndarray) -> float:
  """Returns the sample standard deviation; NaN for one value."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _directories(workdirs: Sequence[pathlib.Path],
                 ) -> dict[pathlib.Path, pathlib.Path | None]:
  """Maps the directory of each run and trial to its log file, if any."""
  runs: dict[pathlib.Path, pathlib.Path | None] = {}
  for workdir in workdirs:
    if (workdir / 'sweep.json').is_file():
      names = plan.planned_names(workdir)
      errors.require(bool(names), f'{workdir}/sweep.json names no trials')
      for name in names:
        runs[workdir / 'trials' / name] = workdir / 'logs' / f'{name}.log'
    elif RunDirectory(workdir).config_file.is_file():
      runs[workdir] = None
    else:
      raise errors.UserError(f'{workdir} is neither a run nor a sweep: it has '
                             'no config.json and no sweep.json')
  return runs


def _incomplete(path: pathlib.Path, log: pathlib.Path | None, data: str) -> str:
  """Returns the reason why a run is not complete, '' if it is complete."""
  run = RunDirectory(path)
  if run.config_file.is_file():
    spec = data or run.read_config().data.eval
    if not spec:
      return ('config.data.eval is empty; name what it has been evaluated on '
              'since, --data=SPEC')
    if (run.evaluation(spec) / predictions_lib.METRICS).is_file():
      return ''
    if data:
      return 'not evaluated: python -m experiments.evaluate ' + shlex.join(
          [f'--workdir={path}', f'--data={data}'])
  mark = log and log.parent.parent / 'pruned' / f'{path.name}.json'
  if mark and mark.is_file():
    return f'pruned: {files.read_object(mark).get("reason", "")}'
  words = plan.last_words(log) if log else ''
  if words.startswith(plan.MISTAKE):
    return words.removeprefix(plan.MISTAKE).removeprefix(f'{path}: ')
  if words and not path.is_dir():
    return f'its directory is missing; its log ends with: {words}'
  if words:
    return words
  steps = [row['step'] for row in run.read_metrics()]
  return f'stopped after step {steps[-1]}' if steps else 'not started'


def _read(paths: Sequence[pathlib.Path], data: str,
          ) -> tuple[list[Run], str, list[str]]:
  """Reads complete runs, the SPEC of their questions and its articles.

  Raises:
    UserError: a run was evaluated on other questions.
  """
  configs = {path: RunDirectory(path).read_config() for path in paths}
  spec = data or configs[paths[0]].data.eval
  examples = sources.load_examples(spec)
  first = paths[0]
  hashes = {path: RunDirectory(path).read_record().get(
      'sha256', {}).get('eval', '') for path in ([] if data else paths)}
  for path, digest in hashes.items():
    if digest != hashes[first]:
      raise errors.UserError(f'{first} and {path} were evaluated on different '
                             'questions; report them apart, or evaluate both '
                             'on the same and name that, --data=SPEC')
  if hashes and store.fingerprint(examples) != hashes[first]:
    raise errors.UserError(
        f'{spec} is not what {first} was evaluated on; restore the file')
  questions = {e.id for e in examples}
  runs = []
  for path, config in configs.items():
    rows = RunDirectory(path).read_metrics()
    # The first row is left out because its times include the compilation.
    trained = [row for row in rows if row['split'] == 'train'][1:]
    where = (RunDirectory(path).evaluation(data or config.data.eval)
             / predictions_lib.PREDICTIONS)
    predictions = predictions_lib.read_predictions(where)
    other = questions ^ predictions.keys()
    if other:
      raise errors.UserError(
          f'{where} and {spec} are not of the same questions: {len(other)} '
          f'are in one alone, such as {min(other)!r}; evaluate again')
    step = run_directory.read_step(where.parent)
    last = max((row['step'] for row in rows), default=0)
    runs.append(Run(
        path=path, config=config,
        earlier=(f'step {step} of {last}'
                 if step is not None and step < last else ''),
        metrics=predictions_lib.read_metrics(
            where.with_name(predictions_lib.METRICS)),
        scores=100 * squad_lib.per_question(examples, predictions),
        curve=[(row['step'], row['f1']) for row in rows
               if row['split'] == 'eval'],
        examples_per_second=_median(trained, 'examples_per_second'),
        peak_megabytes=_median(trained, 'peak_megabytes'),
        device_seconds=_sum(rows, 'device_seconds'),
        compile_seconds=_sum(rows, 'compile_seconds')))
  return runs, spec, [e.article for e in examples]


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float:
  values = [row[name] for row in rows if row.get(name)]
  return float(np.median(values)) if values else math.nan


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
  values = [row[name] for row in rows if name in row]
  return float(sum(values)) if values else math.nan
