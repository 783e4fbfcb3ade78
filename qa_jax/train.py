"""Training: a run from its config to its final metrics, and the loop in it."""

import contextlib
import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import build
from qa_jax import checkpoint
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import evaluate
from qa_jax import features
from qa_jax import fit
from qa_jax import keeper as keeper_lib
from qa_jax import lock
from qa_jax import logs
from qa_jax import meter as meter_lib
from qa_jax import parallel
from qa_jax import processes
from qa_jax import stop
from qa_jax import tracker as tracker_lib
from qa_jax import update
from qa_jax import watchdog
from qa_jax.data import batches


def devices_of(config: config_lib.Config) -> list[jax.Device]:
  """The devices that a config trains on."""
  asked = config.parallel.num_devices
  if asked > jax.device_count():
    raise errors.UserError(
        f'config.parallel.num_devices={asked}, but there are '
        f'{jax.device_count()} {jax.default_backend()} devices')
  if config.parallel.mode != 'jit':
    return processes.spread(jax.devices(), asked)
  if processes.several():
    raise errors.UserError(
        "config.parallel.mode='jit' trains on one device, but there are "
        f'{jax.process_count()} processes; choose pmap or mesh')
  return jax.devices()[:1]


class Trainer:
  """Everything a run needs, built and checked before anything is written.

  With `like`, whose config has another seed or other rates and nothing else,
  what was read, tokenised and compiled is `like`'s.
  """

  def __init__(self, config: config_lib.Config, like: 'Trainer | None' = None):
    if like:
      vars(self).update(vars(like))
      self.config = config
    else:
      self._read(config)
    self.batches = batches.TrainBatches(
        self.windows,
        self.windows.train_indices(config.data.windows_without_answer),
        config.train.batch_size, self.buckets, config.seed,
        group_questions=self.objective.grouped, packing=config.data.packing,
        devices=len(self.devices), accumulation=config.train.grad_accumulation)
    self.num_steps = config.train.num_steps or math.ceil(
        config.train.num_epochs * self.batches.steps_per_epoch)
    self.schedule, self.optimizer = build.optimizer(
        config.optim, num_steps=self.num_steps,
        num_layers=self.sizes.num_layers)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, notes = build.parameters(
        self.model, init_key, self.source, init_head=config.model.init_head)
    self.state = update.TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        opt_state=self.optimizer.init(params),
        key_data=jax.random.key_data(dropout_key))
    self.skipped = 0, 0  # updates before `state`: all, and the last in a row
    if like:
      return
    self.notes += notes
    self.parallel = parallel.wrap(
        self.step, mode=config.parallel.mode, devices=self.devices,
        axes=dict(config.parallel.mesh))
    self.evaluator = None
    if config.data.eval:
      held_out, made = features.load(
          config, config.data.eval, self.tokenizer)
      self.notes.append(f'evaluation: {made}')
      self.evaluator = evaluate.Evaluator(
          self.model, held_out, config, mesh=self.parallel.mesh)

  def _read(self, config: config_lib.Config) -> None:
    """What does not depend on the seed or the rates."""
    self.config = config
    self.devices = devices_of(config)
    parallel.check_batch(config.train.batch_size, len(self.devices),
                         config.train.grad_accumulation)
    self.buckets = build.buckets(config)
    self.objective = fit.check_objective(config.objective, config.model.head)
    if not config.data.train:
      raise errors.UserError('config.data.train is empty; name a data source')
    self.source = build.init_source(config)
    words = build.vocabulary(config, self.source)
    # Mistakes are told before the data is read; sizes are whole after it.
    sizes = build.bert_config(config, 0, self.source)
    build.check_attention(config, sizes, training=True)
    fit.check_decode(
        config.decode, build.model(config, sizes).head, self.objective)
    self.windows, made = features.load(config, config.data.train, words)
    self.notes = [f'{made}; alignment of gold spans {self.windows.audit}']
    self.tokenizer = self.windows.tokenizer
    self.sizes = build.bert_config(
        config, len(self.tokenizer.vocab), self.source)
    self.model = build.model(config, self.sizes)
    self._loss = build.loss(self.model, self.objective, config.decode)

  hashes = functools.cached_property(keeper_lib.hashes)

  def step(self, state: update.TrainState, batch: dict[str, jax.Array],
           axis_name: str | None = None, *,
           rates: dict[str, jax.Array] | None = None) -> tuple[Any, Any]:
    """An update; `rates` are the config's learning_rate and weight_decay
    where they are not its own, but arguments of the program."""
    schedule, optimizer = self.schedule, self.optimizer
    if rates is not None:
      schedule, optimizer = build.optimizer(
          self.config.optim, num_steps=self.num_steps,
          num_layers=self.sizes.num_layers, **rates)
    rate = schedule(state.step)
    state, values = update.train_step(
        state, batch, axis_name, loss_fn=self._loss, optimizer=optimizer,
        accumulation=self.config.train.grad_accumulation,
        skip_norm=self.config.optim.skip_norm)
    return state, {**values, 'learning_rate': rate}

  def place(self, length: int, rows: dict[str, np.ndarray]) -> Any:
    """What `batches.next_rows` gives → the step's batch, on the devices."""
    rows = processes.part(rows, self.parallel.mesh)
    return self.parallel.place_batch(self.batches.gather(length, rows))

  def compile(self) -> int:
    """Compiles the step for each shape of a batch that comes this epoch.

    One after the other: XLA has threads of its own. What `lower().compile()`
    made is what the same call runs (jax 0.10), so nothing is compiled twice; a
    test counts.
    """
    shapes = self.batches.shapes(self.num_steps - int(self.state.step))
    for shape in shapes:
      self.parallel.compile(self.state, self.place(*shape))
    return len(shapes)


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
  config_lib.check_workdir(config, workdir)
  if processes.first():
    lock.check(workdir)
  costs = logs.Costs()
  try:
    return _train(Trainer(config), workdir, argv, profile_steps, costs,
                  tracker)
  finally:
    costs.close()


def _train(trainer: Trainer, workdir: pathlib.Path, argv: list[str] | None,
           profile_steps: range, costs: logs.Costs,
           tracker: tracker_lib.Tracker | None) -> dict[str, float]:
  if processes.several():
    processes.check_same(
        config=json.dumps(trainer.config.to_dict(), sort_keys=True),
        **trainer.hashes)
  for note in trainer.notes:
    logs.say(note)
  logs.check_trace(profile_steps, 0, trainer.num_steps)
  keeper_lib.write_run(trainer, workdir, argv or [])
  with contextlib.ExitStack() as open_things:
    keeper_lib.take(workdir, open_things)
    store = checkpoint.Checkpoints(workdir / 'checkpoints')
    open_things.callback(store.close)
    start, = processes.of_first([store.latest or 0])
    keeper_lib.restore(trainer, store, start or None)
    if keeper_lib.complete(trainer, store, start):
      logs.say(f'{workdir} is complete at step {start}; nothing to do')
      return keeper_lib.final_metrics(trainer, workdir)
    logs.check_trace(profile_steps, start, trainer.num_steps)
    began = time.perf_counter()
    shapes = trainer.compile()
    logs.say(f'shapes of batches compiled: {shapes}, in '
             f'{time.perf_counter() - began:.1f} s')
    log = logs.MetricsLog(workdir, start, tracker)
    open_things.callback(log.close)
    progress = logs.Progress('train', trainer.num_steps, start)
    open_things.callback(progress.close)
    return _loop(trainer, store, log, progress, workdir, start,
                 logs.Trace(workdir / 'profile', profile_steps
                            if processes.first() else range(0)), costs,
                 open_things.enter_context(
                     stop.Requests(alone=not processes.several())),
                 open_things.enter_context(watchdog.Watchdog(
                     trainer.config.train.step_timeout_seconds, str(workdir))))


def _loop(trainer: Trainer, store: checkpoint.Checkpoints,
          log: logs.MetricsLog, progress: logs.Progress,
          workdir: pathlib.Path, start: int,
          trace: logs.Trace, costs: logs.Costs, requests: stop.Requests,
          dog: watchdog.Watchdog) -> dict[str, float]:
  """Evaluate → checkpoint → next batch → step, in that order."""
  state = trainer.state
  ahead = parallel.RunAhead(run_ahead(), dog.waiting)
  meter = keeper_lib.meter_of(trainer, log, costs, progress)
  keeper = keeper_lib.Keeper(
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
      logs.say(keeper.farewell(step))
      raise requests.stopped()
    trace.before(step if step < trainer.num_steps else None, state)
    if step == trainer.num_steps:
      break
    length, rows = trainer.batches.next_rows()
    meter.batch(rows['window'], trainer.batches.lengths_of(rows['window']))
    state, values = trainer.parallel.step(state, trainer.place(length, rows))
    if processes.several():
      values['signal'] = processes.largest(
          requests.noted or 0, trainer.parallel.mesh)
    _read(meter, requests, ahead.push(step + 1, values))
  return keeper.metrics


def _read(meter: meter_lib.Meter, requests: stop.Requests,
          done: list[tuple[int, Any]]) -> None:
  """Reads the values of steps that are complete: all processes the same ones,
  so that they agree before which step to stop."""
  for _, values in done:
    requests.hear(int(values.pop('signal', 0)))
  meter.add(done)


def run_ahead() -> int:
  """How many steps may be in flight."""
  return 2 if jax.default_backend() == 'cpu' else 8
