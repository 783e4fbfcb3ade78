"""What the files of a checkpoint directory hold: tensors by common names.

Nothing is executed: safetensors and tensor bundles are read, pickles are not.
"""

import pathlib
import re
from typing import Any

import ml_dtypes  # noqa: F401  lets safetensors read bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from qa_jax import errors
from qa_jax.checkpoints import tensorflow
from qa_jax.checkpoints import weight_names
from qa_jax.io import files


def read_model_type(directory: pathlib.Path) -> tuple[
    pathlib.Path, dict[str, Any], str]:
  """The file of the sizes, what it holds, and its model_type."""
  path = directory / 'config.json'
  if not path.is_file():
    path = directory / 'bert_config.json'
    return path, files.read_object(path), 'bert'
  config = files.read_object(path)
  kind = config.get('model_type')
  if not isinstance(kind, str) or kind not in weight_names.ARCHITECTURES:
    raise errors.UserError(
        f'{path}: model_type {kind!r} is not supported; only '
        f'{", ".join(map(repr, weight_names.ARCHITECTURES))} are')
  return path, config, kind


def read_tensors(
    directory: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
  """Tensors of a checkpoint by their common names, and notes.

  Raises:
    UserError: damaged files, two checkpoints in one, pickles; one line.
  """
  _, _, kind = read_model_type(directory)
  if (directory / 'config.json').is_file():
    raw = _read_safetensors(directory)
    names = {k: weight_names.from_hugging_face(k, kind) for k in raw}
  else:
    index = tensorflow.read_index(_prefix(directory))
    names = {k: weight_names.from_tensorflow(k) for k in index.entries}
    raw = {k: weight_names.tensorflow_value(k, names[k], v)
           for k, v in tensorflow.read_tensors(
               index, [k for k, v in names.items() if v]).items()}
  ignored = sorted(k for k, v in names.items() if v is None)
  tensors: dict[str, np.ndarray] = {}
  for theirs, name in names.items():
    if name in tensors:  # never None, which is no key
      raise errors.UserError(
          f'{directory}: the weights hold {first_names([name])} twice, once as '
          f'{first_names([theirs])}')
    if name is not None:
      tensors[name] = raw[theirs]
  if kind == 'distilbert':
    like = tensors.get('embeddings.LayerNorm.bias', np.zeros(0))
    tensors[weight_names.TOKEN_TYPES] = np.zeros((2, *like.shape), np.float32)
  return tensors, [
      f'not read, a span model has no use for them: {first_names(ignored)}'
  ] if ignored else []


def _prefix(directory: pathlib.Path) -> pathlib.Path:
  """The one TensorFlow checkpoint of a directory."""
  found = sorted(directory.glob('*.index'))
  if len(found) != 1:
    raise errors.UserError(
        f'{directory} has {len(found)} TensorFlow checkpoints'
        f'{": " * bool(found)}{first_names([f.name for f in found])}; '
        'exactly one NAME.index with its data files is expected beside '
        'bert_config.json')
  return found[0].with_suffix('')


def _read_safetensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
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
          f'{path} is missing; pickled .bin weights are not read, they can '
          'run code: convert them to safetensors')
    try:
      tensors |= safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError,
            OSError) as e:
      raise errors.UserError(
          f'{path}: not a whole safetensors file ({" ".join(str(e).split())}); '
          'fetch it again') from None
  return tensors


def first_names(names: list[str], count: int = 4) -> str:
  """The first of them in one line, whatever a file calls its tensors."""
  more = f' and {len(names) - count} more' if len(names) > count else ''
  return ', '.join(name if name.isprintable() else repr(name)
                   for name in names[:count]) + more
