"""TensorFlow checkpoints, written by TensorFlow and by tests.common."""

from collections.abc import Mapping
import json
import pathlib
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from qa_jax import checkpoints
from qa_jax import errors
from qa_jax import heads
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import tensorflow
from qa_jax.checkpoints import weight_names
from qa_jax.models import qa
from tests.common import tensorflow as tensorflow_lib
from tests.common.refusals import refusal
from tests.golden import record_tf

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
RELEASES = {'tf1_bert': True, 'tf2_bert': False}  # whether it has a head

NUMBERS = {np.dtype(v): k for k, v in tensorflow.DTYPES.items()}


def write(prefix: pathlib.Path,
          arrays: Mapping[str, np.ndarray],
          *,
          shards: int = 1,
          header: bytes = b'',
          extra: bytes = b'',
          **options) -> pathlib.Path:
  """Writes a bundle; entries end with `extra`, the header with `header`."""
  data = [b''] * shards
  rows = {b'': tensorflow_lib.field(1, shards) + header}
  for n, (name, array) in enumerate(arrays.items()):
    content, shard = array.tobytes(), n % shards
    shape = b''.join(
        tensorflow_lib.field(2, tensorflow_lib.field(1, size))
        for size in array.shape)
    rows[name.encode()] = (tensorflow_lib.field(1, NUMBERS[array.dtype]) +
                           tensorflow_lib.field(2, shape) +
                           tensorflow_lib.field(3, shard) +
                           tensorflow_lib.field(4, len(data[shard])) +
                           tensorflow_lib.field(5, len(content)) +
                           tensorflow_lib.varint(6 << 3 | 5) +
                           tensorflow_lib.masked_crc(content) + extra)
    data[shard] += content
  for n, content in enumerate(data):
    prefix.with_name(f'{prefix.name}.data-{n:05}-of-{shards:05}').write_bytes(
        content)
  prefix.with_name(prefix.name + '.index').write_bytes(
      tensorflow_lib.table(rows, **options))
  return prefix


ARRAYS = {
    f'layer_{i}/{leaf}': np.arange(i, 7 * i + 12, dtype=dtype).reshape(3, -1)
    for i in range(0, 12, 3)
    for leaf, dtype in (('kernel', np.float32), ('kernel/m', np.float64),
                        ('half', np.float16), ('brain', ml_dtypes.bfloat16))
}
ARRAYS['scalar'] = np.float32(3.5).reshape(())
ARRAYS['empty'] = np.zeros((0, 4), np.float32)


def read(prefix: pathlib.Path) -> dict[str, np.ndarray]:
  index = tensorflow.read_index(prefix)
  return tensorflow.read_tensors(index, index.entries)


@pytest.mark.parametrize('options', [{}, {
    'per_block': 100
}, {
    'per_block': 1
}, {
    'every': 16,
    'per_block': 7
}, {
    'compression': 1,
    'per_block': 5
}, {
    'shards': 3
}])
def test_the_tensors_of_a_bundle_are_read_bitwise(tmp_path, options):
  loaded = read(write(tmp_path / 'model.ckpt-7', ARRAYS, **options))
  assert loaded.keys() == ARRAYS.keys()
  for name, value in ARRAYS.items():
    assert loaded[name].dtype == value.dtype
    np.testing.assert_array_equal(loaded[name], value)


def test_any_flipped_bit_or_cut_of_the_index_is_an_error(tmp_path):
  path = write(tmp_path / 'm', {
      'a': np.ones(3, np.float32)
  }).with_name('m.index')
  content = path.read_bytes()
  index = tensorflow.read_index(tmp_path / 'm')
  harmless = 0
  for n in range(8 * len(content)):
    damaged = bytearray(content)
    damaged[n // 8] ^= 1 << n % 8
    path.write_bytes(damaged)
    try:
      assert tensorflow.read_index(tmp_path / 'm') == index
      harmless += 1
    except errors.UserError as e:
      assert str(path) in str(e) and '\n' not in str(e)
  # No checksum covers the empty block of metadata, its handle, the padding.
  assert harmless <= 8 * (40 + 13)
  for size in range(len(content)):
    path.write_bytes(content[:size])
    assert 'not a whole index' in refusal(tensorflow.read_index, tmp_path / 'm')


def test_any_flipped_bit_or_cut_of_the_data_is_an_error(tmp_path):
  prefix = write(tmp_path / 'm', {'a/b': np.arange(4, dtype=np.float32)})
  path = tmp_path / 'm.data-00000-of-00001'
  content = path.read_bytes()
  for n in range(8 * len(content)):
    damaged = bytearray(content)
    damaged[n // 8] ^= 1 << n % 8
    path.write_bytes(damaged)
    assert 'a/b is damaged (its checksum' in refusal(read, prefix)
  path.write_bytes(content[:-1])
  assert 'the file ends before it' in refusal(read, prefix)
  path.unlink()
  assert str(path) in refusal(read, prefix)


@pytest.mark.parametrize(
    ('options', 'message'),
    [({
        'header': tensorflow_lib.field(2, 1)
    }, 'big-endian'),
     ({
         'extra': tensorflow_lib.field(5, 5)
     }, r'5 bytes for shape (3,)'),
     ({
         'extra':
             tensorflow_lib.field(
                 2, tensorflow_lib.field(2, tensorflow_lib.field(1, 2**63)))
     }, 'bytes for shape'),
     ({
         'extra': tensorflow_lib.field(4, 2**62)
     }, 'the file ends before it'),
     ({
         'extra': tensorflow_lib.field(1, 7)
     }, 'is of type 7'),
     ({
         'extra': tensorflow_lib.field(7, b'')
     }, 'cut into slices'),
     ({
         'extra': tensorflow_lib.field(3, 4)
     }, 'data-00004-of-00001'),
     ({
         'extra': tensorflow_lib.varint(8 << 3 | 3)
     }, 'wire type 3'),
     ({
         'extra': tensorflow_lib.field(8, b'x' * 9)[:-3]
     }, 'ends within 9 bytes'),
     ({
         'extra': tensorflow_lib.field(2, 5)
     }, 'not a whole index'), ({
         'extra': tensorflow_lib.field(4, b'7')
     }, 'field 4 is no number'), ({
         'extra': b'\xff' * 12
     }, 'a number without end'), ({
         'compression': 2
     }, 'compression 2')])
def test_fields_without_a_checksum_are_checked(tmp_path, options, message):
  prefix = write(tmp_path / 'm', {'a': np.ones(3, np.float32)}, **options)
  assert message in refusal(read, prefix)


def test_tensors_that_overlap_in_a_short_file_are_refused(tmp_path):
  first_bytes = tensorflow_lib.field(4, 0) + tensorflow_lib.field(
      1, 1)  # offset 0, float32
  prefix = write(tmp_path / 'm', {
      'a': np.ones(3, np.float32),
      'b': np.ones(3, np.float32)
  },
                 extra=first_bytes)
  assert len(read(prefix)) == 2
  path = tmp_path / 'm.data-00000-of-00001'
  path.write_bytes(path.read_bytes()[:12])
  assert 'b is damaged (it overlaps others)' in refusal(read, prefix)


def test_a_name_that_would_break_the_line_is_refused(tmp_path):
  prefix = write(tmp_path / 'm', {'a\nb\x1b[2J': np.ones(3, np.float32)})
  assert r"the name 'a\nb\x1b[2J'" in refusal(read, prefix)


def test_a_snappy_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
  prefix = write(tmp_path / 'm', {'a': np.ones(3, np.float32)},
                 compression=1,
                 extra=tensorflow_lib.field(9, b'x' * 4000))
  size = (tmp_path / 'm.index').stat().st_size
  assert size < 1000 and len(read(prefix)) == 1
  monkeypatch.setattr(tensorflow, 'LARGEST', size)
  assert 'a block of 40' in refusal(tensorflow.read_index, prefix)


def test_a_missing_index_is_named(tmp_path):
  assert 'm.index: No such file' in refusal(tensorflow.read_index,
                                            tmp_path / 'm')


# --- BERT, written by TensorFlow


@pytest.mark.parametrize(('release', 'head'), RELEASES.items())
def test_a_bert_of_tensorflow_is_read_bitwise(release, head):
  checkpoint = hugging_face.read_checkpoint(GOLDEN / release)
  loaded, expected = checkpoint.tensors, record_tf.tensors(head)
  assert loaded.keys() == expected.keys()
  for name, value in expected.items():
    assert loaded[name].dtype == np.float32
    np.testing.assert_array_equal(loaded[name], value, err_msg=name)
  assert hugging_face.stored_head(checkpoint) == ('biased' if head else '')
  note, = checkpoint.notes
  assert 'not read' in note


def zeros(sizes):
  """Returns zero parameters of the biased head on an encoder of `sizes`."""
  model = qa.QAModel(sizes, heads.HEADS['biased']())
  return jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0))))


@pytest.mark.parametrize(('release', 'head'), RELEASES.items())
def test_a_bert_of_tensorflow_fits_our_model(release, head):
  directory = hugging_face.resolve_source(str(GOLDEN / release))
  sizes = hugging_face.read_config(directory)
  assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.mlp_size,
          sizes.vocab_size, sizes.max_position,
          sizes.layer_norm_eps) == (16, 2, 2, 24, 30, 20, 1e-12)
  fresh = zeros(sizes)
  params, notes = hugging_face.load_parameters(directory, fresh)
  assert jax.tree.structure(params) == jax.tree.structure(fresh)
  assert (hugging_face.FRESH_HEAD in notes) == (not head)
  kernel = params['encoder']['layer_1']['attention']['output']['kernel']
  np.testing.assert_array_equal(
      kernel.T,
      record_tf.tensors(head)['encoder.layer.1.attention.output.dense.weight'])


@pytest.mark.parametrize(
    ('name', 'common'),
    [('encoder/layer_with_weights-5/_attention_output_dense/kernel'
      '/.ATTRIBUTES/VARIABLE_VALUE',
      'encoder.layer.1.attention.output.dense.weight'),
     ('encoder/layer_with_weights-1/position_embeddings'
      '/.ATTRIBUTES/VARIABLE_VALUE', 'embeddings.position_embeddings.weight'),
     ('model/layer_with_weights-4/_output_dense/bias/.OPTIMIZER_SLOT/optimizer'
      '/m/.ATTRIBUTES/VARIABLE_VALUE', None),
     ('bert/encoder/layer_11/output/LayerNorm/gamma',
      'encoder.layer.11.output.LayerNorm.weight'),
     ('bert/encoder/layer_3/adapter/kernel', 'encoder.layer.3.adapter.weight'),
     ('bert/embeddings/word_projection', 'bert/embeddings/word_projection'),
     ('bert/pooler/dense/bias', None), ('global_step', None)])
def test_names_of_both_generations_become_common_names(name, common):
  assert weight_names.from_tensorflow(name) == common


# Suffixes under which optimizers store their slots beside a variable: those of
# tf.train (Adam, Momentum, Adagrad, Adadelta, RMSProp, Ftrl), BERT's
# optimizer, LAMB, Adafactor in its two generations, moving averages, Keras.
SLOTS = ('Adam', 'Adam_1', 'adam_m', 'adam_v', 'Momentum', 'Adagrad',
         'Adadelta', 'Adadelta_1', 'RMSProp', 'RMSProp_1', 'Ftrl', 'Ftrl_1',
         'LAMB', 'LAMB_1', 'lamb_m', 'lamb_v', 'AdamWeightDecayOptimizer',
         'AdamWeightDecayOptimizer_1', 'Adafactor', 'Adafactor_1', 'vr', 'vc',
         'ExponentialMovingAverage', '.OPTIMIZER_SLOT/optimizer/m')
VARIABLES = ('bert/embeddings/word_embeddings',
             'bert/embeddings/LayerNorm/gamma',
             'bert/encoder/layer_0/attention/self/query/kernel',
             'bert/encoder/layer_11/output/LayerNorm/beta',
             'bert/encoder/layer_2/intermediate/dense/bias',
             'cls/squad/output_weights', 'cls/squad/output_bias')


@pytest.mark.parametrize('slot', [
    *('/' + name for name in SLOTS), '_slot_vr', '_slot_vc', '_slot_m'])
def test_slots_of_any_optimizer_are_not_read(slot):
  assert all(weight_names.from_tensorflow(name) for name in VARIABLES)
  assert not any(weight_names.from_tensorflow(name + slot)
                 for name in VARIABLES)


@pytest.mark.parametrize('name', [
    'beta1_power', 'beta2_power', 'global_step', 'loss_scale', 'good_steps',
    'save_counter/.ATTRIBUTES/VARIABLE_VALUE', '_CHECKPOINTABLE_OBJECT_GRAPH',
    'optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE',
    'optimizer/learning_rate/.ATTRIBUTES/VARIABLE_VALUE',
    'training/Adam/bert/encoder/layer_0/output/dense/kernel/m',
    'training/LAMB/bert/embeddings/word_embeddings/v',
    'cls/predictions/transform/LayerNorm/gamma',
    'cls/seq_relationship/output_weights', 'output_weights', 'output_bias'])
def test_state_of_training_and_heads_of_other_tasks_are_not_read(name):
  assert weight_names.from_tensorflow(name) is None


@pytest.mark.parametrize('slots', [
    ('Adam', 'Adam_1'), ('adam_m', 'adam_v'), ('LAMB', 'LAMB_1'),
    ('Momentum',), ('vr', 'vc')])
def test_a_checkpoint_with_slots_loads_as_without(tmp_path, slots):
  arrays = {}
  for common, array in record_tf.tensors(head=True).items():
    name, array = record_tf.tf1(common, array)
    arrays[name] = np.ascontiguousarray(array)
    arrays |= {f'{name}/{slot}': np.full_like(array, np.nan) for slot in slots}
  shutil.copy(GOLDEN / 'tf1_bert' / 'bert_config.json', tmp_path)
  write(tmp_path / 'model.ckpt-9', arrays | {
      'beta1_power': np.float32(0.9).reshape(())})
  sizes = hugging_face.read_config(tmp_path)
  params, notes = hugging_face.load_parameters(tmp_path, zeros(sizes))
  recorded, _ = hugging_face.load_parameters(GOLDEN / 'tf1_bert', zeros(sizes))
  jax.tree.map(np.testing.assert_array_equal, params, recorded)
  assert len(notes) == 1 and 'not read' in notes[0]


def test_a_layer_that_the_config_does_not_have_is_refused(tmp_path):
  directory = shutil.copytree(GOLDEN / 'tf1_bert', tmp_path / 'bert')
  path = directory / 'bert_config.json'
  path.write_text(
      json.dumps(json.loads(path.read_text()) | {'num_hidden_layers': 1}))
  message = refusal(hugging_face.load_parameters, directory,
                    zeros(hugging_face.read_config(directory)))
  assert '16 unknown' in message and 'encoder.layer.1.' in message


@pytest.mark.parametrize(
    ('remove', 'message'),
    [('bert_config.json', 'bert_config.json'),
     ('bert_model.ckpt.index', 'has 0 TensorFlow checkpoints'),
     ('bert_model.ckpt.data-00000-of-00001', 'data-00000-of-00001')])
def test_a_missing_file_is_named(tmp_path, remove, message):
  directory = shutil.copytree(GOLDEN / 'tf1_bert', tmp_path / 'bert')
  (directory / remove).unlink()
  assert message in refusal(
      lambda path: hugging_face.read_checkpoint(
          hugging_face.resolve_source(path)), str(directory))


@pytest.mark.parametrize('package', ['cramjam', 'google_crc32c'])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
  monkeypatch.delitem(sys.modules, 'qa_jax.checkpoints.tensorflow')
  monkeypatch.delattr(checkpoints, 'tensorflow')
  monkeypatch.setitem(sys.modules, package, None)
  message = refusal(hugging_face.read_checkpoint, GOLDEN / 'tf1_bert')
  assert message.endswith(
      f"needs the package {package}; pip install -e '.[tensorflow]'")


def test_two_checkpoints_in_one_directory_are_refused(tmp_path):
  directory = shutil.copytree(GOLDEN / 'tf1_bert', tmp_path / 'bert')
  shutil.copy(directory / 'bert_model.ckpt.index', directory / 'b.index')
  assert 'has 2 TensorFlow checkpoints: b.index, bert_model' in refusal(
      hugging_face.read_checkpoint, directory)


@pytest.mark.parametrize('name', [
    'bert_model.ckpt.data-00000-of-00001', 'bert_model.ckpt.index',
    'bert_config.json'])
def test_the_hashes_of_a_checkpoint_cover_its_files(tmp_path, name):
  source = shutil.copytree(GOLDEN / 'tf1_bert', tmp_path / 'tf')
  before = hugging_face.file_hashes(source)
  with (source / name).open('ab') as file:
    file.write(b'x')
  after = hugging_face.file_hashes(source)
  assert {k for k in after if after[k] != before.get(k)} == {name}
