"""The fields of a config: names, types, bounds. Config files fill them in.

A config file is an ml_collections.ConfigDict; `check` turns it into these
frozen dataclasses, so that a typo or a wrong type is one line before any work.
"""

from collections.abc import Mapping
import copy
import dataclasses
import json
import re
from typing import Any, get_type_hints

import ml_collections

from qa_jax import errors


@dataclasses.dataclass(frozen=True)
class Model:
  preset: str = 'tiny'
  hidden_size: int = 0  # 0: the preset's, or that of init_from
  num_layers: int = 0
  num_heads: int = 0
  mlp_size: int = 0
  dropout: float = 0.1
  attention_dropout: float = 0.1
  attention: str = 'auto'  # what computes it; the result is one
  initializer_range: float = 0.02  # of an encoder from scratch
  init_from: str = ''  # '': from scratch
  init_head: bool = True  # False: a fresh head, whatever init_from has
  head: str = 'independent'


@dataclasses.dataclass(frozen=True)
class Decode:
  max_answer_length: int = 30  # tokens, counting both ends
  n_best: int = 20
  search: str = 'two_stage'
  null_rule: str = 'min_null'
  null_threshold: float = 0.0  # no answer iff the rule's score exceeds it
  merge: str = 'none'  # 'surface_form': equal texts of the n-best are one


@dataclasses.dataclass(frozen=True)
class Data:
  train: str = ''
  eval: str = ''  # '': no evaluation while training
  max_length: int = 384
  window_overlap: int = 128
  max_question_length: int = 64
  lowercase: bool = True
  vocab: str = ''  # '': of init_from, else learned from data.train
  vocab_size: int = 2000  # of a learned vocabulary
  buckets: tuple = ()  # batch lengths; max_length is always one
  packing: bool = False  # several windows a row of max_length, no buckets
  windows_without_answer: str = 'cls'
  cache: str = 'auto'  # of windows: the user's own, 'none', or a directory


@dataclasses.dataclass(frozen=True)
class Train:
  batch_size: int = 32  # windows per update over all devices
  # Windows of max_length a batch; of shorter ones as many more, so that all
  # batches have as many tokens, rounded up to a multiple of the devices.
  eval_batch_size: int = 0  # 0: what suits the platform, as build.py says
  num_epochs: float = 0.0  # one of num_epochs and num_steps is set
  num_steps: int = 0
  grad_accumulation: int = 1
  eval_every_steps: int = 0  # 0: at the end only
  checkpoint_every_steps: int = 500
  log_every_steps: int = 50
  max_skipped: int = 10  # updates in a row that are not finite
  step_timeout_seconds: float = 1800.0  # ends a run that hangs; 0: never


@dataclasses.dataclass(frozen=True)
class Optim:
  learning_rate: float = 5e-5
  warmup_fraction: float = 0.1
  schedule: str = 'linear'
  weight_decay: float = 0.01
  clip_norm: float = 1.0  # 0: no clipping
  skip_norm: float = 0.0  # longer gradients are no updates; 0: all are
  layer_decay: float = 1.0
  bias_correction: bool = True  # of Adam; False and eps 1e-6 as BERT's code
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  mode: str = 'pmap'
  num_devices: int = 0  # of all processes together; 0: all
  mesh: Mapping = dataclasses.field(  # mode 'mesh': axis sizes, one may be -1
      default_factory=lambda: {'data': -1, 'fsdp': 1})


@dataclasses.dataclass(frozen=True)
class Precision:
  compute_dtype: str = 'float32'  # or 'bfloat16'; parameters stay float32


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = 0
  model: Model = Model()
  objective: str = 'cross_entropy'
  decode: Decode = Decode()
  data: Data = Data()
  train: Train = Train()
  optim: Optim = Optim()
  parallel: ParallelConfig = ParallelConfig()
  precision: Precision = Precision()

  def to_dict(self) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(self)))

SURROGATE = re.compile('[\ud800-\udfff]')  # what stands for other bytes

# field → (lowest, highest) allowed.
BOUNDS = {
    'seed': (0, 2**31 - 1),
    'model.hidden_size': (0, None), 'model.num_layers': (0, None),
    'model.num_heads': (0, None), 'model.mlp_size': (0, None),
    'model.initializer_range': (1e-6, 1),
    'model.dropout': (0, 0.9), 'model.attention_dropout': (0, 0.9),
    'decode.max_answer_length': (1, None), 'decode.n_best': (1, None),
    'data.max_length': (8, 512), 'data.vocab_size': (100, None),
    'train.batch_size': (1, None), 'train.eval_batch_size': (0, None),
    'train.num_epochs': (0, None), 'train.num_steps': (0, None),
    'train.grad_accumulation': (1, None),
    'train.eval_every_steps': (0, None),
    'train.checkpoint_every_steps': (1, None),
    'train.log_every_steps': (1, None), 'train.max_skipped': (0, None),
    'train.step_timeout_seconds': (0, None),
    'optim.learning_rate': (0, None), 'optim.warmup_fraction': (0, 1),
    'optim.weight_decay': (0, None), 'optim.clip_norm': (0, None),
    'optim.skip_norm': (0, None),
    'optim.layer_decay': (0, 1), 'optim.eps': (1e-12, 1),
    'parallel.num_devices': (0, None),
}


def check_config(config: Mapping[str, Any]) -> Config:
  """A ConfigDict or plain nested dict → Config.

  Raises:
    UserError: unknown field, wrong type, value out of bounds, or both or
      neither of train.num_epochs and train.num_steps set.
  """
  checked = _fill(Config, config, '')
  for path, (low, high) in BOUNDS.items():
    value: Any = checked
    for key in path.split('.'):
      value = getattr(value, key)
    if value < low or (high is not None and value > high):
      bound = f'at least {low}' if high is None else f'in {low} … {high}'
      raise errors.UserError(f'config.{path}={value} must be {bound}')
  train = checked.train
  if (train.num_epochs > 0) == (train.num_steps > 0):
    raise errors.UserError(
        f'set one of config.train.num_epochs ({train.num_epochs}) and '
        f'config.train.num_steps ({train.num_steps}), the other to 0')
  if checked.precision.compute_dtype not in ('float32', 'bfloat16'):
    raise errors.UserError(
        f'config.precision.compute_dtype='
        f'{checked.precision.compute_dtype!r}; choose float32 or bfloat16')
  return checked


def _fill(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints = get_type_hints(cls)
  filled = {}
  for key, value in values.items():
    where = f'{path}{key}'
    if key not in hints:
      raise errors.UserError(
          f'config has no field {where!r}{errors.did_you_mean(key, hints)}')
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
  elif kind is str and isinstance(value, str) and SURROGATE.search(value):
    raise errors.UserError(
        f'config.{where}={value!r} is not UTF-8, as config.json is; if it is '
        'the name of a file, rename that')
  elif type(value) is kind and value == value:  # not NaN
    return value
  wanted = {tuple: 'a list of ints', Mapping: 'names to ints'}.get(
      kind, kind.__name__)
  raise errors.UserError(f'config.{where}={value!r}, expected {wanted}')


def override(fields: Mapping[str, Any],
             changes: Mapping[str, Any]) -> dict[str, Any]:
  """Nested fields with dotted ones replaced, or added if there are none."""
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


def differences(stored: Mapping[str, Any], new: Mapping[str, Any],
                path: str = '') -> list[tuple[str, Any, Any]]:
  """[(field, stored value, new value)] of two nested dicts."""
  out: list[tuple[str, Any, Any]] = []
  for key in dict.fromkeys([*stored, *new]):
    a, b = stored.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      out += differences(a, b, f'{path}{key}.')
    elif a != b:
      out.append((path + key, a, b))
  return out


def defaults() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults, for a config file to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))
