r"""Trains every variant of a config with several seeds, to be compared.

  python -m experiments.sweep --config=configs/sweep_heads.py:tiny \
      --workdir=runs/heads [--seeds=3] [--workers=2] [--config.seed=7]

The variants are what sweep() in the config file yields, dicts of overrides such
as {'model.head': 'biaffine'}, the default first; without it there is one, the
config as it is. A trial is a run in WORKDIR/trials. The same command again
finishes what is missing.
"""

from collections.abc import Mapping, Sequence
import pathlib
import runpy
import shlex
import signal
import sys
from typing import Any

from absl import flags
import jax

from experiments import cli
from qa_jax import engines
from qa_jax import errors
from qa_jax import files
from qa_jax import logs
from qa_jax import sweep
from qa_jax.engines import devices as devices_lib
from qa_jax.engines import schedule

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the sweep.')
SEEDS = flags.DEFINE_integer(
    'seeds', 3, 'Seeds of a variant, from config.seed on.')
ENGINE = flags.DEFINE_string('engine', 'local', 'What runs the trials.')
WORKERS = flags.DEFINE_integer(
    'workers', 0, 'Trials side by side; 0: one a GPU, else one.')
PRINT = flags.DEFINE_bool(
    'print', False, 'Print a command for each trial; run nothing.')


def main() -> None:
  config = cli.config()
  cli.required(workdir=WORKDIR.value)
  if ENGINE.value not in engines.ENGINES:
    raise errors.UserError(f'--engine={ENGINE.value}: not there yet; '
                           f'known: {", ".join(engines.ENGINES)}')
  if WORKERS.value < 0:
    raise errors.UserError(f'--workers={WORKERS.value} must be at least 0')
  workdir = pathlib.Path(WORKDIR.value)
  files.check_writable(workdir / 'sweep.json')
  jax.config.update('jax_platforms', 'cpu')  # the devices are the trials'
  trials = sweep.plan(config, _variants(), SEEDS.value, workdir)
  if PRINT.value:
    sweep.check(trials)
    _print(trials)
    return
  devices = devices_lib.devices(WORKERS.value)
  sweep.check(trials, devices.count)
  files.write_json(workdir / 'sweep.json', {'trials': [t.name for t in trials]})
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the trials
  failed = engines.ENGINES[ENGINE.value](
      trials, _command, schedule.Setup(devices.environments, WORKERS.value))
  if failed:
    for name, reason in failed.items():
      logs.say(f'failed: {name}: {reason}')
    raise errors.UserError(f'{len(failed)} of {len(trials)} trials failed; '
                           f'see {workdir}/logs')
  print(f'{len(trials)} trials are complete; compare them by\n'
        f'  python -m experiments.report --workdir={workdir}')


def _variants() -> list[Mapping[str, Any]]:
  """What sweep() in the config file yields, checked to be overrides."""
  path = flags.FLAGS['config'].config_filename.split(':')[0]
  make = runpy.run_path(path).get('sweep', lambda: [{}])
  try:
    variants = list(make())
  except Exception as e:  # a config file is code: it may raise anything
    raise errors.UserError(
        f'{path}: sweep(): {type(e).__name__}: {e}') from None
  given = flags.FLAGS['config'].override_values
  for variant in variants:
    if not isinstance(variant, Mapping) or not all(
        isinstance(key, str) for key in variant):
      raise errors.UserError(f'{path}: sweep() yields {variant!r}, expected '
                             "overrides such as {'model.head': 'biaffine'}")
    for key in given.keys() & variant.keys():
      raise errors.UserError(
          f'--config.{key}: {path} varies it; leave it to sweep()')
  return variants


def _command(trial: sweep.Trial) -> list[str]:
  given = flags.FLAGS['config']
  return [sys.executable, '-m', 'experiments.train',
          f'--config={given.config_filename}', f'--workdir={trial.run}',
          *(f'--config.{key}={value}' for key, value in {
              **given.override_values, **trial.overrides}.items())]


def _print(trials: Sequence[sweep.Trial]) -> None:
  """One line a trial that trains and is not complete, for any scheduler."""
  missing = [t for t in trials if not t.metrics.is_file()]
  for trial in missing:
    if not trial.source:
      print(shlex.join(_command(trial)))
  shared = sum(bool(t.source) for t in missing)
  if shared:
    print(f'# Then, without --print, what is left: {shared} trials that share '
          'the training of these.')


if __name__ == '__main__':
  cli.run(main, config=True)
