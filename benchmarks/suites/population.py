"""Suite population: trials that differ in seed and rate, run in three ways.

The trials run as one program, as processes side by side, and as processes one
after another. Each way is the sweep command with an empty cache, so start-up,
compilation and evaluation are included. A further row times updates alone,
after compilation: all members in one program against one member after another.
Losses are compared first.
"""

from collections.abc import Callable, Mapping
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import cores
from benchmarks import harness
from benchmarks.session import ROOT
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import startup
from qa_jax import config as config_lib
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import console
from qa_jax.training import population
from qa_jax.training import trainer

TOLERANCE = 1e-5  # relative tolerance of losses
SEEDS = 2
CONFIG = '''
import ml_collections

def get_config():
  return ml_collections.ConfigDict({fields})

def sweep():
  for rate in {rates}:
    yield {{'optim.learning_rate': rate}}
'''


class Ours:
  """The calls of the worker of qa_jax: updates after compilation."""

  def __init__(self):
    self._ways: dict[str, Callable[[], tuple[float, np.ndarray]]] = {}
    self._losses: dict[str, np.ndarray] = {}

  def calls(self) -> dict[str, Any]:
    return {'build': self.build, 'run': self.run, 'difference': self.difference}

  def build(self, configs: list[dict[str, Any]], steps: int) -> list[str]:
    """Compiles both programs and returns the names of the ways."""
    first = trainer.build_trainer(config_lib.check_config(configs[0]))
    members = [trainer.with_seed_and_rates(first, config_lib.check_config(c))
               for c in configs]
    states = [jax.device_get(m.state) for m in members]
    batches = [[next(m.batches) for _ in range(steps)] for m in members]
    rates = [{name: np.float32(getattr(m.config.optim, name))
              for name in population.RATES} for m in members]
    step = lambda state, rates, batch: first.step(state, batch, rates=rates)
    program = population.vectorize_step(
        step, members=len(members), devices=first.devices)
    single = jax.jit(step, donate_argnums=0)

    def as_one() -> tuple[float, np.ndarray]:
      state, member_rates, losses = program.place(states), program.place(
          rates), []
      began = time.perf_counter()
      for rows in zip(*batches, strict=True):
        state, values = program.step(state, member_rates, program.place(rows))
        losses.append(values['loss'])
        jax.block_until_ready(losses[-1])
      return time.perf_counter() - began, np.stack(
          [program.take(x) for x in losses], axis=1)

    def one_by_one() -> tuple[float, np.ndarray]:
      seconds, losses = 0.0, []
      for start, member_rates, rows in zip(states, rates, batches, strict=True):
        state, member_rates = jax.device_put((start, member_rates),
                                             first.devices[0])
        began = time.perf_counter()
        for batch in rows:
          state, values = single(
              state, member_rates, jax.device_put(batch, first.devices[0]))
          losses.append(jax.block_until_ready(values['loss']))
        seconds += time.perf_counter() - began
      return seconds, np.reshape(jax.device_get(losses), (len(members), -1))

    self._ways = {'one program': as_one, 'one after another': one_by_one}
    for name in self._ways:
      self.run(name)
    return [*self._ways]

  def run(self, name: str) -> float:
    seconds, self._losses[name] = self._ways[name]()
    return seconds

  def difference(self) -> float:
    return apart(*self._losses.values())


def apart(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the largest relative difference; infinite if the counts differ."""
  if np.shape(a) != np.shape(b):
    return np.inf
  return float(np.max(np.abs(a - b) / np.abs(b)))


def run(session: Session) -> Outcome:
  """Returns the rows of the three commands and one of updates alone."""
  out, sizes = Outcome(), session.sizes
  count, steps = sizes.population_members, sizes.population_steps
  config = session.config(
      model__preset='tiny', model__dropout=0.0, model__attention_dropout=0.0,
      model__initializer_range=0.09, data__train='synthetic(size=2000)',
      data__eval='synthetic(seed=1, size=40, split="eval")',
      data__max_length=80, data__window_overlap=8, data__max_question_length=20,
      data__vocab='', data__vocab_size=1500, data__buckets=[],
      train__batch_size=32, train__num_steps=steps, train__log_every_steps=1)
  rates = [1e-3 / 2**n for n in range(count // SEEDS)]
  with session.worker('ours', 'population') as ours:
    timed = max(1, steps // 8)  # updates of each member, many times over
    names = ours.call('build', steps=timed, configs=[
        config_lib.override(config, {'seed': seed, 'optim.learning_rate': rate})
        for rate in rates for seed in range(SEEDS)])
    ways = [harness.Contender(
        'ours', f'updates, {name}', lambda name=name: ours.call(
            'run', name=name), count * timed, unit='updates')
            for name in names]
    harness.interleave(ways, session.rounds)
    one, other = (way.timing for way in ways)
    out.timings += [one, other]
    out.rows.append(harness.Row(
        'population', 'updates', one, other, checks=(harness.Check(
            'losses', ours.call('difference'), TOLERANCE),)))
  _commands(session, out, config, rates)
  return out


def _commands(session: Session, out: Outcome, config: Mapping[str, Any],
              rates: list[float]) -> None:
  """Runs each way once: each takes long and starts with cold caches."""
  path = session.scratch / 'population.py'
  path.write_text(CONFIG.format(fields=config, rates=rates))
  ways = {'one program': ['--engine=population'],
          'one after another': ['--workers=1']}
  platform = session.about['ours']['devices']['platform']
  if platform == 'cpu' and session.threads > 1:
    ways[f'{session.threads} processes'] = [f'--workers={session.threads}']
  timings, losses = {}, {}
  for name, flags in ways.items():
    workdir = session.scratch / name.replace(' ', '_')
    console.say(f'population: {name}')
    with cores.limited(session.threads):
      seconds = _sweep(session, path, workdir, flags)
    timings[name] = harness.Timing(
        'ours', f'sweep, {name}', (seconds,), len(rates) * SEEDS, unit='trials')
    losses[name] = _losses(workdir)
  for name in [*ways][1:]:
    out.rows.append(harness.Row(
        'population', f'sweep against {name}', timings['one program'],
        timings[name], checks=(harness.Check(
            'losses', apart(losses['one program'], losses[name]),
            TOLERANCE),)))
  out.timings += [*timings.values()]


def _sweep(session: Session, config: pathlib.Path, workdir: pathlib.Path,
           flags: list[str]) -> float:
  command = [sys.executable, '-m', 'experiments.sweep', f'--config={config}',
             f'--workdir={workdir}', f'--seeds={SEEDS}', *flags]
  began = time.perf_counter()
  done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=False,
      env=harness.environment(session.threads) | startup.cache_environment(
          workdir.with_name(f'{workdir.name}.cache')))
  if done.returncode:
    raise harness.WorkerError(
        f'experiments.sweep: exit code {done.returncode}: '
        f'{done.stderr.strip().rpartition(chr(10))[2]}')
  return time.perf_counter() - began


def _losses(workdir: pathlib.Path) -> np.ndarray:  # [trials, steps]
  return np.asarray([[
      row['loss']
      for row in RunDirectory(trial).read_metrics()
      if row['split'] == 'train'
  ]
                     for trial in sorted((workdir / 'trials').iterdir())])
