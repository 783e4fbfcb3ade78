"""Checkpoints of Hugging Face and TensorFlow ↔ our parameters, strictly.

A missing name, an extra name or a wrong shape is an error that lists them.
"""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

import flax.traverse_util
import huggingface_hub
import numpy as np

from qa_jax import errors
from qa_jax.checkpoints import manifest
from qa_jax.checkpoints import weight_files
from qa_jax.checkpoints import weight_names
from qa_jax.io import files
from qa_jax.models import bert

Arrays = Mapping[str, np.ndarray]

# Hugging Face's path → ours, for what is one tensor on both sides. {i} is the
# layer. A Dense "kernel" is the transpose of a torch "weight".
LAYER = 'encoder.layer.{i}.'
TABLE = {
    'embeddings.{part}_embeddings': 'encoder/embeddings/{part}/embedding',
    'embeddings.LayerNorm': 'encoder/embeddings/layer_norm',
    LAYER + 'attention.output.dense': 'encoder/layer_{i}/attention/output',
    LAYER + 'attention.output.LayerNorm':
        'encoder/layer_{i}/attention/layer_norm',
    LAYER + 'intermediate.dense': 'encoder/layer_{i}/mlp/intermediate',
    LAYER + 'output.dense': 'encoder/layer_{i}/mlp/output',
    LAYER + 'output.LayerNorm': 'encoder/layer_{i}/mlp/layer_norm',
}
FETCHED = ('config.json', '*.safetensors', '*.safetensors.index.json',
           'vocab.txt', 'tokenizer.json', 'tokenizer_config.json')
PAIRS = ({'start/kernel', 'end/kernel'},
         {'start/kernel', 'end/kernel', 'start/bias', 'end/bias'})
FRESH_HEAD = ('the checkpoint has no span head: S and E are freshly '
              'initialised')


def resolve_source(source: str) -> pathlib.Path:
  """A directory, or a hub id fetched (or found in the cache).

  Raises:
    UserError: neither, or the hub cannot be reached.
  """
  directory = pathlib.Path(source)
  if directory.is_dir():
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
        f'{source} is not a directory with a checkpoint, nor a hub id')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        source, allow_patterns=list(FETCHED), etag_timeout=5))
  except Exception as e:  # the hub's errors share no base class
    raise errors.UserError(
        f'{source!r} is not a local directory and could not be fetched from '
        f'the hub ({type(e).__name__}); check the name and the network'
    ) from None


def file_hashes(directory: pathlib.Path) -> dict[str, str]:
  """File → sha256, of a checkpoint or of a run's manifests: what a run was
  initialised from."""
  out = {}
  for pattern in (*FETCHED, 'bert_config.json', '*.index', '*.data-*',
                  f'checkpoints/*/{manifest.NAME}'):
    for path in sorted(directory.glob(pattern)):
      out[path.relative_to(directory).as_posix()] = files.sha256(path)
  return out


def read_config(directory: pathlib.Path) -> bert.BertConfig:
  """Sizes from a config.json, or the bert_config.json of TensorFlow.

  GELU is the erf form, as transformers has it for both.

  Raises:
    UserError: another architecture, or a field that BERT needs is missing.
  """
  path, config, kind = weight_files.read_model_type(directory)
  architecture = weight_names.ARCHITECTURES[kind]
  for key, supported in architecture.supported.items():
    value = config.get(key, supported)
    if value != supported:
      raise errors.UserError(
          f'{path}: {key} {value!r} is not supported; only {supported!r} is')
  for name in architecture.fields.values():
    if type(config.get(name)) is not int or config[name] < 1:
      raise errors.UserError(
          f'{path}: {name} is {config.get(name)!r}, expected a positive int')
  sizes = {ours: config[name] for ours, name in architecture.fields.items()}
  hidden_size, num_heads = sizes['hidden_size'], sizes['num_heads']
  if hidden_size % num_heads:
    names = architecture.fields
    raise errors.UserError(
        f'{path}: {names["hidden_size"]} {hidden_size} is not divisible by '
        f'{names["num_heads"]} {num_heads}')
  width = config.get('embedding_size', hidden_size)
  if width != hidden_size:
    raise errors.UserError(
        f'{path}: embedding_size {width!r} differs from hidden_size '
        f'{hidden_size}: an encoder that projects its embeddings is not '
        'supported')
  eps = config.get('layer_norm_eps', 1e-12)
  if type(eps) not in (int, float) or not 0 < eps < 1:
    raise errors.UserError(
        f'{path}: layer_norm_eps is {eps!r}, expected a number in (0, 1)')
  return bert.BertConfig(**sizes, layer_norm_eps=float(eps))


def head_of(tensors: Arrays) -> str:
  """The head that a checkpoint's tensors are: '' if they have none."""
  if 'qa_outputs.weight' not in tensors:
    return ''
  bias = tensors.get('qa_outputs.bias')
  return 'independent' if bias is None or not bias.any() else 'biased'


def fit_tensors(tensors: Arrays, template: Any,
                directory: pathlib.Path) -> tuple[Any, list[str]]:
  """Parameters in the shape of `template`, and notes.

  The template's head stays where the checkpoint has none, or where it is no
  pair of S and E. A bias has a place in the `biased` head alone; elsewhere it
  is dropped: constant over positions, it changes neither the best span nor
  null - best.

  Raises:
    UserError: names and shapes that do not fit `template`; one line.
  """
  tensors, notes = dict(tensors), []
  expected = to_hugging_face(template)
  weight, bias = 'qa_outputs.weight', 'qa_outputs.bias'
  if weight not in tensors or weight not in expected:
    if weight not in tensors:
      notes.append(FRESH_HEAD)
    else:
      notes.append('the span head of the checkpoint, a pair of S and E, is '
                   'dropped: the head asked for is freshly initialised')
    for part in (weight, bias):
      tensors.pop(part, None)
      expected.pop(part, None)
  elif 'bias' in template['head']['start']:
    tensors.setdefault(bias, np.zeros(2, np.float32))
  else:
    expected.pop(bias)
    dropped = tensors.pop(bias, np.zeros(2))
    if dropped.any():
      notes.append(f"the bias {dropped.tolist()} of the checkpoint's head is "
                   "dropped: it changes no prediction; the head 'biased' "
                   'keeps it')
  _compare({k: v.shape for k, v in tensors.items()},
           {k: v.shape for k, v in expected.items()}, directory)
  loaded = from_hugging_face(tensors)
  ours = flax.traverse_util.flatten_dict(template, sep='/')
  fresh = {k: np.asarray(v) for k, v in ours.items() if k not in loaded}
  return flax.traverse_util.unflatten_dict({**loaded, **fresh}, sep='/'), notes


def load_parameters(directory: pathlib.Path,
                    template: Any) -> tuple[Any, list[str]]:
  """What is in the files of `directory`, in the shape of `template`."""
  tensors, ignored = weight_files.read_tensors(directory)
  params, notes = fit_tensors(tensors, template, directory)
  return params, ignored + notes


def to_hugging_face(params: Any) -> dict[str, np.ndarray]:
  """Our tree → common names; without qa_outputs if the head is no pair."""
  ours = {k: np.asarray(v) for k, v in
          flax.traverse_util.flatten_dict(params, sep='/').items()}
  out = {}
  for path, value in ours.items():
    if match := re.fullmatch(
        r'encoder/layer_(\d+)/attention/query_key_value/(kernel|bias)', path):
      parts = np.split(value, 3, axis=-1)
      kind = 'weight' if match[2] == 'kernel' else 'bias'
      for name, part in zip(('query', 'key', 'value'), parts, strict=True):
        out[f'encoder.layer.{match[1]}.attention.self.{name}.{kind}'] = part.T
    elif not path.startswith('head/'):
      out[_translate(path)] = value.T if path.endswith('kernel') else value
  head = {k.removeprefix('head/') for k in ours if k.startswith('head/')}
  if head in PAIRS:
    out['qa_outputs.weight'] = np.concatenate(
        [ours['head/start/kernel'], ours['head/end/kernel']], axis=1).T
    out['qa_outputs.bias'] = np.concatenate(
        [ours.get(f'head/{end}/bias', np.zeros(1, np.float32))
         for end in ('start', 'end')])
  return out


def from_hugging_face(tensors: Arrays) -> dict[str, np.ndarray]:
  """Common names → our flat paths, all float32; a bias only if there is."""
  tensors = {k: np.asarray(v, np.float32) for k, v in tensors.items()}
  out, fused = {}, {}
  for name, value in tensors.items():
    if match := re.fullmatch(
        r'encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)'
        r'\.(weight|bias)', name):
      kind = 'kernel' if match[3] == 'weight' else 'bias'
      path = f'encoder/layer_{match[1]}/attention/query_key_value/{kind}'
      fused.setdefault(path, {})[match[2]] = value.T
    elif name == 'qa_outputs.weight':
      out['head/start/kernel'] = value[:1].T
      out['head/end/kernel'] = value[1:].T
    elif name == 'qa_outputs.bias':
      out['head/start/bias'], out['head/end/bias'] = value[:1], value[1:]
    else:
      path = _translate_back(name)
      out[path] = value.T if path.endswith('kernel') else value
  for path, parts in fused.items():
    out[path] = np.concatenate(
        [parts[k] for k in ('query', 'key', 'value')], axis=-1)
  return out


def _pattern(template: str) -> str:
  return re.escape(template).replace(
      r'\{i\}', r'(?P<i>\d+)').replace(r'\{part\}', r'(?P<part>\w+?)')


def _translate(path: str) -> str:
  for theirs, ours in TABLE.items():
    if match := re.fullmatch(_pattern(ours) + r'(?P<leaf>/\w+)?', path):
      leaf = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
              '': 'weight'}[(match['leaf'] or '')[1:]]
      return theirs.format(**match.groupdict()) + '.' + leaf
  raise AssertionError(f'the name table does not cover {path}')


def _translate_back(name: str) -> str:
  for theirs, ours in TABLE.items():
    if match := re.fullmatch(
        _pattern(theirs) + r'\.(?P<leaf>weight|bias)', name):
      path = ours.format(**match.groupdict())
      if path.endswith('embedding'):
        return path
      weight = 'scale' if path.endswith('layer_norm') else 'kernel'
      return f'{path}/{weight if match["leaf"] == "weight" else "bias"}'
  raise AssertionError(f'the name table does not cover {name}')


def _compare(found: Mapping[str, tuple], expected: Mapping[str, tuple],
             directory: pathlib.Path) -> None:
  faults = []
  for what, names in (('missing', expected.keys() - found.keys()),
                      ('unknown', found.keys() - expected.keys())):
    if names:
      faults.append(
          f'{len(names)} {what}: {weight_files.first_names(sorted(names))}')
  wrong = [f'{k} {found[k]} for {expected[k]}'
           for k in sorted(found.keys() & expected.keys())
           if found[k] != expected[k]]
  if wrong:
    faults.append(
        f'{len(wrong)} of another shape: {weight_files.first_names(wrong)}')
  if faults:
    raise errors.UserError(
        f'{directory}: weights do not fit the model; {"; ".join(faults)}')
