"""Checkpoints and evaluations of a run, and the files of its directory."""

import contextlib
import pathlib
import sys
from typing import Any

import jax

from qa_jax import build
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_record
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import step as step_lib
from qa_jax.training.trainer import Trainer


class Checkpointer:
  """Evaluates and saves a run at the steps that its config sets."""

  def __init__(self, trainer: Trainer, store: manager.Checkpoints,
               workdir: pathlib.Path, requests: signals.StopRequests,
               meter: metrics_log_lib.StepMetrics, *, start: int):
    self._trainer, self._store, self._workdir = trainer, store, workdir
    self._requests, self._meter, self._start = requests, meter, start
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def is_due(self, step: int) -> bool:
    """Returns whether to evaluate or save before this step.

    Before the first step of this process, `start`, there is nothing to save,
    but an evaluation may be missing.
    """
    if step == self._start:
      return step > 0 and _lacks_evaluation(self._trainer, self._store, step)
    return (bool(self._requests.signal) or _evaluates(self._trainer, step)
            or step % self._trainer.config.train.checkpoint_every_steps == 0)

  def is_complete(self, step: int) -> bool:
    """Returns whether the run is complete before this step."""
    return is_complete(self._trainer, self._store, step)

  def stop_message(self, step: int) -> str:
    """Returns the line for the user when a signal stops the run."""
    saved = 'saved' if step in self._store.steps else 'nothing to save'
    return (f'{self._workdir}: stopped by {self._requests.signal.name} before '
            f'step {step}: {saved}; the same command goes on from there')

  def evaluate_and_save(self, step: int, state: step_lib.TrainState) -> str:
    """Evaluates if the config says so, then saves a checkpoint.

    A signal ends the evaluation early. The process that resumes the run then
    evaluates. Returns a line for the user, empty without an evaluation.
    """
    trainer, metrics, log = self._trainer, {}, self._meter.log
    output = RunDirectory(self._workdir).evaluation(trainer.config.data.eval)
    last = step == trainer.num_steps
    if _evaluates(trainer, step) and trainer.evaluator:
      with (contextlib.suppress(signals.Interrupted),
            self._requests.interrupting()):
        metrics = trainer.evaluator.evaluate(
            state.params, progress='evaluate', output=output if last else None,
            seal=False, show=(lambda name, values: log.histogram(
                step, f'eval/{name}_of_windows', values))
            if build.scores_all_spans(trainer.model.head) else None)
    if metrics:
      self.metrics = metrics
      log.write(step, 'eval', {
          **metrics, **self._meter.costs.spent(len(trainer.devices))})
    self._store.save(
        step, params=state.params, metrics=metrics,
        optimizer={'opt_state': state.opt_state, 'step': state.step},
        meta={'position': trainer.batches.position,
              'devices': len(trainer.devices),
              'skipped': list(self._meter.skipped),
              'losses': list(self._meter.losses)})
    if not metrics:
      return ''
    if last:
      self._store.finish()
      if processes.is_first_process():
        # A sweep takes a run for complete once this file is there.
        files.write_json(output / 'metrics.json', metrics)
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'


def _evaluates(trainer: Trainer, step: int) -> bool:
  every = trainer.config.train.eval_every_steps
  return step == trainer.num_steps or bool(every and step % every == 0)


def _lacks_evaluation(trainer: Trainer, store: manager.Checkpoints,
                      step: int) -> bool:
  return (_evaluates(trainer, step) and trainer.evaluator is not None
          and not store.metrics(step))


def is_complete(
    trainer: Trainer, store: manager.Checkpoints, step: int) -> bool:
  """Returns whether the run is saved and evaluated after its last step."""
  return (step == trainer.num_steps
          and not _lacks_evaluation(trainer, store, step))


def restore_state(
    trainer: Trainer, store: manager.Checkpoints, step: int
    ) -> tuple[step_lib.TrainState, dict[str, Any], dict[str, int]]:
  """Reads checkpoint `step`; step 0 is the initial state of the trainer.

  Returns the train state on the devices, the counts that `step_metrics` takes,
  and the position of the batch stream.
  """
  shardings = trainer.parallel.state_sharding(trainer.state)
  if not step:
    return (devices_lib.put_tree(trainer.state, shardings), {},
            trainer.batches.position)
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      trainer.state, shardings)
  params, optimizer, meta = store.restore(
      step, params=shapes.params,
      optimizer={'opt_state': shapes.opt_state, 'step': shapes.step})
  state = step_lib.TrainState(
      params=params, **optimizer, key_data=devices_lib.put_tree(
          trainer.state.key_data, shardings.key_data))
  console.say(f'resuming from step {step} of {trainer.num_steps}')
  if meta['devices'] != len(trainer.devices):
    regrouped = ('; questions are grouped anew, so this epoch may repeat or '
                 'skip windows' if trainer.batches.group_questions else '')
    console.say(f'{meta["devices"]} devices before, {len(trainer.devices)} '
                f'now: equal but for rounding{regrouped}')
  counts = {name: tuple(meta[name]) for name in ('skipped', 'losses')
            if name in meta}
  return state, counts, meta['position']


def step_metrics(
    trainer: Trainer, log: metrics_log_lib.MetricsLog,
    costs: metrics_log_lib.Costs, counts: dict[str, Any],
    progress: console.Progress | None = None) -> metrics_log_lib.StepMetrics:
  """Builds the step metrics of a run.

  `counts` are the skipped updates so far and the losses since the last row.
  """
  config = trainer.config.train
  return metrics_log_lib.StepMetrics(
      log, costs, progress, every_steps=config.log_every_steps,
      steps_per_epoch=trainer.batches.steps_per_epoch, devices=trainer.devices,
      max_skipped=config.max_skipped, num_steps=trainer.num_steps, **counts)


def open_run(trainer: Trainer, workdir: pathlib.Path, argv: list[str],
             stack: contextlib.ExitStack,
             record: dict[str, Any] | None = None) -> manager.Checkpoints:
  """Opens the checkpoints of a run directory, locked until `stack` closes.

  A directory that is new appears by one rename with all files that precede the
  first step, so it is never half a run. Entries of `record` are added to its
  run.json. With several processes, only the first writes and locks.

  Raises:
    UserError: the directory cannot be written or is locked, or another process
      cannot see it.
  """
  def write(path: pathlib.Path) -> None:
    directory = RunDirectory(path)
    files.write_json(directory.alignment_file, {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    directory.write(
        trainer.config, trainer.sizes, trainer.tokenizer, run_record.run_record(
            seed=trainer.config.seed, argv=argv or sys.argv,
            devices=trainer.devices, hashes=trainer.hashes) | (record or {}))

  directory = RunDirectory(workdir)
  if processes.is_first_process() and not directory.config_file.is_file():
    files.write_directory(workdir, write)
  processes.wait_for_all('run')
  if not directory.config_file.is_file():
    raise errors.UserError(
        f'--workdir={workdir} of process {jax.process_index()} is not that of '
        'process 0; choose a directory that all see')
  if processes.is_first_process():
    before = stack.enter_context(lock.hold_lock(workdir))
    if before:
      console.say(f'{workdir}: going on from {before}, which died')
  store = manager.Checkpoints(directory.checkpoints)
  stack.callback(store.close)
  return store


def final_metrics(trainer: Trainer, workdir: pathlib.Path,
                  params: Any) -> dict[str, Any]:
  """Returns the metrics of a complete run; evaluates if they are not stored."""
  if not trainer.evaluator:
    return {}
  output = RunDirectory(workdir).evaluation(trainer.config.data.eval)
  path = output / 'metrics.json'
  return (files.read_object(path) if path.is_file() else
          trainer.evaluator.evaluate(params, output=output))
