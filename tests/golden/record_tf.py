"""Records tf1_bert/ and tf2_bert/ by TensorFlow itself, by hand, once.

  pip install tensorflow-cpu==2.21.0
  python tests/golden/record_tf.py

A BERT of hidden size 16, 2 layers and 2 heads under the names of Google's
release (with the head of run_squad.py and some of Adam's slots) and under those
of the model garden (without a head). Values are a function of the common name
(see `value`), so that tests know them without a second file.
"""

import json
import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
D, LAYERS, HEADS, MLP, VOCAB, POSITIONS = 16, 2, 2, 24, 30, 20


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns float32 values in [-0.5, 0.5), a function of name and shape."""
  index = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64)
  bits = (index * 2654435761 + zlib.crc32(name.encode())) % 2**32
  return (bits / 2**32 - 0.5).astype(np.float32).reshape(shape)


def tensors(head: bool) -> dict[str, np.ndarray]:
  """Returns every tensor by its common name, in the layout of torch."""
  shapes = {'embeddings.word_embeddings.weight': (VOCAB, D),
            'embeddings.position_embeddings.weight': (POSITIONS, D),
            'embeddings.token_type_embeddings.weight': (2, D)}
  norms, dense = ['embeddings.LayerNorm'], {}
  for i in range(LAYERS):
    layer = f'encoder.layer.{i}.'
    dense |= {layer + f'attention.self.{part}': (D, D)
              for part in ('query', 'key', 'value')}
    dense |= {layer + 'attention.output.dense': (D, D),
              layer + 'intermediate.dense': (MLP, D),
              layer + 'output.dense': (D, MLP)}
    norms += [layer + 'attention.output.LayerNorm', layer + 'output.LayerNorm']
  if head:
    dense['qa_outputs'] = (2, D)
  for name, shape in dense.items():
    shapes |= {name + '.weight': shape, name + '.bias': shape[:1]}
  for name in norms:
    shapes |= {name + '.weight': (D,), name + '.bias': (D,)}
  return {name: value(name, shape) for name, shape in shapes.items()}


def tf1(common: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  if common.startswith('qa_outputs'):
    leaf = 'weights' if common.endswith('weight') else 'bias'
    return f'cls/squad/output_{leaf}', array
  path, leaf = common.replace('layer.', 'layer_').rsplit('.', 1)
  path = 'bert/' + path.replace('.', '/')
  if path.endswith('embeddings'):
    return path, array
  if path.endswith('LayerNorm'):
    return path + {'weight': '/gamma', 'bias': '/beta'}[leaf], array
  return (path + '/kernel', array.T) if leaf == 'weight' else (
      path + '/bias', array)


MODEL_GARDEN = {
    'attention.self.query': ['_attention_layer', '_query_dense'],
    'attention.self.key': ['_attention_layer', '_key_dense'],
    'attention.self.value': ['_attention_layer', '_value_dense'],
    'attention.output.dense': ['_attention_layer', '_output_dense'],
    'attention.output.LayerNorm': ['_attention_layer_norm'],
    'intermediate.dense': ['_intermediate_dense'],
    'output.dense': ['_output_dense'],
    'output.LayerNorm': ['_output_layer_norm']}


def tf2(common: str, array: np.ndarray) -> tuple[list[str], np.ndarray]:
  """Returns the path of attributes and the array with an axis for heads."""
  path, leaf = common.rsplit('.', 1)
  embeddings = ('word', 'position', 'token_type')
  if path.endswith('_embeddings'):
    number = embeddings.index(path.split('.')[1].removesuffix('_embeddings'))
    return [f'layer_with_weights-{number}', 'embeddings'], array
  if 'LayerNorm' in path:
    leaf = {'weight': 'gamma', 'bias': 'beta'}[leaf]
  elif leaf == 'weight':
    leaf, array = 'kernel', array.T
  if 'attention.self' in path:
    array = array.reshape(*array.shape[:-1], HEADS, D // HEADS)
  elif 'attention.output.dense' in path and leaf == 'kernel':
    array = array.reshape(HEADS, D // HEADS, D)
  if path == 'embeddings.LayerNorm':
    return ['layer_with_weights-3', leaf], array
  _, _, i, part = path.split('.', 3)
  return [f'layer_with_weights-{int(i) + 4}', *MODEL_GARDEN[part], leaf], array


def write_beside(directory: pathlib.Path) -> None:
  directory.mkdir(exist_ok=True)
  (directory / 'bert_config.json').write_text(json.dumps({
      'attention_probs_dropout_prob': 0.1, 'hidden_act': 'gelu',
      'hidden_dropout_prob': 0.1, 'hidden_size': D, 'initializer_range': 0.02,
      'intermediate_size': MLP, 'max_position_embeddings': POSITIONS,
      'num_attention_heads': HEADS, 'num_hidden_layers': LAYERS,
      'type_vocab_size': 2, 'vocab_size': VOCAB}, indent=2) + '\n')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
           *'abcdefghijklmnopqrstu', '##a', '##b', '.', '?']
  (directory / 'vocab.txt').write_text('\n'.join(words) + '\n')


def main() -> None:
  import tensorflow as tf

  one, two = HERE / 'tf1_bert', HERE / 'tf2_bert'
  for directory in (one, two):
    write_beside(directory)
  v1 = tf.compat.v1
  with tf.Graph().as_default(), v1.Session() as session:
    def add(name, array):
      v1.get_variable(name, initializer=np.ascontiguousarray(array))
    for common, array in tensors(head=True).items():
      name, array = tf1(common, array)
      add(name, array)
      if name.endswith('bias'):
        add(name + '/adam_m', 0 * array)
    add('bert/pooler/dense/kernel', value('pooler', (D, D)))
    add('cls/predictions/output_bias', value('cls', (VOCAB,)))
    add('global_step', np.int64(7))
    session.run(v1.global_variables_initializer())
    v1.train.Saver().save(session, str(one / 'bert_model.ckpt'),
                          write_meta_graph=False, write_state=False)

  root = tf.Module()

  def put(path, array):
    at = root
    for part in path[:-1]:
      if part not in vars(at):
        setattr(at, part, tf.Module())
      at = vars(at)[part]
    setattr(at, path[-1], tf.Variable(array))

  for common, array in tensors(head=False).items():
    put(*tf2(common, array))
  put([f'layer_with_weights-{LAYERS + 4}', 'kernel'], value('pooler', (D, D)))
  tf.train.Checkpoint(model=root).write(str(two / 'bert_model.ckpt'))


if __name__ == '__main__':
  main()
