"""Training: a run from its config to its final metrics, and the loop in it."""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax

from qa_jax import config as config_lib
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import console
from qa_jax.runtime import devices
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.runtime import watchdog
from qa_jax.training import checkpointing as checkpointing_lib
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import profiler
from qa_jax.training import tracker as tracker_lib
from qa_jax.training import trainer as trainer_lib


def train(config: config_lib.Config, workdir: pathlib.Path,
          argv: list[str] | None = None,
          profile_steps: range = range(0),
          tracker: tracker_lib.Tracker | None = None) -> dict[str, float]:
  """Trains `config` in `workdir`, or resumes it; returns the final metrics.

  A trace of `profile_steps` goes to WORKDIR/profile; `tracker` is told what
  metrics.jsonl is.

  Raises:
    UserError: a bad config or data, another config or process in `workdir`, no
      space for a checkpoint, or losses that are not finite.
    stop.Stopped: a signal asked for it; what there was is saved.
  """
  RunDirectory(workdir).check_config(config)
  if processes.is_first_process():
    lock.check_unlocked(workdir)
  costs = metrics_log_lib.Costs()
  try:
    return _train(trainer_lib.Trainer(config), workdir, argv, profile_steps,
                  costs, tracker)
  finally:
    costs.close()


def _train(trainer: trainer_lib.Trainer, workdir: pathlib.Path,
           argv: list[str] | None, profile_steps: range,
           costs: metrics_log_lib.Costs,
           tracker: tracker_lib.Tracker | None) -> dict[str, float]:
  if processes.is_multi_process():
    processes.check_equal_on_all(
        config=json.dumps(trainer.config.to_dict(), sort_keys=True),
        **trainer.hashes)
  for note in trainer.notes:
    console.say(note)
  profiler.check_profile_steps(profile_steps, 0, trainer.num_steps)
  checkpointing_lib.write_run(trainer, workdir, argv or [])
  with contextlib.ExitStack() as open_things:
    checkpointing_lib.hold_run(workdir, open_things)
    store = manager.Checkpoints(workdir / 'checkpoints')
    open_things.callback(store.close)
    start, = processes.broadcast_from_first([store.latest or 0])
    trainer_lib.restore_state(trainer, store, start or None)
    if checkpointing_lib.is_complete(trainer, store, start):
      console.say(f'{workdir} is complete at step {start}; nothing to do')
      return checkpointing_lib.final_metrics(trainer, workdir)
    profiler.check_profile_steps(profile_steps, start, trainer.num_steps)
    began = time.perf_counter()
    shapes = trainer.compile()
    console.say(f'shapes of batches compiled: {shapes}, in '
                f'{time.perf_counter() - began:.1f} s')
    log = metrics_log_lib.MetricsLog(workdir, start, tracker)
    open_things.callback(log.close)
    progress = console.Progress('train', trainer.num_steps, start)
    open_things.callback(progress.close)
    return _loop(
        trainer, store, log, progress, workdir, start,
        profiler.Profiler(
            workdir / 'profile',
            profile_steps if processes.is_first_process() else range(0)), costs,
        open_things.enter_context(
            signals.StopRequests(alone=not processes.is_multi_process())),
        open_things.enter_context(
            watchdog.Watchdog(trainer.config.train.step_timeout_seconds,
                              str(workdir))))


def _loop(trainer: trainer_lib.Trainer, store: manager.Checkpoints,
          log: metrics_log_lib.MetricsLog, progress: console.Progress,
          workdir: pathlib.Path, start: int, trace: profiler.Profiler,
          costs: metrics_log_lib.Costs, requests: signals.StopRequests,
          dog: watchdog.Watchdog) -> dict[str, float]:
  """Evaluate → checkpoint → next batch → step, in that order."""
  state = trainer.state
  ahead = devices.RunAhead(run_ahead(), dog.waiting)
  meter = checkpointing_lib.step_metrics(trainer, log, costs, progress)
  keeper = checkpointing_lib.Checkpointer(
      trainer, store, log, costs, workdir, requests, meter)
  for step in range(start, trainer.num_steps + 1):
    if keeper.due(step, start):
      _read(meter, requests, ahead.drain())
      began = time.perf_counter()
      note = keeper.keep(step, state)
      if note:
        progress.note(note)
      meter.leave_out(time.perf_counter() - began)
    if requests.signal and not keeper.complete(step):
      console.say(keeper.farewell(step))
      raise requests.stopped()
    trace.before(step if step < trainer.num_steps else None, state)
    if step == trainer.num_steps:
      break
    length, rows = trainer.batches.next_rows()
    meter.batch(rows['window'], trainer.batches.lengths_of(rows['window']))
    state, values = trainer.parallel.step(state, trainer.place(length, rows))
    if processes.is_multi_process():
      values['signal'] = devices.max_over_processes(
          requests.noted or 0, trainer.parallel.mesh)
    _read(meter, requests, ahead.push(step + 1, values))
  return keeper.metrics


def _read(meter: metrics_log_lib.StepMetrics, requests: signals.StopRequests,
          done: list[tuple[int, Any]]) -> None:
  """Reads the values of steps that are complete: all processes the same ones,
  so that they agree before which step to stop."""
  for _, values in done:
    requests.hear(int(values.pop('signal', 0)))
  meter.add(done)


def run_ahead() -> int:
  """How many steps may be in flight."""
  return 2 if jax.default_backend() == 'cpu' else 8
