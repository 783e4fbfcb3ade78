"""A sweep whose workers and driver are killed at random."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import optuna

from tests.chaos import processes
from tests.chaos import runs

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '''
import ml_collections
from qa_jax.sweeps import grid
from tests.common import tiny

def get_config():
  return ml_collections.ConfigDict(tiny.config(
      train={{'num_steps': {steps}, 'checkpoint_every_steps': 3}},
      parallel={{'num_devices': 1}}).to_dict())

def sweep():
  return [{{}}] + [{{'optim.learning_rate': 1e-3 * n}} for n in range(1, {n})]
'''
SEEDS = 3
STEPS = 12
MOST_BEGINNINGS = 20  # retries of the killed sweep: one more than kills


def killed(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R10: a sweep of `count` trials, undisturbed and with kills."""
  draw, config = random.Random(seed), directory / 'config.py'
  config.write_text(CONFIG.format(n=count // SEEDS, steps=STEPS))
  whole = _begin(config, directory / 'whole')
  assert whole.wait(processes.SECONDS * count) == 0, _said(directory / 'whole')
  kills = ['worker'] * (count // 3) + ['driver'] * max(count // 10, 1)
  draw.shuffle(kills)
  done = {'worker': 0, 'driver': 0}
  for _ in range(MOST_BEGINNINGS):
    driver = _begin(config, directory / 'killed')
    while driver.poll() is None:
      time.sleep(draw.uniform(1.0, 20.0))
      if not kills or driver.poll() is not None:
        continue
      victim = (driver.pid if kills[0] == 'driver'
                else _trial(driver.pid, draw))
      if victim:
        os.kill(victim, signal.SIGKILL)
        done[kills.pop(0)] += 1
    if driver.returncode == 0:
      break
  else:
    raise AssertionError(_said(directory / 'killed'))
  expected, results = (_results(directory / n) for n in ('whole', 'killed'))
  assert len(expected) == count and results == expected
  return (f'{count} trials, {done["worker"]} workers and {done["driver"]} '
          'drivers killed: the same command again ended with each trial '
          'complete once; every logged value, score and sha256 of parameters '
          'and optimizer equal to those of the undisturbed sweep')


def _begin(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  with workdir.with_suffix('.log').open('a') as log:
    return subprocess.Popen(
        [sys.executable, '-m', 'experiments.sweep', f'--config={config}',
         f'--workdir={workdir}', f'--seeds={SEEDS}', '--workers=2'],
        stdout=log, stderr=log, cwd=ROOT, env={
            **os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})


def _said(workdir: pathlib.Path) -> str:
  return workdir.with_suffix('.log').read_text()


def _trial(pid: int, draw: random.Random) -> int | None:
  """Returns one of the driver's child processes, or None."""
  try:
    text = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  except OSError:  # the process has ended
    return None
  return draw.choice([int(word) for word in text.split()] or [None])


def _results(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns trial → log, scores and checkpoint; asserts one complete run."""
  study = optuna.load_study(
      study_name='sweep', storage=f'sqlite:///{workdir}/study.db')
  names = sorted(t.user_attrs['name'] for t in study.get_trials(
      states=[optuna.trial.TrialState.COMPLETE]))
  assert names == sorted(p.name for p in (workdir / 'trials').iterdir())
  results = {}
  for name in names:
    trial = workdir / 'trials' / name
    path, = trial.glob('eval/*/metrics.json')
    results[name] = json.loads(path.read_text()), *runs.outcome(trial, STEPS)
  return results
