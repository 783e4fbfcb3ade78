"""Checkpoints and evaluations of a run, and the files of its directory."""

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import jax

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints import run_record
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import batches as batches_lib
from qa_jax.evaluation import evaluator as evaluator_lib
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import step as step_lib
from qa_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The steps before which a run is evaluated or saved."""

  num_steps: int
  eval_every_steps: int  # 0: only after the last step
  checkpoint_every_steps: int
  has_evaluation: bool  # False: the config has no evaluation data

  def saves(self, step: int) -> bool:
    """Returns whether a checkpoint is saved before this step."""
    return (step == self.num_steps or self.evaluates(step)
            or step % self.checkpoint_every_steps == 0)

  def evaluates(self, step: int) -> bool:
    """Returns whether metrics are measured before this step."""
    every = self.eval_every_steps
    return self.has_evaluation and (
        step == self.num_steps or bool(every and step % every == 0))

  def lacks_evaluation(self, store: manager.Checkpoints, step: int) -> bool:
    """Returns whether the checkpoint of a step has no metrics but should."""
    return self.evaluates(step) and not store.metrics(step)

  def is_complete(self, store: manager.Checkpoints, step: int) -> bool:
    """Returns whether the run is saved and evaluated after its last step."""
    return (step == self.num_steps and step in store.steps
            and not self.lacks_evaluation(store, step))


def make_schedule(trainer: Trainer) -> Schedule:
  """Returns the schedule that the config of a trainer sets."""
  config = trainer.config.train
  return Schedule(
      trainer.num_steps, config.eval_every_steps,
      config.checkpoint_every_steps, trainer.evaluator is not None)


class Checkpointer:
  """Evaluates and saves a run at the steps of its schedule.

  `data` is the data SPEC of the evaluations; the files of the last one are
  written into the run directory `workdir`. `histograms` says whether statistics
  of the windows are logged with each evaluation.
  """

  def __init__(self, store: manager.Checkpoints, schedule: Schedule,
               batches: batches_lib.TrainBatches,
               evaluator: evaluator_lib.Evaluator | None,
               requests: signals.StopRequests,
               meter: metrics_log_lib.StepMetrics, *, workdir: pathlib.Path,
               data: str, num_devices: int, histograms: bool,
               start: int):
    self._store, self._schedule, self._batches = store, schedule, batches
    self._evaluator, self._requests, self._meter = evaluator, requests, meter
    self._workdir, self._data = workdir, data
    self._num_devices, self._histograms = num_devices, histograms
    self._start = start
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def is_due(self, step: int) -> bool:
    """Returns whether to evaluate or save before this step.

    Before the first step of this process, `start`, there is nothing to save,
    but an evaluation may be missing.
    """
    if step == self._start:
      return step > 0 and self._schedule.lacks_evaluation(self._store, step)
    return bool(self._requests.signal) or self._schedule.saves(step)

  def is_complete(self, step: int) -> bool:
    """Returns whether the run is complete before this step."""
    return self._schedule.is_complete(self._store, step)

  def stop_message(self, step: int) -> str:
    """Returns the line for the user when a signal stops the run.

    Raises:
      UserError: the last checkpoint could not be written.
    """
    self._store.finish()
    saved = 'saved' if step in self._store.steps else 'nothing to save'
    return (f'{self._workdir}: stopped by {self._requests.signal.name} before '
            f'step {step}: {saved}; the same command goes on from there')

  def evaluate_and_save(self, step: int, state: step_lib.TrainState) -> str:
    """Evaluates if the schedule says so, then saves a checkpoint.

    A signal ends the evaluation early. The process that resumes the run then
    evaluates. Returns a line for the user, empty without an evaluation. An
    error of the evaluation, such as one in a user's search, is raised after the
    checkpoint is saved without metrics, so that the training is not lost.

    Raises:
      UserError: scores are not finite, or the checkpoint, or the one before it,
        cannot be written. If scores are not finite, nothing is saved.
    """
    metrics, failure, log = {}, None, self._meter.log
    last = step == self._schedule.num_steps
    if self._schedule.evaluates(step):
      run = RunDirectory(self._workdir)
      with (contextlib.suppress(signals.Interrupted),
            self._requests.interrupting()):
        try:
          output = run.record_evaluation(self._data) if last else None
          metrics = self._evaluator.evaluate(
              state.params, progress='evaluate', seal=False,
              output=output,
              show=(lambda name, values: log.histogram(
                  step, f'eval/{name}_of_windows', values))
              if self._histograms else None)
        except errors.NotFiniteError:  # a training that diverged
          raise
        except Exception as e:
          failure = e
    if metrics:
      self.metrics = metrics
      log.write(step, 'eval', {
          **metrics, **self._meter.costs.spent(self._num_devices)})
    self._store.save(
        step, params=state.params, metrics=metrics,
        optimizer={'opt_state': state.opt_state, 'step': state.step},
        meta={'position': self._batches.position,
              'devices': self._num_devices,
              'skipped': list(self._meter.skipped),
              'losses': list(self._meter.losses)})
    if failure:
      self._store.finish()
      console.say(f'{self._workdir}: the evaluation before step {step} failed; '
                  'the checkpoint is saved, and the same command goes on there')
      raise failure
    if last:  # The run counts as complete only once its checkpoint is sealed.
      self._store.finish()
      processes.wait_for_all('complete')
    if not metrics:
      return ''
    if last and processes.is_first_process():
      run_directory.record_step(output, step)
      # A sweep takes a run for complete once this file is there.
      files.write_json(output / predictions_lib.METRICS, metrics)
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'


def build_checkpointer(
    trainer: Trainer, store: manager.Checkpoints, workdir: pathlib.Path,
    requests: signals.StopRequests, meter: metrics_log_lib.StepMetrics, *,
    start: int) -> Checkpointer:
  """Builds the checkpointer of a run that begins at step `start`."""
  return Checkpointer(
      store, make_schedule(trainer), trainer.batches, trainer.evaluator,
      requests, meter, workdir=workdir, data=trainer.config.data.eval,
      num_devices=len(trainer.devices),
      histograms=build.scores_all_spans(trainer.model.head), start=start)


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
  held = int(optimizer['step'])
  errors.require(held == step, f'{store.path(step)} holds step {held}; rename '
                 'it to its step, or remove it')
  errors.require(
      step <= trainer.num_steps,
      f'{store.path(step)} is later than the {trainer.num_steps} updates of '
      'the config; choose a new --workdir')
  state = step_lib.TrainState(
      params=params, **optimizer, key_data=devices_lib.put_tree(
          trainer.state.key_data, shardings.key_data))
  if meta['devices'] != len(trainer.devices):
    changed = (f'{meta["devices"]} device{"s" * (meta["devices"] > 1)} before, '
               f'{len(trainer.devices)} now')
    # No batch follows the last step.
    errors.require(
        step == trainer.num_steps or not trainer.batches.depends_on_devices,
        f'the run had {changed}, but the windows of its updates depend on the '
        'number of devices ('
        + ('data.packing=rows' if trainer.batches.packing == 'rows' else
           'the objective keeps questions together')
        + '); resume it on as many, such as by --config.parallel.num_devices='
        f'{meta["devices"]}, or choose a new --workdir')
    console.say(f'{changed}: equal but for rounding'
                + ' and dropout' * bool(trainer.batches.packing))
  console.say(f'resuming from step {step} of {trainer.num_steps}')
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


def open_run(trainer: Trainer, config: config_lib.Config,
             workdir: pathlib.Path, stack: contextlib.ExitStack,
             record: dict[str, Any] | None = None) -> manager.Checkpoints:
  """Opens the checkpoints of a run directory, locked until `stack` closes.

  `config` is stored. It may leave choices to the platform; run.json has those
  that the config of the trainer settles. A directory that is new appears by one
  rename with all files that precede the first step, so it is never half a run.
  Entries of `record` are added to the run.json of a member of a population; it
  is None for a run alone. With several processes, only the first writes and
  locks.

  Raises:
    UserError: the directory cannot be written or is locked, another process
      cannot see it, or its run began with other data.
  """
  def write(path: pathlib.Path) -> None:
    directory = RunDirectory(path)
    files.write_json(directory.alignment_file, {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    directory.write(
        config, trainer.model.config, trainer.windows.tokenizer,
        run_record.run_record(
            seed=config.seed, argv=sys.argv, devices=trainer.devices,
            hashes=trainer.data_hashes | trainer.weight_hashes) | {
                'compute_dtype': build.compute_dtype(config),
                'platform_choices': config_lib.platform_choices(
                    trainer.config, trainer.devices[0].platform),
                **({} if trainer.source_step is None
                   else {'init_from_step': trainer.source_step}),
                **(record or {})})

  directory = RunDirectory(workdir)
  if processes.is_first_process() and not directory.config_file.is_file():
    files.write_directory(workdir, write)
  if processes.is_first_process():
    before = stack.enter_context(lock.hold_lock(workdir))
    if before:
      console.say(f'{workdir}: going on from {before}, which died')
    if record is None:  # The user trains this run alone, so it tries again.
      directory.failure_file.unlink(missing_ok=True)
  processes.wait_for_all('run')
  if processes.is_multi_process():
    # In a directory that only looks the same, the first save would wait for the
    # files of the others for ever.
    processes.check_equal_on_all(**{
        f'the directory --workdir={workdir}': lock.read_lock(workdir)})
  store = manager.Checkpoints(directory.checkpoints)
  stack.callback(store.close)
  _check_inputs(trainer, directory, store)
  return store


def _check_inputs(trainer: Trainer, directory: RunDirectory,
                  store: manager.Checkpoints) -> None:
  """Compares the inputs of a run with those with which it began.

  Hashes that run.json lacks, as in runs of older code, are not compared.

  Raises:
    UserError: the vocabulary or the training data differ, or, before the first
      checkpoint, the weights of model.init_from.
  """
  if not directory.record_file.is_file():
    return
  record = directory.read_record()
  stored = record.get('sha256', {})
  # The initial weights do not count after the first checkpoint.
  hashes = trainer.data_hashes | ({} if store.latest else trainer.weight_hashes)
  changed = [name for name, digest in hashes.items()
             if stored.get(name, digest) != digest]
  names = {'vocabulary': 'the vocabulary', 'train': 'the training data'}
  differing = [names.get(name, f'config.model.{name}') for name in changed
               if name != 'eval']
  began = record.get('init_from_step', trainer.source_step)
  if not store.latest and began != trainer.source_step:
    differing.append(f'the best step of config.model.init_from, {began} before '
                     f'and {trainer.source_step} now,')
  errors.require(
      not differing,
      f'{directory.path} began with other inputs: {" and ".join(differing)} '
      'changed; put back what the run began with, or choose a new --workdir')
  if 'eval' in changed and processes.is_first_process():
    console.say(f'{directory.path}: the evaluation data changed since the run '
                'began, so its metrics before and after cannot be compared')


def final_metrics(trainer: Trainer, workdir: pathlib.Path,
                  params: Any) -> dict[str, Any]:
  """Returns the metrics of a complete run after its last step.

  The run is evaluated if they are not stored, or if the stored ones are those
  of another checkpoint.
  """
  if not trainer.evaluator:
    return {}
  run, data = RunDirectory(workdir), trainer.config.data.eval
  folder = run.evaluation(data)
  path = folder / predictions_lib.METRICS
  if path.is_file() and run_directory.read_step(folder) in (
      None, trainer.num_steps):
    return predictions_lib.read_metrics(path)
  metrics = trainer.evaluator.evaluate(
      params, output=run.record_evaluation(data))
  run_directory.record_step(folder, trainer.num_steps)
  return metrics


def metrics_without_data(run: RunDirectory, config: config_lib.Config
                         ) -> dict[str, float] | None:
  """Returns the metrics of a complete run whose data cannot be read.

  They are those of its last checkpoint; {} if the config has no evaluation
  data. The result is None if the run is not known to be complete.
  """
  if not run.has_checkpoint():
    return None
  with contextlib.closing(
      manager.Checkpoints(run.checkpoints, read_only=True)) as store:
    step, metrics = store.latest, store.metrics(store.latest)
  train = config.train  # num_steps or num_epochs is 0
  ended = step >= train.num_steps and any(
      row.get('split') == 'train' and row['step'] == step
      and row.get('epoch', 0) >= train.num_epochs
      for row in run.read_metrics())
  return metrics if ended and (metrics or not config.data.eval) else None
