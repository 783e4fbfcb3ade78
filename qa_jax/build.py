"""Config → the parts of a run: tokenizer, model, parameters, objective."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qa_jax import checkpoint
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import files
from qa_jax import heads
from qa_jax import objectives
from qa_jax import optim
from qa_jax import registry
from qa_jax import update
from qa_jax import weights
from qa_jax.data import batches
from qa_jax.data import cache
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from qa_jax.data.examples import Example
from qa_jax.models import attention
from qa_jax.models import bert
from qa_jax.models import qa

SIZES = ('hidden_size', 'num_layers', 'num_heads', 'mlp_size')
# What the model reads of a batch, and of a packed one besides.
INPUTS = ('token_ids', 'token_type_ids', 'attention_mask', 'context_mask')
PACKED = tuple(f.name for f in dataclasses.fields(qa.Packed))


def is_run(directory: pathlib.Path) -> bool:
  """A workdir of ours, as opposed to a Hugging Face directory."""
  return (directory / 'config.json').is_file() and (
      directory / 'checkpoints').is_dir()


def vocabulary(config: config_lib.Config, source: pathlib.Path | None
               ) -> tokenizer_lib.Tokenizer | cache.Learned:
  """That of data.vocab, else of `source`, else to be learned."""
  directory = pathlib.Path(config.data.vocab) if config.data.vocab else source
  if directory is not None:
    if not directory.is_dir():
      raise errors.UserError(
          f'config.data.vocab={str(directory)!r} is not a directory with '
          'vocab.txt or tokenizer.json')
    if is_run(directory):
      directory = directory / 'tokenizer'
    return tokenizer_lib.from_directory(directory, config.data.lowercase)
  return cache.Learned(config.data.vocab_size, config.data.lowercase)


def tokenizer(config: config_lib.Config, source: pathlib.Path | None,
              examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
  """The same, learned from `examples` if it is to be."""
  words = vocabulary(config, source)
  return (words.tokenizer(examples) if isinstance(words, cache.Learned)
          else words)


def init_source(config: config_lib.Config) -> pathlib.Path | None:
  """The local directory of model.init_from, fetched if it is a hub id."""
  if not config.model.init_from:
    return None
  directory = pathlib.Path(config.model.init_from)
  if is_run(directory):
    return directory
  return weights.resolve(config.model.init_from)


def bert_config(config: config_lib.Config, vocab_size: int,
                source: pathlib.Path | None) -> bert.BertConfig:
  """Sizes from the preset, single fields over it, checked with `source`."""
  asked: dict[str, int] = {}
  if config.model.preset:
    if config.model.preset not in bert.PRESETS:
      raise errors.UserError(
          f'unknown config.model.preset {config.model.preset!r}'
          f'{errors.did_you_mean(config.model.preset, bert.PRESETS)}')
    asked |= bert.PRESETS[config.model.preset]
  asked |= {k: getattr(config.model, k) for k in SIZES
            if getattr(config.model, k)}
  if source is None:
    missing = [k for k in SIZES if k not in asked]
    if missing:
      raise errors.UserError(
          f'config.model.{missing[0]} is 0 and no preset or init_from gives it')
    sizes = bert.BertConfig(vocab_size=vocab_size, **asked)
  elif is_run(source):
    sizes = run_sizes(source)
  else:
    sizes = weights.read_config(source)
  for key, value in asked.items():
    if getattr(sizes, key) != value:
      raise errors.UserError(
          f'config.model: preset {config.model.preset!r} has {key} {value}, '
          f'but {source} has {getattr(sizes, key)}; set '
          "config.model.preset='' to take the checkpoint's sizes")
  if vocab_size > sizes.vocab_size:
    raise errors.UserError(
        f'the vocabulary has {vocab_size} entries, but the embeddings of '
        f'{source} only {sizes.vocab_size}')
  if sizes.hidden_size % sizes.num_heads:
    raise errors.UserError(
        f'config.model.hidden_size {sizes.hidden_size} is not divisible by '
        f'num_heads {sizes.num_heads}')
  check_positions(config, sizes)
  return dataclasses.replace(
      sizes, dropout=config.model.dropout,
      attention_dropout=config.model.attention_dropout,
      initializer_range=config.model.initializer_range)


def check_positions(config: config_lib.Config,
                    sizes: bert.BertConfig) -> None:
  """Raises a UserError for windows longer than the encoder has positions."""
  if config.data.max_length > sizes.max_position:
    raise errors.UserError(
        f'config.data.max_length={config.data.max_length} exceeds the '
        f"encoder's {sizes.max_position} positions")


def check_attention(config: config_lib.Config, sizes: bert.BertConfig, *,
                    training: bool, platform: str | None = None) -> None:
  """Raises a UserError for an attention that cannot do what is asked of it.

  `platform` is jax's name of it: None is that of this process, '' any.
  """
  attention.check(
      config.model.attention, _use(config, sizes, training, platform),
      'config.model.attention')


def usable_attention(config: config_lib.Config, sizes: bert.BertConfig,
                     ) -> tuple[config_lib.Config, str]:
  """The config of a run for inference here, and what to tell the user, or ''.

  A run may have been trained by what this machine does not have.
  """
  name = config.model.attention
  problem = (attention.misfit(name, _use(config, sizes, False, None))
             if name in attention.ATTENTION else 'is unknown here')
  if not problem:
    return config, ''
  return (
      dataclasses.replace(config, model=dataclasses.replace(
          config.model, attention='auto')),
      f'config.model.attention={name!r} of the run {problem}: auto is used')


def _use(config: config_lib.Config, sizes: bert.BertConfig, training: bool,
         platform: str | None) -> attention.Use:
  return attention.Use(
      platform=jax.default_backend() if platform is None else platform,
      length=config.data.max_length,
      head_size=sizes.hidden_size // sizes.num_heads,
      dtype=jnp.dtype(config.precision.compute_dtype),
      packed=config.data.packing, training=training,
      dropout=sizes.attention_dropout)


def run_sizes(workdir: pathlib.Path) -> bert.BertConfig:
  """The encoder's sizes that a run stored."""
  path = workdir / 'encoder.json'
  try:
    return bert.BertConfig(**files.read_object(path))
  except TypeError as e:  # a field too many or too few
    raise errors.UserError(f'{path}: {e}') from None


def model(config: config_lib.Config, sizes: bert.BertConfig) -> qa.QAModel:
  head = registry.build(heads.HEADS, config.model.head, what='head')
  return qa.QAModel(
      config=sizes, head=head,
      compute_dtype=jnp.dtype(config.precision.compute_dtype),
      attention=config.model.attention)


def parameters(net: qa.QAModel, key: jax.Array, source: pathlib.Path | None,
               *, init_head: bool = True) -> tuple[Any, list[str]]:
  """Fresh parameters, or those of `source`; and what to tell the user.

  A head comes from `source` too if it is one like `net`'s and `init_head`.
  """
  if source is None:
    return qa.init_params(net, key), []
  if not is_run(source):
    fresh = qa.init_head(net, key)
    params, notes = weights.load(source, fresh)
    return (params if init_head else {**params, 'head': fresh['head']}), notes
  stored = config_lib.read(source)
  other = model(stored, net.config)
  params = run_parameters(source, 'best', jax.eval_shape(
      lambda: qa.init_params(other, key)))
  if init_head and other.head == net.head:
    return params, []
  return {**params, 'head': qa.init_head(net, key)['head']}, [
      f'the head is fresh; {source}, whose head is {stored.model.head}, gives '
      'the encoder']


def run_step(workdir: pathlib.Path, which: str) -> int:
  """The step of a run's checkpoint 'best', 'last' or a step."""
  store = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
  try:
    return store.resolve(which)
  finally:
    store.close()


def run_parameters(workdir: pathlib.Path, which: str, shapes: Any) -> Any:
  """The parameters of a run's checkpoint 'best', 'last' or a step."""
  store = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
  try:
    return store.restore_params(store.resolve(which), jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype,
            sharding=jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0])),
        shapes))
  finally:
    store.close()


def optimizer(config: config_lib.Optim, *, num_steps: int, num_layers: int,
              learning_rate: jax.Array | None = None,
              weight_decay: jax.Array | None = None
              ) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The learning rate by step, and AdamW with it; rates that are given stand
  in for the config's."""
  if learning_rate is None:
    learning_rate, weight_decay = config.learning_rate, config.weight_decay
  schedule = optim.make_schedule(
      config.schedule, learning_rate=learning_rate, num_steps=num_steps,
      warmup_fraction=config.warmup_fraction)
  return schedule, optim.adamw(
      schedule, weight_decay=weight_decay, clip_norm=config.clip_norm,
      layer_decay=config.layer_decay, bias_correction=config.bias_correction,
      eps=config.eps, num_layers=num_layers)


def write_run(directory: pathlib.Path, config: config_lib.Config,
              sizes: bert.BertConfig, words: tokenizer_lib.Tokenizer,
              record: Mapping[str, Any]) -> None:
  """What a run directory holds from its first moment; `record` is run.json."""
  words.save(directory / 'tokenizer')
  files.write_json(directory / 'encoder.json', dataclasses.asdict(sizes))
  files.write_json(directory / 'run.json', record)
  files.write_json(directory / 'config.json', config.to_dict())


def make_windows(config: config_lib.Config, examples: Sequence[Example],
                 words: tokenizer_lib.Tokenizer) -> windows.WindowSet:
  return windows.make_windows(examples, words, **lengths(config))


def lengths(config: config_lib.Config) -> dict[str, int]:
  """How windows are cut, in tokens."""
  return {'max_length': config.data.max_length,
          'window_overlap': config.data.window_overlap,
          'max_question_length': config.data.max_question_length}


def buckets(config: config_lib.Config) -> tuple[int, ...]:
  return batches.check_buckets(config.data.buckets, config.data.max_length)


def eval_batch_size(config: config_lib.Config, devices: int) -> int:
  """Windows of max_length in a batch of evaluation, over all devices.

  On a CPU a batch of 1,500 tokens stays in its caches; packing wants more
  windows to choose from.
  """
  few = jax.default_backend() == 'cpu' and not config.data.packing
  return config.train.eval_batch_size or devices * (4 if few else 32)


def model_inputs(batch: Mapping[str, jax.Array]) -> dict[str, Any]:
  """The entries of a batch that the model reads."""
  inputs = {k: batch[k] for k in INPUTS}
  if 'segment_ids' in batch:
    inputs['packed'] = qa.Packed(**{k: batch[k] for k in PACKED})
  return inputs


def loss(net: qa.QAModel, objective: objectives.Objective,
         decode: config_lib.Decode) -> update.Loss:
  """What a step minimises, and what it logs beside."""
  def loss_fn(params, batch, key):
    scores = net.apply(
        {'params': params}, **model_inputs(batch), dropout_key=key,
        rows=batch['row'], dropout_lengths=batch.get('dropout_lengths'),
        gold_start=batch['start_positions'])
    rows = {'loss': objective.loss(scores, batch)}
    if not scores.conditional:
      rows['valid_mass'] = objectives.valid_mass(
          jax.lax.stop_gradient(scores), batch,
          max_answer_length=decode.max_answer_length)
    return rows
  return loss_fn
