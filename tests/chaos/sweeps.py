"""A sweep whose workers, and whose driver, are killed at random."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from tests.chaos import processes

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '''
import ml_collections
from qa_jax import grid
from tests import tiny

def get_config():
  return ml_collections.ConfigDict(tiny.config(
      train={{'num_steps': 12, 'checkpoint_every_steps': 3}},
      parallel={{'num_devices': 1}}).to_dict())

def sweep():
  return [{{}}] + [{{'optim.learning_rate': 1e-3 * n}} for n in range(1, {n})]
'''
SEEDS = 3


def killed(directory: pathlib.Path, count: int, seed: int) -> str:
  """R10: a sweep of `count` trials, undisturbed and with kills."""
  draw, config = random.Random(seed), directory / 'config.py'
  config.write_text(CONFIG.format(n=count // SEEDS))
  whole = _begin(config, directory / 'whole')
  assert whole.wait(processes.SECONDS * count) == 0, _said(directory / 'whole')
  workers = drivers = 0
  while True:
    driver = _begin(config, directory / 'killed')
    while driver.poll() is None:
      time.sleep(draw.uniform(1.0, 20.0))
      trials = _children(driver.pid)
      if trials and workers < count // 3:
        os.kill(draw.choice(trials), signal.SIGKILL)
        workers += 1
      elif drivers < count // 10:
        driver.kill()
        drivers += 1
    if driver.wait() == 0:
      break
    assert drivers or workers, _said(directory / 'killed')
  expected, found = (_scores(directory / name) for name in ('whole', 'killed'))
  assert len(expected) == count and found == expected
  return (f'{count} trials, {workers} workers and {drivers} drivers killed: '
          'the same command again ended with each trial complete once, and '
          'all scores equal to those of the undisturbed sweep')


def _begin(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  with workdir.with_suffix('.log').open('a') as log:
    return subprocess.Popen(
        [sys.executable, '-m', 'experiments.sweep', f'--config={config}',
         f'--workdir={workdir}', f'--seeds={SEEDS}', '--workers=2'],
        stdout=log, stderr=log, cwd=ROOT, env={
            **os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})


def _said(workdir: pathlib.Path) -> str:
  return workdir.with_suffix('.log').read_text()


def _children(pid: int) -> list[int]:
  try:
    text = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  except OSError:  # it has ended
    return []
  return [int(word) for word in text.split()]


def _scores(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  """Trial → its metrics; it must have one evaluation and be complete."""
  found = {}
  for trial in sorted((workdir / 'trials').iterdir()):
    path, = trial.glob('eval/*/metrics.json')
    found[trial.name] = json.loads(path.read_text())
    steps = [json.loads(line)['step'] for line in (
        trial / 'metrics.jsonl').read_text().splitlines()
             if '"train"' in line]
    assert len(steps) == len({*steps}), trial
  return found
