"""Names of weights: other programs' → those of Hugging Face's BERT.

Common names have no "bert." in front: `encoder.layer.0.output.dense.weight`.
The name None marks a tensor that a span model never reads. An unknown part of
the encoder or of the span head keeps its name, so that it is refused later.
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
POSITIONS = 'embeddings.position_embeddings.weight'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A `model_type` of Hugging Face whose encoder computes what BERT's does."""

  fields: Mapping[str, str]  # our field → theirs
  class_prefix: str  # of the names in `architectures`: BertForMaskedLM
  supported: Mapping[str, Any]  # other fields, and what they must be
  prefix: str  # of the names of the encoder's weights
  renames: tuple[tuple[str, str], ...] = ()  # a part of a name → BERT's
  # Positions are counted from pad_token_id + 1, as in fairseq. The earlier rows
  # of the table are never used, and are left out here.
  positions_after_pad: bool = False


# A decoder's attention is causal: it computes something else.
_BERT_ONLY = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute',
              'is_decoder': False}
ARCHITECTURES = {
    'bert': Architecture(FIELDS, 'Bert', _BERT_ONLY, 'bert.'),
    # Liu et al. (2019), also DistilRoBERTa: one token type.
    'roberta': Architecture(FIELDS, 'Roberta', _BERT_ONLY, 'roberta.',
                            positions_after_pad=True),
    # Conneau et al. (2020) and Martin et al. (2020), with Unigram vocabularies.
    'xlm-roberta': Architecture(FIELDS, 'XLMRoberta', _BERT_ONLY, 'roberta.',
                                positions_after_pad=True),
    'camembert': Architecture(FIELDS, 'Camembert', _BERT_ONLY, 'roberta.',
                              positions_after_pad=True),
    # Clark et al. (2020), where embeddings are as wide as layers: not small.
    'electra': Architecture(FIELDS, 'Electra', _BERT_ONLY, 'electra.'),
    # Sanh et al. (2019): without token types; here all have a vector of zeros.
    'distilbert': Architecture(
        {'hidden_size': 'dim', 'num_layers': 'n_layers',
         'num_heads': 'n_heads', 'mlp_size': 'hidden_dim',
         'vocab_size': 'vocab_size', 'max_position': 'max_position_embeddings'},
        'DistilBert', {'activation': 'gelu'}, 'distilbert.',
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
# A part of any other name belongs to another task's head or to the pooler.
_ENCODER_OR_HEAD = re.compile(
    r'\b(embeddings\w*|encoder|transformer|qa_outputs)\b')
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
  name = name.removeprefix(ARCHITECTURES[model_type].prefix)
  if _BUFFER.fullmatch(name) or not _ENCODER_OR_HEAD.search(name):
    return None
  for theirs, berts in ARCHITECTURES[model_type].renames:
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
