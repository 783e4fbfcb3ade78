"""Names of weights: other programs' → those of Hugging Face's BERT.

Common names have no "bert." in front: `encoder.layer.0.output.dense.weight`.
None is a part that a span model never reads. An unknown name stays as it is, to
be refused.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import numpy as np

# Our field of a BertConfig → BERT's of config.json.
FIELDS = {
    'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads', 'mlp_size': 'intermediate_size',
    'vocab_size': 'vocab_size', 'max_position': 'max_position_embeddings',
    'type_vocab_size': 'type_vocab_size'}
TOKEN_TYPES = 'embeddings.token_type_embeddings.weight'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A `model_type` of Hugging Face whose encoder computes what BERT's does."""

  fields: Mapping[str, str]  # our field → theirs
  supported: Mapping[str, Any]  # other fields, and what they must be
  ignored: str  # pattern of the names that a span model never reads
  renames: tuple[tuple[str, str], ...] = ()  # a part of a name → BERT's


_BERT_ONLY = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute'}
ARCHITECTURES = {
    'bert': Architecture(FIELDS, _BERT_ONLY, r'pooler\.|cls\.'),
    # Clark et al. (2020), where embeddings are as wide as layers: not small.
    'electra': Architecture(
        FIELDS, _BERT_ONLY,
        r'discriminator_predictions\.|generator_(predictions|lm_head)\.'),
    # Sanh et al. (2019): without token types; here all have a vector of zeros.
    'distilbert': Architecture(
        {'hidden_size': 'dim', 'num_layers': 'n_layers',
         'num_heads': 'n_heads', 'mlp_size': 'hidden_dim',
         'vocab_size': 'vocab_size', 'max_position': 'max_position_embeddings'},
        {'activation': 'gelu'}, r'vocab_(transform|layer_norm|projector)\.',
        (('transformer.layer.', 'encoder.layer.'),
         ('.attention.q_lin.', '.attention.self.query.'),
         ('.attention.k_lin.', '.attention.self.key.'),
         ('.attention.v_lin.', '.attention.self.value.'),
         ('.attention.out_lin.', '.attention.output.dense.'),
         ('.sa_layer_norm.', '.attention.output.LayerNorm.'),
         ('.ffn.lin1.', '.intermediate.dense.'),
         ('.ffn.lin2.', '.output.dense.'),
         ('.output_layer_norm.', '.output.LayerNorm.'))),
}

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
_TF_LEAVES = {'kernel': '.weight', 'gamma': '.weight', 'bias': '.bias',
              'beta': '.bias'}


def from_hugging_face(name: str, model_type: str) -> str | None:
  """Returns the common name of a safetensors name, with or without a prefix."""
  architecture = ARCHITECTURES[model_type]
  name = name.removeprefix(model_type + '.')
  if re.match(rf'({architecture.ignored})|embeddings\.position_ids$', name):
    return None
  for theirs, berts in architecture.renames:
    name = name.replace(theirs, berts)
  return name


def from_tensorflow(name: str) -> str | None:
  """Returns the common name of a variable of Google's BERT or model garden."""
  if match := re.fullmatch(
      r'bert/(?P<path>(?:encoder|embeddings)/.*?)'
      r'(?:/(?P<leaf>kernel|bias|gamma|beta))?', name):
    if match['path'].endswith(('/adam_m', '/adam_v')):
      return None
    path = re.sub(r'\blayer_(\d+)', r'layer.\1', match['path'])
    return path.replace('/', '.') + _TF_LEAVES.get(match['leaf'], '.weight')
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
