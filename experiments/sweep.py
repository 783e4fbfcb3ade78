r"""Trains variants of a config with several seeds, to be compared.

  python -m experiments.sweep --config=configs/sweep_heads.py:tiny \
      --workdir=runs/heads [--seeds=3] [--workers=2] [--config.seed=7]
  python -m experiments.sweep --config=configs/sweep_rates.py:tiny \
      --workdir=runs/rates --sampler=tpe --trials=20 --pruner=halving

Variants are what sweep() in the config yields, the default first, or what
--sampler=random or tpe draws from search_space(). A trial is a run in
WORKDIR/trials; the same command again finishes what is missing.
--engine=population trains those that differ in seed or rates as one program.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import pathlib
import runpy
import shlex
import signal
import sys
from typing import Any

from absl import flags
import jax

from experiments import cli
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import settings
from qa_jax.sweeps import engines
from qa_jax.sweeps import plan as plan_lib
from qa_jax.sweeps import pruners
from qa_jax.sweeps import samplers
from qa_jax.sweeps import study as study_lib
from qa_jax.sweeps.engines import local as local_lib
from qa_jax.sweeps.engines import scheduler
from qa_jax.training import tracker

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the sweep.')
SEEDS = flags.DEFINE_integer(
    'seeds', 3, 'Seeds of a variant, from config.seed on.')
ENGINE = flags.DEFINE_string(
    'engine', 'local', 'local, population, ray or slurm.')
WORKERS = flags.DEFINE_integer(
    'workers', 0, 'Trials side by side; 0: one a GPU, else one.')
ADDRESS = flags.DEFINE_string(
    'address', 'auto', 'Of a Ray cluster, HOST:PORT; local starts one.')
SLURM = flags.DEFINE_list(
    'slurm', [], "submitit's parameters, timeout_min=240,mem_gb=16,…")
SAMPLER = flags.DEFINE_string(
    'sampler', 'grid', 'Variants: grid of sweep(); random or tpe.')
TRIALS = flags.DEFINE_integer(
    'trials', 20, 'Variants of random and tpe, beside the default.')
PRUNER = flags.DEFINE_string(
    'pruner', 'none', 'Ends trials early: none, halving, wilcoxon.')
STORAGE = flags.DEFINE_string(
    'storage', '', "The study's database, a URL [WORKDIR/study.db].")
WANDB_PROJECT = flags.DEFINE_string(
    'wandb_project', None, 'Show the trials there, as one group.')
PRINT = flags.DEFINE_bool(
    'print', False, 'Print a command for each trial; run nothing.')


def main() -> None:
  config = cli.config()
  _check_flags(config)
  workdir = pathlib.Path(WORKDIR.value)
  if ENGINE.value == 'population':
    settings.configure_process()
  else:
    jax.config.update('jax_platforms', 'cpu')  # the devices are the trials'
  plan = lambda variants: plan_lib.plan_trials(config, variants, SEEDS.value,
                                               workdir)
  if SAMPLER.value == 'grid':
    variants, space = _variants(), {}
  else:
    space = samplers.parse_space(_call('search_space'))
    variants = plan_lib.drawn_variants(workdir)
  trials = plan(variants or [{}])
  if PRINT.value:
    plan_lib.check_trials(trials)
    _print(trials)
    return
  setup, devices = _setup()
  plan_lib.check_trials(trials, devices)
  study = study_lib.open_study(
      workdir, STORAGE.value, pruner=PRUNER.value, space=space,
      eval_every_steps=config.train.eval_every_steps)
  setup = dataclasses.replace(setup, study=study)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the trials
  failed: dict[str, str] = {}
  for part in [variants] if not space else _rounds(
      study, space, config, variants,
      max(WORKERS.value, len(setup.environments))):
    known, trials = trials, plan(part)
    plan_lib.check_trials([t for t in trials if t not in known], devices)
    plan_lib.write_plan(workdir, trials, drawn=part if space else None)
    failed |= engines.ENGINES[ENGINE.value](
        [t for t in trials if not {t.name, t.source} & failed.keys()],
        _command, setup)
    study.settle(trials, failed)
  _conclude(trials, failed)


def _setup() -> tuple[scheduler.Setup, int | None]:
  """What the engine is told, and the devices of a trial if they are known."""
  options = dict(item.partition('=')[::2] for item in SLURM.value)
  setup = scheduler.Setup(
      workers=WORKERS.value, address=ADDRESS.value, slurm={
          key: int(value) if value.isdigit() else value
          for key, value in options.items()})
  if ENGINE.value in engines.ELSEWHERE:
    engines.ELSEWHERE[ENGINE.value](setup)
    return setup, None
  devices = local_lib.list_devices(
      1 if ENGINE.value == 'population' else WORKERS.value)
  return (dataclasses.replace(setup, environments=devices.environments),
          devices.count)


def _check_flags(config: config_lib.Config) -> None:
  cli.required(workdir=WORKDIR.value)
  for name, value, table in (
      ('engine', ENGINE.value, engines.ENGINES),
      ('sampler', SAMPLER.value, ('grid', *samplers.SAMPLERS))):
    if value not in table:
      raise errors.UserError(
          f'--{name}={value}{errors.did_you_mean(value, table)}')
  for name, value, least in (('workers', WORKERS.value, 0),
                             ('trials', TRIALS.value, 1)):
    if value < least:
      raise errors.UserError(f'--{name}={value} must be at least {least}')
  if PRINT.value and SAMPLER.value != 'grid':
    raise errors.UserError(f'--print: what --sampler={SAMPLER.value} draws is '
                           'not known before; it goes with grid')
  if WANDB_PROJECT.value:
    tracker.load_wandb(WANDB_PROJECT.value)
  if ENGINE.value == 'population':
    if WANDB_PROJECT.value:
      raise errors.UserError(f'--wandb_project={WANDB_PROJECT.value}: the '
                             'members of --engine=population are not shown '
                             'there; use another engine')
    if WORKERS.value > 1:
      raise errors.UserError(f'--workers={WORKERS.value}: --engine=population '
                             'has one, this process; leave it out')
    if PRUNER.value != 'none':
      raise errors.UserError(f'--pruner={PRUNER.value}: the members of '
                             '--engine=population run to the end')
  pruners.check_pruner(PRUNER.value, seeds=SEEDS.value,
                       eval_every_steps=config.train.eval_every_steps)
  files.check_writable(pathlib.Path(WORKDIR.value) / 'sweep.json')


def _call(name: str) -> Any:
  """What a function of the config file gives, a generator's as a list."""
  path = flags.FLAGS['config'].config_filename.split(':')[0]
  make = runpy.run_path(path).get(name)
  if make is None:
    raise errors.UserError(
        f'{path} has no {name}(), which --sampler={SAMPLER.value} needs')
  try:
    found = make()
    return list(found) if isinstance(found, Iterator) else found
  except Exception as e:  # a config file is code: it may raise anything
    raise errors.UserError(
        f'{path}: {name}(): {type(e).__name__}: {e}') from None


def _variants() -> list[Mapping[str, Any]]:
  """What sweep() in the config file yields, checked to be overrides."""
  path = flags.FLAGS['config'].config_filename.split(':')[0]
  functions = runpy.run_path(path)
  if 'sweep' not in functions and 'search_space' not in functions:
    return [{}]
  variants = _call('sweep')
  if not isinstance(variants, Iterable):
    raise errors.UserError(f'{path}: sweep() gives {variants!r}, expected '
                           'a list of overrides')
  given = flags.FLAGS['config'].override_values
  for variant in variants:
    if not isinstance(variant, Mapping) or not all(
        isinstance(key, str) for key in variant):
      raise errors.UserError(f'{path}: sweep() yields {variant!r}, expected '
                             "overrides such as {'model.head': 'biaffine'}")
    for key in given.keys() & variant.keys():
      raise errors.UserError(
          f'--config.{key}: {path} varies it; leave it to sweep()')
    if 'seed' in variant and flags.FLAGS['seeds'].present:
      raise errors.UserError(f'--seeds: {path} sets seeds; leave them to it')
  return list(variants)


def _rounds(study: study_lib.Study, space: Mapping[str, Any],
            config: config_lib.Config, variants: Sequence[Mapping[str, Any]],
            workers: int) -> Iterator[list[Mapping[str, Any]]]:
  """As many at a time as keep the workers busy; random ones all at once."""
  size = (TRIALS.value if SAMPLER.value == 'random'
          else math.ceil(workers / SEEDS.value))
  return samplers.propose_rounds(
      study, space, SAMPLER.value, config=config, variants=variants,
      count=TRIALS.value, size=size)


def _command(trial: plan_lib.Trial) -> list[str]:
  given = flags.FLAGS['config']
  return [sys.executable, '-m', 'experiments.train',
          f'--config={given.config_filename}', f'--workdir={trial.run}',
          *_shown(),
          *(f'--config.{key}={value}' for key, value in {
              **given.override_values, **trial.overrides}.items())]


def _shown() -> list[str]:
  """Flags of a trial that is shown at Weights & Biases."""
  if not WANDB_PROJECT.value:
    return []
  return [f'--wandb_project={WANDB_PROJECT.value}',
          f'--wandb_group={pathlib.Path(WORKDIR.value).resolve().name}']


def _print(trials: Sequence[plan_lib.Trial]) -> None:
  """One line a trial that trains and is not complete, for any scheduler."""
  missing = [t for t in trials if not t.metrics.is_file()]
  for trial in missing:
    if not trial.source:
      print(shlex.join(_command(trial)))
  shared = sum(bool(t.source) for t in missing)
  if shared:
    print(f'# Then, without --print, what is left: {shared} trials that share '
          'the training of these.')


def _conclude(trials: Sequence[plan_lib.Trial],
              failed: Mapping[str, str]) -> None:
  """Raises a UserError if trials have failed."""
  if failed:
    for name, reason in failed.items():
      console.say(f'failed: {name}: {reason}')
    raise errors.UserError(f'{len(failed)} of {len(trials)} trials failed; '
                           f'see {WORKDIR.value}/logs')
  pruned = sum(t.pruned.is_file() and not t.metrics.is_file() for t in trials)
  print(f'{len(trials) - pruned} trials are complete'
        + f' and {pruned} pruned' * bool(pruned) + '; compare them by\n'
        f'  python -m experiments.report --workdir={WORKDIR.value}')


if __name__ == '__main__':
  cli.run(main, config=True)
