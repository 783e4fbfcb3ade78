"""Stand-ins for the trials of a sweep."""

import pathlib
import sys

import optuna

from qa_jax.io import files
from qa_jax.sweeps import plan as plan_lib
from qa_jax.sweeps import study as study_lib
from tests.common import commands
from tests.common import tiny


def rows(study: study_lib.Study) -> dict[str, optuna.trial.FrozenTrial]:
  return {r.user_attrs['name']: r for r in study.optuna.get_trials()}


def measure(trial: plan_lib.Trial, *scores: float, final: bool = True) -> None:
  """What a run leaves that evaluates every 10 steps."""
  files.write_jsonl(trial.run / 'metrics.jsonl', [
      {'step': 10 * (i + 1), 'split': split, 'f1': score}
      for i, score in enumerate(scores) for split in ('train', 'eval')])
  if final:
    files.write_json(trial.metrics, {'exact_match': 1.0, 'f1': scores[-1]})


SLOW = '''
log = metrics.parents[2] / 'metrics.jsonl'
log.parent.mkdir(parents=True, exist_ok=True)
for step in range(10, 1000, 10):
  with log.open('a') as f:
    f.write('{"step": %d, "split": "eval", "f1": SCORE}\\n' % step)
  time.sleep(0.05)
'''
TWO = ({'objective': 'cross_entropy'}, {'objective': 'span_softmax'})
STAND_IN = '''
import os, pathlib, signal, sys, time
metrics, started = map(pathlib.Path, sys.argv[1:])
started.parent.mkdir(parents=True, exist_ok=True)
with started.open('a') as f: f.write(str(os.getpid()) + '\\n')
attempt = len(started.read_text().split())
def die(): os.kill(os.getpid(), signal.SIGKILL)
def finish():
  metrics.parent.mkdir(parents=True)
  metrics.write_text('{"exact_match": 50.0, "f1": 60.0}')
'''


def plan(workdir, variants=TWO, seeds=1, **changes):
  return plan_lib.plan_trials(tiny.config(**changes), variants, seeds, workdir)


def started(trial: plan_lib.Trial) -> pathlib.Path:
  return trial.workdir / 'started' / trial.name


def starts(trial: plan_lib.Trial) -> int:
  path = started(trial)
  return len(path.read_text().split()) if path.exists() else 0


def stand_in(trial: plan_lib.Trial, code: str) -> list[str]:
  return [sys.executable, '-S', '-c', STAND_IN + code, str(trial.metrics),
          str(started(trial))]


def write_config(path: pathlib.Path, functions: str) -> pathlib.Path:
  """Writes a config file of two steps that ends with `functions`."""
  fields = tiny.config(train={'num_steps': 2}, data={'max_length': 48},
                       parallel={'num_devices': 1})
  path.write_text(commands.CONFIG.format(fields=fields.to_dict()) + functions)
  return path
