"""Training of one run, and the training loop that populations share."""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any, Protocol

import jax

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import compilation
from qa_jax.runtime import console
from qa_jax.runtime import devices
from qa_jax.runtime import processes
from qa_jax.runtime import settings
from qa_jax.runtime import signals
from qa_jax.runtime import watchdog
from qa_jax.training import checkpointing
from qa_jax.training import dry_run
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import profiler
from qa_jax.training import tracker as tracker_lib
from qa_jax.training import trainer as trainer_lib


class Program(Protocol):
  """The steps of one run, or of all runs of a population, for `run_loop`."""

  most_at_once: int  # steps that one dispatch makes at most

  def is_due(self, step: int) -> bool:
    """Returns whether to evaluate or save before this step."""

  def evaluate_and_save(self, step: int, state: Any) -> None:
    """Evaluates and saves the runs that are due before this step."""

  def is_complete(self, step: int) -> bool:
    """Returns whether all runs are complete before this step."""

  def has_failed(self) -> bool:
    """Returns whether no run can go on."""

  def stop_message(self, step: int) -> str:
    """Returns the text for the user when a signal stops the runs."""

  def is_compiling(self) -> bool:
    """Returns whether the program of the next step is still being compiled."""

  def wait_for_program(self) -> None:
    """Waits for the program of the next step, or until a signal comes."""

  def dispatch(self, step: int, state: Any) -> tuple[Any, Any, int]:
    """Starts steps on the next batches; none before which work is due.

    Returns the state, the metrics and the number of steps.
    """

  def read(self, done: list[tuple[range, Any]]) -> None:
    """Logs the (steps, metrics) of dispatches that are complete.

    The steps count from 1, so that the first of a run is step 1.
    """


def run_loop(program: Program, state: Any, *, start: int, num_steps: int,
             requests: signals.StopRequests, dog: watchdog.Watchdog) -> Any:
  """Makes the steps from `start` on, and returns the last state.

  Metrics are read while later steps run.

  Raises:
    Stopped: a signal asked for it. The runs are saved.
  """
  in_flight = 2 if jax.default_backend() == 'cpu' else 8
  ahead = devices.RunAhead(
      max(2, in_flight // program.most_at_once), dog.waiting)
  step = start
  while True:
    if program.is_compiling():
      program.read(ahead.drain())
      program.wait_for_program()
    if program.is_due(step):
      program.read(ahead.drain())
      program.evaluate_and_save(step, state)
    if requests.signal and not program.is_complete(step):
      console.say(program.stop_message(step))
      raise requests.stopped()
    if step == num_steps or program.has_failed():
      break
    state, values, count = program.dispatch(step, state)
    program.read(ahead.push(range(step + 1, step + count + 1), values))
    step += count
  return state


def describe_run(trainer: trainer_lib.Trainer) -> str:
  """Returns the size of the model and of the run, and its devices, as a line.

  The trainer has its initial state.
  """
  config = trainer.config
  return (f'{dry_run.describe_parameters(trainer)} on '
          f'{dry_run.device_text(trainer)} ({config.parallel.mode}), '
          f'{build.compute_dtype(config)}, attention '
          f'{build.attention_in_use(config, trainer.model.config)}; '
          f'{trainer.num_steps} updates of {trainer.batches.describe()}'
          + f'; {trainer.dispatch} a dispatch' * (trainer.dispatch > 1))


def train(config: config_lib.Config, workdir: pathlib.Path,
          profile_steps: range = range(0),
          tracker: tracker_lib.Tracker | None = None) -> dict[str, float]:
  """Trains `config` in `workdir`, or resumes it; returns the final metrics.

  A profile of `profile_steps` goes to WORKDIR/profile. `tracker` gets the rows
  of metrics.jsonl.

  Raises:
    UserError: the config or the data has a mistake, `workdir` belongs to
      another config or process, a checkpoint has no space, or too many updates
      in a row were skipped.
    Stopped: a signal asked for it. The run is saved.
  """
  run_directory = RunDirectory(workdir)
  run_directory.check_config(config)
  settled = run_directory.settle(config, jax.default_backend())
  if processes.is_first_process():
    lock.check_unlocked(workdir)
  with metrics_log_lib.Costs() as costs, contextlib.ExitStack() as open_things:
    try:
      trainer = trainer_lib.build_trainer(settled, run_directory)
    except errors.UserError as e:
      metrics = checkpointing.metrics_without_data(run_directory, settled)
      if metrics is None:
        raise
      console.say(f'{e}; {workdir} is complete; nothing to do')
      return metrics
    for note in trainer.notes:
      console.say(note)
    profile_steps = profiler.steps_to_profile(
        profile_steps, 0, trainer.num_steps)
    store = checkpointing.open_run(trainer, config, workdir, open_things)
    start, *bounds = processes.broadcast_from_first(
        [store.latest or 0, profile_steps.start, profile_steps.stop])
    about = describe_run(trainer)  # counts the initial parameters
    state, counts, position = checkpointing.restore_state(
        trainer, store, start)
    trainer.batches.seek(position)
    # Device memory cannot hold the initial state beside the state of the loop.
    trainer = dataclasses.replace(trainer, state=None)
    if checkpointing.make_schedule(trainer).is_complete(store, start):
      console.say(f'{workdir} is complete at step {start}; nothing to do')
      return checkpointing.final_metrics(trainer, workdir, state.params)
    profile_steps = profiler.steps_to_profile(
        range(*bounds), start, trainer.num_steps)
    console.say(about)
    shapes = len(trainer.batches.shapes(trainer.num_steps - start))
    overlaps = shapes > 1 and compilation.may_overlap()
    if shapes:  # not if the last step needs only its evaluation
      console.say(f'compiling {shapes} batch shape{"s" * (shapes > 1)}'
                  f'{settings.cache_note()}'
                  f'{"; training begins with the first" * overlaps}')
    programs = open_things.enter_context(trainer.start_compiling(
        state, lambda seconds: console.say(f'compiled in {seconds:.1f} s')))
    if not overlaps:
      programs.wait_for_all()
    log = metrics_log_lib.MetricsLog(workdir, start, tracker)
    open_things.callback(log.close)
    progress = console.Progress('train', trainer.num_steps, start)
    open_things.callback(progress.close)
    requests = open_things.enter_context(
        signals.StopRequests(alone=not processes.is_multi_process()))
    dog = open_things.enter_context(watchdog.Watchdog(
        config.train.step_timeout_seconds, str(workdir)))
    trace = profiler.Profiler(workdir / 'profile', profile_steps)
    open_things.callback(trace.close)
    meter = checkpointing.step_metrics(trainer, log, costs, counts, progress)
    checkpointer = checkpointing.build_checkpointer(
        trainer, store, workdir, requests, meter, start=start)
    run = SingleRun(trainer, checkpointer, meter, progress, requests, trace,
                    programs)
    state = run_loop(run, state, start=start, num_steps=trainer.num_steps,
                     requests=requests, dog=dog)
    trace.before(None, state)
    return checkpointer.metrics


@dataclasses.dataclass(frozen=True)
class SingleRun:
  """The steps of one run; a `Program`."""

  trainer: trainer_lib.Trainer
  checkpointer: checkpointing.Checkpointer
  meter: metrics_log_lib.StepMetrics
  progress: console.Progress
  requests: signals.StopRequests
  trace: profiler.Profiler
  programs: compilation.Compilation

  def is_due(self, step: int) -> bool:
    return self.checkpointer.is_due(step)

  def evaluate_and_save(self, step: int, state: Any) -> None:
    began = time.perf_counter()
    note = self.checkpointer.evaluate_and_save(step, state)
    if note:
      self.progress.note(note)
    self.meter.leave_out(time.perf_counter() - began)

  def is_complete(self, step: int) -> bool:
    return self.checkpointer.is_complete(step)

  def has_failed(self) -> bool:
    return False

  def stop_message(self, step: int) -> str:
    return self.checkpointer.stop_message(step)

  def _next_shape(self) -> tuple[int, int]:
    return trainer_lib.batch_shape(*self.trainer.batches.shapes(1)[0])

  def is_compiling(self) -> bool:
    # At the end of an epoch all its programs are ready, and `shapes` does not
    # move the stream to the next epoch before a checkpoint.
    return not (self.programs.is_done()
                or self.programs.is_ready(self._next_shape()))

  def wait_for_program(self) -> None:
    began = time.perf_counter()
    self.programs.wait(self._next_shape(), lambda: self.requests.signal)
    self.meter.leave_out(time.perf_counter() - began)

  @property
  def most_at_once(self) -> int:
    return self.trainer.dispatch

  def dispatch(self, step: int, state: Any) -> tuple[Any, Any, int]:
    self.trace.before(step, state)
    trainer = self.trainer
    most = next((n for n in range(1, trainer.dispatch)
                 if self.is_due(step + n) or self.trace.is_boundary(step + n)),
                trainer.dispatch)
    length, batches = trainer.batches.next_alike(most)
    for rows in batches:
      self.meter.add_batch(
          rows['window'], trainer.batches.lengths_of(rows['window']))
    state, values = trainer.parallel.step(
        state, trainer.place(length, *batches))
    if processes.is_multi_process():
      values['signal'] = devices.max_over_processes(
          self.requests.noted or 0, trainer.parallel.mesh)
    return state, values, len(batches)

  def read(self, done: list[tuple[range, Any]]) -> None:
    # All processes read the same steps, so that they agree before which step a
    # signal stops them.
    for _, values in done:
      self.requests.hear(int(values.pop('signal', 0)))
    self.meter.add_steps([
        (step, {name: value[k] for name, value in values.items()}
         if self.trainer.dispatch > 1 else values)
        for steps, values in done for k, step in enumerate(steps)])
