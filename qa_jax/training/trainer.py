"""The parts of a training run, built from its config."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
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
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import alignment
from qa_jax.data import batches as batches_lib
from qa_jax.data import cache
from qa_jax.data import examples as examples_lib
from qa_jax.data import sources
from qa_jax.data import store as store_lib
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.evaluation import evaluator as evaluator_lib
from qa_jax.models import qa
from qa_jax.runtime import compilation
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.training import optimizer as optimizer_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib


def initial_parameters(net: qa.QAModel, key: jax.Array,
                       source: pathlib.Path | None, step: int | None = None, *,
                       init_head: bool = True) -> tuple[Any, list[str]]:
  """Returns the parameters before the first step, and notes for the user.

  Without `source` they are drawn with `key`. A Hugging Face model at `source`
  or, with a `step`, a checkpoint of the run there gives the encoder: its first
  layers if it has more than the model. It also gives the head if it gives all
  layers, the heads are equal and `init_head` is true; otherwise the head is
  drawn.
  """
  if source is None:
    return qa.init_params(net, key), []
  if step is None:
    stored = hugging_face.read_config(source).num_layers
    return hugging_face.load_parameters(
        source, qa.init_head(net, key), reads_head=(
            init_head and net.config.num_layers == stored
            and build.is_stored_head(net)))
  stored = RunDirectory(source).read_config()
  sizes = RunDirectory(source).read_encoder_config()
  other = build.build_model(stored, sizes)
  params = RunDirectory(source).read_parameters(
      str(step), qa.param_shapes(other))
  used = net.config.num_layers
  if used < sizes.num_layers:
    fresh = qa.init_head(net, key)  # with the names of the layers to take
    return {'encoder': {k: params['encoder'][k] for k in fresh['encoder']},
            'head': fresh['head']}, [hugging_face.first_layers_note(
                source, used, sizes.num_layers)]
  if init_head and other.head == net.head:
    return params, []
  return {**params, 'head': qa.init_head(net, key)['head']}, [
      f'the head is fresh; {source}, whose head is {stored.model.head}, gives '
      'the encoder']


def build_optimizer(
    config: config_lib.Optim, *, num_steps: int, num_layers: int,
    bias_table: str = '', step: jax.Array | None = None,
    learning_rate: jax.Array | None = None,
    weight_decay: jax.Array | None = None
    ) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Builds the learning-rate schedule and the AdamW optimizer that follows it.

  The learning rate is that of `step`, the number of steps so far with skipped
  updates, so that the schedule ends with the run. optax counts only the updates
  that were made; without `step` its count is taken. `learning_rate` and
  `weight_decay`, given together, replace the config's. All three may be traced
  values.
  """
  if learning_rate is None:
    learning_rate, weight_decay = config.learning_rate, config.weight_decay
  schedule = optimizer_lib.make_schedule(
      config.schedule, learning_rate=learning_rate, num_steps=num_steps,
      warmup_fraction=config.warmup_fraction)
  applied = schedule if step is None else lambda _: schedule(step)
  return schedule, optimizer_lib.adamw(
      applied, weight_decay=weight_decay, clip_norm=config.clip_norm,
      layer_decay=config.layer_decay, bias_correction=config.bias_correction,
      eps=config.eps, num_layers=num_layers, bias_table=bias_table,
      freeze_encoder=config.freeze_encoder)


def build_loss(net: qa.QAModel, objective: objectives.Objective,
               decode: config_lib.Decode, freeze_encoder: bool = False
               ) -> step_lib.Loss:
  """Builds the loss function of the train step.

  With `freeze_encoder` the gradient with respect to the encoder is 0, and is
  neither computed nor summed over devices.

  It returns the objective's 'loss' of each row. Unless the head scores ends
  only for given starts, it also returns 'valid_mass', which is only logged.
  """
  def loss_fn(params, batch, key):
    if freeze_encoder:
      params = {**params, 'encoder': jax.lax.stop_gradient(params['encoder'])}
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


def build_step(config: config_lib.Config, loss_fn: step_lib.Loss, *,
               num_steps: int, num_layers: int,
               bias_table: str = '') -> parallel.Step:
  """Builds the train step of a config, not yet wrapped for devices.

  Its argument `rates` overrides the config's learning rate and weight decay
  with traced values, so that runs that differ only in these share one compiled
  program.
  """
  def step(state: step_lib.TrainState, batch: dict[str, jax.Array],
           axis_name: str | None = None, *,
           rates: dict[str, jax.Array] | None = None) -> tuple[Any, Any]:
    schedule, optimizer = build_optimizer(
        config.optim, num_steps=num_steps, num_layers=num_layers,
        bias_table=bias_table, step=state.step, **(rates or {}))
    rate = schedule(state.step)
    state, values = step_lib.train_step(
        state, batch, axis_name, loss_fn=loss_fn, optimizer=optimizer,
        accumulation=config.train.grad_accumulation,
        skip_norm=config.optim.skip_norm)
    return state, {**values, 'learning_rate': rate}
  return step


def select_train_devices(config: config_lib.Config) -> list[jax.Device]:
  """Returns the devices that a config trains on.

  Raises:
    UserError: there are fewer devices than the config asks for, or mode 'jit'
      is used with several processes.
  """
  count = config.parallel.num_devices
  if count > jax.device_count():
    raise errors.UserError(
        f'config.parallel.num_devices={count}, but there are '
        f'{jax.device_count()} {jax.default_backend()} devices'
        + (f'; JAX_NUM_CPU_DEVICES={count} in the environment makes {count}'
           if jax.default_backend() == 'cpu'
           and not processes.is_multi_process() else ''))
  if config.parallel.mode != 'jit':
    return devices_lib.select_devices(jax.devices(), count)
  if processes.is_multi_process():
    raise errors.UserError(
        "config.parallel.mode='jit' trains on one device, but there are "
        f'{jax.process_count()} processes; choose pmap or mesh')
  return jax.devices()[:1]


def updates_per_dispatch(config: config_lib.Config, platform: str,
                         one_shape: bool) -> int:
  """Returns train.updates_per_dispatch, with 0 resolved for a platform.

  An accelerator finishes an update of a small encoder in about the time that
  the host needs to start it. Batches of several shapes seldom follow each other
  in one shape.
  """
  return config.train.updates_per_dispatch or (
      4 if one_shape and platform != 'cpu' else 1)


def describe_alignment(audit: Mapping[str, int]) -> str:
  """Returns the numbers of gold spans in an audit as a sentence."""
  spans = {fate: audit[fate] for fate in alignment.FATES}
  faults = ', '.join(f'{count:,} {fate.replace("_", " ")}'
                     for fate, count in spans.items()
                     if count and fate != 'exact')
  return (f'{audit["exact"]:,} of {sum(spans.values()):,} gold spans are whole '
          'tokens' + f', {faults}' * bool(faults))


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a training run; only the batch stream changes in the run."""

  config: config_lib.Config
  devices: list[jax.Device]
  objective: objectives.Objective
  source: pathlib.Path | None  # directory of model.init_from
  source_step: int | None  # its best checkpoint; None: it is no run
  windows: windows_lib.WindowSet
  buckets: tuple[int, ...]  # lengths of batches, in tokens
  model: qa.QAModel
  loss_fn: step_lib.Loss
  batches: batches_lib.TrainBatches
  num_steps: int
  schedule: optax.Schedule
  step: parallel.Step  # not wrapped for devices, see `build_step`
  dispatch: int  # updates that one call of `parallel` makes at most
  parallel: parallel.Parallel  # the step, or several, wrapped for the devices
  evaluator: evaluator_lib.Evaluator | None  # None without config.data.eval
  state: step_lib.TrainState  # before the first step
  notes: list[str]  # lines for the user

  @functools.cached_property
  def data_hashes(self) -> dict[str, str]:
    """The hashes of the vocabulary and the data."""
    hashes = {'vocabulary': self.windows.tokenizer.fingerprint,
              'train': store_lib.fingerprint(self.windows.examples)}
    if self.evaluator:
      hashes['eval'] = store_lib.fingerprint(self.evaluator.windows.examples)
    return hashes

  @functools.cached_property
  def weight_hashes(self) -> dict[str, str]:
    """The hashes of the files of model.init_from."""
    return {} if not self.source else {
        f'init_from: {name}': digest for name, digest in
        hugging_face.file_hashes(self.source).items()}

  def place(self, length: int, *rows: dict[str, np.ndarray]) -> Any:
    """Puts batches of one shape on the devices, for one call of `parallel`.

    `rows` are one or several of `batches.next_rows`, at most `dispatch`.
    """
    batches = [self.batches.gather(
        length, devices_lib.local_rows(some, self.parallel.mesh))
               for some in rows]
    return self.parallel.place_batch(
        batches[0] if self.dispatch == 1
        else step_lib.stack_batches(batches, self.dispatch))

  def start_compiling(self, state: step_lib.TrainState,
                      report: Callable[[float], None] | None = None
                      ) -> compilation.Compilation:
    """Starts to compile the step for each batch shape left in this epoch.

    The key of a program is the `batch_shape` of its batch. If training may
    begin meanwhile, the shapes have the order in which batches need them. Else
    the largest is the first. `state` may be donated meanwhile. `report` is that
    of Compilation.
    """
    shapes = self.batches.shapes(self.num_steps - int(state.step))
    if not compilation.may_overlap():
      shapes.sort(key=lambda batch: -math.prod(batch_shape(*batch)))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding), state)
    return compilation.Compilation('the train step for a batch', {
        batch_shape(*batch): lambda batch=batch: self.parallel.lower(
            state, self.place(*batch)) for batch in shapes}, report)


def batch_shape(length: int, rows: Mapping[str, np.ndarray]) -> tuple[int, int]:
  """Returns the (rows, tokens) of the batch of `TrainBatches.next_rows`."""
  return rows.get('packed_row', rows['window']).size, length


def build_parts(
    config: config_lib.Config, num_devices: int | None,
    platform: str | None = None, run: RunDirectory | None = None
) -> tuple[objectives.Objective, pathlib.Path | None,
           tokenizer_lib.Tokenizer | cache.LearnedVocabulary, qa.QAModel]:
  """Builds and checks all that needs no data, because data are slow to read.

  Returns the objective, the directory of model.init_from, the tokenizer or the
  settings of a vocabulary to learn, and the model. The vocab_size of its
  encoder is 0 if the vocabulary is learned from the data. `num_devices` is None
  if it is unknown. A `platform` of None is that of this process; '' is unknown.
  `run` is that of `build_trainer`.

  Raises:
    UserError: the config has a mistake, or weights cannot be read.
  """
  mode = config.parallel.mode
  parallel.check_mode(mode, config.parallel.mesh, num_devices)
  if mode == 'jit' and config.parallel.num_devices > 1:
    raise errors.UserError(
        f'config.parallel.num_devices={config.parallel.num_devices}, but '
        "parallel.mode='jit' trains on one device; choose pmap or mesh")
  parallel.check_batch(config.train.batch_size, num_devices or 1,
                       config.train.grad_accumulation)
  input_pipeline.batch_buckets(config)
  windows_lib.check_without_answer(config.data.windows_without_answer)
  optimizer_lib.make_schedule(config.optim.schedule, learning_rate=1.0,
                              num_steps=1, warmup_fraction=0.0)
  objective = build.check_specs(config)
  errors.require(
      not objective.reads_padding or not config_lib.packing(
          config, jax.default_backend() if platform is None else platform),
      f'config.objective={config.objective!r} normalises over padding, which '
      f'packed rows lack: config.data.packing={config.data.packing!r}; set it '
      'to False')
  errors.require(
      not objective.needs_whole_questions
      or config.data.windows_without_answer != 'drop',
      f'config.objective={config.objective!r} needs all windows of a question, '
      "but config.data.windows_without_answer='drop' leaves some out; set it "
      'to cls')
  if not config.data.train:
    raise errors.UserError('config.data.train is empty; name a data source')
  for spec in filter(None, (config.data.train, config.data.eval)):
    sources.check_spec(spec)
  source = _find_source(config, run)
  vocabulary = input_pipeline.vocabulary_source(config, source)
  known = isinstance(vocabulary, tokenizer_lib.Tokenizer)
  windows_lib.check_lengths(**input_pipeline.window_lengths(config), **(
      {'outer_length': vocabulary.outer_length} if known else {}))
  sizes = build.encoder_config(
      config, len(vocabulary.vocab) if known else 0, source,
      vocabulary.pad_id if known and not config.data.vocab else None)
  build.check_layer_decay(config, sizes)
  build.check_attention(config, sizes, training=True, platform=platform)
  model = build.build_model(config, sizes, platform)
  return objective, source, vocabulary, model


def _find_source(config: config_lib.Config, run: RunDirectory | None
                 ) -> pathlib.Path | None:
  """Returns the directory of model.init_from, or that of `run` if it is gone.

  A run with a checkpoint needs its initial weights no more.
  """
  try:
    return build.init_source(config)
  except errors.UserError as e:
    if not (run and run.has_checkpoint()):
      raise
    console.say(f'{e}; {run.path} has a checkpoint and goes on without it')
    return run.path


def build_trainer(config: config_lib.Config,
                  run: RunDirectory | None = None) -> Trainer:
  """Builds and checks all parts of a run before anything is written.

  `run` may be resumed: where model.init_from is gone, its checkpoint will do.

  Raises:
    UserError: the config has a mistake, data or weights cannot be read, or one
      of them differs between processes.
  """
  devices = select_train_devices(config)
  objective, source, vocabulary, model = build_parts(
      config, len(devices), run=run)
  if run and source == run.path:  # in place of init_from; its head is this one
    config = dataclasses.replace(config, model=dataclasses.replace(
        config.model, init_head=True))
  source_step = (RunDirectory(source).resolve_step('best')
                 if source and RunDirectory(source).is_run() else None)
  buckets = input_pipeline.batch_buckets(config)
  windows, note = input_pipeline.load_windows(
      config, config.data.train, vocabulary)
  examples_lib.require_answers(
      windows.audit['unanswered'], len(windows.examples), config.data.train)
  notes = [f'{note}; {describe_alignment(windows.audit)}']
  if not model.config.vocab_size:
    model = model.clone(config=dataclasses.replace(
        model.config, vocab_size=len(windows.tokenizer.vocab)))
  loss_fn = build_loss(model, objective, config.decode,
                       config.optim.freeze_encoder)
  parts, state_notes = _seeded_parts(
      config, devices, objective, source, source_step, windows, buckets, model,
      loss_fn)
  dispatch = updates_per_dispatch(
      config, jax.default_backend(), parts['batches'].one_shape)
  wrapped = parallel.wrap_step(
      parts['step'] if dispatch == 1
      else step_lib.several_updates(parts['step']),
      mode=config.parallel.mode, devices=devices,
      axes=dict(config.parallel.mesh),
      deterministic=config.precision.deterministic)
  if source_step is not None and not (run and source == run.path):
    last = RunDirectory(source).latest_step()
    notes += [f'{source}: the parameters of step {source_step}, its best '
              f'checkpoint; the last is of step {last}'] * (source_step != last)
  notes += state_notes + [note for note in (
      parts['batches'].rounding_note(), input_pipeline.buckets_note(config),
      build.untrained_lengths(config, objective)) if note]
  evaluator = None
  if config.data.eval:
    held_out, note = input_pipeline.load_windows(
        config, config.data.eval, windows.tokenizer)
    examples_lib.check_answered(held_out.examples, config.data.eval)
    notes.append(f'evaluation: {note}')
    evaluator = evaluator_lib.Evaluator(
        model, held_out, config, mesh=wrapped.mesh)
  trainer = Trainer(
      config=config, devices=devices, objective=objective, source=source,
      source_step=source_step, windows=windows, buckets=buckets, model=model,
      loss_fn=loss_fn, dispatch=dispatch, parallel=wrapped,
      evaluator=evaluator, notes=notes, **parts)
  if processes.is_multi_process():
    processes.check_equal_on_all(
        config=json.dumps(config.to_dict(), sort_keys=True),
        **trainer.data_hashes, **trainer.weight_hashes)
  return trainer


def with_seed_and_rates(trainer: Trainer, config: config_lib.Config) -> Trainer:
  """Returns the trainer of a config that differs only in seed and rates.

  It shares the data, model, evaluator and wrapped step of `trainer`.
  """
  parts, _ = _seeded_parts(
      config, trainer.devices, trainer.objective, trainer.source,
      trainer.source_step, trainer.windows, trainer.buckets, trainer.model,
      trainer.loss_fn)
  return dataclasses.replace(trainer, config=config, **parts)


def _seeded_parts(
    config: config_lib.Config, devices: list[jax.Device],
    objective: objectives.Objective, source: pathlib.Path | None,
    source_step: int | None, windows: windows_lib.WindowSet,
    buckets: tuple[int, ...], model: qa.QAModel, loss_fn: step_lib.Loss
    ) -> tuple[dict[str, Any], list[str]]:
  """Builds the fields that depend on seed and rates, and notes for the user."""
  batches = batches_lib.TrainBatches(
      windows, windows.train_indices(config.data.windows_without_answer),
      config.train.batch_size, buckets, config.seed,
      group_questions=objective.needs_whole_questions,
      packing=input_pipeline.packing(config), devices=len(devices),
      accumulation=config.train.grad_accumulation)
  updates = (config.train.num_steps
             or config.train.num_epochs * batches.steps_per_epoch)
  _, most = config_lib.BOUNDS['train.num_steps']
  errors.require(
      updates <= most, f'config.train.num_epochs={config.train.num_epochs:g} '
      f'are {updates:.3g} updates, more than {most}; lower it')
  num_steps = math.ceil(round(updates, 6))  # 0.07 · 100 is more than 7
  facts = dict(num_steps=num_steps, num_layers=model.config.num_layers,
               bias_table=model.config.BIAS_TABLE)
  schedule, optimizer = build_optimizer(config.optim, **facts)
  init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
  params, notes = initial_parameters(
      model, init_key, source, source_step, init_head=config.model.init_head)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      # AdamW begins with zeros. `optimizer.init` would compile a program for
      # each shape of a parameter.
      opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype),
                             jax.eval_shape(optimizer.init, params)),
      key_data=jax.random.key_data(dropout_key))
  return dict(batches=batches, num_steps=num_steps, schedule=schedule,
              step=build_step(config, loss_fn, **facts), state=state), notes
