"""Training: a run from its config to its final metrics, and the loop in it."""

import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from qa_jax import build
from qa_jax import checkpoint
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import evaluate
from qa_jax import files
from qa_jax import fit
from qa_jax import logs
from qa_jax import objectives
from qa_jax import optim
from qa_jax import parallel
from qa_jax import update
from qa_jax.data import batches
from qa_jax.data import sources
from qa_jax.data import store as store_lib


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
    objective = fit.check_objective(config.objective, config.model.head)
    if not config.data.train:
      raise errors.UserError('config.data.train is empty; name a data source')
    source = build.init_source(config)
    examples = sources.load(config.data.train)
    self.tokenizer = build.tokenizer(config, source, examples)
    self.sizes = build.bert_config(config, len(self.tokenizer.vocab), source)
    self.model = build.model(config, self.sizes)
    fit.check_decode(config.decode, self.model.head, objective)
    began = time.perf_counter()
    self.windows = build.make_windows(config, examples, self.tokenizer)
    self.seconds_features = time.perf_counter() - began
    self.batches = batches.TrainBatches(
        self.windows,
        self.windows.train_indices(config.data.windows_without_answer),
        config.train.batch_size, self.buckets, config.seed,
        group_questions=objective.grouped, packing=config.data.packing,
        devices=len(self.devices), accumulation=config.train.grad_accumulation)
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
        bias_correction=config.optim.bias_correction, eps=config.optim.eps,
        num_layers=self.sizes.num_layers)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, self.notes = build.parameters(
        self.model, init_key, source, init_head=config.model.init_head)
    self.state = update.TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        opt_state=self.optimizer.init(params),
        key_data=jax.random.key_data(dropout_key))

    def loss_fn(params, batch, key):
      scores = self.model.apply(
          {'params': params}, **build.model_inputs(batch),
          dropout_key=key, rows=batch['row'],
          gold_start=batch['start_positions'])
      rows = {'loss': objective.loss(scores, batch)}
      if not scores.conditional:
        rows['valid_mass'] = objectives.valid_mass(
            scores, batch, max_answer_length=config.decode.max_answer_length)
      return rows

    def step(state, batch, axis_name=None):
      rate = self.schedule(state.step)
      state, values = update.train_step(
          state, batch, axis_name, loss_fn=loss_fn, optimizer=self.optimizer,
          accumulation=config.train.grad_accumulation)
      return state, {**values, 'learning_rate': rate}

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
        'batch_shapes': self._shapes(),
        'steps_per_epoch': self.batches.steps_per_epoch,
        'steps': self.num_steps,
        'vocabulary': len(self.tokenizer.vocab),
    }

  def _shapes(self) -> list[list[int]] | str:
    if self.config.data.packing:
      return f'packed in rows of {self.buckets[-1]}'
    return [[self.config.train.batch_size, b] for b in self.buckets]


def train(config: config_lib.Config, workdir: pathlib.Path,
          argv: list[str] | None = None,
          profile_steps: range = range(0)) -> dict[str, float]:
  """Trains `config` in `workdir`, or resumes it; returns the final metrics.

  A trace of `profile_steps` goes to WORKDIR/profile.

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
      return _loop(trainer, store, log, progress, workdir, start,
                   logs.Trace(workdir / 'profile', profile_steps))
    finally:
      progress.close()
      log.close()
  finally:
    store.close()


def _loop(trainer: Trainer, store: checkpoint.Checkpoints,
          log: logs.MetricsLog, progress: logs.Progress,
          workdir: pathlib.Path, start: int,
          trace: logs.Trace) -> dict[str, float]:
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
      began = time.perf_counter()
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
                   meta={'position': trainer.batches.position,
                         'devices': len(trainer.devices)},
                   metrics=metrics if evaluates else {})
      meter.leave_out(time.perf_counter() - began)
    trace.before(None if last else step, state)
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
    tokens = batch['attention_mask'].sum(axis=1)
    self._rows += float((tokens > 1).sum())  # a padding row is one [CLS]
    self._tokens += float(tokens[tokens > 1].sum())

  def leave_out(self, seconds: float) -> None:
    """Time that was not training's."""
    self._began += seconds

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
                'epoch': step / self._trainer.batches.steps_per_epoch,
                'examples_per_second': self._rows / seconds,
                'tokens_per_second': self._tokens / seconds,
                'peak_megabytes': parallel.peak_megabytes(
                    self._trainer.devices[0])}
        self._log.write(step, 'train', line)
        self._progress.note(f'loss {line["loss"]:.4f}  '
                            f'{line["examples_per_second"]:.1f} examples/s')
        self._began, self._rows, self._tokens = time.perf_counter(), 0.0, 0.0


def check_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Refuses a workdir that holds something else than this config's run."""
  if workdir.exists() and not workdir.is_dir():
    raise errors.UserError(f'--workdir={workdir} is a file, not a directory')
  files.check_writable(workdir / 'config.json')
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
  """All at once, by a rename: a workdir is empty or it is a run."""
  if (workdir / 'config.json').is_file():
    return
  hashes = {'vocabulary': trainer.tokenizer.fingerprint,
            'train': store_lib.fingerprint(trainer.windows.examples)}
  if trainer.evaluator:
    hashes['eval'] = store_lib.fingerprint(trainer.evaluator.windows.examples)

  def write(directory: pathlib.Path) -> None:
    files.write_json(directory / 'alignment.json', {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    build.write_run(
        directory, trainer.config, trainer.sizes, trainer.tokenizer,
        logs.run_record(seed=trainer.config.seed, argv=argv or sys.argv,
                        devices=trainer.devices, hashes=hashes))

  files.write_directory(workdir, write)


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
  trainer.state = update.TrainState(
      params=params, **optimizer,
      key_data=jax.device_put(state.key_data, shardings.key_data))
  trainer.batches.seek(meta['position'])
  logs.say(f'resuming from step {step} of {trainer.num_steps}')
  if meta['devices'] != len(trainer.devices):
    regrouped = ('; questions are grouped anew, so this epoch may repeat or '
                 'skip windows' if trainer.batches.group_questions else '')
    logs.say(f'{meta["devices"]} devices before, {len(trainer.devices)} now: '
             f'equal but for rounding{regrouped}')
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
