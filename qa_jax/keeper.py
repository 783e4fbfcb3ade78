"""What a run keeps: its directory, checkpoints, evaluations."""

import contextlib
import functools
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qa_jax import build
from qa_jax import checkpoint
from qa_jax import errors
from qa_jax import evaluate
from qa_jax import files
from qa_jax import fit
from qa_jax import lock
from qa_jax import logs
from qa_jax import meter as meter_lib
from qa_jax import processes
from qa_jax import stop
from qa_jax import update
from qa_jax import weights
from qa_jax.data import store as store_lib

if TYPE_CHECKING:
  from qa_jax import train


class Keeper:
  """Evaluates and saves a run at the steps that its config says."""

  def __init__(self, trainer: 'train.Trainer', store: checkpoint.Checkpoints,
               log: logs.MetricsLog, costs: logs.Costs,
               workdir: pathlib.Path, requests: stop.Requests,
               meter: meter_lib.Meter):
    self._trainer, self._store = trainer, store
    self._log, self._costs, self._workdir = log, costs, workdir
    self._requests, self._meter = requests, meter
    self._adds_up = fit.adds_up(trainer.model.head)
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def due(self, step: int, start: int) -> bool:
    """Whether there is something to `keep` before this step, in a process that
    began with step `start`."""
    if step == start:
      return step > 0 and owes(self._trainer, self._store, step)
    every = self._trainer.config.train.checkpoint_every_steps
    return (bool(self._requests.signal) or _evaluates(self._trainer, step)
            or step % every == 0)

  def complete(self, step: int) -> bool:
    return complete(self._trainer, self._store, step)

  def farewell(self, step: int) -> str:
    saved = 'saved' if step in self._store.steps else 'nothing to save'
    return (f'{self._workdir}: stopped by {self._requests.signal.name} before '
            f'step {step}: {saved}; the same command goes on from there')

  def keep(self, step: int, state: update.TrainState) -> str:
    """Evaluates, if it is time, then saves; what to tell the user, or ''.

    An evaluation is given up for a signal; who resumes makes it.
    """
    trainer, metrics = self._trainer, {}
    last = step == trainer.num_steps
    if _evaluates(trainer, step) and trainer.evaluator:
      with (contextlib.suppress(stop.Interrupted),
            self._requests.interrupting()):
        metrics = trainer.evaluator.evaluate(
            state.params, progress='evaluate',
            output=_output(trainer, self._workdir) if last else None,
            seal=False, show=functools.partial(self._show, step)
            if self._adds_up else None)
    if metrics:
      self.metrics = metrics
      self._log.write(step, 'eval', {
          **metrics, **self._costs.spent(len(trainer.devices))})
    self._store.save(
        step, params=state.params,
        optimizer={'opt_state': state.opt_state, 'step': state.step},
        meta={'position': trainer.batches.position,
              'devices': len(trainer.devices),
              'skipped': list(self._meter.skipped)}, metrics=metrics)
    if not metrics:
      return ''
    if last:
      self._store.finish()
      if processes.first():  # for a sweep, the run is complete with it
        files.write_json(
            _output(trainer, self._workdir) / 'metrics.json', metrics)
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'

  def _show(self, step: int, name: str, values: np.ndarray) -> None:
    self._log.histogram(step, f'eval/{name}_of_windows', values)


def _evaluates(trainer: 'train.Trainer', step: int) -> bool:
  every = trainer.config.train.eval_every_steps
  return step == trainer.num_steps or bool(every and step % every == 0)


def owes(trainer: 'train.Trainer', store: checkpoint.Checkpoints,
         step: int) -> bool:
  """Whether a step was saved without the evaluation that it was time for."""
  return (_evaluates(trainer, step) and trainer.evaluator is not None
          and not store.metrics(step))


def complete(trainer: 'train.Trainer', store: checkpoint.Checkpoints,
             step: int) -> bool:
  """Whether a run needs no process after this step."""
  return step == trainer.num_steps and not owes(trainer, store, step)


def meter_of(trainer: 'train.Trainer', log: logs.MetricsLog, costs: logs.Costs,
             progress: logs.Progress | None = None) -> meter_lib.Meter:
  """The meter of a run that goes on from the trainer's state."""
  config = trainer.config.train
  return meter_lib.Meter(
      log, costs, progress, every_steps=config.log_every_steps,
      steps_per_epoch=trainer.batches.steps_per_epoch, devices=trainer.devices,
      max_skipped=config.max_skipped, skipped=trainer.skipped)


def take(workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
  """Holds the lock of a run until `stack` is left; of several processes the
  first does."""
  if not processes.first():
    return
  before = stack.enter_context(lock.hold(workdir))
  if before:
    logs.say(f'{workdir}: going on from {before}, which died')


def write_run(trainer: 'train.Trainer', workdir: pathlib.Path, argv: list[str],
              more: dict[str, Any] | None = None) -> None:
  """All at once, by a rename: a workdir is empty or it is a run.

  `more` goes into run.json. Of several processes the first writes.

  Raises:
    UserError: the workdir cannot be written, or another process sees none.
  """
  if processes.first() and not (workdir / 'config.json').is_file():
    _write_run(trainer, workdir, argv, more)
  processes.wait('run')
  if not (workdir / 'config.json').is_file():
    raise errors.UserError(
        f'--workdir={workdir} of process {jax.process_index()} is not that of '
        'process 0; choose a directory that all see')


def _write_run(trainer: 'train.Trainer', workdir: pathlib.Path,
               argv: list[str], more: dict[str, Any] | None) -> None:
  def write(directory: pathlib.Path) -> None:
    files.write_json(directory / 'alignment.json', {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    build.write_run(
        directory, trainer.config, trainer.sizes, trainer.tokenizer,
        logs.run_record(seed=trainer.config.seed, argv=argv or sys.argv,
                        devices=trainer.devices, hashes=trainer.hashes)
        | (more or {}))

  files.write_directory(workdir, write)


def hashes(trainer: 'train.Trainer') -> dict[str, str]:
  """Of what a run reads."""
  found = {'vocabulary': trainer.tokenizer.fingerprint,
           'train': store_lib.fingerprint(trainer.windows.examples)}
  if trainer.source:
    found |= {f'init_from: {name}': digest for name, digest in
              weights.hashes(trainer.source).items()}
  if trainer.evaluator:
    found['eval'] = store_lib.fingerprint(trainer.evaluator.windows.examples)
  return found


def restore(trainer: 'train.Trainer', store: checkpoint.Checkpoints,
            step: int | None) -> None:
  """Puts the state of checkpoint `step` on the devices; None: as it begins."""
  state = trainer.state
  shardings = trainer.parallel.state_sharding(state)
  if step is None:
    trainer.state = processes.put(state, shardings)
    return
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings)
  params, optimizer, meta = store.restore(
      step, params=shapes.params,
      optimizer={'opt_state': shapes.opt_state, 'step': shapes.step})
  trainer.state = update.TrainState(
      params=params, **optimizer,
      key_data=processes.put(state.key_data, shardings.key_data))
  trainer.batches.seek(meta['position'])
  trainer.skipped = tuple(meta.get('skipped', (0, 0)))
  logs.say(f'resuming from step {step} of {trainer.num_steps}')
  if meta['devices'] != len(trainer.devices):
    regrouped = ('; questions are grouped anew, so this epoch may repeat or '
                 'skip windows' if trainer.batches.group_questions else '')
    logs.say(f'{meta["devices"]} devices before, {len(trainer.devices)} now: '
             f'equal but for rounding{regrouped}')


def _output(trainer: 'train.Trainer', workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'eval' / evaluate.data_name(trainer.config.data.eval)


def final_metrics(trainer: 'train.Trainer',
                  workdir: pathlib.Path) -> dict[str, Any]:
  if not trainer.evaluator:
    return {}
  path = _output(trainer, workdir) / 'metrics.json'
  if not path.is_file():
    return trainer.evaluator.evaluate(trainer.state.params,
                                      output=_output(trainer, workdir))
  return files.read_object(path)
