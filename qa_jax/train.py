"""Training: one pure step, and the loop around it.

Glossary of shapes: B batch (windows) over all devices and micro-steps.
"""

from collections.abc import Callable
import dataclasses
import math
import pathlib
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qa_jax import build
from qa_jax import checkpoint
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import evaluate
from qa_jax import files
from qa_jax import logs
from qa_jax import objectives
from qa_jax import optim
from qa_jax import parallel
from qa_jax import registry
from qa_jax.data import batches
from qa_jax.data import sources

Loss = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
  """What an update changes."""

  step: jax.Array  # [] int32, updates made so far
  params: Any
  opt_state: Any


def train_step(state: TrainState, batch: dict[str, jax.Array],
               axis_name: str | None = None, *, loss_fn: Loss,
               optimizer: optax.GradientTransformation, key: jax.Array,
               accumulation: int = 1) -> tuple[TrainState, dict[str, Any]]:
  """One update from sums: Σ w·∇loss / Σ w over rows, micro-steps, devices.

  `loss_fn(params, batch, key) → [rows]`. Dividing once, at the end, by the
  global weight is what makes uneven padding exact on any number of devices.
  """
  key = jax.random.fold_in(key, state.step)

  def weighted(params, rows):
    losses = loss_fn(params, rows, key)
    return jnp.sum(losses * rows['weight']), jnp.sum(rows['weight'])

  def sums(rows):
    (loss, weight), grads = jax.value_and_grad(weighted, has_aux=True)(
        state.params, rows)
    return loss, weight, grads

  if accumulation == 1:
    totals = sums(batch)
  else:
    # Row r goes to micro-step r mod A, so a device keeps its own rows.
    micro = jax.tree.map(lambda x: x.reshape(
        -1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(
        sums, jax.tree.map(lambda x: x[0], micro)))
    totals, _ = jax.lax.scan(
        lambda total, rows: (jax.tree.map(jnp.add, total, sums(rows)), None),
        zero, micro)
  if axis_name:
    totals = jax.lax.psum(totals, axis_name)
  loss, weight, grads = totals
  weight = jnp.maximum(weight, 1e-8)
  grads = jax.tree.map(lambda g: g / weight, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  state = TrainState(step=state.step + 1, opt_state=opt_state,
                     params=optax.apply_updates(state.params, updates))
  return state, {'loss': loss / weight, 'grad_norm': optax.tree.norm(grads)}


def devices_of(config: config_lib.Config) -> list[jax.Device]:
  """The devices that a config trains on."""
  asked = config.parallel.num_devices
  if asked > jax.device_count():
    raise errors.UserError(
        f'config.parallel.num_devices={asked}, but there are '
        f'{jax.device_count()} {jax.default_backend()} devices')
  devices = jax.devices()[:asked or None]
  return devices[:1] if config.parallel.mode == 'jit' else devices


class Trainer:
  """Everything a run needs, built and checked before anything is written."""

  def __init__(self, config: config_lib.Config):
    self.config = config
    self.devices = devices_of(config)
    parallel.check_batch(config.train.batch_size, len(self.devices),
                         config.train.grad_accumulation)
    self.buckets = build.buckets(config)
    objective = registry.build(
        objectives.OBJECTIVES, config.objective, what='objective')
    evaluate.check_decode(config.decode)
    if not config.data.train:
      raise errors.UserError('config.data.train is empty; name a data source')
    source = build.init_source(config)
    examples = sources.load(config.data.train)
    self.tokenizer = build.tokenizer(config, source, examples)
    self.sizes = build.bert_config(config, len(self.tokenizer.vocab), source)
    self.model = build.model(config, self.sizes)
    began = time.perf_counter()
    self.windows = build.make_windows(config, examples, self.tokenizer)
    self.seconds_features = time.perf_counter() - began
    self.batches = batches.TrainBatches(
        self.windows,
        self.windows.train_indices(config.data.windows_without_answer),
        config.train.batch_size, self.buckets, config.seed)
    self.num_steps = config.train.num_steps or math.ceil(
        config.train.num_epochs * self.batches.steps_per_epoch)
    self.schedule = optim.make_schedule(
        config.optim.schedule, learning_rate=config.optim.learning_rate,
        num_steps=self.num_steps,
        warmup_fraction=config.optim.warmup_fraction)
    self.optimizer = optim.adamw(
        self.schedule, weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        layer_decay=config.optim.layer_decay,
        num_layers=self.sizes.num_layers)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, self.notes = build.parameters(self.model, init_key, source)
    self.state = TrainState(step=jnp.zeros((), jnp.int32), params=params,
                            opt_state=self.optimizer.init(params))

    def loss_fn(params, batch, key):
      scores = self.model.apply(
          {'params': params}, **build.model_inputs(batch),
          dropout_key=key, rows=batch['row'],
          gold_start=batch['start_positions'])
      return objective.loss(scores, batch)

    def step(state, batch, axis_name=None):
      return train_step(
          state, batch, axis_name, loss_fn=loss_fn, optimizer=self.optimizer,
          key=dropout_key, accumulation=config.train.grad_accumulation)

    self.parallel = parallel.wrap(
        step, mode=config.parallel.mode, devices=self.devices,
        axes=dict(config.parallel.mesh))
    self.evaluator = None
    if config.data.eval:
      held_out = build.make_windows(
          config, sources.load(config.data.eval), self.tokenizer)
      self.evaluator = evaluate.Evaluator(
          self.model, held_out, config, mesh=self.parallel.mesh)

  def summary(self) -> dict[str, Any]:
    """What --dry_run prints."""
    count = sum(x.size for x in jax.tree.leaves(self.state.params))
    return {
        'parameters': count,
        'state_megabytes': round(3 * 4 * count / 2**20, 1),
        'devices': f'{len(self.devices)} x {self.devices[0].device_kind}',
        'examples': len(self.windows.examples),
        'windows': len(self.windows),
        'windows_trained_on': len(self.batches.indices),
        'alignment': self.windows.audit,
        'batch_shapes': [[self.config.train.batch_size, b]
                         for b in self.buckets],
        'steps_per_epoch': self.batches.steps_per_epoch,
        'steps': self.num_steps,
        'vocabulary': len(self.tokenizer.vocab),
    }


def train(config: config_lib.Config, workdir: pathlib.Path,
          argv: list[str] | None = None) -> dict[str, float]:
  """Trains `config` in `workdir`, or resumes it; returns the final metrics.

  Raises:
    UserError: a bad config or data, another config in `workdir`, or a loss
      that is not finite.
  """
  check_workdir(config, workdir)
  trainer = Trainer(config)
  for note in trainer.notes:
    logs.say(note)
  logs.say(f'{len(trainer.windows)} windows of {len(trainer.windows.examples)}'
           f' questions in {trainer.seconds_features:.1f} s; alignment of '
           f'gold spans {trainer.windows.audit}')
  _write_run(trainer, workdir, argv or [])
  store = checkpoint.Checkpoints(workdir / 'checkpoints')
  try:
    start = _restore(trainer, store)
    if start == trainer.num_steps:
      logs.say(f'{workdir} is complete at step {start}; nothing to do')
      return _final_metrics(trainer, workdir)
    log = logs.MetricsLog(workdir, start)
    progress = logs.Progress('train', trainer.num_steps, start)
    try:
      return _loop(trainer, store, log, progress, workdir, start)
    finally:
      progress.close()
      log.close()
  finally:
    store.close()


def _loop(trainer: Trainer, store: checkpoint.Checkpoints,
          log: logs.MetricsLog, progress: logs.Progress,
          workdir: pathlib.Path, start: int) -> dict[str, float]:
  """Evaluate → checkpoint → next batch → step, in that order."""
  config, state = trainer.config.train, trainer.state
  ahead = parallel.RunAhead(2 if jax.default_backend() == 'cpu' else 8)
  meter = _Meter(log, progress, trainer)
  metrics: dict[str, float] = {}
  for step in range(start, trainer.num_steps + 1):
    last = step == trainer.num_steps
    if step > start:
      evaluates = last or (config.eval_every_steps
                           and step % config.eval_every_steps == 0)
      saves = last or evaluates or step % config.checkpoint_every_steps == 0
      if evaluates or saves:
        meter.add(ahead.drain())
      if evaluates and trainer.evaluator:
        metrics = trainer.evaluator.evaluate(
            state.params, output=_output(trainer, workdir) if last else None)
        log.write(step, 'eval', metrics)
        progress.note(f'eval EM {metrics["exact_match"]:.2f} '
                      f'F1 {metrics["f1"]:.2f}')
      if saves:
        store.save(step, params=state.params,
                   optimizer={'opt_state': state.opt_state,
                              'step': state.step},
                   meta={'position': trainer.batches.position},
                   metrics=metrics if evaluates else {})
    if last:
      break
    batch = next(trainer.batches)
    meter.batch(batch)
    state, values = trainer.parallel.step(
        state, trainer.parallel.place_batch(batch))
    meter.add(ahead.push(step + 1, values))
  return metrics


class _Meter:
  """Turns step metrics, read late, into log lines."""

  def __init__(self, log: logs.MetricsLog, progress: logs.Progress,
               trainer: Trainer):
    self._log, self._progress, self._trainer = log, progress, trainer
    self._began = time.perf_counter()
    self._rows = self._tokens = 0.0

  def batch(self, batch: dict[str, Any]) -> None:
    self._rows += float(batch['weight'].sum())
    self._tokens += float(batch['attention_mask'].sum())

  def add(self, done: list[tuple[int, Any]]) -> None:
    for step, values in done:
      if not all(math.isfinite(v) for v in values.values()):
        raise errors.UserError(
            f'loss {values["loss"]}, gradient norm {values["grad_norm"]} at '
            f'step {step}: not finite; nothing after the last checkpoint is '
            'kept. Lower config.optim.learning_rate or use float32')
      self._progress.update(step)
      if step % self._trainer.config.train.log_every_steps == 0:
        seconds = time.perf_counter() - self._began
        line = {**{k: float(v) for k, v in values.items()},
                'learning_rate': float(self._trainer.schedule(step - 1)),
                'epoch': step / self._trainer.batches.steps_per_epoch,
                'examples_per_second': self._rows / seconds,
                'tokens_per_second': self._tokens / seconds}
        self._log.write(step, 'train', line)
        self._progress.note(f'loss {line["loss"]:.4f}  '
                            f'{line["examples_per_second"]:.1f} examples/s')
        self._began, self._rows, self._tokens = time.perf_counter(), 0.0, 0.0


def check_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Refuses a workdir that holds something else than this config's run."""
  if workdir.exists() and not workdir.is_dir():
    raise errors.UserError(f'--workdir={workdir} is a file, not a directory')
  if not (workdir / 'config.json').is_file():
    if workdir.is_dir() and any(workdir.iterdir()):
      raise errors.UserError(
          f'--workdir={workdir} is not empty and not a run; choose another')
    return
  stored = config_lib.read(workdir).to_dict()
  changed = config_lib.differences(stored, config.to_dict())
  if changed:
    width = max(len(field) for field, _, _ in changed)
    rows = '\n'.join(f'  {field:{width}}  {old!r} → {new!r}'
                     for field, old, new in changed)
    raise errors.UserError(
        f'{workdir} was trained with another config (stored → given); choose '
        f'another --workdir or undo:\n{rows}')


def _write_run(trainer: Trainer, workdir: pathlib.Path,
               argv: list[str]) -> None:
  """config.json last: a directory that has it has everything else."""
  workdir.mkdir(parents=True, exist_ok=True)
  if (workdir / 'config.json').is_file():
    return
  hashes = {'vocabulary': trainer.tokenizer.fingerprint,
            'train': evaluate.fingerprint(trainer.windows.examples)}
  if trainer.evaluator:
    hashes['eval'] = evaluate.fingerprint(trainer.evaluator.windows.examples)
  trainer.tokenizer.save(workdir / 'tokenizer')
  files.write_json(workdir / 'encoder.json', dataclasses.asdict(trainer.sizes))
  files.write_json(workdir / 'alignment.json', {
      'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
  files.write_json(workdir / 'run.json', logs.run_record(
      seed=trainer.config.seed, argv=argv or sys.argv,
      devices=trainer.devices, hashes=hashes))
  files.write_json(workdir / 'config.json', trainer.config.to_dict())


def _restore(trainer: Trainer, store: checkpoint.Checkpoints) -> int:
  """Puts the state on the devices, from the latest checkpoint if any."""
  state = trainer.state
  shardings = trainer.parallel.state_sharding(state)
  step = store.latest
  if step is None:
    trainer.state = jax.device_put(state, shardings)
    return 0
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings)
  params, optimizer, meta = store.restore(
      step, params=shapes.params,
      optimizer={'opt_state': shapes.opt_state, 'step': shapes.step})
  trainer.state = TrainState(params=params, **optimizer)
  trainer.batches.seek(meta['position'])
  logs.say(f'resuming from step {step} of {trainer.num_steps}')
  return step


def _output(trainer: Trainer, workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'eval' / evaluate.data_name(trainer.config.data.eval)


def _final_metrics(trainer: Trainer, workdir: pathlib.Path) -> dict[str, Any]:
  if not trainer.evaluator:
    return {}
  path = _output(trainer, workdir) / 'metrics.json'
  if not path.is_file():
    return trainer.evaluator.evaluate(trainer.state.params,
                                      output=_output(trainer, workdir))
  return files.read_object(path)
