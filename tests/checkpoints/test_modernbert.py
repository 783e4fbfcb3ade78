"""ModernBERT loads, answers, trains and leaves as transformers has it.

tests/golden/record_modernbert.py recorded the checkpoint and the arrays.

Glossary of shapes: B rows, L row length, D hidden size, N layers.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from qa_jax import build
from qa_jax import objectives
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.export import hugging_face as export_lib
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.models import qa
from qa_jax.models.encoders import modernbert
from qa_jax.training import optimizer
from qa_jax.training import trainer
from tests.common import programs
from tests.common import scripts
from tests.common import tiny
from tests.common import weights
from tests.common.refusals import refusal

RATE, DECAY, EPS = 1e-2, 0.1, 1e-3  # of the recorded update
MARKS = 'xlm_roberta'  # the kind whose checksums were recorded
DIRECTORY = weights.GOLDEN / 'tiny_modernbert'
WINDOWS = {'max_length': 48, 'window_overlap': 6, 'max_question_length': 8}
ANY = {'null_rule': 'never', 'max_answer_length': 9, 'n_best': 5}
CONTEXT = ("The café (1901)  isn't far\n\n from Zürich, 東京 or Łódź: "
           'Ålesund-Bergen costs €5.30! ') * 3
QUESTIONS = [('Where is it?', CONTEXT), ('東京?', '  東京 x '), ('', 'a b'),
             ('[SEP] [PAD]', '[CLS]word[SEP] [MASK] [PAD]words'), ('q', '')]
# The config.json of answerdotai/ModernBERT-base, which transformers 4 wrote.
RELEASED = {
    'architectures': ['ModernBertForMaskedLM'], 'attention_bias': False,
    'attention_dropout': 0.0, 'bos_token_id': 50281,
    'classifier_activation': 'gelu', 'classifier_bias': False,
    'classifier_dropout': 0.0, 'classifier_pooling': 'mean',
    'cls_token_id': 50281, 'decoder_bias': True,
    'deterministic_flash_attn': False, 'embedding_dropout': 0.0,
    'eos_token_id': 50282, 'global_attn_every_n_layers': 3,
    'global_rope_theta': 160000.0, 'gradient_checkpointing': False,
    'hidden_activation': 'gelu', 'hidden_size': 768,
    'initializer_cutoff_factor': 2.0, 'initializer_range': 0.02,
    'intermediate_size': 1152, 'layer_norm_eps': 1e-05, 'local_attention': 128,
    'local_rope_theta': 10000.0, 'max_position_embeddings': 8192,
    'mlp_bias': False, 'mlp_dropout': 0.0, 'model_type': 'modernbert',
    'norm_bias': False, 'norm_eps': 1e-05, 'num_attention_heads': 12,
    'num_hidden_layers': 22, 'pad_token_id': 50283,
    'position_embedding_type': 'absolute', 'sep_token_id': 50282,
    'tie_word_embeddings': True, 'torch_dtype': 'float32', 'vocab_size': 50368}


@pytest.fixture(scope='module')
def golden():
  with np.load(weights.GOLDEN / 'modernbert_golden.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def reader():
  return tokenizer_files.read_tokenizer(DIRECTORY)


@pytest.fixture(scope='module')
def stored():
  return pretrained.read_pretrained(str(DIRECTORY))


def rows(golden) -> dict[str, np.ndarray]:
  ids, mask = golden['token_ids'], golden['attention_mask']
  return {'token_ids': ids, 'token_type_ids': np.zeros_like(ids),
          'attention_mask': mask}


# --- the encoder


@pytest.mark.parametrize('attention', ['auto', 'xla', 'chunked'])
def test_every_layer_and_the_logits_are_those_of_transformers(
    golden, stored, attention):
  assert stored.config.model.head == 'transformed(bias=True)'
  net, inputs = stored.model.clone(attention=attention), rows(golden)
  mask = inputs['attention_mask'] > 0
  encoder = jax.jit(net.config.build(attention=attention).apply)
  for types in (0 * inputs['token_ids'], inputs['attention_mask']):  # no effect
    layers = encoder({'params': stored.params['encoder']},
                     **inputs | {'token_type_ids': types})
    for ours, theirs in zip(layers, golden['layers'], strict=True):
      np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5, rtol=0)
  scores = jax.jit(net.apply)(
      {'params': stored.params}, **inputs, context_mask=mask)
  for end in ('start', 'end'):
    np.testing.assert_allclose(getattr(scores, end)[mask], golden[end][mask],
                               atol=1e-5, rtol=0)


def test_loss_gradients_and_one_update_are_those_of_torch(golden, stored):
  batch = {k: golden[k] for k in ('start_positions', 'end_positions')} | {
      'context_mask': golden['attention_mask'] > 0}
  architecture = ARCHITECTURES['modernbert']

  def mean_loss(params):
    return objectives.cross_entropy().loss(stored.model.apply(
        {'params': params}, **rows(golden),
        context_mask=batch['context_mask']), batch).mean()

  value, gradients = jax.jit(jax.value_and_grad(mean_loss))(stored.params)
  np.testing.assert_allclose(value, golden['loss'], atol=1e-5)
  named = lambda params: {
      (k if k.startswith(('head.', 'classifier.')) else f'model.{k}'): v
      for k, v in hugging_face.to_hugging_face(params, architecture).items()}
  theirs = {k.removeprefix('gradient '): v for k, v in golden.items()
            if k.startswith('gradient ')}
  ours = named(gradients)
  word = 'model.embeddings.tok_embeddings.weight'
  ours[word] = ours[word].copy()
  ours[word][stored.tokenizer.pad_id] = 0  # torch's padding_idx
  assert ours.keys() == theirs.keys()
  for name, g in theirs.items():
    np.testing.assert_allclose(ours[name], g, atol=1e-4 * np.abs(g).max() + (
        1e-6 if name.startswith('classifier.b') else 0), rtol=0, err_msg=name)

  adam = optimizer.adamw(
      optax.constant_schedule(RATE), clip_norm=0, weight_decay=DECAY, eps=EPS)
  updates, _ = adam.update(gradients, adam.init(stored.params), stored.params)
  ours = named(optax.apply_updates(stored.params, updates))
  theirs = {k.removeprefix('updated '): v for k, v in golden.items()
            if k.startswith('updated ')}
  assert len(theirs) == 11
  for name, value in theirs.items():
    np.testing.assert_allclose(ours[name], value, atol=1e-5, rtol=0,
                               err_msg=name)


def test_angles_far_from_the_start_are_those_of_transformers(golden):
  for theta, far in zip((160_000.0, 10_000.0), golden['far'], strict=True):
    cos, _ = modernbert.rotation(jnp.array([[8191]]), 64, theta)
    # An angle of 8,191 is a multiple of 2^-10 in float32: of the cosines, the
    # difference is that of the functions of torch and XLA.
    np.testing.assert_allclose(cos[0, 0], far, atol=1e-6)


def test_rotation_depends_on_the_difference_of_positions_alone():
  """Su et al. (2021), equation 11."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32)
          for _ in range(2))
  at = lambda position: modernbert.rotation(
      jnp.array([[position]]), 8, 10_000.0)
  product = lambda a, b: float((modernbert.rotate(q, at(a))
                                * modernbert.rotate(k, at(b))).sum())
  assert product(3, 10) == pytest.approx(product(503, 510), abs=1e-4)
  assert abs(product(3, 10) - product(3, 11)) > 1e-2


@pytest.mark.parametrize(('preset', 'count'), [
    ('base', 149_014_272), ('large', 394_781_696)])
def test_presets_have_the_parameters_of_the_releases(preset, count):
  """149M and 395M (Warner et al., 2024, table 4), here to the last one."""
  config = modernbert.ModernBertConfig(
      vocab_size=50368, **modernbert.ModernBertConfig.PRESETS[preset])
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  shapes = jax.eval_shape(lambda x: config.build().init(
      jax.random.key(0), x, x, x), ids)
  total = sum(x.size for x in jax.tree.leaves(shapes))
  n, d, m = config.num_layers, config.hidden_size, config.mlp_size
  assert total == 50368 * d + d + n * (4 * d * d + 3 * d * m + 2 * d) == count


@pytest.mark.parametrize('name', ['attention_bias', 'mlp_bias', 'norm_bias'])
def test_biases_are_read_and_used(tmp_path, name):
  """A bias that transformers would add changes the result and is exported."""
  directory = shutil.copytree(DIRECTORY, tmp_path / 'x')
  config = files.read_object(directory / 'config.json')
  files.write_json(directory / 'config.json', config | {name: True})
  path, parts = directory / 'model.safetensors', {
      'attention_bias': ('attn.Wqkv', 'attn.Wo'),
      'mlp_bias': ('mlp.Wi', 'mlp.Wo'), 'norm_bias': ('norm',)}[name]
  tensors = safetensors.numpy.load_file(path)
  biases = {k.replace('.weight', '.bias'): np.full(len(v), 0.5, v.dtype)
            for k, v in tensors.items()
            if k.removesuffix('.weight').endswith(parts)}
  assert len(biases) == {'norm_bias': 8}.get(name, 6)
  safetensors.numpy.save_file(tensors | biases, path)
  plain, biased = predict.load(DIRECTORY, **WINDOWS), predict.load(
      directory, **WINDOWS)
  a, b = (x.spans('Where?', 'a b c').start for x in (plain, biased))
  assert np.abs(a - b).max() > 1e-3
  assert biased.config.model.head == 'transformed(bias=True' + (
      ', norm_bias=True)' if name == 'norm_bias' else ')')
  export_lib.write_hugging_face(
      export_lib.read_source(str(directory)), tmp_path / 'out')
  again = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  for key, value in biases.items():
    np.testing.assert_array_equal(again[key], value)
  assert files.read_object(tmp_path / 'out' / 'config.json')[name] is True


# --- config.json


def read(tmp_path: pathlib.Path, fields: dict[str, Any]
         ) -> modernbert.ModernBertConfig:
  files.write_json(tmp_path / 'config.json', fields)
  return hugging_face.read_config(tmp_path)


def test_the_config_of_the_release_is_read(tmp_path):
  sizes = read(tmp_path, RELEASED)
  assert sizes == modernbert.ModernBertConfig(
      vocab_size=50368, **modernbert.ModernBertConfig.PRESETS['base'])
  optional = {'local_attention', 'global_rope_theta', 'local_rope_theta',
              'attention_bias', 'mlp_bias', 'norm_bias', 'norm_eps',
              'global_attn_every_n_layers', 'hidden_activation'}
  assert read(tmp_path, {
      k: v for k, v in RELEASED.items() if k not in optional}) == sizes


@pytest.mark.parametrize(('fields', 'expected'), [
    ({'global_rope_theta': 5.0, 'local_rope_theta': 7},
     {'global_theta': 5.0, 'local_theta': 7.0}),
    ({'global_rope_theta': 5.0, 'local_rope_theta': None},
     {'global_theta': 5.0, 'local_theta': 5.0}),
    ({'rope_parameters': {'full_attention': {'rope_theta': 5.0},
                          'sliding_attention': None}},
     {'global_theta': 5.0, 'local_theta': 10_000.0}),
    ({'layer_types': ['full_attention', 'sliding_attention'] * 11},
     {'global_every': 2}),
    ({'layer_types': ['full_attention'] * 22}, {'global_every': 1}),
    ({'layer_types': ['full_attention'] + ['sliding_attention'] * 21},
     {'global_every': 22}),
    ({'layer_types': None, 'global_attn_every_n_layers': 4},
     {'global_every': 4}),
    ({'norm_eps': 1e-6}, {'layer_norm_eps': 1e-6}),
    ({'local_attention': 33}, {'local_attention': 33})])
def test_fields_of_both_versions_are_read(tmp_path, fields, expected):
  sizes = read(tmp_path, RELEASED | fields)
  assert {k: getattr(sizes, k) for k in expected} == expected


@pytest.mark.parametrize(('fields', 'message'), [
    ({'hidden_activation': 'relu'}, "hidden_activation 'relu' is not"),
    ({'classifier_activation': 'silu'}, "classifier_activation 'silu' is not"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope_scaling'),
    ({'rope_parameters': {'full_attention': {'rope_type': 'yarn'}}},
     'rope_parameters'),
    ({'rope_parameters': {'full_attention': {
        'rope_theta': 1.0, 'partial_rotary_factor': 0.5}}}, 'rope_parameters'),
    ({'rope_parameters': {'rope_theta': 1.0}}, 'rope_parameters'),
    ({'rope_parameters': 3}, 'rope_parameters 3'),
    ({'global_rope_theta': 0}, 'global_rope_theta is 0'),
    ({'global_rope_theta': None}, 'global_rope_theta is None'),
    ({'local_rope_theta': 'x'}, "local_rope_theta is 'x'"),
    ({'layer_types': ['sliding_attention'] * 22}, 'layer_types'),
    ({'layer_types': ['full_attention'] * 3}, 'layer_types'),
    ({'local_attention': 0}, 'local_attention is 0'),
    ({'sliding_window': 1}, 'sliding_window 1 is not supported; only 64 is'),
    ({'global_attn_every_n_layers': 0}, 'global_attn_every_n_layers is 0'),
    ({'head_dim': 32}, 'head_dim 32 is not supported; only 64 is'),
    ({'norm_bias': 'no'}, "norm_bias is 'no'"),
    ({'norm_eps': 2}, 'norm_eps is 2'),
    ({'num_attention_heads': 256}, 'divisible by 2 · num_heads, 512'),
    ({'max_position_embeddings': None}, 'max_position_embeddings is None')])
def test_other_fields_are_refused_by_name(tmp_path, fields, message):
  assert message in refusal(read, tmp_path, RELEASED | fields)


# --- the head


def other_task(tmp_path: pathlib.Path, kind: str) -> pathlib.Path:
  """Writes the checkpoint with the class and tensors of another task."""
  directory = shutil.copytree(DIRECTORY, tmp_path / kind)
  config = files.read_object(directory / 'config.json')
  files.write_json(directory / 'config.json',
                   config | {'architectures': [f'ModernBert{kind}']})
  path = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  if kind == 'ForMaskedLM':
    tensors = {k: v for k, v in tensors.items() if 'classifier' not in k}
    tensors['decoder.bias'] = np.zeros(300, np.float16)
  if kind == 'Model':
    tensors = {k.removeprefix('model.'): v for k, v in tensors.items()
               if k.startswith('model.')}
  safetensors.numpy.save_file(tensors, path)
  return directory


@pytest.mark.parametrize('kind', [
    'ForMaskedLM', 'ForTokenClassification', 'Model'])
@pytest.mark.parametrize('head', ['independent', 'transformed'])
def test_another_task_gives_the_encoder_and_the_layer_of_its_head(
    tmp_path, stored, kind, head):
  directory = other_task(tmp_path, kind)
  fresh = weights.fresh(head, directory)
  params, notes = hugging_face.load_parameters(directory, fresh)
  jax.tree.map(np.testing.assert_array_equal, params['encoder'],
               stored.params['encoder'])
  assert hugging_face.FRESH_HEAD in notes
  assert any('classifier.weight' in note or 'decoder.bias' in note
             for note in notes) == (kind != 'Model')
  for end in ('start', 'end'):
    np.testing.assert_array_equal(params['head'][end]['kernel'],
                                  fresh['head'][end]['kernel'])
  if head == 'transformed':
    source = fresh if kind == 'Model' else stored.params
    for layer in ('dense', 'layer_norm'):
      jax.tree.map(np.testing.assert_array_equal, params['head'][layer],
                   source['head'][layer])
  assert any('head.dense.weight' in note for note in notes) == (kind != 'Model')


def test_another_head_drops_that_of_the_checkpoint_with_a_note():
  fresh = weights.fresh('biaffine', DIRECTORY)
  params, (note,) = hugging_face.load_parameters(DIRECTORY, fresh)
  assert "'transformed', is dropped" in note
  jax.tree.map(np.testing.assert_array_equal, params['head'], fresh['head'])


def test_a_missing_tensor_of_the_head_is_named(tmp_path):
  directory = shutil.copytree(DIRECTORY, tmp_path / 'x')
  path = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  del tensors['head.norm.weight']
  safetensors.numpy.save_file(tensors, path)
  assert '1 missing: head.norm.weight' in refusal(
      pretrained.read_pretrained, str(directory))


# --- the tokenizer


def test_ids_and_offsets_are_those_of_transformers(golden, reader):
  recorded, texts = golden['checksums'], scripts.texts()
  found = reader.encode(texts)
  different = [text for text, a, b, expected in zip(
      texts, found.ptr[:-1], found.ptr[1:], recorded, strict=True)
      if scripts.checksum(MARKS, text, found.ids[a:b], found.offsets[a:b])
      != expected]
  assert len(texts) == 2000 and not different


def test_a_window_is_the_pair_of_transformers(golden, reader):
  question, context = (scripts.texts()[i][:20] for i in (0, 12))
  expected = golden['pair']
  window = windows_lib.make_windows(
      [Example('0', question, context)], reader, max_length=120,
      window_overlap=1, max_question_length=80).gather(
          np.zeros(1, int), len(expected))
  assert window['token_ids'][0].tolist() == expected.tolist()


def test_typed_special_tokens_are_text(reader):
  ids = reader.encode([' '.join((*reader.special, *reader.special))
                       + ''.join(reader.special)]).ids.tolist()
  closed = {reader.index[t] for t in reader.special}
  assert len(ids) > 10 and not closed.intersection(ids)


# --- prediction, conversion, training


def test_an_exported_program_answers_as_its_model(tmp_path):
  model = predict.load(DIRECTORY, **WINDOWS, **ANY)
  programs.assert_answers_as_its_model(model, QUESTIONS, tmp_path)


@pytest.mark.parametrize('kind', ['ForQuestionAnswering', 'Model'])
def test_a_checkpoint_leaves_equal(kind, tmp_path):
  source = DIRECTORY if kind == 'ForQuestionAnswering' else other_task(
      tmp_path, kind)
  export_lib.write_hugging_face(
      export_lib.read_source(str(source)), tmp_path / 'out')
  reference, written = (files.read_object(path / 'config.json')
                        for path in (source, tmp_path / 'out'))
  default = {'classifier_dropout', 'classifier_pooling', 'decoder_bias',
             'deterministic_flash_attn', 'initializer_cutoff_factor',
             'sparse_pred_ignore_index', 'sparse_prediction',
             'tie_word_embeddings', 'transformers_version'}
  rates = {'attention_dropout', 'embedding_dropout', 'mlp_dropout', 'dtype'}
  for name in reference.keys() - default - rates:
    assert written[name] == reference[name], name
  assert rates <= written.keys()
  assert written['global_rope_theta'] == 160000.0  # of transformers 4
  theirs, ours = (safetensors.numpy.load_file(
      path / 'model.safetensors') for path in (source, tmp_path / 'out'))
  assert theirs.keys() == ours.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value.astype(np.float32))
  a, b = (pretrained.read_pretrained(str(path))
          for path in (source, tmp_path / 'out'))
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  assert (a.tokenizer, a.model) == (b.tokenizer, b.model)


def test_a_checkpoint_becomes_a_run(tmp_path):
  source = export_lib.read_source(str(DIRECTORY))
  export_lib.write_run_directory(source, tmp_path / 'run', [])
  run = predict.load(tmp_path / 'run', **WINDOWS)
  assert run.model == source.model.model
  assert RunDirectory(
      tmp_path / 'run').read_encoder_config() == source.model.model.config
  jax.tree.map(np.testing.assert_array_equal, run.params, source.model.params)


@pytest.mark.parametrize(('head', 'message'), [
    ('independent', "the head 'independent'; only 'transformed' can be a "
     'ModernBertForQuestionAnswering'),
    ('transformed(eps=0.01)', 'eps=0.01, but the encoder has 1e-05'),
    ('transformed(norm_bias=True)', 'norm_bias=True, but the encoder has')])
def test_a_head_that_transformers_lacks_is_refused(tmp_path, stored, head,
                                                   message):
  config = tiny.config(model={'head': head})
  net = build.build_model(config, stored.model.config)
  model = pretrained.Pretrained(
      net, qa.zero_params(net), stored.tokenizer, config, True, ())
  source = export_lib.ConversionSource('x', model, None)
  assert message in refusal(
      export_lib.write_hugging_face, source, tmp_path / 'out')


def test_the_first_layers_of_a_checkpoint_are_taken(stored):
  net = stored.model.clone(config=dataclasses.replace(
      stored.model.config, num_layers=1))
  params, notes = trainer.initial_parameters(
      net, jax.random.key(0), DIRECTORY)
  whole = stored.params['encoder']
  assert {k for k in whole if k not in params['encoder']} == {
      f'layer_{n}' for n in range(1, stored.model.config.num_layers)}
  jax.tree.map(np.testing.assert_array_equal, params['encoder'],
               {k: whole[k] for k in params['encoder']})
  assert 'the first 1 of the' in notes[-1] and 'fresh head' in notes[-1]


def test_training_starts_from_the_checkpoint_with_its_head(stored):
  """Windows are those of the checkpoint; the head is given by its spec."""
  config = tiny.config(
      model={'preset': '', 'init_from': str(DIRECTORY), 'hidden_size': 0,
             'num_layers': 0, 'num_heads': 0, 'mlp_size': 0,
             'head': 'transformed(bias=True)'},
      data={'lowercase': False})
  sizes = build.encoder_config(config, 297, build.init_source(config))
  assert sizes.dropout == 0.1  # of the config
  params, notes = trainer.initial_parameters(
      build.build_model(config, sizes), jax.random.key(0), DIRECTORY)
  assert notes == []
  jax.tree.map(np.testing.assert_array_equal, params, stored.params)
