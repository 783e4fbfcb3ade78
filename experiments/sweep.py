r"""Trains variants of a config with several seeds, to be compared.

  python -m experiments.sweep --config=configs/sweep_heads.py:tiny \
      --workdir=runs/heads [--seeds=3] [--workers=2] [--config.seed=7]
  python -m experiments.sweep --config=configs/sweep_rates.py:tiny \
      --workdir=runs/rates --sampler=tpe --trials=20 --pruner=halving

sweep() of the config file yields the variants, the default first, unless
--sampler=random or tpe draws them from search_space(). A trial is a run in
WORKDIR/trials; the same command again completes the sweep. --engine=population
makes one program of the trials that differ only in seed, learning rate or
weight decay.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry

if TYPE_CHECKING:
  from qa_jax.sweeps import plan as plan_lib
  from qa_jax.sweeps.engines import scheduler

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the sweep.')
SEEDS = flags.DEFINE_integer(
    'seeds', 3, 'Seeds of a variant; the first is config.seed.')
ENGINE = flags.DEFINE_string(
    'engine', 'local', 'local, population, ray or slurm.')
WORKERS = flags.DEFINE_integer(
    'workers', 0, 'Trials at the same time; 0: one for each GPU, or one '
    'without GPUs; on SLURM all.')
ADDRESS = flags.DEFINE_string(
    'address', 'auto', 'HOST:PORT of a Ray cluster; local starts one.')
SLURM = flags.DEFINE_list(
    'slurm', [], 'Parameters of submitit, such as timeout_min=240.')
SAMPLER = flags.DEFINE_string(
    'sampler', 'grid', 'Source of variants: grid, random or tpe.')
TRIALS = flags.DEFINE_integer(
    'trials', 20, 'Variants that random or tpe adds to the default.')
PRUNER = flags.DEFINE_string(
    'pruner', 'none', 'Stops bad trials: none, halving or wilcoxon.')
STORAGE = flags.DEFINE_string(
    'storage', '', 'URL of the database of the study [WORKDIR/study.db].')
WANDB_PROJECT = flags.DEFINE_string(
    'wandb_project', None, 'Also log the trials to this wandb project.')
ONLY = flags.DEFINE_string(
    'only', None, 'Run only variants whose name matches this REGEX.')
TUNED = flags.DEFINE_list(
    'tuned', [], 'Fields that take their best value in --tuned_in.')
TUNED_IN = flags.DEFINE_string(
    'tuned_in', None, 'Sweep of all variants, scored on held-out data.')
PRINT = flags.DEFINE_bool(
    'print', False, 'Print a command for each trial; run nothing.')


def main() -> None:
  import jax

  from qa_jax.runtime import settings
  from qa_jax.runtime import signals
  from qa_jax.sweeps import config_file
  from qa_jax.sweeps import plan as plan_lib
  from qa_jax.sweeps import samplers
  from qa_jax.sweeps import study as study_lib

  config = cli.config()
  _check_flags(config)
  workdir = pathlib.Path(WORKDIR.value)
  if ENGINE.value == 'population':
    settings.configure_process()
  else:
    jax.config.update('jax_platforms', 'cpu')  # leaves the devices to trials
  given, whole = flags.FLAGS['config'], []
  path, _, variant = given.config_filename.partition(':')
  drawn = plan_lib.drawn_variants(workdir)
  if SAMPLER.value == 'grid':
    if drawn:
      raise errors.UserError(
          f'--workdir={workdir} is the search of another --sampler, with the '
          'variants that it drew; give that sampler or another --workdir')
    space = {}
    variants = config_file.grid_variants(path, given.override_values,
                                         flags.FLAGS['seeds'].present, variant)
    if ONLY.value is not None:
      whole = [t.name for t in plan_lib.plan_trials(
          config, variants, SEEDS.value, workdir)]
      variants = plan_lib.select_variants(variants, ONLY.value)
    if TUNED.value:
      variants = _tuned(config, variants)
    rounds = [variants]
  else:
    if not drawn and plan_lib.planned_names(workdir):
      raise errors.UserError(
          f'--workdir={workdir} is a sweep of --sampler=grid; give another '
          '--workdir')
    choices = config_file.call(path, 'search_space', SAMPLER.value, variant)
    space = samplers.parse_space(choices)
    config_file.check_overrides(path, given.override_values, space,
                                'search_space')
    _admit_choices(choices)
    variants = drawn or [{}]
  trials = plan_lib.plan_trials(config, variants, SEEDS.value, workdir)
  _admit_code(trials)
  if PRINT.value:
    plan_lib.check_trials(trials)
    _print_commands(trials)
    return
  setup, devices = _setup()
  plan_lib.check_trials(trials, devices)
  study = study_lib.open_study(
      workdir, STORAGE.value, pruner=PRUNER.value, space=space,
      eval_every_steps=config.train.eval_every_steps)
  if space:
    workers = max(WORKERS.value, len(setup.environments))
    rounds = samplers.propose_rounds(
        study, space, SAMPLER.value, config=config, variants=drawn,
        count=TRIALS.value,
        check=lambda varied: plan_lib.check_parts(varied, devices),
        # Random variants are drawn all at once; tpe draws a variant a worker.
        size=(TRIALS.value if SAMPLER.value == 'random'
              else math.ceil(workers / SEEDS.value)))
  with signals.ExitRequests() as requests:
    setup = dataclasses.replace(setup, study=study,
                                check_signals=requests.check)
    outcome = _run(config, rounds, trials, setup, devices, whole)
  _conclude(*outcome)


def _tuned(config: config_lib.Config, variants: Sequence[Mapping[str, Any]]
           ) -> list[Mapping[str, Any]]:
  """Returns the best variants in --tuned_in, and prints their scores there."""
  from qa_jax.runtime import console
  from qa_jax.sweeps import plan as plan_lib
  from qa_jax.sweeps import tuning

  workdir = pathlib.Path(TUNED_IN.value)
  _admit_code(plan_lib.plan_trials(config, variants, 1, workdir))
  choices = tuning.choose(variants, TUNED.value, workdir, data=config.data.eval)
  for choice in choices:
    console.say(f'tuned in {workdir}: {choice.line()}')
  return tuning.variants_of(choices, variants)


def _admit_code(trials: Sequence['plan_lib.Trial']) -> None:
  """Allows the code that the config file names; drawn variants are stored."""
  for trial in trials:
    if SAMPLER.value == 'grid':
      cli.allow_code_of(trial.config)
    registry.check_code(WORKDIR.value or '--workdir',
                        config_lib.spec_strings(trial.config))


def _admit_choices(choices: Mapping[str, Any]) -> None:
  """Allows the code that search_space() names, because its file is code."""
  for values in choices.values():
    for value in values if isinstance(values, list) else ():
      if isinstance(value, str):
        registry.allow_code(registry.imported_modules(value))


def _run(config: config_lib.Config,
         rounds: Iterable[Sequence[Mapping[str, Any]]],
         checked: Sequence['plan_lib.Trial'], setup: 'scheduler.Setup',
         devices: int | None, whole: Sequence[str]
         ) -> tuple[list['plan_lib.Trial'], dict[str, str]]:
  """Runs lists of variants, each of which extends the list before it.

  `checked` are the trials that need no check, and `whole` is that of
  `write_plan`. Returns all trials, and the names of the failed ones with the
  reasons.
  """
  from qa_jax.runtime import console
  from qa_jax.sweeps import engines
  from qa_jax.sweeps import plan as plan_lib

  workdir = pathlib.Path(WORKDIR.value)
  trials, failed = [*checked], {}
  _say_start(trials, setup)
  for variants in rounds:
    known = trials
    trials = plan_lib.plan_trials(config, variants, SEEDS.value, workdir)
    _admit_code(trials)
    plan_lib.check_trials([t for t in trials if t not in known], devices)
    left = plan_lib.write_plan(
        workdir, trials, whole=whole,
        drawn=None if SAMPLER.value == 'grid' else variants)
    if left:
      console.say(f'{len(left)} earlier trials, such as {left[0]}, are not of '
                  f'this command; they stay in {workdir}/trials, and reports '
                  'leave them out until a command has their variant and seed')
    failed |= engines.ENGINES[ENGINE.value](
        [t for t in trials if not {t.name, t.source} & failed.keys()],
        _command, setup)
    setup.study.settle(trials, failed)
  return trials, failed


def _say_start(trials: Sequence['plan_lib.Trial'],
               setup: 'scheduler.Setup') -> None:
  """Says how many trials will run, how many at a time, and where they log."""
  from qa_jax.runtime import console

  done = sum(t.metrics.is_file() for t in trials)
  pruned = sum(t.is_pruned for t in trials)
  left = len(trials) - done - pruned
  if not left:
    return
  where = (f'their logs are {WORKDIR.value}/logs/TRIAL.log'
           if ENGINE.value != 'population' else 'this process runs them')
  side = (f', {len(setup.environments)} at a time'
          if ENGINE.value == 'local' else '')
  first = '' if SAMPLER.value == 'grid' else 'the first '
  console.say(f'--engine={ENGINE.value} runs {first}{left} of '
              f'{len(trials)} trials{side}, {done} are complete'
              + f' and {pruned} pruned' * bool(pruned) + f'; {where}')


def _setup() -> tuple['scheduler.Setup', int | None]:
  """Returns the options of the engine and the devices of a trial, if known."""
  from qa_jax.sweeps import engines
  from qa_jax.sweeps.engines import local as local_lib
  from qa_jax.sweeps.engines import scheduler

  setup = scheduler.Setup(
      workers=WORKERS.value, address=ADDRESS.value,
      slurm=cli.assignments(
          SLURM.value, '--slurm: {!r} is not NAME=VALUE, such as '
          'slurm_exclusive=True; quote an item with a comma: '
          '--slurm=\'"NAME=a,b"\''))
  if ENGINE.value in engines.ELSEWHERE:
    engines.ELSEWHERE[ENGINE.value](setup)
    return setup, None
  devices = local_lib.list_devices(
      1 if ENGINE.value == 'population' else WORKERS.value)
  return (dataclasses.replace(setup, environments=devices.environments),
          devices.count)


def _check_flags(config: config_lib.Config) -> None:
  from qa_jax.io import files
  from qa_jax.sweeps import engines
  from qa_jax.sweeps import pruners
  from qa_jax.sweeps import samplers
  from qa_jax.training import population
  from qa_jax.training import tracker

  for name, value, table in (
      ('engine', ENGINE.value, engines.ENGINES),
      ('sampler', SAMPLER.value, ('grid', *samplers.SAMPLERS))):
    if value not in table:
      raise errors.UserError(
          f'--{name}={value}{errors.did_you_mean(value, table)}')
  for name, value, least in (('workers', WORKERS.value, 0),
                             ('seeds', SEEDS.value, 1),
                             ('trials', TRIALS.value, 1)):
    if value < least:
      raise errors.UserError(f'--{name}={value} must be at least {least}')
  if PRINT.value and SAMPLER.value != 'grid':
    raise errors.UserError(
        f'--print: the variants of --sampler={SAMPLER.value} are not known '
        'before the trials run; use --sampler=grid')
  if ONLY.value is not None and SAMPLER.value != 'grid':
    raise errors.UserError(
        f'--only={ONLY.value}: it selects variants of sweep(); leave it out '
        f'with --sampler={SAMPLER.value}')
  for flag, owner, needed in ((SLURM, 'engine', ('slurm',)),
                              (ADDRESS, 'engine', ('ray',)),
                              (TRIALS, 'sampler', (*samplers.SAMPLERS,))):
    if flag.present and flags.FLAGS[owner].value not in needed:
      raise errors.UserError(
          f'--{flag.name} is only for --{owner}={" or ".join(needed)}, not '
          f'{flags.FLAGS[owner].value}; leave it out or set --{owner}')
  if bool(TUNED.value) != bool(TUNED_IN.value):
    raise errors.UserError(
        f'--tuned={",".join(TUNED.value)} and --tuned_in='
        f'{TUNED_IN.value or ""} need each other; give both or none')
  if TUNED.value and SAMPLER.value != 'grid':
    raise errors.UserError(
        f'--tuned={",".join(TUNED.value)}: it selects variants of sweep(); '
        f'leave it out with --sampler={SAMPLER.value}')
  if WANDB_PROJECT.value:
    tracker.load_wandb(WANDB_PROJECT.value)
  if ENGINE.value == 'population':
    if WANDB_PROJECT.value:
      raise errors.UserError(
          f'--wandb_project={WANDB_PROJECT.value}: --engine=population cannot '
          'log its members to Weights & Biases; use another engine')
    if WORKERS.value > 1:
      raise errors.UserError(f'--workers={WORKERS.value}: --engine=population '
                             'has one worker, this process; leave it out')
    population.check_deterministic(config)
    if PRUNER.value != 'none':
      raise errors.UserError(f'--pruner={PRUNER.value}: the members of '
                             '--engine=population run to the end')
  pruners.check_pruner(PRUNER.value, seeds=SEEDS.value,
                       eval_every_steps=config.train.eval_every_steps)
  files.check_writable(pathlib.Path(WORKDIR.value) / 'sweep.json')


def _command(trial: 'plan_lib.Trial') -> list[str]:
  """Returns the command that trains a trial."""
  given = flags.FLAGS['config']
  tracked = [] if not WANDB_PROJECT.value else [
      f'--wandb_project={WANDB_PROJECT.value}',
      f'--wandb_group={pathlib.Path(WORKDIR.value).resolve().name}']
  return [sys.executable, '-m', 'experiments.train',
          f'--config={given.config_filename}', f'--workdir={trial.run}',
          *tracked, *(f'--config.{key}={value}' for key, value in {
              **given.override_values, **trial.overrides}.items())]


def _print_commands(trials: Sequence['plan_lib.Trial']) -> None:
  """Prints a command for each incomplete trial that trains."""
  missing = [t for t in trials if not t.metrics.is_file()]
  for trial in missing:
    if not trial.source:
      print(shlex.join(_command(trial)))
  shared = sum(bool(t.source) for t in missing)
  if shared:
    print('# Then, without --print, run the rest: '
          f'{shared} trials that share the training of these.')


def _conclude(trials: Sequence['plan_lib.Trial'],
              failed: Mapping[str, str]) -> None:
  """Raises a UserError if trials have failed."""
  from qa_jax.runtime import console

  if failed:
    for reason in dict.fromkeys(failed.values()):
      names = [name for name in failed if failed[name] == reason]
      console.say(f'failed: {", ".join(names)}: {reason}')
    raise errors.UserError(f'{len(failed)} of {len(trials)} trials failed; '
                           f'see {WORKDIR.value}/logs')
  pruned = sum(t.is_pruned for t in trials)
  complete = len(trials) - pruned
  print(f'{complete} trial{"s are" if complete != 1 else " is"} complete'
        + f' and {pruned} pruned' * bool(pruned) + '; compare them by\n'
        '  python -m experiments.report '
        + cli.workdir_flags(WORKDIR.value, *(t.config for t in trials)))


if __name__ == '__main__':
  cli.run(main, config=True, required=('config', 'workdir'))
