"""Sweeps: variants × seeds, every trial an ordinary run of its own.

A variant is a dict of dotted overrides of a config; the first one is what the
others are compared with. A trial's run is DIR/trials/NAME, what it says
DIR/logs/NAME.log. Whether it is complete is read from its run directory alone,
so the same sweep again finishes what is missing and repeats nothing.

A trial that differs from an earlier one in decode.* alone is not trained: no
decode field changes what is learned. It starts as a copy of the finished run,
without the evaluation, which then is all that is left to do.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.io import files
from qa_jax.training import optimizer
from qa_jax.training import parallel

MAX_LABEL = 80  # characters
# Of a run: what its training made, less what it measured on the way.
TRAINED = {'checkpoints', 'tokenizer', 'encoder.json', 'alignment.json'}


@dataclasses.dataclass(frozen=True)
class Trial:
  """A variant with a seed, and where it lives in the sweep's `workdir`."""

  name: str
  overrides: Mapping[str, Any]  # of the variant, and the seed
  config: config_lib.Config
  workdir: pathlib.Path
  source: str = ''  # the trial whose training this one shares

  @property
  def variant(self) -> dict[str, Any]:
    """The overrides but for the seed."""
    return {k: v for k, v in self.overrides.items() if k != 'seed'}

  @property
  def run(self) -> pathlib.Path:
    return self.workdir / 'trials' / self.name

  @property
  def log(self) -> pathlib.Path:
    return self.workdir / 'logs' / f'{self.name}.log'

  @property
  def pruned(self) -> pathlib.Path:
    """With this file, a trial is not to go on: {"reason": …}."""
    return self.workdir / 'pruned' / f'{self.name}.json'

  @property
  def metrics(self) -> pathlib.Path:
    """The last file that an evaluation writes: a run is complete with it."""
    name = run_directory.evaluation_name(self.config.data.eval)
    return self.run / 'eval' / name / 'metrics.json'


def plan_trials(config: config_lib.Config, variants: Sequence[Mapping[str,
                                                                      Any]],
                seeds: int, workdir: pathlib.Path) -> list[Trial]:
  """All trials, seed by seed, so that half a sweep can be compared.

  A variant that sets `seed` has that one, others have `seeds` of them.

  Raises:
    UserError: nothing to run, a field that does not exist or a value that it
      does not take, or two trials with one config or one name.
  """
  if seeds < 1 or not variants:
    raise errors.UserError(
        f'{len(variants)} variants × {seeds} seeds: nothing to run')
  runs = sorted(
      ({**variant, 'seed': seed} for variant in variants for seed in (
          [variant['seed']] if 'seed' in variant
          else range(config.seed, config.seed + seeds))),
      key=lambda run: run['seed'] if isinstance(run['seed'], int) else 0)
  trials: dict[str, Trial] = {}
  label_of: dict[str, str] = {}  # config → variant
  trained_by: dict[str, str] = {}  # config without decode → trial
  for overrides in runs:
    label = _label({k: v for k, v in overrides.items() if k != 'seed'})
    try:
      varied = config_lib.check_config(
          config_lib.override(config.to_dict(), overrides))
    except errors.UserError as e:
      raise errors.UserError(f'{label}: {e}') from None
    twin = label_of.get(_key(varied))
    if twin:
      raise errors.UserError(f'{twin} and {label} are the same config; '
                             'drop one')
    label_of[_key(varied)] = label
    name = f'{label}.seed-{varied.seed}'
    if name in trials:
      raise errors.UserError(
          f'{dict(trials[name].variant)} and {overrides} would both be runs '
          f'named {name}; change one')
    source = trained_by.setdefault(_key(dataclasses.replace(
        varied, decode=config_lib.Decode())), name)
    trials[name] = Trial(name, overrides, varied, workdir,
                         '' if source == name else source)
  return [*trials.values()]


def write_plan(workdir: pathlib.Path, trials: Sequence[Trial],
               drawn: Sequence[Mapping[str, Any]] | None) -> None:
  """Names a sweep's trials, and the variants if a sampler drew them."""
  names = {'trials': [t.name for t in trials]}
  files.write_json(workdir / 'sweep.json', names if drawn is None
                   else {**names, 'drawn': drawn})


def drawn_variants(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The variants that a sampler drew for a sweep before."""
  path = workdir / 'sweep.json'
  found = files.read_object(path).get('drawn', []) if path.is_file() else []
  if not isinstance(found, list) or not all(
      isinstance(variant, dict) for variant in found):
    raise errors.UserError(f'{path}: drawn: expected a list of overrides')
  return found


def check_trials(trials: Sequence[Trial], devices: int | None = None) -> None:
  """Refuses what training would refuse, before anything starts.

  Heads, objectives and decoders are built as shapes. Data sets are read, and
  so downloaded once, not by every worker. A trial has `devices` devices, if
  that is known.
  """
  load = functools.cache(lambda spec: bool(sources.load_examples(spec)))
  for trial in trials:
    try:
      RunDirectory(trial.run).check_config(trial.config)
      if trial.config.seed != trials[0].config.seed:
        continue  # seeds share the rest
      _check_parts(trial.config, devices)
      data = trial.config.data
      for name, spec in (('train', data.train), ('eval', data.eval)):
        if not spec:
          raise errors.UserError(
              f'config.data.{name} is empty; name a data source')
        load(spec)
    except errors.UserError as e:
      raise errors.UserError(f'{trial.name}: {e}') from None


def _check_parts(config: config_lib.Config, devices: int | None) -> None:
  asked = config.parallel.num_devices
  if devices and asked > devices:
    raise errors.UserError(f'config.parallel.num_devices={asked}, but a trial '
                           f'has {devices}; run fewer --workers')
  parallel.check_batch(
      config.train.batch_size,
      1 if config.parallel.mode == 'jit' else asked or devices or 1,
      config.train.grad_accumulation)
  input_pipeline.batch_buckets(config)
  optimizer.make_schedule(config.optim.schedule, learning_rate=1.0, num_steps=1,
                          warmup_fraction=0.0)
  objective = build.check_objective(config.objective, config.model.head)
  sizes = build.encoder_config(config, 1, build.init_source(config))
  build.check_attention(config, sizes, training=True, platform='')
  build.check_decode(config.decode,
                     build.build_model(config, sizes).head, objective)


def share_training(source: Trial, trial: Trial) -> None:
  """Makes `trial` the complete run `source`, but for decode and evaluation.

  Files are hard links where the file system has them, so that a checkpoint is
  stored once; nobody changes a checkpoint in place.
  """
  partial = trial.run.with_name(f'{trial.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(
      source.run, partial, copy_function=_link,
      ignore=lambda folder, names: (
          {*names} - TRAINED if folder == str(source.run) else ()))
  record = files.read_object(source.run / 'run.json')
  files.write_json(partial / 'run.json',
                   {**record, 'trained_in': source.name})
  files.write_json(partial / 'config.json', trial.config.to_dict())
  partial.rename(trial.run)


def _link(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # across file systems, or on one without links
    shutil.copy2(source, target)


def _key(config: config_lib.Config) -> str:
  return json.dumps(config.to_dict(), sort_keys=True)


def _label(variant: Mapping[str, Any]) -> str:
  """Part of a file name: to be read, and another for every variant."""
  text = '.'.join(f'{k}-{v}' for k, v in variant.items()) or 'default'
  safe = re.sub(r'[^A-Za-z0-9._-]+', '_', text).strip('._-')
  if safe == text and len(safe) <= MAX_LABEL:
    return safe
  digest = hashlib.sha256(repr(sorted(variant.items())).encode()).hexdigest()
  return f'{safe[:MAX_LABEL - 7]}-{digest[:6]}'
