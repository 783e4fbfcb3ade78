"""The parts of a training run, built from its config."""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax import objectives
from qa_jax import span_scores
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import batches
from qa_jax.data import store as store_lib
from qa_jax.evaluation import evaluator
from qa_jax.models import qa
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.training import optimizer as optimizer_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib


def initial_parameters(net: qa.QAModel,
                       key: jax.Array,
                       source: pathlib.Path | None,
                       *,
                       init_head: bool = True) -> tuple[Any, list[str]]:
  """Fresh parameters, or those of `source`; and what to tell the user.

  A head comes from `source` too if it is one like `net`'s and `init_head`.
  """
  if source is None:
    return qa.init_params(net, key), []
  if not RunDirectory(source).is_run():
    fresh = qa.init_head(net, key)
    params, notes = hugging_face.load_parameters(source, fresh)
    return (params if init_head else {**params, 'head': fresh['head']}), notes
  stored = RunDirectory(source).read_config()
  other = build.build_model(stored, net.config)
  params = RunDirectory(source).read_parameters('best', jax.eval_shape(
      lambda: qa.init_params(other, key)))
  if init_head and other.head == net.head:
    return params, []
  return {**params, 'head': qa.init_head(net, key)['head']}, [
      f'the head is fresh; {source}, whose head is {stored.model.head}, gives '
      'the encoder']


def build_optimizer(
    config: config_lib.Optim,
    *,
    num_steps: int,
    num_layers: int,
    learning_rate: jax.Array | None = None,
    weight_decay: jax.Array | None = None
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The learning rate by step, and AdamW with it; rates that are given stand
  in for the config's."""
  if learning_rate is None:
    learning_rate, weight_decay = config.learning_rate, config.weight_decay
  schedule = optimizer_lib.make_schedule(
      config.schedule, learning_rate=learning_rate, num_steps=num_steps,
      warmup_fraction=config.warmup_fraction)
  return schedule, optimizer_lib.adamw(
      schedule, weight_decay=weight_decay, clip_norm=config.clip_norm,
      layer_decay=config.layer_decay, bias_correction=config.bias_correction,
      eps=config.eps, num_layers=num_layers)


def build_loss(net: qa.QAModel, objective: objectives.Objective,
               decode: config_lib.Decode) -> step_lib.Loss:
  """What a step minimises, and what it logs beside."""
  def loss_fn(params, batch, key):
    scores = net.apply(
        {'params': params}, **qa.model_inputs(batch), dropout_key=key,
        rows=batch['row'], dropout_lengths=batch.get('dropout_lengths'),
        gold_start=batch['start_positions'])
    rows = {'loss': objective.loss(scores, batch)}
    if not scores.conditional:
      rows['valid_mass'] = span_scores.valid_mass(
          jax.lax.stop_gradient(scores), batch['context_mask'],
          max_answer_length=decode.max_answer_length)
    return rows
  return loss_fn


def input_hashes(trainer: 'Trainer') -> dict[str, str]:
  """Of what a run reads."""
  found = {'vocabulary': trainer.tokenizer.fingerprint,
           'train': store_lib.fingerprint(trainer.windows.examples)}
  if trainer.source:
    found |= {f'init_from: {name}': digest for name, digest in
              hugging_face.file_hashes(trainer.source).items()}
  if trainer.evaluator:
    found['eval'] = store_lib.fingerprint(trainer.evaluator.windows.examples)
  return found


def restore_state(trainer: 'Trainer', store: manager.Checkpoints,
                  step: int | None) -> None:
  """Puts the state of checkpoint `step` on the devices; None: as it begins."""
  state = trainer.state
  shardings = trainer.parallel.state_sharding(state)
  if step is None:
    trainer.state = devices_lib.put_tree(state, shardings)
    return
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings)
  params, optimizer, meta = store.restore(
      step, params=shapes.params,
      optimizer={'opt_state': shapes.opt_state, 'step': shapes.step})
  trainer.state = step_lib.TrainState(
      params=params, **optimizer,
      key_data=devices_lib.put_tree(state.key_data, shardings.key_data))
  trainer.batches.seek(meta['position'])
  trainer.skipped = tuple(meta.get('skipped', (0, 0)))
  console.say(f'resuming from step {step} of {trainer.num_steps}')
  if meta['devices'] != len(trainer.devices):
    regrouped = ('; questions are grouped anew, so this epoch may repeat or '
                 'skip windows' if trainer.batches.group_questions else '')
    console.say(
        f'{meta["devices"]} devices before, {len(trainer.devices)} now: '
        f'equal but for rounding{regrouped}')


def devices_of(config: config_lib.Config) -> list[jax.Device]:
  """The devices that a config trains on."""
  asked = config.parallel.num_devices
  if asked > jax.device_count():
    raise errors.UserError(
        f'config.parallel.num_devices={asked}, but there are '
        f'{jax.device_count()} {jax.default_backend()} devices')
  if config.parallel.mode != 'jit':
    return devices_lib.select_devices(jax.devices(), asked)
  if processes.is_multi_process():
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
        group_questions=self.objective.needs_whole_questions,
        packing=config.data.packing,
        devices=len(self.devices), accumulation=config.train.grad_accumulation)
    self.num_steps = config.train.num_steps or math.ceil(
        config.train.num_epochs * self.batches.steps_per_epoch)
    self.schedule, self.optimizer = build_optimizer(
        config.optim, num_steps=self.num_steps,
        num_layers=self.sizes.num_layers)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, notes = initial_parameters(
        self.model, init_key, self.source, init_head=config.model.init_head)
    self.state = step_lib.TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        opt_state=self.optimizer.init(params),
        key_data=jax.random.key_data(dropout_key))
    self.skipped = 0, 0  # updates before `state`: all, and the last in a row
    if like:
      return
    self.notes += notes
    self.parallel = parallel.wrap_step(
        self.step, mode=config.parallel.mode, devices=self.devices,
        axes=dict(config.parallel.mesh))
    self.evaluator = None
    if config.data.eval:
      held_out, made = input_pipeline.load_windows(
          config, config.data.eval, self.tokenizer)
      self.notes.append(f'evaluation: {made}')
      self.evaluator = evaluator.Evaluator(
          self.model, held_out, config, mesh=self.parallel.mesh)

  def _read(self, config: config_lib.Config) -> None:
    """What does not depend on the seed or the rates."""
    self.config = config
    self.devices = devices_of(config)
    parallel.check_batch(config.train.batch_size, len(self.devices),
                         config.train.grad_accumulation)
    self.buckets = input_pipeline.batch_buckets(config)
    self.objective = build.check_objective(config.objective, config.model.head)
    if not config.data.train:
      raise errors.UserError('config.data.train is empty; name a data source')
    self.source = build.init_source(config)
    words = input_pipeline.vocabulary_source(config, self.source)
    # Mistakes are told before the data is read; sizes are whole after it.
    sizes = build.encoder_config(config, 0, self.source)
    build.check_attention(config, sizes, training=True)
    build.check_decode(
        config.decode, build.build_model(config, sizes).head, self.objective)
    self.windows, made = input_pipeline.load_windows(config, config.data.train,
                                                     words)
    self.notes = [f'{made}; alignment of gold spans {self.windows.audit}']
    self.tokenizer = self.windows.tokenizer
    self.sizes = build.encoder_config(
        config, len(self.tokenizer.vocab), self.source)
    self.model = build.build_model(config, self.sizes)
    self._loss = build_loss(self.model, self.objective, config.decode)

  hashes = functools.cached_property(input_hashes)

  def step(self, state: step_lib.TrainState, batch: dict[str, jax.Array],
           axis_name: str | None = None, *,
           rates: dict[str, jax.Array] | None = None) -> tuple[Any, Any]:
    """An update; `rates` are the config's learning_rate and weight_decay
    where they are not its own, but arguments of the program."""
    schedule, optimizer = self.schedule, self.optimizer
    if rates is not None:
      schedule, optimizer = build_optimizer(
          self.config.optim, num_steps=self.num_steps,
          num_layers=self.sizes.num_layers, **rates)
    rate = schedule(state.step)
    state, values = step_lib.train_step(
        state, batch, axis_name, loss_fn=self._loss, optimizer=optimizer,
        accumulation=self.config.train.grad_accumulation,
        skip_norm=self.config.optim.skip_norm)
    return state, {**values, 'learning_rate': rate}

  def place(self, length: int, rows: dict[str, np.ndarray]) -> Any:
    """What `batches.next_rows` gives → the step's batch, on the devices."""
    rows = devices_lib.local_rows(rows, self.parallel.mesh)
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
