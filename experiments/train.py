r"""Trains a config in a run directory, or resumes the run.

  python -m experiments.train --config=configs/quickstart.py \
      --workdir=runs/quickstart [--config.optim.learning_rate=5e-4]

The same command, run again, resumes from the last checkpoint. With
--coordinator, this process is one of several that share the run directory and
divide each batch.
"""

from collections.abc import Mapping
import contextlib
import pathlib
import pprint

from absl import flags

from experiments import cli
from qa_jax import config as config_lib
from qa_jax import errors

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run. (required to train)')
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print memory, steps and expected time; train nothing.')
PRINT_CONFIG = flags.DEFINE_bool(
    'print_config', False, 'Print the whole config; train nothing.')
PROFILE_STEPS = flags.DEFINE_string(
    'profile_steps', None,
    'FIRST:END; write a trace of these steps, without END, to WORKDIR/profile.')
WANDB_PROJECT = flags.DEFINE_string(
    'wandb_project', None, 'Also log to this wandb project; needs wandb.')
WANDB_GROUP = flags.DEFINE_string(
    'wandb_group', '', 'Name of the sweep that the run belongs to in wandb.')


def profile_steps() -> range:
  """Returns the steps of --profile_steps, FIRST to END - 1."""
  text = PROFILE_STEPS.value
  if text is None:
    return range(0)
  first, _, end = text.partition(':')
  if not (first.isdecimal() and end.isdecimal()
          and int(first) < int(end)):
    raise errors.UserError(
        f'--profile_steps={text}: expected FIRST:END, such as 10:13')
  return range(int(first), int(end))


def check_specs(config: config_lib.Config) -> None:
  """Raises a UserError if a spec string of a config is wrong; reads no file."""
  from qa_jax import build
  from qa_jax.data import sources

  build.check_specs(config)
  if not config.model.init_from:
    build.encoder_config(config, 0, None)
  for spec in filter(None, (config.data.train, config.data.eval)):
    sources.check_spec(spec, must_exist=False)


def _check_flags() -> None:
  """Raises a UserError if a flag would have no effect."""
  if PRINT_CONFIG.value and DRY_RUN.value:
    raise errors.UserError('give --print_config or --dry_run, not both')
  only = [f'--{f.name}' for f in (PRINT_CONFIG, DRY_RUN) if f.value]
  for flag in (PROFILE_STEPS, WANDB_PROJECT, WANDB_GROUP):
    if only and flag.present:
      raise errors.UserError(f'--{flag.name} has no effect with {only[0]}, '
                             'which trains nothing; leave it out')
  if WANDB_PROJECT.present:
    cli.check_required(WANDB_PROJECT.name)
  if WANDB_GROUP.present and not WANDB_PROJECT.value:
    raise errors.UserError(
        f'--{WANDB_GROUP.name} goes with --{WANDB_PROJECT.name}')


def main() -> None:
  from qa_jax.runtime import console
  from qa_jax.runtime import processes
  from qa_jax.runtime import settings
  from qa_jax.training import dry_run
  from qa_jax.training import tracker
  from qa_jax.training import train
  from qa_jax.training import trainer

  config = cli.config()
  _check_flags()
  if PRINT_CONFIG.value:
    check_specs(config)
    pprint.pprint(config.to_dict(), sort_dicts=False)
    return
  cli.join()
  settings.configure_process()
  if DRY_RUN.value:
    console.say('dry run: reads the data, compiles the step of the largest '
                'batch and times a few steps; no run is written')
    summary = dry_run.summarize(trainer.build_trainer(config))
    if processes.is_first_process():
      for key, value in summary.items():
        print(f'{key:22}{value}')
    return
  cli.check_required('workdir')
  workdir = pathlib.Path(WORKDIR.value)
  with contextlib.ExitStack() as open_things:
    run_tracker = None
    if WANDB_PROJECT.value and processes.is_first_process():
      run_tracker = tracker.Tracker(
          WANDB_PROJECT.value, workdir, config.to_dict(), WANDB_GROUP.value)
      open_things.callback(run_tracker.close)
    metrics = train.train(
        config, workdir, profile_steps(), run_tracker)
  if processes.is_first_process():
    _conclude(workdir, config, metrics)


def _conclude(workdir: pathlib.Path, config: config_lib.Config,
              metrics: Mapping[str, float]) -> None:
  """Prints the scores of a complete run, its files and the next commands."""
  from qa_jax.checkpoints.run_directory import RunDirectory

  if metrics:
    print(cli.scores_line(metrics))
    print(f'results: {RunDirectory(workdir).evaluation(config.data.eval)}')
  else:
    print(f'results: {workdir}; not evaluated, config.data.eval is empty')
  shown = cli.workdir_flags(workdir, config)
  print(f'next: python -m experiments.predict {shown} '
        '--question="…" --context="…"\n'
        f'      python -m experiments.evaluate {shown} --data=SPEC')


if __name__ == '__main__':
  cli.run(main, config=True, several=True, required=('config',))
