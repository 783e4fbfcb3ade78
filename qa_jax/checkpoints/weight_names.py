"""Common names of weights: from other programs' names, to paths of our tree.

Common names have no prefix in front: `encoder.layer.0.output.dense.weight`. The
name None marks a tensor that a span model never reads. An unknown part of the
encoder or of the span head keeps its name, so that it is refused later.
"""

from collections.abc import Iterable, Mapping
import re

import numpy as np

from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.checkpoints.architectures import Architecture

# Parts of a layer in the object-based checkpoints of TensorFlow's model garden,
# of two generations: attention's output was first a layer of its own.
_TF2_PARTS = {
    '_attention_layer/_query_dense': 'attention.self.query',
    '_attention_layer/_key_dense': 'attention.self.key',
    '_attention_layer/_value_dense': 'attention.self.value',
    '_attention_layer/_output_dense': 'attention.output.dense',
    '_attention_output_dense': 'attention.output.dense',
    '_attention_layer_norm': 'attention.output.LayerNorm',
    '_intermediate_dense': 'intermediate.dense',
    '_output_dense': 'output.dense',
    '_output_layer_norm': 'output.LayerNorm'}
_TF2_EMBEDDINGS = ('word', 'position', 'token_type')
_TF_HEAD = {'cls/squad/output_weights': 'qa_outputs.weight',
            'cls/squad/output_bias': 'qa_outputs.bias'}
_BUFFER = re.compile(r'embeddings\.(position_ids|token_type_ids)')
_TF_LEAVES = {'kernel': '.weight', 'gamma': '.weight', 'bias': '.bias',
              'beta': '.bias'}
# An optimizer stores its slots under the name of their variable, with one more
# part that every optimizer names in its own way: Adam, adam_m, LAMB_1, vr, …
_TF_VARIABLE = re.compile(
    r'bert/(?P<path>(?:encoder|embeddings)/.*?)(?:/(?P<leaf>kernel|bias|gamma|'
    r'beta)|(?<=_embeddings))(?P<slot>/.+|_slot_.+)?')


def from_hugging_face(name: str, model_type: str) -> str | None:
  """Returns the common name of a safetensors name, with or without a prefix.

  The heads of other tasks, the pooler and the buffers have the name None.
  """
  architecture = ARCHITECTURES[model_type]
  name = name.removeprefix(architecture.prefix)
  if _BUFFER.fullmatch(name) or not re.search(architecture.reads, name):
    return None
  for theirs, berts in architecture.renames:
    name = name.replace(theirs, berts)
  # The names of TensorFlow, which the first conversions to torch kept.
  return re.sub(r'(?<=LayerNorm\.)(gamma|beta)$',
                lambda leaf: _TF_LEAVES[leaf[0]].removeprefix('.'), name)


def from_tensorflow(name: str) -> str | None:
  """Returns the common name of a variable of Google's BERT or model garden."""
  if match := _TF_VARIABLE.fullmatch(name):
    if match['slot']:
      return None
    path = re.sub(r'\blayer_(\d+)', r'layer.\1', match['path'])
    return path.replace('/', '.') + _TF_LEAVES.get(match['leaf'], '.weight')
  if name.startswith(('bert/encoder/', 'bert/embeddings/')):
    return name
  if name in _TF_HEAD:
    return _TF_HEAD[name]
  match = re.fullmatch(
      r'(?:model|encoder)/layer_with_weights-(?P<i>\d+)/(?P<path>.+)'
      r'/\.ATTRIBUTES/VARIABLE_VALUE', name)
  if match and '.OPTIMIZER_SLOT' not in match['path']:
    return _from_model_garden(int(match['i']), match['path'])
  return None


def _from_model_garden(number: int, path: str) -> str | None:
  """Layers are numbered: three embeddings, their LayerNorm, blocks, pooler."""
  part, _, leaf = path.rpartition('/')
  if number < 3:
    return f'embeddings.{_TF2_EMBEDDINGS[number]}_embeddings.weight'
  if number == 3:
    return f'embeddings.LayerNorm{_TF_LEAVES.get(leaf, "." + leaf)}'
  if not part:
    return None
  return (f'encoder.layer.{number - 4}.{_TF2_PARTS.get(part, part)}'
          f'{_TF_LEAVES.get(leaf, "." + leaf)}')


def tensorflow_value(name: str, common: str, value: np.ndarray) -> np.ndarray:
  """Returns a variable in the layout of the tensor with the common name.

  A kernel is the transpose of a torch weight; in the model garden it has an
  axis for the heads and one for the size of a head.
  """
  if common.endswith('.bias'):
    return value.reshape(-1)
  if not re.search(r'/kernel\b', name) or value.ndim < 2 or not value.size:
    return value
  heads_first = common.endswith('attention.output.dense.weight')
  rows = -1 if heads_first else value.shape[0]
  return value.reshape(rows, value.shape[-1] if heads_first else -1).T


def from_paths(tree: Mapping[str, np.ndarray],
               architecture: Architecture) -> dict[str, np.ndarray]:
  """Returns {common name: tensor} for {path: array} of an encoder.

  The kernel of a Dense layer is the transpose of torch's weight.
  """
  out = {}
  for path, value in tree.items():
    names, leaf = _translate(path, architecture)
    parts = np.split(value, len(names), axis=-1)
    for name, part in zip(names, parts, strict=True):
      out[f'{name}.{"bias" if leaf == "bias" else "weight"}'] = (
          part.T if leaf == 'kernel' else part)
  return out


def to_paths(tensors: Mapping[str, np.ndarray], paths: Iterable[str],
             architecture: Architecture) -> dict[str, np.ndarray]:
  """Returns {path: array} for {common name: tensor}: inverts `from_paths`."""
  out = {}
  for path in paths:
    names, leaf = _translate(path, architecture)
    parts = [tensors[f'{name}.{"bias" if leaf == "bias" else "weight"}']
             for name in names]
    out[path] = np.concatenate(
        [part.T if leaf == 'kernel' else part for part in parts], axis=-1)
  return out


def _translate(path: str, architecture: Architecture) -> tuple[list[str], str]:
  """Returns the common names of a path, without their last part, and its leaf.

  The leaf is kernel, bias, scale or embedding.
  """
  for ours, theirs in {**architecture.names,
                       **architecture.head_names}.items():
    pattern = re.escape(ours).replace(r'\{i\}', r'(?P<i>\d+)').replace(
        r'\{part\}', r'(?P<part>\w+?)')
    if match := re.fullmatch(f'{pattern}(?:/(?P<leaf>kernel|bias|scale))?',
                             path):
      names = (theirs,) if isinstance(theirs, str) else theirs
      return ([name.format(**match.groupdict()) for name in names],
              match['leaf'] or 'embedding')
  raise AssertionError(f'the name table does not cover {path}')
