"""The plan of a sweep: one trial for every variant and seed.

A variant is a dict of dotted overrides of a config. The first variant is the
default, with which the report compares the others. A trial is an ordinary run
in DIR/trials/NAME; its output goes to DIR/logs/NAME.log. Only the run directory
says whether it is complete. A sweep that is started again therefore repeats no
complete trial.

A trial whose config differs from an earlier trial's only in decode.* is not
trained, because no decode field changes the parameters. It starts from a copy
of the finished run without the evaluation, and only evaluates.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
from typing import Any

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.training import trainer

MAX_LABEL = 80  # characters
LOG_MARK = 'sweep: '  # prefix of the lines of a log that the sweep writes
MISTAKE = 'error: '  # prefix of the message of a trial that failed
# Entries of a run directory that a trial copies when it shares a training.
# The metrics that were measured while training are not copied.
TRAINED = {'checkpoints', 'tokenizer', 'encoder.json', 'alignment.json'}


@dataclasses.dataclass(frozen=True)
class Trial:
  """A variant with a seed, and its files in the sweep's `workdir`."""

  name: str
  overrides: Mapping[str, Any]  # of the variant, and the seed
  config: config_lib.Config
  workdir: pathlib.Path
  source: str = ''  # the trial whose training this one shares

  @property
  def variant(self) -> dict[str, Any]:
    return without_seed(self.overrides)

  @property
  def run(self) -> pathlib.Path:
    return self.workdir / 'trials' / self.name

  @property
  def log(self) -> pathlib.Path:
    return self.workdir / 'logs' / f'{self.name}.log'

  @property
  def pruned(self) -> pathlib.Path:
    """Returns the path of the file {"reason": …} that marks a pruned trial."""
    return self.workdir / 'pruned' / f'{self.name}.json'

  @property
  def is_pruned(self) -> bool:
    return self.pruned.is_file() and not self.metrics.is_file()

  @property
  def metrics(self) -> pathlib.Path:
    """Returns the path of metrics.json, the last file that a run writes."""
    return (RunDirectory(self.run).evaluation(self.config.data.eval)
            / predictions_lib.METRICS)

  def read_metrics(self) -> dict[str, Any]:
    """Reads metrics.json, which must be there."""
    return predictions_lib.read_metrics(self.metrics)


def plan_trials(
    config: config_lib.Config, variants: Sequence[Mapping[str, Any]],
    seeds: int, workdir: pathlib.Path) -> list[Trial]:
  """Returns all trials, sorted by seed so that a part can be compared.

  A variant that sets `seed` gives one trial; any other gives `seeds` trials.

  Raises:
    UserError: there is no trial, a field does not exist or refuses its value,
      or two trials have equal configs or equal names.
  """
  if seeds < 1 or not variants:
    raise errors.UserError(
        f'{len(variants)} variants of sweep() × {seeds} seeds: nothing to run')
  runs = sorted(
      ({**variant, 'seed': seed} for variant in variants for seed in (
          [variant['seed']] if 'seed' in variant
          else range(config.seed, config.seed + seeds))),
      key=lambda run: run['seed'] if isinstance(run['seed'], int) else 0)
  trials: dict[str, Trial] = {}
  label_of: dict[str, str] = {}  # config → variant
  trained_by: dict[str, str] = {}  # config without decode → trial
  for overrides in runs:
    label = label_variant(without_seed(overrides))
    try:
      varied = config_lib.check_config(
          config_lib.override(config.to_dict(), overrides))
    except errors.UserError as e:
      raise errors.UserError(f'{label}: {e}') from None
    key = config_lib.key(varied)
    if key in label_of:
      raise errors.UserError(
          f'{label_of[key]} and {label} are the same config; drop one')
    label_of[key] = label
    name = f'{label}.seed-{varied.seed}'
    if name in trials:
      raise errors.UserError(
          f'{dict(trials[name].variant)} and {overrides} would both be runs '
          f'named {name}; change one')
    source = trained_by.setdefault(
        config_lib.key(varied, without=('decode',)), name)
    trials[name] = Trial(name, overrides, varied, workdir,
                         '' if source == name else source)
  return [*trials.values()]


def select_variants(variants: Sequence[Mapping[str, Any]], pattern: str
                    ) -> list[Mapping[str, Any]]:
  """Returns the variants whose label the regular expression finds.

  Raises:
    UserError: the pattern is no regular expression or finds no variant.
  """
  labels = [label_variant(without_seed(variant)) for variant in variants]
  try:
    chosen = [v for v, label in zip(variants, labels, strict=True)
              if re.search(pattern, label)]
  except re.error as e:
    raise errors.UserError(
        f'--only={pattern} is no regular expression: {e}') from None
  if not chosen:
    raise errors.UserError(
        f'--only={pattern} matches none of the variants '
        f'{", ".join(dict.fromkeys(labels))}')
  return chosen


def write_plan(workdir: pathlib.Path, trials: Sequence[Trial],
               drawn: Sequence[Mapping[str, Any]] | None, *,
               whole: Sequence[str] = ()) -> list[str]:
  """Writes the names of the trials, and any sampled variants, to sweep.json.

  If the trials are a part of a sweep, `whole` has the names of all its trials.
  Those of an existing file are kept then, in the order of `whole`, because the
  first one is the default. Returns the names of the existing file that are left
  out of the new one, although their trials have begun.
  """
  path, names = workdir / 'sweep.json', [t.name for t in trials]
  earlier = planned_names(workdir)
  if whole:
    order = {name: i for i, name in enumerate(whole)}
    names = sorted(dict.fromkeys([*earlier, *names]),
                   key=lambda name: order.get(name, len(order)))
  files.write_json(path, {'trials': names} if drawn is None
                   else {'trials': names, 'drawn': drawn})
  return [name for name in earlier if name not in names
          and (workdir / 'trials' / name).is_dir()]


def planned_names(workdir: pathlib.Path) -> list[str]:
  """Reads the names of the trials from sweep.json; [] if there is no file."""
  path = workdir / 'sweep.json'
  if not path.is_file():
    return []
  names = files.read_object(path).get('trials')
  if not isinstance(names, list) or not all(
      isinstance(name, str) for name in names):
    raise errors.UserError(f'{path}: trials: expected a list of names')
  return names


def drawn_variants(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads from sweep.json the variants that a sampler drew earlier."""
  path = workdir / 'sweep.json'
  drawn = files.read_object(path).get('drawn', []) if path.is_file() else []
  if not isinstance(drawn, list) or not all(
      isinstance(variant, dict) for variant in drawn):
    raise errors.UserError(f'{path}: drawn: expected a list of overrides')
  return drawn


def check_trials(trials: Sequence[Trial], devices: int | None = None) -> None:
  """Checks the configs and data of all trials before the first one starts.

  Of a complete trial, whose data may be gone, only the config is compared.
  Heads, objectives and decoders are built as shapes. Data sets are read here,
  so that they are downloaded once and not by every worker. `devices` is the
  number of devices of a trial, None if it is unknown.

  Raises:
    UserError: training would refuse a trial, or its run directory has another
      config.
  """
  load = functools.cache(lambda spec: bool(sources.load_answered(spec)))
  checked = set()  # seeds share all but the run directory
  for trial in trials:
    try:
      RunDirectory(trial.run).check_config(trial.config)
      key = config_lib.key(trial.config, without=('seed',))
      if key in checked or trial.metrics.is_file():
        continue
      checked.add(key)
      check_parts(trial.config, devices)
      data = trial.config.data
      errors.require(bool(data.eval),
                     'config.data.eval is empty; name a data source')
      for spec in (data.train, data.eval):
        load(spec)
    except errors.UserError as e:
      raise errors.UserError(f'{trial.name}: {e}') from None


def check_parts(config: config_lib.Config, devices: int | None) -> None:
  """Checks the parts of a config as `check_trials` does, without its data."""
  num_devices = config.parallel.num_devices
  if devices and num_devices > devices:
    raise errors.UserError(
        f'config.parallel.num_devices={num_devices}, but a trial has '
        f'{devices}; run fewer --workers')
  trainer.build_parts(
      config, 1 if config.parallel.mode == 'jit' else num_devices or devices,
      platform='')


def last_words(log: pathlib.Path) -> str:
  """Returns the message of a trial that failed, else the last line of its log.

  Threads of a library may print tracebacks after the message, as those of orbax
  do when the disk is full. Returns '' if the log is empty or missing.
  """
  text = log.read_text(encoding='utf-8',
                       errors='replace') if log.is_file() else ''
  lines = [line.strip() for line in text.split('\n') if line.strip()]
  for line in reversed(lines):
    if line.startswith(MISTAKE):
      return line[:300]
    if line.startswith(LOG_MARK):  # an earlier attempt is before this line
      break
  return lines[-1].removeprefix(LOG_MARK)[:300] if lines else ''


def share_training(source: Trial, trial: Trial) -> None:
  """Copies the training of the complete run `source` to `trial`.

  The copy has the config of `trial` and no evaluation. Files are hard links
  where the file system supports them: no program changes a checkpoint in place.
  """
  partial = trial.run.with_name(f'{trial.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(
      source.run, partial, copy_function=_link,
      ignore=lambda folder, names: (
          {*names} - TRAINED if folder == str(source.run) else ()))
  copy = RunDirectory(partial)
  files.write_json(copy.record_file, {
      **RunDirectory(source.run).read_record(), 'trained_in': source.name})
  files.write_json(copy.config_file, trial.config.to_dict())
  partial.rename(trial.run)


def _link(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # across file systems, or on one without links
    shutil.copy2(source, target)


def without_seed(overrides: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in overrides.items() if k != 'seed'}


def label_variant(variant: Mapping[str, Any]) -> str:
  """Returns a readable part of a file name, different for every variant."""
  text = '.'.join(f'{k}-{v}' for k, v in variant.items()) or 'default'
  safe = re.sub(r'[^A-Za-z0-9._-]+', '_', text).strip('._-')
  if safe == text and len(safe) <= MAX_LABEL:
    return safe
  digest = hashlib.sha256(repr(sorted(variant.items())).encode()).hexdigest()
  return f'{safe[:MAX_LABEL - 7]}-{digest[:6]}'
