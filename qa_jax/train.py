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
    self.schedule, self.optimizer = self._optimizer(
        config.optim.learning_rate, config.optim.weight_decay)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, self.notes = build.parameters(
        self.model, init_key, self.source, init_head=config.model.init_head)
    self.state = update.TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        opt_state=self.optimizer.init(params),
        key_data=jax.random.key_data(dropout_key))
    if like:
      return
    self.parallel = parallel.wrap(
        self.step, mode=config.parallel.mode, devices=self.devices,
        axes=dict(config.parallel.mesh))
    self.evaluator = None
    if config.data.eval:
      held_out = build.make_windows(
          config, sources.load(config.data.eval), self.tokenizer)
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
    examples = sources.load(config.data.train)
    self.tokenizer = build.tokenizer(config, self.source, examples)
    self.sizes = build.bert_config(
        config, len(self.tokenizer.vocab), self.source)
    build.check_attention(config, self.sizes, training=True)
    self.model = build.model(config, self.sizes)
    fit.check_decode(config.decode, self.model.head, self.objective)
    began = time.perf_counter()
    self.windows = build.make_windows(config, examples, self.tokenizer)
    self.seconds_features = time.perf_counter() - began

  def _optimizer(self, learning_rate, weight_decay):
    optim_config = self.config.optim
    schedule = optim.make_schedule(
        optim_config.schedule, learning_rate=learning_rate,
        num_steps=self.num_steps,
        warmup_fraction=optim_config.warmup_fraction)
    return schedule, optim.adamw(
        schedule, weight_decay=weight_decay,
        clip_norm=optim_config.clip_norm,
        layer_decay=optim_config.layer_decay,
        bias_correction=optim_config.bias_correction, eps=optim_config.eps,
        num_layers=self.sizes.num_layers)

  def _loss(self, params, batch, key) -> update.Rows:
    scores = self.model.apply(
        {'params': params}, **build.model_inputs(batch),
        dropout_key=key, rows=batch['row'],
        dropout_lengths=batch.get('dropout_lengths'),
        gold_start=batch['start_positions'])
    rows = {'loss': self.objective.loss(scores, batch)}
    if not scores.conditional:
      rows['valid_mass'] = objectives.valid_mass(
          scores, batch,
          max_answer_length=self.config.decode.max_answer_length)
    return rows

  def step(self, state: update.TrainState, batch: dict[str, jax.Array],
           axis_name: str | None = None, *,
           rates: dict[str, jax.Array] | None = None) -> tuple[Any, Any]:
    """An update; `rates` are the config's learning_rate and weight_decay
    where they are not its own, but arguments of the program."""
    schedule, optimizer = self.schedule, self.optimizer
    if rates is not None:
      schedule, optimizer = self._optimizer(**rates)
    rate = schedule(state.step)
    state, values = update.train_step(
        state, batch, axis_name, loss_fn=self._loss, optimizer=optimizer,
        accumulation=self.config.train.grad_accumulation)
    return state, {**values, 'learning_rate': rate}

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
  costs = logs.Costs()
  try:
    return _train(Trainer(config), workdir, argv, profile_steps, costs)
  finally:
    costs.close()


def _train(trainer: Trainer, workdir: pathlib.Path, argv: list[str] | None,
           profile_steps: range, costs: logs.Costs) -> dict[str, float]:
  for note in trainer.notes:
    logs.say(note)
  logs.say(f'{len(trainer.windows)} windows of {len(trainer.windows.examples)}'
           f' questions in {trainer.seconds_features:.1f} s; alignment of '
           f'gold spans {trainer.windows.audit}')
  write_run(trainer, workdir, argv or [])
  store = checkpoint.Checkpoints(workdir / 'checkpoints')
  try:
    restore(trainer, store, store.latest)
    start = store.latest or 0
    if start == trainer.num_steps:
      logs.say(f'{workdir} is complete at step {start}; nothing to do')
      return final_metrics(trainer, workdir)
    log = logs.MetricsLog(workdir, start)
    progress = logs.Progress('train', trainer.num_steps, start)
    try:
      return _loop(trainer, store, log, progress, workdir, start,
                   logs.Trace(workdir / 'profile', profile_steps), costs)
    finally:
      progress.close()
      log.close()
  finally:
    store.close()


def _loop(trainer: Trainer, store: checkpoint.Checkpoints,
          log: logs.MetricsLog, progress: logs.Progress,
          workdir: pathlib.Path, start: int,
          trace: logs.Trace, costs: logs.Costs) -> dict[str, float]:
  """Evaluate → checkpoint → next batch → step, in that order."""
  state = trainer.state
  ahead = parallel.RunAhead(run_ahead())
  meter = Meter(log, trainer, costs, progress)
  keeper = Keeper(trainer, store, log, costs, workdir)
  for step in range(start, trainer.num_steps + 1):
    if step > start and keeper.due(step):
      meter.add(ahead.drain())
      began = time.perf_counter()
      note = keeper.keep(step, state)
      if note:
        progress.note(note)
      meter.leave_out(time.perf_counter() - began)
    trace.before(step if step < trainer.num_steps else None, state)
    if step == trainer.num_steps:
      break
    batch = next(trainer.batches)
    meter.batch(batch)
    state, values = trainer.parallel.step(
        state, trainer.parallel.place_batch(batch))
    meter.add(ahead.push(step + 1, values))
  return keeper.metrics


def run_ahead() -> int:
  """How many steps may be in flight."""
  return 2 if jax.default_backend() == 'cpu' else 8


class Keeper:
  """Evaluates and saves a run at the steps that its config says."""

  def __init__(self, trainer: Trainer, store: checkpoint.Checkpoints,
               log: logs.MetricsLog, costs: logs.Costs,
               workdir: pathlib.Path):
    self._trainer, self._store = trainer, store
    self._log, self._costs, self._workdir = log, costs, workdir
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def _evaluates(self, step: int) -> bool:
    every = self._trainer.config.train.eval_every_steps
    return (step == self._trainer.num_steps
            or bool(every and step % every == 0))

  def due(self, step: int) -> bool:
    """Whether there is something to `keep` before this step."""
    every = self._trainer.config.train.checkpoint_every_steps
    return self._evaluates(step) or step % every == 0

  def keep(self, step: int, state: update.TrainState) -> str:
    """Evaluates, if it is time, then saves; what to tell the user, or ''."""
    trainer, metrics = self._trainer, {}
    if self._evaluates(step) and trainer.evaluator:
      last = step == trainer.num_steps
      self.metrics = metrics = trainer.evaluator.evaluate(
          state.params,
          output=_output(trainer, self._workdir) if last else None)
      self._log.write(step, 'eval', {
          **metrics, **self._costs.spent(len(trainer.devices))})
    self._store.save(
        step, params=state.params,
        optimizer={'opt_state': state.opt_state, 'step': state.step},
        meta={'position': trainer.batches.position,
              'devices': len(trainer.devices)}, metrics=metrics)
    if not metrics:
      return ''
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'


class Meter:
  """Turns step metrics, read late, into log lines."""

  def __init__(self, log: logs.MetricsLog, trainer: Trainer, costs: logs.Costs,
               progress: logs.Progress | None = None):
    self._costs = costs
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
      if self._progress:
        self._progress.update(step)
      if step % self._trainer.config.train.log_every_steps == 0:
        seconds = time.perf_counter() - self._began
        line = {**{k: float(v) for k, v in values.items()},
                'epoch': step / self._trainer.batches.steps_per_epoch,
                'examples_per_second': self._rows / seconds,
                'tokens_per_second': self._tokens / seconds,
                'peak_megabytes': parallel.peak_megabytes(
                    self._trainer.devices[0]),
                **self._costs.spent(len(self._trainer.devices))}
        self._log.write(step, 'train', line)
        if self._progress:
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


def write_run(trainer: Trainer, workdir: pathlib.Path, argv: list[str],
              more: dict[str, Any] | None = None) -> None:
  """All at once, by a rename: a workdir is empty or it is a run.

  `more` goes into run.json.
  """
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
                        devices=trainer.devices, hashes=hashes)
        | (more or {}))

  files.write_directory(workdir, write)


def restore(trainer: Trainer, store: checkpoint.Checkpoints,
            step: int | None) -> None:
  """Puts the state of checkpoint `step` on the devices; None: as it begins."""
  state = trainer.state
  shardings = trainer.parallel.state_sharding(state)
  if step is None:
    trainer.state = jax.device_put(state, shardings)
    return
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


def _output(trainer: Trainer, workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'eval' / evaluate.data_name(trainer.config.data.eval)


def final_metrics(trainer: Trainer, workdir: pathlib.Path) -> dict[str, Any]:
  if not trainer.evaluator:
    return {}
  path = _output(trainer, workdir) / 'metrics.json'
  if not path.is_file():
    return trainer.evaluator.evaluate(trainer.state.params,
                                      output=_output(trainer, workdir))
  return files.read_object(path)
