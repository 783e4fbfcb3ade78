"""Hugging Face checkpoints ↔ our parameters: one table, both directions.

A checkpoint is read strictly: a missing name, an extra name or a wrong shape is
an error that lists them. Nothing is executed: safetensors only.
"""

from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any

import flax.traverse_util
import huggingface_hub
import ml_dtypes  # noqa: F401  lets safetensors read bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from qa_jax import errors
from qa_jax import files
from qa_jax.models import bert

Arrays = Mapping[str, np.ndarray]

# Our path → Hugging Face's, for what is one tensor on both sides. {i} is the
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
# Parts of other tasks, that a span model never reads.
IGNORED = re.compile(
    r'(bert\.)?(pooler\.|embeddings\.position_ids$)|cls\.')
FETCHED = ('config.json', '*.safetensors', '*.safetensors.index.json',
           'vocab.txt', 'tokenizer.json', 'tokenizer_config.json')
FRESH_HEAD = ('the checkpoint has no span head: S and E are freshly '
              'initialised')


def resolve(source: str) -> pathlib.Path:
  """A directory, or a hub id fetched (or found in the cache).

  Raises:
    UserError: neither, or the hub cannot be reached.
  """
  directory = pathlib.Path(source)
  if directory.is_dir():
    if not (directory / 'config.json').is_file():
      raise errors.UserError(
          f'{source} has no config.json: it is neither a run nor a Hugging '
          'Face checkpoint directory')
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


def read_config(directory: pathlib.Path) -> bert.BertConfig:
  """Sizes from a Hugging Face config.json.

  Raises:
    UserError: another architecture, or a field that BERT needs is missing.
  """
  path = directory / 'config.json'
  config = files.read_object(path)
  for key, supported in (('model_type', 'bert'), ('hidden_act', 'gelu'),
                         ('position_embedding_type', 'absolute')):
    value = config.get(key, supported if key != 'model_type' else None)
    if value != supported:
      raise errors.UserError(
          f'{path}: {key} {value!r} is not supported; only {supported!r} is')
  names = {'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
           'num_heads': 'num_attention_heads',
           'mlp_size': 'intermediate_size', 'vocab_size': 'vocab_size',
           'max_position': 'max_position_embeddings',
           'type_vocab_size': 'type_vocab_size'}
  for name in names.values():
    if type(config.get(name)) is not int or config[name] < 1:
      raise errors.UserError(
          f'{path}: {name} is {config.get(name)!r}, expected a positive int')
  hidden_size, num_heads = config['hidden_size'], config['num_attention_heads']
  if hidden_size % num_heads:
    raise errors.UserError(f'{path}: hidden_size {hidden_size} is not '
                           f'divisible by num_attention_heads {num_heads}')
  eps = config.get('layer_norm_eps', 1e-12)
  if type(eps) not in (int, float) or not 0 < eps < 1:
    raise errors.UserError(
        f'{path}: layer_norm_eps is {eps!r}, expected a number in (0, 1)')
  return bert.BertConfig(
      **{ours: config[theirs] for ours, theirs in names.items()},
      layer_norm_eps=float(eps))


def load_hugging_face(directory: pathlib.Path,
                      template: Any) -> tuple[Any, list[str]]:
  """Parameters of a directory in the shape of `template`, and notes.

  Names may or may not begin with "bert."; a checkpoint without `qa_outputs`
  keeps the template's head, and a bias of the head is dropped: constant over
  positions, it changes neither the best span nor null - best.

  Raises:
    UserError: damaged files, or names and shapes that do not fit; one line.
  """
  tensors = _read_tensors(directory)
  ignored = sorted(k for k in tensors if IGNORED.match(k))
  notes = [f'not read, a span model has no use for them: {_few(ignored)}'
           ] if ignored else []
  theirs = {k.removeprefix('bert.'): v
            for k, v in tensors.items() if k not in ignored}
  if len(theirs) + len(ignored) < len(tensors):
    raise errors.UserError(
        f'{directory}: the weights hold names both with and without "bert."')
  ours = flax.traverse_util.flatten_dict(template, sep='/')
  expected = to_hugging_face(template)
  expected.pop('qa_outputs.bias', None)
  bias = theirs.pop('qa_outputs.bias', None)
  if bias is not None and bias.any():
    notes.append(f'the bias {bias.tolist()} of the checkpoint\'s head is '
                 'dropped: it changes no prediction')
  has_head = 'qa_outputs.weight' in theirs
  if not has_head:
    notes.append(FRESH_HEAD)
    expected.pop('qa_outputs.weight', None)
  _compare({k: v.shape for k, v in theirs.items()},
           {k: v.shape for k, v in expected.items()}, directory)
  loaded = from_hugging_face(theirs)
  fresh = {k: np.asarray(v) for k, v in ours.items()
           if k.startswith('head/') and not has_head}
  return flax.traverse_util.unflatten_dict(
      {**loaded, **fresh}, sep='/'), notes


def save_hugging_face(directory: pathlib.Path, params: Any,
                      config: bert.BertConfig) -> None:
  """Writes config.json and model.safetensors for transformers."""
  tensors = to_hugging_face(params)
  if 'qa_outputs.weight' not in tensors:
    raise errors.UserError(
        'only the independent head has a place in a BertForQuestionAnswering, '
        f'not one with {_few(sorted(params["head"]))}')
  tensors = {k if k.startswith('qa_outputs') else f'bert.{k}':
             np.ascontiguousarray(v) for k, v in tensors.items()}
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / 'model.safetensors.partial'
  safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
  os.replace(partial, directory / 'model.safetensors')
  files.write_json(directory / 'config.json', {
      'architectures': ['BertForQuestionAnswering'], 'model_type': 'bert',
      'hidden_size': config.hidden_size,
      'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads,
      'intermediate_size': config.mlp_size, 'vocab_size': config.vocab_size,
      'max_position_embeddings': config.max_position,
      'type_vocab_size': config.type_vocab_size, 'hidden_act': 'gelu',
      'layer_norm_eps': config.layer_norm_eps,
      'hidden_dropout_prob': config.dropout,
      'attention_probs_dropout_prob': config.attention_dropout,
      'pad_token_id': 0, 'dtype': 'float32'})


def to_hugging_face(params: Any) -> dict[str, np.ndarray]:
  """Our tree → their flat names, without the "bert." prefix."""
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
  if 'head/start/kernel' in ours:
    out['qa_outputs.weight'] = np.concatenate(
        [ours['head/start/kernel'], ours['head/end/kernel']], axis=1).T
    out['qa_outputs.bias'] = np.zeros(2, np.float32)
  return out


def from_hugging_face(tensors: Arrays) -> dict[str, np.ndarray]:
  """Their flat names (no "bert.") → our flat paths, all float32."""
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
      faults.append(f'{len(names)} {what}: {_few(sorted(names))}')
  wrong = [f'{k} {found[k]} for {expected[k]}'
           for k in sorted(found.keys() & expected.keys())
           if found[k] != expected[k]]
  if wrong:
    faults.append(f'{len(wrong)} of another shape: {_few(wrong)}')
  if faults:
    raise errors.UserError(
        f'{directory}: weights do not fit the model; {"; ".join(faults)}')


def _few(names: list[str], count: int = 4) -> str:
  more = f' and {len(names) - count} more' if len(names) > count else ''
  return ', '.join(names[:count]) + more


def _read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of model.safetensors, or of the shards of its index."""
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
      raise errors.UserError(
          f'{path} is missing; pickled .bin weights are not read: convert '
          'them to safetensors')
    try:
      tensors |= safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError,
            OSError) as e:
      raise errors.UserError(
          f'{path}: not a whole safetensors file ({e}); fetch it again'
      ) from None
  return tensors
