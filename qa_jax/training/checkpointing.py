"""What a run keeps: its directory, checkpoints, evaluations."""

import contextlib
import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from qa_jax import build
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints import run_record
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import step as step_lib
from qa_jax.training import trainer as trainer_lib


class Checkpointer:
  """Evaluates and saves a run at the steps that its config says."""

  def __init__(self, trainer: 'trainer_lib.Trainer', store: manager.Checkpoints,
               log: metrics_log_lib.MetricsLog, costs: metrics_log_lib.Costs,
               workdir: pathlib.Path, requests: signals.StopRequests,
               meter: metrics_log_lib.StepMetrics):
    self._trainer, self._store = trainer, store
    self._log, self._costs, self._workdir = log, costs, workdir
    self._requests, self._meter = requests, meter
    self._adds_up = build.scores_all_spans(trainer.model.head)
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def due(self, step: int, start: int) -> bool:
    """Whether there is something to `keep` before this step, in a process that
    began with step `start`."""
    if step == start:
      return step > 0 and lacks_evaluation(self._trainer, self._store, step)
    every = self._trainer.config.train.checkpoint_every_steps
    return (bool(self._requests.signal) or _evaluates(self._trainer, step)
            or step % every == 0)

  def complete(self, step: int) -> bool:
    return is_complete(self._trainer, self._store, step)

  def farewell(self, step: int) -> str:
    saved = 'saved' if step in self._store.steps else 'nothing to save'
    return (f'{self._workdir}: stopped by {self._requests.signal.name} before '
            f'step {step}: {saved}; the same command goes on from there')

  def keep(self, step: int, state: step_lib.TrainState) -> str:
    """Evaluates, if it is time, then saves; what to tell the user, or ''.

    An evaluation is given up for a signal; who resumes makes it.
    """
    trainer, metrics = self._trainer, {}
    last = step == trainer.num_steps
    if _evaluates(trainer, step) and trainer.evaluator:
      with (contextlib.suppress(signals.Interrupted),
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
      if processes.is_first_process(
      ):  # for a sweep, the run is complete with it
        files.write_json(
            _output(trainer, self._workdir) / 'metrics.json', metrics)
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'

  def _show(self, step: int, name: str, values: np.ndarray) -> None:
    self._log.histogram(step, f'eval/{name}_of_windows', values)


def _evaluates(trainer: 'trainer_lib.Trainer', step: int) -> bool:
  every = trainer.config.train.eval_every_steps
  return step == trainer.num_steps or bool(every and step % every == 0)


def lacks_evaluation(trainer: 'trainer_lib.Trainer', store: manager.Checkpoints,
                     step: int) -> bool:
  """Whether a step was saved without the evaluation that it was time for."""
  return (_evaluates(trainer, step) and trainer.evaluator is not None
          and not store.metrics(step))


def is_complete(trainer: 'trainer_lib.Trainer', store: manager.Checkpoints,
                step: int) -> bool:
  """Whether a run needs no process after this step."""
  return step == trainer.num_steps and not lacks_evaluation(
      trainer, store, step)


def step_metrics(
    trainer: 'trainer_lib.Trainer',
    log: metrics_log_lib.MetricsLog,
    costs: metrics_log_lib.Costs,
    progress: console.Progress | None = None) -> metrics_log_lib.StepMetrics:
  """The meter of a run that goes on from the trainer's state."""
  config = trainer.config.train
  return metrics_log_lib.StepMetrics(
      log, costs, progress, every_steps=config.log_every_steps,
      steps_per_epoch=trainer.batches.steps_per_epoch, devices=trainer.devices,
      max_skipped=config.max_skipped, skipped=trainer.skipped)


def hold_run(workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
  """Holds the lock of a run until `stack` is left; of several processes the
  first does."""
  if not processes.is_first_process():
    return
  before = stack.enter_context(lock.hold_lock(workdir))
  if before:
    console.say(f'{workdir}: going on from {before}, which died')


def write_run(trainer: 'trainer_lib.Trainer',
              workdir: pathlib.Path,
              argv: list[str],
              more: dict[str, Any] | None = None) -> None:
  """All at once, by a rename: a workdir is empty or it is a run.

  `more` goes into run.json. Of several processes the first writes.

  Raises:
    UserError: the workdir cannot be written, or another process sees none.
  """
  if processes.is_first_process() and not (workdir / 'config.json').is_file():
    _write_run(trainer, workdir, argv, more)
  processes.wait_for_all('run')
  if not (workdir / 'config.json').is_file():
    raise errors.UserError(
        f'--workdir={workdir} of process {jax.process_index()} is not that of '
        'process 0; choose a directory that all see')


def _write_run(trainer: 'trainer_lib.Trainer', workdir: pathlib.Path,
               argv: list[str], more: dict[str, Any] | None) -> None:
  def write(directory: pathlib.Path) -> None:
    files.write_json(directory / 'alignment.json', {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    RunDirectory(directory).write(
        trainer.config, trainer.sizes, trainer.tokenizer,
        run_record.run_record(seed=trainer.config.seed, argv=argv or sys.argv,
                              devices=trainer.devices, hashes=trainer.hashes)
        | (more or {}))

  files.write_directory(workdir, write)


def _output(trainer: 'trainer_lib.Trainer',
            workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'eval' / run_directory.evaluation_name(
      trainer.config.data.eval)


def final_metrics(trainer: 'trainer_lib.Trainer',
                  workdir: pathlib.Path) -> dict[str, Any]:
  if not trainer.evaluator:
    return {}
  path = _output(trainer, workdir) / 'metrics.json'
  if not path.is_file():
    return trainer.evaluator.evaluate(trainer.state.params,
                                      output=_output(trainer, workdir))
  return files.read_object(path)
