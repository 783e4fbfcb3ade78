"""Checkpoint directories of Hugging Face and TensorFlow, and their conversion.

`resolve_source` finds the directory, `read_config` reads the sizes of its
encoder, and `load_parameters` reads its weights into a tree of parameters.
Nothing in a directory is executed: safetensors and TensorFlow's tensor bundles
are read, pickles are refused. `qa_jax.export.hugging_face` writes a directory.

Common names are those of Hugging Face without the prefix of the encoder, such
as `bert.`; DistilBERT's are BERT's.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
import shlex
import types
from typing import Any, NamedTuple

import flax.traverse_util
import huggingface_hub
import jax
import ml_dtypes  # noqa: F401  lets safetensors read bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import manifest
from qa_jax.checkpoints import weight_names
from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.checkpoints.architectures import REFUSED
from qa_jax.checkpoints.architectures import Architecture
from qa_jax.checkpoints.architectures import bert
from qa_jax.io import files
from qa_jax.models import encoders

_, MAX_LAYERS = config_lib.BOUNDS['model.num_layers']

Arrays = Mapping[str, np.ndarray]

FETCHED = ('config.json', '*.safetensors', '*.safetensors.index.json',
           'vocab.txt', 'tokenizer.json', 'tokenizer_config.json',
           'vocab.json', 'merges.txt',
           'special_tokens_map.json', 'added_tokens.json',
           'adapter_config.json')
# The program that the refusal of pickled weights advises: it is never run here.
CONVERT = (
    'import pathlib, sys, torch, safetensors.torch; '
    'd = pathlib.Path(sys.argv[1]); safetensors.torch.save_file('
    '{k: v.contiguous().clone() for f in d.glob(\'pytorch_model*.bin\') '
    'for k, v in torch.load(f, map_location=\'cpu\', weights_only=True)'
    '.items()}, d / \'model.safetensors\', {\'format\': \'pt\'})')
FRESH_HEAD = 'the checkpoint has no span head: S and E are freshly initialised'


class ConfigFile(NamedTuple):
  """The config.json, or TensorFlow's bert_config.json, of a checkpoint."""

  path: pathlib.Path
  fields: Mapping[str, Any]
  kind: str  # key of ARCHITECTURES

  @property
  def class_name(self) -> str:
    """Returns the name of the model's class, '' for none."""
    return _class_name(self.fields)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The config and the tensors of a checkpoint directory."""

  directory: pathlib.Path
  config: ConfigFile
  sizes: encoders.EncoderConfig
  tensors: Arrays  # by common names
  notes: Sequence[str]  # for the user

  @property
  def architecture(self) -> Architecture:
    return ARCHITECTURES[self.config.kind]


def resolve_source(source: str) -> pathlib.Path:
  """Returns the directory of a checkpoint, fetched first if it is a hub id.

  Raises:
    UserError: `source` is neither a checkpoint directory nor a hub id, or the
      hub cannot be reached and its cache does not hold the checkpoint.
  """
  directory = pathlib.Path(source)
  if source and directory.is_dir():
    if not any((directory / name).is_file()
               for name in ('config.json', 'bert_config.json')):
      raise errors.UserError(
          f'{source} has no config.json: it is neither a run nor a Hugging '
          'Face checkpoint directory; nor has it the bert_config.json of a '
          'TensorFlow BERT')
    return directory
  if directory.exists() or not re.fullmatch(
      r'[\w.-]+(/[\w.-]+)?', source) or source.startswith(('.', '/')):
    raise errors.UserError(
        f'{source or "an empty path"} is not a directory with a checkpoint, '
        'nor a hub id')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        source, allow_patterns=list(FETCHED), etag_timeout=5))
  except Exception as e:  # the hub's errors share no base class
    raise errors.UserError(
        f'{source!r} is not a local directory and could not be fetched from '
        f'the hub ({type(e).__name__}); check the name and the network'
    ) from None


def file_hashes(directory: pathlib.Path) -> dict[str, str]:
  """Returns {file: sha256} of a checkpoint directory or a run's manifests."""
  patterns = (*FETCHED, 'bert_config.json', '*.index', '*.data-*',
              f'checkpoints/*/{manifest.NAME}')
  return {path.relative_to(directory).as_posix(): files.sha256(path)
          for pattern in patterns for path in sorted(directory.glob(pattern))}


def read_config(directory: pathlib.Path, pad_id: int | None = None
                ) -> encoders.EncoderConfig:
  """Reads encoder sizes from config.json, or TensorFlow's bert_config.json.

  GELU is the erf form for both, as in transformers. `pad_id` is that of the
  checkpoint's tokenizer.

  Raises:
    UserError: the architecture is not supported, or a field that it needs is
      missing or out of range, or has another `pad_id`.
  """
  file = _read_config_file(directory)
  if pad_id is not None:
    check_padding(file, pad_id)
  return encoder_config(file)


def encoder_config(file: ConfigFile) -> encoders.EncoderConfig:
  """Returns what `read_config` reads in a file, and raises as it does."""
  path, config, kind = file
  architecture = ARCHITECTURES[kind]
  for key, supported in architecture.supported.items():
    value = config.get(key, supported)
    if value != supported:
      raise errors.UserError(
          f'{path}: {key} {value!r} is not supported; only {supported!r} is')
  names = architecture.fields
  for name in names.values():
    if type(config.get(name)) is not int or config[name] < 1:
      raise errors.UserError(
          f'{path}: {name} is {config.get(name)!r}, expected a positive int')
  sizes = {ours: config[name] for ours, name in names.items()}
  if sizes['num_layers'] > MAX_LAYERS:
    raise errors.UserError(
        f'{path}: {names["num_layers"]} is {sizes["num_layers"]}, expected at '
        f'most {MAX_LAYERS}')
  hidden_size, num_heads = sizes['hidden_size'], sizes['num_heads']
  if hidden_size % num_heads:
    raise errors.UserError(
        f'{path}: {names["hidden_size"]} {hidden_size} is not divisible by '
        f'{names["num_heads"]} {num_heads}')
  eps = config.get(architecture.eps, architecture.default_eps)
  if type(eps) not in (int, float) or not 0 < eps < 1:
    raise errors.UserError(
        f'{path}: {architecture.eps} is {eps!r}, expected a number in (0, 1)')
  sizes['max_position'] -= _unused_positions(path, config, kind)
  errors.require(
      sizes['max_position'] > 0,
      f'{path}: {names["max_position"]} {config[names["max_position"]]} leaves '
      'no position behind those of padding')
  try:
    return architecture.encoder(**{
        **sizes, 'layer_norm_eps': float(eps),
        'architecture': architecture.exported_as or kind,
        **architecture.read(config)})
  except errors.UserError as e:
    raise errors.UserError(f'{path}: {e}') from None


def _unused_positions(path: pathlib.Path, config: Mapping[str, Any],
                      kind: str) -> int:
  """Returns the number of first rows of the position table without use."""
  if not ARCHITECTURES[kind].positions_after_pad:
    return 0
  pad = config.get('pad_token_id', 1)  # 1 is the default of transformers
  errors.require(type(pad) is int and pad >= 0,
                 f'{path}: pad_token_id is {pad!r}, expected an int ≥ 0')
  return pad + 1


def check_padding(file: ConfigFile, pad_id: int) -> None:
  """Raises a UserError if another token than padding has padding's position.

  RoBERTa and MPNet of transformers count positions without the tokens whose id
  is pad_token_id of config.json.
  """
  stored = _unused_positions(*file) - 1
  errors.require(
      stored in (-1, pad_id),
      f'{file.path}: pad_token_id is {stored}, but the tokenizer pads with '
      f'{pad_id}; transformers would give each token {stored} of a text the '
      'position of padding: correct one of the files')


def _read_config_file(directory: pathlib.Path) -> ConfigFile:
  errors.require(
      not (adapter := directory / 'adapter_config.json').is_file(),
      f'{adapter}: adapters are not supported; merge this one into the weights '
      'by merge_and_unload() of peft')
  path = directory / 'config.json'
  if not path.is_file():
    path = directory / 'bert_config.json'
    return ConfigFile(path, files.read_object(path), 'bert')
  config = files.read_object(path)
  kind = config.get('model_type')
  kind = _infer_model_type(config) if kind is None else kind
  if not isinstance(kind, str) or kind not in ARCHITECTURES:
    classes = _class_name(config)
    raise errors.UserError(
        f'{path}: model_type {config.get("model_type")!r}'
        f'{f" of {classes}" * bool(classes)} is not supported; only '
        f'{", ".join(map(repr, ARCHITECTURES))} are'
        f'{REFUSED.get(str(kind), "")}')
  return ConfigFile(path, config, kind)


def _infer_model_type(config: Mapping[str, Any]) -> str | None:
  """Returns the model_type of a config without one, as early configs are.

  A config that names no class either is BERT's if it has all of its sizes:
  Google's bert_config.json under the name config.json.
  """
  name = _class_name(config)
  if not name and config.keys() >= {*bert.FIELDS.values()}:
    return 'bert'
  return next((kind for kind, v in ARCHITECTURES.items()
               if re.fullmatch(rf'{v.class_prefix}(For\w+|(LMHead)?Model)',
                               name)),
              None)


def _class_name(config: Mapping[str, Any]) -> str:
  """Returns the first class name in `architectures`, '' if there is none."""
  names = config.get('architectures')
  first = names[0] if isinstance(names, list) and names else ''
  return first if isinstance(first, str) and first.isidentifier() else ''


def read_checkpoint(directory: pathlib.Path) -> Checkpoint:
  """Reads the config and the tensors of a checkpoint directory.

  Raises:
    UserError: the config is not one that `read_config` reads, a file is
      damaged, a weight is not finite, the directory holds two checkpoints or
      pickled weights, or the extra for TensorFlow checkpoints is missing.
  """
  config = _read_config_file(directory)
  sizes = encoder_config(config)
  return Checkpoint(directory, config, sizes,
                    *_read_tensors(directory, config))


def _read_tensors(directory: pathlib.Path, file: ConfigFile
                  ) -> tuple[dict[str, np.ndarray], list[str]]:
  path, config, kind = file
  if path.name == 'config.json':
    raw = _read_safetensors(directory)
    names = {k: weight_names.from_hugging_face(k, kind) for k in raw}
    head = ARCHITECTURES[kind]
    if head.head_is_shared and not file.class_name.endswith(
        'ForQuestionAnswering'):
      names = {k: None if v and v.startswith(f'{head.head}.') else v
               for k, v in names.items()}
  else:
    tensorflow = _import_tensorflow(directory)
    index = tensorflow.read_index(_tensorflow_prefix(directory))
    names = {k: weight_names.from_tensorflow(k) for k in index.entries}
    raw = tensorflow.read_tensors(index, [k for k, v in names.items() if v])
    raw = {k: weight_names.tensorflow_value(k, names[k], v)
           for k, v in raw.items()}
  ignored = sorted(k for k, v in names.items() if v is None)
  tensors: dict[str, np.ndarray] = {}
  for theirs, name in names.items():
    if name in tensors:
      raise errors.UserError(
          f'{directory}: the weights hold {_first_names([name])} twice, once '
          f'as {_first_names([theirs])}')
    if name is not None:
      errors.require(
          jax.dtypes.issubdtype(raw[theirs].dtype, np.floating),
          f'{directory}: {theirs} has the type {raw[theirs].dtype}, expected '
          'floats; take the checkpoint that is not quantised')
      tensors[name] = raw[theirs]
  _check_finite(tensors, directory)
  if kind == 'distilbert':  # It has no token types: their vectors are zeros.
    like = tensors.get('embeddings.LayerNorm.bias', np.zeros(0))
    tensors[bert.TOKEN_TYPES] = np.zeros((2, *like.shape), np.float32)
  if bert.POSITIONS in tensors:
    tensors[bert.POSITIONS] = tensors[bert.POSITIONS][
        _unused_positions(path, config, kind):]
  notes = [f'not read, a span model has no use for them: '
           f'{_first_names(ignored)}'] if ignored else []
  if config.get('quantization_config'):
    notes.append('quantization_config is not read: the weights are floats')
  types = tensors.get(bert.TOKEN_TYPES, np.zeros((1, 0)))
  if not _has_token_types(directory) and (types != types[:1]).any():
    # A model whose tokens all have type 0.
    tensors[bert.TOKEN_TYPES] = np.repeat(types[:1], len(types), axis=0)
    notes.append('the context gets the vector of token type 0, because '
                 'tokenizer_config.json asks for no token_type_ids')
  return tensors, notes


def _has_token_types(directory: pathlib.Path) -> bool:
  """Returns whether transformers gives the context token type 1."""
  path = directory / 'tokenizer_config.json'
  about = files.read_object(path) if path.is_file() else {}
  names, kind = about.get('model_input_names'), about.get('tokenizer_class')
  if isinstance(names, list):
    return 'token_type_ids' in names
  if re.fullmatch('(DistilBert|MPNet|(XLM)?Roberta|Camembert)Tokenizer(Fast)?',
                  str(kind)):
    return False
  # Others have another default in transformers 5, which writes `backend`.
  return 'backend' not in about or kind not in (
      'AlbertTokenizer', 'TokenizersBackend')


def _check_finite(tensors: Arrays, directory: pathlib.Path) -> None:
  """Raises a UserError if a weight is not finite as the float32 it is used."""
  with np.errstate(over='ignore'):
    odd = {name: count for name, value in sorted(tensors.items())
           if (count := int((~np.isfinite(value.astype(np.float32, copy=False)
                                          )).sum()))}
  if odd:
    raise errors.UserError(
        f'{directory}: weights are not finite (NaN or infinity): '
        f'{sum(odd.values())} in {_first_names(list(odd))}; the file is '
        'damaged or the training diverged: fetch it again or choose another '
        'checkpoint')


def _import_tensorflow(directory: pathlib.Path) -> types.ModuleType:
  try:
    from qa_jax.checkpoints import tensorflow
    return tensorflow
  except ImportError as e:
    raise errors.UserError(
        f'{directory} is a TensorFlow checkpoint, which needs the package '
        f"{e.name}; pip install -e '.[tensorflow]'") from None


def _tensorflow_prefix(directory: pathlib.Path) -> pathlib.Path:
  indexes = sorted(directory.glob('*.index'))
  if len(indexes) != 1:
    raise errors.UserError(
        f'{directory} has {len(indexes)} TensorFlow checkpoints'
        f'{": " * bool(indexes)}{_first_names([f.name for f in indexes])}; '
        'exactly one NAME.index with its data files is expected beside '
        'bert_config.json')
  return indexes[0].with_suffix('')


def _read_safetensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors of model.safetensors, or of the shards of its index."""
  index = directory / 'model.safetensors.index.json'
  names = ['model.safetensors']
  if not (directory / names[0]).is_file() and index.is_file():
    shards = files.read_object(index).get('weight_map')
    if not isinstance(shards, dict) or not all(
        isinstance(v, str) and re.fullmatch(r'[\w.-]+\.safetensors', v)
        for v in shards.values()):
      raise errors.UserError(f'{index}: weight_map does not name shards')
    names = sorted(set(shards.values()))
  tensors: dict[str, np.ndarray] = {}
  for name in names:
    path = directory / name
    if not path.is_file():
      raise errors.UserError(f'{path} is missing; {_remedy(directory)}')
    try:
      tensors |= safetensors.numpy.load_file(path)
    except AttributeError as e:  # numpy has no such type
      raise errors.UserError(
          f'{path}: {e}; take the checkpoint that is not quantised') from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError,
            OSError) as e:
      raise errors.UserError(
          f'{path}: not a whole safetensors file ({" ".join(str(e).split())}); '
          'fetch it again') from None
  return tensors


def _remedy(directory: pathlib.Path) -> str:
  """Returns the advice for a directory without one of its weight files.

  Pickled weights get the command that converts them. With `weights_only`, torch
  reads tensors and executes nothing.
  """
  # A snapshot in the hub's cache: CACHE/models--OWNER--NAME/snapshots/COMMIT.
  hub = re.fullmatch(r'models--(.+)', directory.parent.parent.name)
  names = sorted(path.name for path in directory.iterdir())
  if any(re.match(r'model(-.*\.safetensors|\.safetensors\.index\.json)$', n)
         for n in names):  # a shard is missing
    return 'fetch it again'
  if not (hub or any(re.match(r'pytorch_model.*\.bin$', n) for n in names)):
    others = [n for n in names if re.search(
        r'\.(h5|msgpack|onnx|safetensors)$', n)]
    return (f'{others[0]} is not read; save the model as model.safetensors'
            if others else 'fetch it again')
  target, fetch, use = str(directory), '', ''
  if hub:  # pickled weights are not fetched
    hub_id = hub[1].replace('--', '/')
    target = hub_id.rsplit('/', 1)[-1]
    fetch = f'hf download {hub_id} --local-dir {target} && '
    use = f', and use {target}'
  return ('pickled weights (pytorch_model.bin) can run code and are not read; '
          'convert them where torch is installed: '
          f'{fetch}python -c "{CONVERT}" {shlex.quote(target)}{use}')


def stored_head(checkpoint: Checkpoint) -> str:
  """Returns the spec string of the checkpoint's head, '' for none."""
  architecture = checkpoint.architecture
  if f'{architecture.head}.weight' not in checkpoint.tensors:
    return ''
  return architecture.head_spec(checkpoint.tensors, checkpoint.sizes)


def fit_tensors(checkpoint: Checkpoint, template: Any, *,
                reads_head: bool = True) -> tuple[Any, list[str]]:
  """Returns `template` with a checkpoint's tensors as values, and notes.

  The head of `template` is returned unchanged if the checkpoint has no head, or
  if the head of `template` is not one that the architecture can store: a start
  vector S and an end vector E, behind the layers of `head_names`. These layers
  are also taken from the head of another task. Without `reads_head` the head of
  `template` is always unchanged. The bias of a checkpoint's S and E is used by
  a head with a bias alone. Other heads drop it: it is constant over positions,
  so it changes neither the best span nor the difference of null score and best
  span score.

  Raises:
    UserError: names or shapes do not fit `template`.
  """
  architecture = checkpoint.architecture
  tensors, notes = dict(checkpoint.tensors), []
  expected = to_hugging_face(template, architecture)
  weight, bias = (f'{architecture.head}.{x}' for x in ('weight', 'bias'))
  loads_head = reads_head and weight in tensors and weight in expected
  layers = {k for k in {**tensors, **expected} if k.startswith(tuple(
      f'{name}.' for name in architecture.head_names.values()))}
  stored_layers = sorted(layers & tensors.keys())
  loads_layers = (reads_head and bool(stored_layers)
                  and not layers.isdisjoint(expected))
  if not loads_head:
    kind = (' or '.join(map(repr, architecture.heads)) if layers
            else 'a pair of S and E')
    notes.append(FRESH_HEAD if weight not in tensors else
                 f'the span head of the checkpoint, {kind}, is dropped: the '
                 'head asked for is freshly initialised')
    if loads_layers:
      notes.append('the layers of the head before S and E are those of the '
                   f'checkpoint: {_first_names(stored_layers)}')
    elif stored_layers and weight not in tensors:
      notes.append(f'not read: {_first_names(stored_layers)}; the head '
                   f'{architecture.heads[0]!r} starts from them')
    for part in {weight, bias} | (set() if loads_layers else layers):
      tensors.pop(part, None)
      expected.pop(part, None)
  elif 'bias' in template['head']['start']:
    tensors.setdefault(bias, np.zeros(2, np.float32))
  else:
    expected.pop(bias)
    dropped = tensors.pop(bias, np.zeros(2))
    if dropped.any():
      notes.append(
          f"the bias {dropped.tolist()} of the checkpoint's head is dropped: "
          "it changes no prediction; the head 'biased' keeps it")
  if unused := sorted(name for name in tensors.keys() - expected.keys()
                      if re.fullmatch(architecture.unused, name)):
    notes.append('not read, this encoder has no use for them: '
                 f'{_first_names(unused)}')
    for name in unused:
      del tensors[name]
  _check_shapes({k: v.shape for k, v in tensors.items()},
                {k: v.shape for k, v in expected.items()}, checkpoint.directory)
  tensors = {k: np.asarray(v, np.float32) for k, v in tensors.items()}
  ours = {k: np.asarray(v) for k, v in
          flax.traverse_util.flatten_dict(template, sep='/').items()}
  ours |= weight_names.to_paths(
      tensors, [path for path in ours if not path.startswith('head/')
                or (loads_layers and _module(path) in architecture.head_names)],
      architecture)
  if loads_head:
    for row, end in enumerate(('start', 'end')):
      ours[f'head/{end}/kernel'] = tensors[weight][row:row + 1].T
      if bias in tensors:
        ours[f'head/{end}/bias'] = tensors[bias][row:row + 1]
  return flax.traverse_util.unflatten_dict(ours, sep='/'), notes


def load_parameters(directory: pathlib.Path, template: Any, *,
                    reads_head: bool = True) -> tuple[Any, list[str]]:
  """Reads parameters of a directory, and notes, as `fit_tensors` does.

  A `template` with fewer layers gets the first layers of the checkpoint. Its
  head is then returned unchanged.
  """
  checkpoint = read_checkpoint(directory)
  sizes, used, notes = checkpoint.sizes, count_layers(template), []
  stored = 1 if sizes.SHARES_LAYERS else sizes.num_layers
  if used < stored:
    architecture = checkpoint.architecture
    layer = {k: re.search(r'\blayers?\.(\d+)\.', k)
             for k in checkpoint.tensors}
    checkpoint = dataclasses.replace(checkpoint, tensors={
        k: v for k, v in checkpoint.tensors.items()
        if not (layer[k] and used <= int(layer[k][1]) < stored)
        and not in_head(k, architecture)})
    notes = [first_layers_note(directory, used, stored)]
  params, fitted = fit_tensors(checkpoint, template, reads_head=reads_head)
  return params, [*checkpoint.notes, *(notes or fitted)]


def in_head(name: str, kind: Architecture) -> bool:
  """Returns whether a common name is that of a tensor of the span head."""
  return name.startswith(tuple(
      f'{layer}.' for layer in (kind.head, *kind.head_names.values())))


def count_layers(params: Any) -> int:
  """Returns the number of transformer layers in a tree of parameters."""
  return sum(name.startswith('layer_') for name in params['encoder'])


def first_layers_note(source: pathlib.Path, used: int, stored: int) -> str:
  """Returns the note for an encoder of `used` of the layers of `source`."""
  return (f'config.model.num_layers={used}: the first {used} of the {stored} '
          f'layers of {source}, with a fresh head')


def to_hugging_face(params: Any, architecture: Architecture
                    ) -> dict[str, np.ndarray]:
  """Returns parameters by common names, without a head that has none.

  Hugging Face can store the parameters of S and E, which may have biases,
  behind the layers of the architecture's `head_names`.
  """
  ours = {k: np.asarray(v) for k, v in
          flax.traverse_util.flatten_dict(params, sep='/').items()}
  head = {k for k in ours if k.startswith('head/')}
  pair = {k for k in head if re.fullmatch(
      r'head/(start|end)/(kernel|bias)', k)}
  has_names = {'head/start/kernel', 'head/end/kernel'} <= pair and {
      _module(k) for k in head - pair} == {*architecture.head_names}
  out = weight_names.from_paths(
      {k: v for k, v in ours.items()
       if k not in head or (has_names and k not in pair)}, architecture)
  if has_names:
    out[f'{architecture.head}.weight'] = np.concatenate(
        [ours['head/start/kernel'], ours['head/end/kernel']], axis=1).T
    zero = np.zeros(1, np.float32)
    out[f'{architecture.head}.bias'] = np.concatenate(
        [ours.get(f'head/{end}/bias', zero) for end in ('start', 'end')])
  return out


def _module(path: str) -> str:
  return path.rpartition('/')[0]


def _check_shapes(stored: Mapping[str, tuple], expected: Mapping[str, tuple],
                  directory: pathlib.Path) -> None:
  faults = []
  for what, names in (('missing', expected.keys() - stored.keys()),
                      ('unknown', stored.keys() - expected.keys())):
    if names:
      faults.append(f'{len(names)} {what}: {_first_names(sorted(names))}')
  wrong = [f'{k} {stored[k]} for {expected[k]}'
           for k in sorted(stored.keys() & expected.keys())
           if stored[k] != expected[k]]
  if wrong:
    faults.append(f'{len(wrong)} of another shape: {_first_names(wrong)}')
  if faults:
    raise errors.UserError(
        f'{directory}: weights do not fit the model; {"; ".join(faults)}')


def _first_names(names: list[str]) -> str:
  """Returns the first names in one line, with unprintable names quoted."""
  first, others = names[:4], names[4:]
  more = f' and {len(others)} more' if others else ''
  return ', '.join(name if name.isprintable() else repr(name)
                   for name in first) + more
