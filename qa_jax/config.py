"""The fields of a config: their names, types, defaults, meanings and bounds.

A config file starts from `defaults()` and assigns the fields that differ:

  c = config.defaults()
  c.model.preset = 'base'
  c.data.buckets = (128, 256)

`check_config` turns it into the frozen dataclasses of this file. The comments
above the fields, in whole sentences, and the ranges of numbers in BOUNDS are
also the source of docs/configuration.md.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import json
import math
import operator
import re
from typing import Any, get_type_hints

import ml_collections

from qa_jax import errors


@dataclasses.dataclass(frozen=True)
class Model:
  """The encoder, its initial parameters and the span head."""

  # Spec string of the encoder, an entry of ENCODERS. '' takes the encoder of
  # init_from, and bert from scratch.
  encoder: str = ''
  # Name of a set of encoder sizes: tiny, mini, small, medium, base, large or
  # minilm_l6. '' takes the four sizes below, or those of init_from.
  preset: str = 'tiny'
  # Width of the hidden states. 0 takes it from preset or init_from.
  hidden_size: int = 0
  # Number of transformer layers. 0 takes it from preset or init_from. Fewer
  # than init_from has take its first layers, with a fresh head.
  num_layers: int = 0
  # Number of attention heads a layer. 0 takes it from preset or init_from.
  num_heads: int = 0
  # Width of the inner layer of the MLPs. 0 takes it from preset or init_from.
  mlp_size: int = 0
  # Dropout rate of hidden states while training.
  dropout: float = 0.1
  # Dropout rate of attention weights while training.
  attention_dropout: float = 0.1
  # Implementation of attention: auto, xla, cudnn, pallas, pallas_tpu or
  # chunked. All compute one result; auto chooses what suits device, config and
  # row length.
  attention: str = 'auto'
  # Standard deviation, before a cut at two of them, of the weights of an
  # encoder from scratch.
  initializer_range: float = 0.02
  # Base of the sinusoids that learned positions start from; Vaswani et al.
  # (2017) have 10000. 0 draws them as the other weights; else at least 1.
  position_base: float = 0.0
  # Whether queries and keys of an encoder from scratch start with equal
  # weights.
  equal_query_key: bool = False
  # Source of the initial parameters: a checkpoint directory of Hugging Face or
  # TensorFlow, a hub id, or a run directory. '' trains from scratch.
  init_from: str = ''
  # Whether the head is taken from init_from too. False draws a fresh head.
  init_head: bool = True
  # Spec string of the span head, an entry of HEADS.
  head: str = 'independent'


@dataclasses.dataclass(frozen=True)
class Decode:
  """The search for n-best candidates and the choice of the answer."""

  # Length of the longest candidate in tokens, counting both ends.
  max_answer_length: int = 30
  # Number of candidates of each window and each question.
  n_best: int = 20
  # Spec string of the span search, an entry of SEARCHES: dense, banded,
  # two_stage, top_k, argmax or beam.
  search: str = 'two_stage'
  # Null rule, which scores "no answer": never, min_null, margin, classifier,
  # product or posterior.
  null_rule: str = 'min_null'
  # Null threshold. A question gets no answer if its null-rule score exceeds it.
  null_threshold: float = 0.0
  # Merging of n-best candidates: none, or surface_form, by equal text.
  merge: str = 'none'
  # Whether candidates begin and end at word boundaries only, as align_to_words
  # of transformers. Words are separated by white space and punctuation.
  whole_words: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
  """The examples, and the windows that are cut from them."""

  # Data SPEC of the training examples.
  train: str = ''
  # Data SPEC of the examples to evaluate on. '' skips evaluation in training.
  eval: str = ''
  # Length of the longest window in tokens, [CLS] and [SEP] included.
  max_length: int = 384
  # Number of context tokens that neighbouring windows share.
  window_overlap: int = 128
  # Length in tokens to which a question is cut.
  max_question_length: int = 64
  # Whether the tokenizer lower-cases text. A learned tokenizer then strips
  # accents, too; a tokenizer of a checkpoint has its own setting for them.
  lowercase: bool = True
  # Directory with vocab.txt or tokenizer.json, or a run directory. '' takes
  # the vocabulary of model.init_from, or learns one from data.train.
  vocab: str = ''
  # Most entries that a learned vocabulary has. It keeps each letter of the
  # data, alone and within a word, even if these are more.
  vocab_size: int = 2000
  # Lengths in tokens that batches are padded to. The longest is max_length;
  # lengths above it are left out. () is the platform's default, max_length
  # alone on a CPU, else four lengths.
  buckets: tuple = ()
  # Packing of several windows into rows of max_length tokens: False, True (with
  # batch_size windows in each update), rows (with a fixed number of rows, as
  # many as batch_size windows need on average), or auto. auto is False on a CPU
  # and for an attention or objective that takes no packed rows, else rows.
  packing: bool | str = 'auto'
  # Training on windows that do not hold the answer of their question: cls
  # labels them with the span at [CLS], drop leaves them out.
  windows_without_answer: str = 'cls'
  # Cache of windows: a directory, none, or auto, the user's cache directory.
  cache: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Train:
  """The length of training, its batches, and its regular work."""

  # Number of windows in an update, over all devices and micro-steps. If
  # data.packing is rows, the mean number comes as near to it as a whole number
  # of packed rows for each device and micro-step allows.
  batch_size: int = 32
  # Number of windows of max_length in an evaluation batch, over all devices;
  # batches of shorter windows have as many tokens. 0 is the platform's
  # default.
  eval_batch_size: int = 0
  # Number of passes over the training windows. Set either this or num_steps.
  num_epochs: float = 0.0
  # Number of updates. Set either this or num_epochs.
  num_steps: int = 0
  # Number of micro-steps whose gradients are summed in an update.
  grad_accumulation: int = 1
  # Largest number of updates that one call of the device makes. They have one
  # batch shape, and no evaluation or checkpoint between them. 0 is the
  # platform's default, 1 on a CPU, else 4 if all batches have one shape.
  updates_per_dispatch: int = 0
  # Number of updates between evaluations. 0 evaluates at the end only.
  eval_every_steps: int = 0
  # Number of updates between checkpoints.
  checkpoint_every_steps: int = 500
  # Number of updates between lines of training metrics.
  log_every_steps: int = 50
  # Number of updates in a row that may be skipped, as the loss or gradient is
  # not finite or the gradient norm exceeds optim.skip_norm. One more ends the
  # run.
  max_skipped: int = 10
  # Seconds after which a step (or the updates of one dispatch) that hangs ends
  # the process. 0 waits for ever.
  step_timeout_seconds: float = 1800.0


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW, its learning rates, and the limits of the gradient."""

  # Highest learning rate, after the warm-up.
  learning_rate: float = 5e-5
  # Fraction of all updates in which the learning rate rises from 0.
  warmup_fraction: float = 0.1
  # Learning-rate schedule after the warm-up: linear, bert, cosine or constant.
  schedule: str = 'linear'
  # Decoupled weight decay of all parameters but biases and LayerNorms.
  weight_decay: float = 0.01
  # Norm to which a longer gradient is scaled down. 0 turns clipping off.
  clip_norm: float = 1.0
  # An update is skipped if its unclipped gradient is longer. 0 skips none.
  skip_norm: float = 0.0
  # Factor on the learning rate for each layer below the head; 1 has no effect.
  layer_decay: float = 1.0
  # Whether only the head is trained and the encoder keeps its weights.
  freeze_encoder: bool = False
  # Whether Adam corrects the bias of its moments; BERT does not (eps 1e-6).
  bias_correction: bool = True
  # Adam's epsilon, added to the root of the second moment.
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """The devices of a run and the way a step is spread over them."""

  # Wrapper of the train step: pmap, mesh or jit (one device).
  mode: str = 'pmap'
  # Number of devices, of all processes together. 0 takes all of them.
  num_devices: int = 0
  # Sizes of the axes data and fsdp for mode mesh. -1 takes the devices left.
  mesh: Mapping = dataclasses.field(
      default_factory=lambda: {'data': -1, 'fsdp': 1})


@dataclasses.dataclass(frozen=True)
class Precision:
  """The floating-point types of a run."""

  # Type of activations and matrix products: float32, tf32, bfloat16 or auto.
  # Parameters stay float32. tf32 is float32 with products of the encoder that a
  # GPU rounds to TF32. auto is bfloat16 on a GPU or TPU and float32 on a CPU.
  compute_dtype: str = 'auto'
  # Whether a GPU computes only with operations whose results repeat bit for
  # bit. Slower. A CPU repeats its results anyway.
  deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
  """All fields of a run."""

  # Seed of every random draw: parameters, order of the data, dropout.
  seed: int = 0
  # Encoder, initial parameters and span head.
  model: Model = Model()
  # Spec string of the training objective, an entry of OBJECTIVES.
  objective: str = 'cross_entropy'
  # Search for candidates and choice of the answer.
  decode: Decode = Decode()
  # Examples and windows.
  data: Data = Data()
  # Length of training, batches, and regular work.
  train: Train = Train()
  # Optimizer.
  optim: Optim = Optim()
  # Devices.
  parallel: ParallelConfig = ParallelConfig()
  # Floating-point types.
  precision: Precision = Precision()

  def to_dict(self) -> dict[str, Any]:
    """Returns nested dicts that JSON can hold; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


# Python reads bytes that are not UTF-8 as these code points.
SURROGATE = re.compile('[\ud800-\udfff]')

PACKINGS = (False, True, 'rows', 'auto')
COMPUTE_DTYPES = ('float32', 'tf32', 'bfloat16', 'auto')

# Field → the lowest and the highest value allowed; None is no limit.
BOUNDS = {
    'seed': (0, 2**31 - 1), 'model.hidden_size': (0, 2**16),
    'model.num_layers': (0, 1000), 'model.num_heads': (0, 2**16),
    'model.mlp_size': (0, 2**20), 'model.initializer_range': (1e-6, 1),
    'model.position_base': (0, None),
    'model.dropout': (0, 0.9), 'model.attention_dropout': (0, 0.9),
    'decode.max_answer_length': (1, 10**6), 'decode.n_best': (1, 10**6),
    'data.max_length': (8, 8192), 'data.vocab_size': (100, 10**6),
    'train.batch_size': (1, 10**6), 'train.eval_batch_size': (0, None),
    'train.num_epochs': (0, None), 'train.num_steps': (0, 2**31 - 1),
    'train.grad_accumulation': (1, None),
    'train.updates_per_dispatch': (0, 16), 'train.eval_every_steps': (0, None),
    'train.checkpoint_every_steps': (1, None),
    'train.log_every_steps': (1, None), 'train.max_skipped': (0, None),
    'train.step_timeout_seconds': (0, None), 'optim.learning_rate': (0, None),
    'optim.warmup_fraction': (0, 1), 'optim.weight_decay': (0, 1000),
    'optim.clip_norm': (0, None), 'optim.skip_norm': (0, None),
    'optim.layer_decay': (0, 1), 'optim.eps': (1e-12, 1),
    'parallel.num_devices': (0, None)}


def defaults() -> ml_collections.ConfigDict:
  """Returns a new ConfigDict of all fields with their default values."""
  fields = dataclasses.asdict(Config())
  # A ConfigDict holds each field to the type of its default.
  fields['data']['packing'] = ml_collections.FieldReference(
      fields['data']['packing'], field_type=object)
  return ml_collections.ConfigDict(fields)


def check_config(
    config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
  """Returns the checked Config of nested fields; missing fields get defaults.

  Raises:
    UserError: a field is unknown, has the wrong type or a value out of bounds,
      or not exactly one of train.num_epochs and train.num_steps is set.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  checked = _fill(Config, config, '')
  for path, (low, high) in BOUNDS.items():
    value = operator.attrgetter(path)(checked)
    if value < low or (high is not None and value > high):
      bound = f'at least {low}' if high is None else f'in {low} … {high}'
      raise errors.UserError(f'config.{path}={value} must be {bound}')
  train = checked.train
  if (train.num_epochs > 0) == (train.num_steps > 0):
    raise errors.UserError(
        f'set one of config.train.num_epochs ({train.num_epochs}) and '
        f'config.train.num_steps ({train.num_steps}), the other to 0')
  if 0 < checked.model.position_base < 1:
    raise errors.UserError(
        f'config.model.position_base={checked.model.position_base:g} must be '
        'at least 1, or 0 for positions that are drawn')
  if checked.precision.compute_dtype not in COMPUTE_DTYPES:
    raise errors.UserError(
        f'config.precision.compute_dtype={checked.precision.compute_dtype!r}; '
        f'choose {", ".join(COMPUTE_DTYPES[:-1])} or {COMPUTE_DTYPES[-1]}')
  if checked.data.packing not in PACKINGS:
    raise errors.UserError(
        f'config.data.packing={checked.data.packing!r}; choose '
        f'{", ".join(map(str, PACKINGS[:-1]))} or {PACKINGS[-1]}')
  return checked


def paths() -> list[str]:
  """Returns the dotted names of all fields, such as 'model.head'."""
  return [f'{group}{name}' for group, fields in [('', Config)] + [
      (f'{name}.', kind) for name, kind in get_type_hints(Config).items()
      if dataclasses.is_dataclass(kind)]
          for name, kind in get_type_hints(fields).items()
          if not dataclasses.is_dataclass(kind)]


def packing(config: Config, platform: str) -> bool | str:
  """Returns data.packing, with 'auto' resolved for a platform.

  `platform` is in the naming of jax; '' is unknown yet and resolves to False.
  """
  if config.data.packing != 'auto':
    return config.data.packing
  padded = (platform in ('', 'cpu') or config.model.attention == 'cudnn'
            # Such an objective normalises over padding.
            or re.search(r'domain *= *\\*[\'"]all', config.objective))
  return False if padded else 'rows'


def buckets(config: Config, platform: str) -> tuple[int, ...]:
  """Returns data.buckets, with () resolved for a platform, as in `packing`.

  On an accelerator they are quarters of data.max_length, rounded up to
  multiples of 64, the tile of the attention kernels.
  """
  longest = config.data.max_length
  if config.data.buckets or platform in ('', 'cpu') or packing(
      config, platform):
    return config.data.buckets or (longest,)
  return tuple(sorted({min(longest, -(-longest * n // 4 // 64) * 64)
                       for n in (1, 2, 3, 4)}))


def compute_dtype(config: Config, platform: str) -> str:
  """Returns precision.compute_dtype, with 'auto' resolved for a platform."""
  name = config.precision.compute_dtype
  if name != 'auto':
    return name
  return 'float32' if platform in ('', 'cpu') else 'bfloat16'


def platform_choices(config: Config, platform: str) -> dict[str, Any]:
  """Returns the fields of training that depend on the platform, resolved."""
  return {'data.packing': packing(config, platform),
          'data.buckets': list(buckets(config, platform)),
          'precision.compute_dtype': compute_dtype(config, platform)}


def _fill(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints, filled = get_type_hints(cls), {}
  for key, value in values.items():
    where = f'{path}{key}'
    if key not in hints:
      raise errors.UserError(
          f'config has no field {where!r}'
          f'{errors.did_you_mean(key, hints, () if path else paths())}')
    kind = hints[key]
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping):
        raise errors.UserError(
            f'config.{where} is {value!r}, expected fields '
            f'{", ".join(get_type_hints(kind))}')
      filled[key] = _fill(kind, value, where + '.')
    else:
      filled[key] = _cast(kind, value, where)
  return cls(**filled)


def _cast(kind: type, value: Any, where: str) -> Any:
  if kind is float and type(value) is int and abs(value) < 2**1023:
    return float(value)
  if kind is tuple and isinstance(value, (list, tuple)):
    if all(type(v) is int for v in value):
      return tuple(value)
  elif kind is Mapping and isinstance(value, Mapping):
    if all(type(v) is int for v in value.values()) and all(
        isinstance(k, str) and not SURROGATE.search(k) for k in value):
      return dict(value)
  elif kind == bool | str and isinstance(value, bool | str):
    return {'True': True, 'False': False}.get(value, value)
  elif kind is str and isinstance(value, str) and SURROGATE.search(value):
    raise errors.UserError(
        f'config.{where}={value!r} is not UTF-8, as config.json is; if it is '
        'the name of a file, rename that')
  elif type(value) is kind and (kind is not float or math.isfinite(value)):
    return value
  wanted = {tuple: 'a list of ints', Mapping: 'names to ints',
            bool | str: 'bool or str',
            float: 'a finite float'}.get(kind) or kind.__name__
  raise errors.UserError(f'config.{where}={value!r}, expected {wanted}')


def spec_strings(config: Config) -> dict[str, str]:
  """Returns the fields that may name importable code, with their values."""
  return {path: operator.attrgetter(path)(config) for path in (
      'model.encoder', 'model.head', 'objective', 'decode.search',
      'decode.null_rule', 'data.train', 'data.eval')}


def override(fields: Mapping[str, Any], changes: Mapping[str, Any]
             ) -> dict[str, Any]:
  """Returns a copy of nested `fields` with `changes`, {'model.head': value}.

  Groups that `fields` lacks are added.
  """
  out: dict[str, Any] = copy.deepcopy(dict(fields))
  for path, value in changes.items():
    *groups, last = path.split('.')
    inner = out
    for group in groups:
      inner = inner.setdefault(group, {})
      if not isinstance(inner, dict):
        raise errors.UserError(f'config has no field {path!r}')
    inner[last] = value
  return out


def key(config: Config, *, without: Sequence[str] = ()) -> str:
  """Returns a text that is equal for configs with equal fields.

  The fields and groups of fields `without`, such as 'optim.learning_rate' or
  'decode', are left out.
  """
  fields = override(config.to_dict(), dict.fromkeys(without))
  return json.dumps(fields, sort_keys=True)


def differences(stored: Mapping[str, Any], new: Mapping[str, Any],
                path: str = '') -> list[tuple[str, Any, Any]]:
  """Returns (dotted path, stored value or None, new) of fields that differ."""
  out: list[tuple[str, Any, Any]] = []
  for key in dict.fromkeys([*stored, *new]):
    a, b = stored.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      out += differences(a, b, f'{path}{key}.')
    elif a != b:
      out.append((path + key, a, b))
  return out
