"""Hugging Face checkpoints become parameters bitwise, or are refused."""

import json
import os
import pathlib
import shutil
import subprocess
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qa_jax.checkpoints import hugging_face
from qa_jax.io import files
from tests.common import weights
from tests.common.refusals import refusal

HEAD = ('qa_outputs.weight', 'qa_outputs.bias')
QUERY = 'encoder.layer.2.attention.self.query.weight'


@pytest.fixture(scope='module')
def template():
  return weights.fresh()


@pytest.fixture(scope='module')
def tensors() -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(weights.TINY / 'model.safetensors')


def write(directory: pathlib.Path, arrays, **config) -> pathlib.Path:
  """Writes a checkpoint; `config` overrides fields, and None removes one."""
  fields = json.loads((weights.TINY / 'config.json').read_text()) | config
  (directory / 'config.json').write_text(json.dumps(
      {k: v for k, v in fields.items() if v is not None}))
  safetensors.numpy.save_file(arrays, directory / 'model.safetensors')
  return directory


def assert_trees_equal(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_loaded_tree_has_the_structure_and_type_of_the_template(template):
  params, _ = hugging_face.load_parameters(weights.TINY, template)
  assert jax.tree.structure(params) == jax.tree.structure(template)
  def shapes_and_types(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes_and_types(params) == shapes_and_types(template)


def test_a_shallower_template_gets_the_first_layers_and_keeps_its_head(
    template):
  whole, _ = hugging_face.load_parameters(weights.TINY, template)
  first = {k: v for k, v in template['encoder'].items() if k != 'layer_2'}
  params, notes = hugging_face.load_parameters(
      weights.TINY, {'encoder': first, 'head': template['head']})
  assert_trees_equal(params['encoder'], {k: whole['encoder'][k] for k in first})
  assert_trees_equal(params['head'], template['head'])
  assert notes[-1].startswith(
      'config.model.num_layers=2: the first 2 of the 3 layers')


def test_kernels_are_transposed_and_query_key_value_are_joined(
    template, tensors):
  layer = hugging_face.load_parameters(
      weights.TINY, template)[0]['encoder']['layer_1']
  prefix = 'bert.encoder.layer.1.'
  np.testing.assert_array_equal(
      layer['mlp']['intermediate']['kernel'],
      tensors[prefix + 'intermediate.dense.weight'].T)
  for i, name in enumerate(('query', 'key', 'value')):
    for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
      np.testing.assert_array_equal(
          layer['attention']['query_key_value'][ours][..., 32 * i:32 * i + 32],
          tensors[f'{prefix}attention.self.{name}.{theirs}'].T)


def test_rows_of_qa_outputs_are_start_then_end(template, tensors):
  head = hugging_face.load_parameters(weights.TINY, template)[0]['head']
  weight = tensors['qa_outputs.weight']  # [2, D]
  np.testing.assert_array_equal(head['start']['kernel'][:, 0], weight[0])
  np.testing.assert_array_equal(head['end']['kernel'][:, 0], weight[1])


def test_names_without_prefix_load_equally(template, tensors, tmp_path):
  write(tmp_path, {k.removeprefix('bert.'): v for k, v in tensors.items()})
  assert_trees_equal(hugging_face.load_parameters(tmp_path, template),
                     hugging_face.load_parameters(weights.TINY, template))


def test_names_with_and_without_prefix_at_once_are_refused(
    template, tensors, tmp_path):
  write(tmp_path, tensors | {QUERY: tensors['bert.' + QUERY] + 1})
  assert f'{QUERY} twice' in refusal(hugging_face.load_parameters, tmp_path,
                                     template)


def test_a_name_cannot_break_the_line(template, tensors, tmp_path):
  name = 'encoder.a\nb\x1b[2J'
  write(tmp_path, tensors | {name: np.zeros(2, np.float32)})
  assert f'unknown: {name!r}' in refusal(
      hugging_face.load_parameters, tmp_path, template)


@pytest.mark.parametrize('prefix', ['bert.', ''])
@pytest.mark.parametrize('part', [
    '{}pooler.dense.weight', '{}embeddings.position_ids',
    '{}embeddings.token_type_ids', 'cls.predictions.bias',
    'cls.predictions.transform.LayerNorm.gamma',
    'cls.predictions.decoder.weight', 'cls.seq_relationship.weight',
    'classifier.weight', 'classifier.out_proj.bias', 'crf.transitions'])
def test_parts_of_other_tasks_are_skipped_and_noted(
    template, tensors, tmp_path, prefix, part):
  others = {part.format(prefix): np.arange(6)[None]}
  write(tmp_path, {prefix + k.removeprefix('bert.') if k not in HEAD else k: v
                   for k, v in tensors.items()} | others)
  params, notes = hugging_face.load_parameters(tmp_path, template)
  assert_trees_equal(params,
                     hugging_face.load_parameters(weights.TINY, template)[0])
  assert all(any(name in note for note in notes) for name in others)


def test_layer_norm_gamma_and_beta_are_weight_and_bias(
    template, tensors, tmp_path):
  """Uses the names in the file of bert-base-uncased."""
  old = {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'): v for k, v in tensors.items()}
  assert len(old.keys() - tensors.keys()) == 14  # 2 of embeddings, 4 a layer
  write(tmp_path, old)
  assert_trees_equal(hugging_face.load_parameters(tmp_path, template),
                     hugging_face.load_parameters(weights.TINY, template))


def test_layer_norm_gamma_beside_weight_is_refused(template, tensors, tmp_path):
  name = 'bert.embeddings.LayerNorm.'
  write(tmp_path, tensors | {name + 'gamma': tensors[name + 'weight'] + 1})
  message = refusal(hugging_face.load_parameters, tmp_path, template)
  assert 'embeddings.LayerNorm.weight twice' in message


@pytest.mark.parametrize(('architecture', 'fields'), [
    ('BertForQuestionAnswering', {}), ('BertModel', {}),
    ('BertLMHeadModel', {}), ('BertForPreTraining', {'is_decoder': False})])
def test_architectures_stand_in_for_a_missing_model_type(
    tensors, tmp_path, architecture, fields):
  write(tmp_path, tensors, model_type=None, architectures=[architecture],
        **fields)
  assert hugging_face.read_config(tmp_path) == hugging_face.read_config(
      weights.TINY)


@pytest.mark.parametrize('name', ['distilbert', 'electra'])
def test_architectures_name_the_other_encoders_too(tmp_path, name):
  directory = shutil.copytree(weights.GOLDEN / f'tiny_{name}', tmp_path / 'x')
  path = directory / 'config.json'
  fields = json.loads(path.read_text())
  assert fields.pop('model_type') == name
  path.write_text(json.dumps(fields))
  loaded, recorded = (hugging_face.read_checkpoint(d).tensors for d in (
      directory, weights.GOLDEN / f'tiny_{name}'))
  assert_trees_equal(loaded, recorded)


def test_a_config_of_sizes_alone_is_berts(tensors, tmp_path):
  write(tmp_path, tensors, model_type=None, architectures=None)
  assert hugging_face.read_config(tmp_path) == hugging_face.read_config(
      weights.TINY)


@pytest.mark.parametrize('architectures', [
    ['RobertaPreLayerNormModel'], ['XLMRobertaXLModel'], ['XLNetModel'],
    ['BertGenerationDecoder'], ['MobileBertForMaskedLM']])
def test_architectures_of_other_encoders_are_refused_by_name(
    tensors, tmp_path, architectures):
  write(tmp_path, tensors, model_type=None, architectures=architectures)
  message = refusal(hugging_face.read_config, tmp_path)
  assert f'model_type None of {architectures[0]} is not supported' in message


@pytest.mark.parametrize('architectures', [None, [], [5], 'BertModel', ['a b']])
def test_a_config_without_kind_and_with_a_missing_size_is_refused(
    tensors, tmp_path, architectures):
  write(tmp_path, tensors, model_type=None, architectures=architectures,
        type_vocab_size=None)
  assert 'model_type None is not supported' in refusal(
      hugging_face.read_config, tmp_path)


@pytest.mark.parametrize(('value', 'dtype'), [
    (np.nan, np.float32), (np.inf, np.float32), (-np.inf, np.float16),
    (np.nan, ml_dtypes.bfloat16), (1e300, np.float64)])
@pytest.mark.parametrize('name', [
    'bert.' + QUERY, 'qa_outputs.bias', 'bert.embeddings.LayerNorm.weight'])
def test_weights_that_are_not_finite_are_refused(
    tensors, tmp_path, value, dtype, name):
  damaged = tensors[name].astype(dtype)
  damaged.flat[[0, -1]] = value
  write(tmp_path, tensors | {name: damaged})
  message = refusal(hugging_face.read_checkpoint, tmp_path)
  assert 'weights are not finite (NaN or infinity): 2 in ' + (
      name.removeprefix('bert.')) in message


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int64, np.bool_])
def test_weights_that_are_no_floats_are_refused(tensors, tmp_path, dtype):
  name = 'bert.' + QUERY
  write(tmp_path, tensors | {name: np.ones(tensors[name].shape, dtype)})
  assert f'{name} has the type {np.dtype(dtype)}, expected floats' in refusal(
      hugging_face.read_checkpoint, tmp_path)


def test_weights_of_a_type_that_numpy_lacks_are_refused(tensors, tmp_path):
  path = write(tmp_path, tensors) / 'model.safetensors'
  raw = path.read_bytes()
  header = raw[8:8 + int.from_bytes(raw[:8], 'little')]
  fields = json.loads(header)
  fields['bert.' + QUERY].update(dtype='F8_E4M3')
  end = 0  # each tensor has a quarter of its bytes, of one byte a number
  for field in fields.values():
    if 'shape' in field:
      field['dtype'] = 'F8_E4M3'
      field['data_offsets'] = [end, end := end + int(np.prod(field['shape']))]
  new = json.dumps(fields).encode()
  path.write_bytes(len(new).to_bytes(8, 'little') + new + bytes(end))
  message = refusal(hugging_face.read_checkpoint, tmp_path)
  assert 'take the checkpoint that is not quantised' in message
  assert str(path) in message


def test_more_layers_than_a_config_may_have_are_refused(tensors, tmp_path):
  write(tmp_path, tensors, num_hidden_layers=10**12)
  assert 'num_hidden_layers is 1000000000000, expected at most' in refusal(
      hugging_face.read_config, tmp_path)


def test_a_part_that_is_not_read_may_be_infinite(tensors, tmp_path):
  write(tmp_path, tensors | {'classifier.bias': np.full(2, np.inf)})
  assert hugging_face.read_checkpoint(tmp_path).tensors


def test_a_checkpoint_without_a_head_leaves_the_fresh_head_with_a_note(
    template, tensors, tmp_path):
  write(tmp_path, {k: v for k, v in tensors.items() if k not in HEAD})
  params, notes = hugging_face.load_parameters(tmp_path, template)
  assert notes == [
      'the checkpoint has no span head: S and E are freshly initialised']
  assert_trees_equal(params['head'], template['head'])
  assert_trees_equal(params['encoder'], hugging_face.load_parameters(
      weights.TINY, template)[0]['encoder'])


def test_a_bias_is_dropped_by_the_independent_head_and_noted_unless_zero(
    template, tensors, tmp_path):
  assert any('bias' in n and 'dropped' in n
             for n in hugging_face.load_parameters(weights.TINY, template)[1])
  write(tmp_path, tensors | {'qa_outputs.bias': np.zeros(2, np.float32)})
  assert hugging_face.load_parameters(tmp_path, template)[1] == []


def test_a_bias_is_kept_by_the_biased_head(tensors, tmp_path):
  template = weights.fresh('biased')
  params, notes = hugging_face.load_parameters(weights.TINY, template)
  assert notes == []
  bias = tensors['qa_outputs.bias']
  assert bias.all()
  for i, end in enumerate(('start', 'end')):
    np.testing.assert_array_equal(params['head'][end]['bias'], bias[i:i + 1])
  write(tmp_path, {k: v for k, v in tensors.items() if k != HEAD[1]})
  params, _ = hugging_face.load_parameters(tmp_path, template)
  assert not params['head']['start']['bias'].any()
  for directory, spec in ((weights.TINY, 'biased'), (tmp_path, 'independent')):
    assert hugging_face.stored_head(
        hugging_face.read_checkpoint(directory)) == spec


@pytest.mark.parametrize('head', ['biaffine', 'layer_mix', 'shared'])
def test_a_head_that_is_no_pair_stays_fresh_with_a_note(head):
  template = weights.fresh(head)
  params, notes = hugging_face.load_parameters(weights.TINY, template)
  assert len(notes) == 1 and 'dropped' in notes[0] and 'fresh' in notes[0]
  assert_trees_equal(params['head'], template['head'])
  assert jax.tree.structure(params) == jax.tree.structure(template)


@pytest.mark.parametrize('about, has_types', [
    ({'model_input_names': ['input_ids', 'attention_mask']}, False),
    ({'model_input_names': ['input_ids', 'token_type_ids']}, True),
    ({'tokenizer_class': 'TokenizersBackend', 'backend': 'tokenizers'}, False),
    ({'tokenizer_class': 'AlbertTokenizer', 'backend': 'tokenizers'}, False),
    ({'tokenizer_class': 'BertTokenizer', 'backend': 'tokenizers'}, True),
    ({'tokenizer_class': 'AlbertTokenizer'}, True),
    ({'tokenizer_class': 'BertTokenizerFast'}, True),
    *(({'tokenizer_class': kind}, False) for kind in (
        'DistilBertTokenizer', 'DistilBertTokenizerFast', 'MPNetTokenizer',
        'RobertaTokenizerFast', 'XLMRobertaTokenizer'))])
def test_a_tokenizer_without_token_types_gives_all_tokens_type_0(
    template, tensors, tmp_path, about, has_types):
  files.write_json(write(tmp_path, tensors) / 'tokenizer_config.json', about)
  params, notes = hugging_face.load_parameters(tmp_path, template)
  assert ('token_type_ids' in ''.join(notes)) != has_types
  original, _ = hugging_face.load_parameters(weights.TINY, template)
  ids = np.arange(5, 17)[None]
  types = (np.arange(12) >= 6)[None].astype(np.int32)
  scores = lambda params, types: weights.model(weights.TINY).apply(
      {'params': params}, ids, types, ids > 0, types > 0)
  ours, theirs = scores(params, types), scores(original, types * has_types)
  np.testing.assert_array_equal(ours.start, theirs.start)
  np.testing.assert_array_equal(ours.end, theirs.end)
  assert (scores(original, types).start != scores(original, 0 * types).start
          ).any()


def test_parts_of_an_electra_discriminator_are_skipped(tmp_path):
  directory = shutil.copytree(weights.GOLDEN / 'tiny_electra',
                              tmp_path / 'electra')
  path = directory / 'model.safetensors'
  safetensors.numpy.save_file(safetensors.numpy.load_file(path) | {
      'discriminator_predictions.dense.bias': np.ones(3, np.float32)}, path)
  checkpoint = hugging_face.read_checkpoint(directory)
  assert 'discriminator_predictions.dense.bias' in checkpoint.notes[0]
  assert checkpoint.tensors.keys() == hugging_face.read_checkpoint(
      weights.GOLDEN / 'tiny_electra').tensors.keys()


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(template, tensors, tmp_path, dtype):
  write(tmp_path, {k: v.astype(dtype) for k, v in tensors.items()})
  params, _ = hugging_face.load_parameters(tmp_path, template)
  embedding = params['encoder']['embeddings']['word']['embedding']
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
  np.testing.assert_array_equal(embedding, tensors[
      'bert.embeddings.word_embeddings.weight'].astype(dtype).astype(
          np.float32))


def shards(directory: pathlib.Path, tensors) -> pathlib.Path:
  write(directory, {})
  (directory / 'model.safetensors').unlink()
  names = sorted(tensors)
  files = {'model-00001-of-00002.safetensors': names[:20],
           'model-00002-of-00002.safetensors': names[20:]}
  for file, part in files.items():
    safetensors.numpy.save_file(
        {k: tensors[k] for k in part}, directory / file)
  (directory / 'model.safetensors.index.json').write_text(json.dumps({
      'metadata': {}, 'weight_map': {
          k: file for file, part in files.items() for k in part}}))
  return directory


def test_shards_give_equal_parameters(template, tensors, tmp_path):
  assert_trees_equal(
      hugging_face.load_parameters(shards(tmp_path, tensors), template),
      hugging_face.load_parameters(weights.TINY, template))


def test_a_missing_shard_is_named(template, tensors, tmp_path):
  (shards(tmp_path, tensors) / 'model-00002-of-00002.safetensors').unlink()
  assert 'model-00002-of-00002.safetensors is missing' in refusal(
      hugging_face.load_parameters, tmp_path, template)


def test_an_index_that_points_outside_is_refused(template, tensors, tmp_path):
  index = shards(tmp_path, tensors) / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'a': '../x.safetensors'}}))
  assert 'weight_map' in refusal(hugging_face.load_parameters, tmp_path,
                                 template)


def test_missing_names_are_listed_and_counted(template, tensors, tmp_path):
  write(tmp_path, {k: v for k, v in tensors.items() if '.layer.2.' not in k})
  message = refusal(hugging_face.load_parameters, tmp_path, template)
  assert '16 missing' in message and 'encoder.layer.2.' in message
  assert 'and 12 more' in message and str(tmp_path) in message


def test_unknown_names_are_listed(template, tensors, tmp_path):
  write(tmp_path, tensors | {
      'bert.encoder.layer.3.output.dense.bias': np.ones(32, np.float32),
      'embeddings_project.weight': np.ones((2, 32), np.float32),
      'qa_outputs.dense.weight': np.ones((2, 32), np.float32)})
  message = refusal(hugging_face.load_parameters, tmp_path, template)
  assert '3 unknown' in message and 'embeddings_project.weight' in message
  assert 'encoder.layer.3.output.dense.bias' in message


@pytest.mark.parametrize('name, shape', [
    ('bert.' + QUERY, (32, 16)), ('qa_outputs.weight', (3, 32)),
    ('bert.embeddings.word_embeddings.weight', (101, 32))])
def test_wrong_shapes_are_listed(template, tensors, tmp_path, name, shape):
  write(tmp_path, tensors | {name: np.ones(shape, np.float32)})
  message = refusal(hugging_face.load_parameters, tmp_path, template)
  assert f'1 of another shape: {name.removeprefix("bert.")} {shape}' in message
  assert str(tensors[name].shape) in message


@pytest.mark.parametrize('size', [0, 4, 100, -1000])
def test_a_truncated_file_is_named(template, tensors, tmp_path, size):
  path = write(tmp_path, tensors) / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  assert str(path) in refusal(hugging_face.load_parameters, tmp_path, template)


def test_a_file_of_another_format_is_named(template, tmp_path):
  path = write(tmp_path, {}) / 'model.safetensors'
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0')
  assert str(path) in refusal(hugging_face.load_parameters, tmp_path, template)


def test_pickled_weights_get_the_command_that_converts_them(
    template, tensors, tmp_path):
  """Runs the advised command with stand-ins for torch and its safetensors."""
  directory = tmp_path / 'a b'
  directory.mkdir()
  write(directory, {})
  (directory / 'model.safetensors').unlink()
  names = sorted(tensors)
  for number, part in enumerate((names[:20], names[20:])):
    np.savez(directory / 'part.npz', **{k: tensors[k] for k in part})
    (directory / 'part.npz').rename(
        directory / f'pytorch_model-0000{number + 1}-of-00002.bin')
  message = refusal(hugging_face.load_parameters, directory, template)
  assert 'pytorch_model.bin' in message and 'can run code' in message
  fakes = tmp_path / 'fakes'
  (fakes / 'safetensors').mkdir(parents=True)
  (fakes / 'torch.py').write_text(textwrap.dedent("""
      import numpy as np
      class Tensor:
        def __init__(self, array): self.array = array
        contiguous = clone = lambda self: self
      def load(path, map_location, weights_only):
        assert map_location == 'cpu' and weights_only
        return {k: Tensor(v) for k, v in np.load(path).items()}
  """))
  (fakes / 'safetensors' / 'torch.py').write_text(textwrap.dedent("""
      import numpy as np
      def save_file(tensors, path, metadata):
        with open(path, 'wb') as file:
          np.savez(file, **{k: v.array for k, v in tensors.items()})
  """))
  command = message.partition('torch is installed: ')[2]
  subprocess.run(['bash', '-c', command], check=True, cwd=tmp_path, env={
      **os.environ, 'PYTHONPATH': str(fakes)})
  with np.load(directory / 'model.safetensors') as converted:
    assert_trees_equal(dict(converted), dict(tensors))


def test_pickled_weights_of_the_hub_are_fetched_and_converted(
    template, tmp_path):
  directory = tmp_path / 'models--someone--some-bert' / 'snapshots' / '0a1b'
  directory.mkdir(parents=True)
  write(directory, {})
  (directory / 'model.safetensors').unlink()
  message = refusal(hugging_face.load_parameters, directory, template)
  assert 'hf download someone/some-bert --local-dir some-bert && ' in message
  assert message.endswith(' some-bert, and use some-bert')


@pytest.mark.parametrize(('name', 'message'), [
    ('tf_model.h5', 'tf_model.h5 is not read; save the model as'),
    ('model.fp16.safetensors', 'model.fp16.safetensors is not read; save'),
    ('adapter_config.json', 'adapters are not supported; merge')])
def test_weights_of_another_kind_are_named(template, tmp_path, name, message):
  (write(tmp_path, {}) / 'model.safetensors').rename(tmp_path / name)
  assert message in refusal(hugging_face.load_parameters, tmp_path, template)
  if name == 'tf_model.h5':  # many checkpoints have both
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    assert 'convert them where torch' in refusal(
        hugging_face.load_parameters, tmp_path, template)


def test_a_quantisation_of_floats_is_noted(template, tensors, tmp_path):
  path = write(tmp_path, tensors) / 'config.json'
  files.write_json(path, files.read_object(path) | {
      'quantization_config': {'load_in_8bit': True}})
  _, notes = hugging_face.load_parameters(tmp_path, template)
  assert 'quantization_config is not read' in ' '.join(notes)


def test_a_directory_without_weights_is_refused(template, tmp_path):
  (write(tmp_path, {}) / 'model.safetensors').unlink()
  message = refusal(hugging_face.load_parameters, tmp_path, template)
  assert message.endswith('model.safetensors is missing; fetch it again')


@pytest.mark.parametrize('field, value', [
    ('model_type', 'xlnet'), ('model_type', 5), ('hidden_act', 'gelu_new'),
    ('position_embedding_type', 'relative_key'), ('num_hidden_layers', '3'),
    ('is_decoder', True),
    ('hidden_size', None), ('vocab_size', 0),
    ('layer_norm_eps', 'small'), ('layer_norm_eps', -1)])
def test_a_config_of_another_encoder_is_refused(
    tensors, tmp_path, field, value):
  write(tmp_path, tensors, **{field: value})
  message = refusal(hugging_face.read_config, tmp_path)
  assert 'config.json' in message
  assert field in message and repr(value) in message


def test_heads_that_do_not_divide_the_hidden_size_are_refused(
    tensors, tmp_path):
  write(tmp_path, tensors, num_attention_heads=5)
  assert 'not divisible by num_attention_heads 5' in refusal(
      hugging_face.read_config, tmp_path)


def test_config_is_read_field_by_field(tensors, tmp_path):
  write(tmp_path, tensors, layer_norm_eps=1e-6)
  config = hugging_face.read_config(tmp_path)
  assert (config.vocab_size, config.hidden_size, config.num_layers,
          config.num_heads, config.mlp_size, config.max_position,
          config.type_vocab_size, config.layer_norm_eps) == (
              100, 32, 3, 4, 64, 40, 2, 1e-6)


def test_the_default_of_layer_norm_eps_is_that_of_bert(tensors, tmp_path):
  write(tmp_path, tensors, layer_norm_eps=None)
  assert hugging_face.read_config(tmp_path).layer_norm_eps == 1e-12


def test_a_directory_resolves_to_itself():
  assert hugging_face.resolve_source(str(weights.TINY)) == weights.TINY


def test_a_directory_without_config_is_refused(tmp_path):
  assert 'config.json' in refusal(hugging_face.resolve_source, str(tmp_path))


@pytest.mark.parametrize('source', ['./nowhere', '/no/where', 'a/b/c', 'a b'])
def test_a_missing_path_is_not_taken_for_a_hub_id(source, monkeypatch):
  monkeypatch.setattr(hugging_face.huggingface_hub, 'snapshot_download',
                      lambda *a, **k: pytest.fail('asked the hub'))
  assert source in refusal(hugging_face.resolve_source, source)


def test_an_unreachable_hub_is_one_line(monkeypatch):
  def unreachable(*_, **__):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(
      hugging_face.huggingface_hub, 'snapshot_download', unreachable)
  message = refusal(hugging_face.resolve_source, 'someone/some-bert')
  assert "'someone/some-bert'" in message and 'network' in message


def test_a_hub_id_is_fetched_without_pickles(monkeypatch, tmp_path):
  asked = {}

  def fetch(name, **options):
    asked.update(options, name=name)
    return str(shutil.copytree(weights.TINY, tmp_path / 'snapshot'))

  monkeypatch.setattr(hugging_face.huggingface_hub, 'snapshot_download', fetch)
  assert hugging_face.resolve_source(
      'someone/some-bert') == tmp_path / 'snapshot'
  assert asked['name'] == 'someone/some-bert' and asked['etag_timeout'] <= 10
  assert not any('bin' in pattern for pattern in asked['allow_patterns'])
