"""DeBERTa v2 and v3 load, answer, learn and leave as transformers has them.

tests/golden/record_deberta_v2.py recorded the arrays and the configs.

Glossary of shapes: B batch, L window length, D hidden size, H attention heads,
K head size, S relative positions on either side.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from qa_jax import heads
from qa_jax import objectives
from qa_jax.checkpoints import architectures
from qa_jax.checkpoints import hugging_face
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.export import hugging_face as export_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.models.encoders import deberta_v2
from qa_jax.training import optimizer
from tests.common import drawn
from tests.common import programs
from tests.common import scripts
from tests.common import weights
from tests.common.refusals import refusal

VARIANTS = ('v3', 'v2', 'c2p', 'p2c', 'conv', 'one')
KIND = architectures.ARCHITECTURES['deberta-v2']
INPUTS = ('token_ids', 'token_type_ids', 'attention_mask')
# The config.json of microsoft/deberta-v3-base: nothing else is in it.
PUBLISHED = {
    'model_type': 'deberta-v2', 'attention_probs_dropout_prob': 0.1,
    'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'hidden_size': 768,
    'initializer_range': 0.02, 'intermediate_size': 3072,
    'max_position_embeddings': 512, 'relative_attention': True,
    'position_buckets': 256, 'norm_rel_ebd': 'layer_norm',
    'share_att_key': True, 'pos_att_type': 'p2c|c2p', 'layer_norm_eps': 1e-7,
    'max_relative_positions': -1, 'position_biased_input': False,
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'type_vocab_size': 0,
    'vocab_size': 128100}
WINDOWS = {'window_overlap': 6, 'max_question_length': 8,
           'null_rule': 'never', 'max_answer_length': 9, 'n_best': 5}
CONTEXT = ("The café (1901)  isn't far\n\n from Zürich, 東京 or Łódź: "
           'Ålesund-Bergen costs €5.30! ') * 3
QUESTIONS = [('Where is it?', CONTEXT), ('東京?', '  東京 x '), ('', 'a b'),
             ('[SEP] [PAD]', '[CLS]word[SEP] [MASK] words'), ('q', '')]


@pytest.fixture(scope='module')
def golden():
  with np.load(weights.GOLDEN / 'deberta_v2_golden.npz') as arrays:
    return dict(arrays)


@functools.cache
def recorded_configs() -> dict[str, dict]:
  return files.read_object(weights.GOLDEN / 'deberta_v2_configs.json')


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """Draws the weights of a directory by the names in transformers."""
  shapes = {('' if name.startswith('qa_outputs') else KIND.prefix) + name:
            x.shape for name, x in hugging_face.to_hugging_face(
                weights.fresh('biased', directory), KIND).items()}
  return drawn.tensors(shapes)


def write(directory: pathlib.Path, variant: str = 'v3', *, kind: str = '',
          **fields) -> pathlib.Path:
  """Writes a checkpoint of a variant; a `kind` of tokenizer gives it one."""
  config = recorded_configs()[variant] | fields
  if kind:
    config['vocab_size'] = 640  # as published, a few more than tokens
    files.write_text(directory / 'tokenizer.json',
                     scripts.deberta_tokenizer(kind).to_str())
    about = recorded_configs()['tokenizer_config'] | {'model_max_length': 40}
    files.write_json(directory / 'tokenizer_config.json', {
        k: about[k] for k in about if kind == 'deberta_5'
        or k.endswith(('_token', '_length', 'do_lower_case'))})
  files.write_json(directory / 'config.json', config)
  safetensors.numpy.save_file(
      tensors_of(directory), directory / 'model.safetensors')
  return directory


def read(directory: pathlib.Path):
  """Returns the model with the head `biased`, its parameters and notes."""
  net = weights.model(directory, 'biased')
  return net, *hugging_face.load_parameters(
      directory, weights.fresh('biased', directory))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """Returns a directory with the tokenizer of transformers 4."""
  return write(tmp_path_factory.mktemp('v3'), kind='deberta_4')


@pytest.fixture(scope='module')
def model(checkpoint):
  return predict.load(checkpoint, **WINDOWS)


def answers_of(model: predict.QA) -> list[predict.Answer]:
  return model.answer_batch(
      [{'question': q, 'context': c} for q, c in QUESTIONS])


# --- the encoder


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_layer_and_the_logits_are_those_of_transformers(
    golden, variant, tmp_path):
  net, params, notes = read(write(tmp_path, variant))
  assert notes == []
  inputs = [golden[name] for name in INPUTS]
  mask = inputs[-1] > 0
  layers = jax.jit(net.config.build().apply)(
      {'params': params['encoder']}, *inputs)
  for ours, theirs in zip(layers, golden[f'{variant} layers'], strict=True):
    np.testing.assert_allclose(ours[mask], theirs, atol=1e-5, rtol=0)
  assert not layers[0][~mask].any()  # as in transformers
  scores = jax.jit(net.apply)({'params': params}, *inputs, mask)
  for end in ('start', 'end'):
    np.testing.assert_allclose(
        getattr(scores, end)[mask], golden[f'{variant} {end}'][mask],
        atol=1e-5, rtol=0)


def test_gradients_and_an_update_are_those_of_torch(golden, tmp_path):
  net, params, _ = read(write(tmp_path))
  batch = {k: golden[k] for k in (
      'context_mask', 'start_positions', 'end_positions')}
  objective = objectives.cross_entropy()

  def loss_fn(params):
    return objective.loss(net.apply(
        {'params': params}, *(golden[k] for k in INPUTS),
        golden['context_mask']), batch).mean()

  loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
  np.testing.assert_allclose(loss, golden['v3 loss'], atol=1e-5)
  adamw = optimizer.adamw(lambda _: 1e-3, weight_decay=0.01, clip_norm=0)
  update, _ = adamw.update(gradients, adamw.init(params), params)
  named = lambda tree: {
      ('' if k.startswith('qa_outputs') else KIND.prefix) + k: v
      for k, v in hugging_face.to_hugging_face(tree, KIND).items()}
  gradients, update = named(gradients), named(update)
  norms = {k.removeprefix('v3 norm '): v for k, v in golden.items()
           if k.startswith('v3 norm ')}
  assert norms.keys() == gradients.keys()
  for name, (gradient, _) in norms.items():
    np.testing.assert_allclose(np.linalg.norm(gradients[name]), gradient,
                               atol=1e-4, err_msg=name)
  full = [k.removeprefix('v3 gradient ') for k in golden if 'gradient ' in k]
  assert len(full) == 3 + 16
  for name in full:
    expected = golden[f'v3 gradient {name}']
    np.testing.assert_allclose(
        gradients[name], expected, atol=1e-4, err_msg=name)
    # The first update of Adam is the sign of the gradient. A softmax ignores
    # the bias of keys in part, so some gradients are 0 up to rounding.
    clear = abs(expected) > 1e-5
    assert clear.mean() > 0.9 or name.endswith('key_proj.bias')
    np.testing.assert_allclose(
        update[name][clear], golden[f'v3 update {name}'][clear], atol=1e-5,
        rtol=0, err_msg=name)


def position_of(config: deberta_v2.DebertaV2Config, distance: int) -> int:
  """Computes δ of a distance by the formula of He et al. (2021b), Python's."""
  n = (config.max_relative_positions if config.max_relative_positions > 0
       else config.max_position)
  span, bucket = n, distance
  if config.position_buckets > 0:
    span, m = config.position_buckets, config.position_buckets // 2
    if abs(distance) > m:
      # 1e-6: an exact quotient must not become the next whole number.
      bucket = int(math.copysign(m + math.ceil(
          (m - 1) * math.log(abs(distance) / m) / math.log((n - 1) / m)
          - 1e-6), distance))
  return min(max(bucket + span, 0), 2 * span - 1)


@pytest.mark.parametrize(('buckets', 'most', 'longest'), [
    (256, -1, 512), (8, -1, 40), (6, 20, 40), (2, -1, 40), (33, 90, 512),
    (-1, -1, 512), (-1, 7, 40), (0, -1, 20)])
def test_relative_positions_are_those_of_the_formula(buckets, most, longest):
  config = deberta_v2.DebertaV2Config(
      vocab_size=9, **deberta_v2.DebertaV2Config.PRESETS['tiny'],
      position_buckets=buckets, max_relative_positions=most,
      max_position=longest)
  distances = np.arange(-longest - 9, longest + 10)
  ours = deberta_v2.relative_positions(config, distances)
  assert ours.tolist() == [position_of(config, int(d)) for d in distances]
  assert ours.min() >= 0 and ours.max() == 2 * config.span - 1


@pytest.mark.parametrize('terms', ['c2p', 'p2c', 'c2p|p2c'])
def test_position_scores_are_a_lookup_of_each_pair(terms):
  config = deberta_v2.DebertaV2Config(
      vocab_size=9, hidden_size=12, num_heads=3, num_layers=1, mlp_size=8,
      position_buckets=6, max_relative_positions=9)
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 2, 3, 11, 4))  # [B, H, L, K]
  r, s = rng.normal(size=(2, 3, 12, 4))  # [H, 2 S, K]
  expected = np.zeros((2, 3, 11, 11))
  for i in range(11):
    for j in range(11):
      place = position_of(config, i - j)
      if 'c2p' in terms:
        expected[:, :, i, j] += (q[:, :, i] * r[:, place]).sum(-1) / 2
      if 'p2c' in terms:
        expected[:, :, i, j] += (k[:, :, j] * s[:, place]).sum(-1) / 2
  as32 = lambda x: jnp.asarray(x, jnp.float32)
  ours = deberta_v2._position_scores(
      config, as32(q), as32(k), as32(r) if 'c2p' in terms else None,
      as32(s) if 'p2c' in terms else None)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_dropout_of_relative_positions_is_that_of_the_step(golden, tmp_path):
  net, params, _ = read(write(tmp_path))
  sizes = dataclasses.replace(net.config, dropout=0.3, attention_dropout=0.0)
  inputs = [golden[name] for name in INPUTS]

  @jax.jit
  def start(rows, key):
    return net.clone(config=sizes).apply(
        {'params': params}, *(jnp.asarray(x)[rows] for x in inputs),
        jnp.asarray(inputs[-1])[rows] > 0, dropout_key=key, rows=rows).start

  key, rows = jax.random.key(1), jnp.array([2, 0])
  # 2e-6: two shapes have two programs, which group sums differently.
  np.testing.assert_allclose(
      start(rows, key), start(jnp.arange(3), key)[rows], atol=2e-6)
  keys = dropout.DropoutKeys.from_rows(key, rows)
  masks = [np.asarray(dropout.dropout(
      jnp.ones((1, 4096)), 0.3, k.shared(), dropout.POSITIONS)) for k in (
          keys, keys.fold(0), keys.fold(1), dropout.DropoutKeys.from_rows(
              key, rows + 5))]
  np.testing.assert_array_equal(masks[0], masks[3])
  correlation = np.corrcoef([m[0] for m in masks[:3]]) - np.eye(3)
  assert abs(correlation).max() < 5 / 4096**0.5
  assert np.mean(masks[0] == 0) == pytest.approx(0.3, abs=0.04)


# --- config.json


def config_of(tmp_path: pathlib.Path, fields: dict) -> pathlib.Path:
  files.write_json(tmp_path / 'config.json', fields)
  return tmp_path


def test_the_published_file_of_version_3_has_the_default_constants(tmp_path):
  sizes = hugging_face.read_config(config_of(tmp_path, PUBLISHED))
  assert sizes == deberta_v2.DebertaV2Config(
      vocab_size=128100, **deberta_v2.DebertaV2Config.PRESETS['base'],
      pos_att_type='p2c|c2p')
  # transformers counts 183,833,090 parameters of this model with a head.
  net = qa.QAModel(sizes, heads.HEADS['biased']())
  assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      lambda: qa.init_params(net, jax.random.key(0))))) == 183_833_090


def test_fields_that_a_file_omits_have_the_defaults_of_transformers(tmp_path):
  few = {k: PUBLISHED[k] for k in (
      *KIND.fields.values(), 'model_type', 'relative_attention',
      'pos_att_type')}
  sizes = hugging_face.read_config(config_of(tmp_path, few))
  assert (sizes.type_vocab_size, sizes.position_buckets, sizes.norm_rel_ebd,
          sizes.share_att_key, sizes.position_biased_input, sizes.span,
          sizes.layer_norm_eps) == (0, -1, 'none', False, True, 512, 1e-7)
  del few['relative_attention']
  message = refusal(hugging_face.read_config, config_of(tmp_path, few))
  assert 'config.json: relative_attention False is not supported' in message


@pytest.mark.parametrize(('fields', 'message'), [
    ({'conv_kernel_size': 4}, 'conv_kernel_size is 4, expected 0'),
    ({'conv_kernel_size': -1}, 'conv_kernel_size is -1, expected 0'),
    ({'conv_act': 'relu'}, "unknown conv_act 'relu'"),
    ({'conv_groups': 2}, 'conv_groups 2 is not supported'),
    ({'hidden_act': 'gelu_new'}, "hidden_act 'gelu_new' is not supported"),
    ({'relative_attention': False}, 'relative_attention False'),
    ({'pos_att_type': ['c2p', 'p2p']}, "pos_att_type 'c2p|p2p' is not"),
    ({'pos_att_type': []}, "pos_att_type '' is not"),
    ({'pos_att_type': None}, "pos_att_type '' is not"),
    ({'pos_att_type': 'c2p|c2p'}, "pos_att_type 'c2p|c2p' is not"),
    ({'pos_att_type': 3}, 'pos_att_type is 3, expected a list'),
    ({'norm_rel_ebd': 'batch_norm'}, "norm_rel_ebd 'batch_norm' is not"),
    ({'position_buckets': 1}, 'position_buckets 1 does not fit'),
    ({'position_buckets': 78}, 'or 2 to 77 for distances up to 40'),
    ({'position_buckets': '8'}, "position_buckets is '8', expected int"),
    ({'share_att_key': 1}, 'share_att_key is 1, expected bool'),
    ({'type_vocab_size': -1}, 'type_vocab_size=-1'),
    ({'attention_head_size': 4}, 'attention_head_size 4 is not supported'),
    ({'embedding_size': 8}, 'embedding_size 8 differs'),
    ({'model_type': 'deberta'}, "versions 2 and 3 are 'deberta-v2'")])
def test_another_option_is_refused_by_name(fields, message, tmp_path):
  directory = config_of(tmp_path, recorded_configs()['v3'] | fields)
  said = refusal(hugging_face.read_config, directory)
  assert message in said and str(tmp_path) in said


# --- weights


def test_tensors_without_a_use_are_skipped_with_a_note(tmp_path):
  write(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  more = {name: np.ones((2, 3), np.float32) for name in (
      'deberta.embeddings.position_embeddings.weight',
      'deberta.embeddings.position_ids', 'cls.predictions.bias',
      'lm_predictions.lm_head.dense.weight', 'pooler.dense.weight',
      'mask_predictions.dense.weight')}
  safetensors.numpy.save_file(tensors | more, path)
  _, params, (other, unused) = read(tmp_path)
  assert '5' not in other and 'lm_predictions.lm_head.dense.weight' in other
  assert unused.endswith('embeddings.position_embeddings.weight')
  safetensors.numpy.save_file(tensors, path)
  jax.tree.map(np.testing.assert_array_equal, params, read(tmp_path)[1])
  safetensors.numpy.save_file(tensors | {
      'deberta.encoder.conv.conv.bias': np.ones(2, np.float32)}, path)
  assert 'unknown: encoder.conv.conv.bias' in refusal(read, tmp_path)


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_checkpoint_becomes_a_run_and_leaves_equal(variant, tmp_path):
  for name in ('in', 'run', 'out'):
    (tmp_path / name).mkdir()
  source = write(tmp_path / 'in', variant, kind='deberta_5')
  export_lib.write_run_directory(
      export_lib.read_source(str(source)), tmp_path / 'run', [])
  export_lib.write_hugging_face(
      export_lib.read_source(str(tmp_path / 'run')), tmp_path / 'out')
  ours, theirs = (safetensors.numpy.load_file(
      tmp_path / name / 'model.safetensors') for name in ('out', 'in'))
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)
  written, config = (files.read_object(tmp_path / name / 'config.json')
                     for name in ('out', 'in'))
  meaning = lambda name, value: (
      '|'.join(value) if name == 'pos_att_type' else value)
  for name in config.keys() - {
      'transformers_version', 'legacy', 'tie_word_embeddings', 'bos_token_id',
      'eos_token_id', *(k for k in config if k.startswith('pooler_'))}:
    assert written[name] == meaning(name, config[name]), name
  before, *after = (predict.load(tmp_path / name, **WINDOWS)
                    for name in ('in', 'run', 'out'))
  for other in after:
    assert other.tokenizer == before.tokenizer
    assert other.model.config == before.model.config
    jax.tree.map(np.testing.assert_array_equal, other.params, before.params)
  assert 'DebertaV2' in (tmp_path / 'out' / 'README.md').read_text()


# --- the tokenizer


@pytest.mark.parametrize('kind', scripts.DEBERTA)
def test_ids_and_offsets_are_those_of_transformers(golden, kind, tmp_path):
  reader = tokenizer_files.read_tokenizer(write(tmp_path, kind=kind))
  texts = scripts.texts()
  rows = reader.encode(texts)
  different = [text for text, a, b, expected in zip(
      texts, rows.ptr[:-1], rows.ptr[1:], golden[kind], strict=True)
      if scripts.checksum(kind, text, rows.ids[a:b], rows.offsets[a:b])
      != expected]
  assert len(texts) == 2000 and not different
  for text in [CONTEXT, *texts[:100]]:
    offsets = reader.encode([text]).offsets
    scripts.assert_covered(kind, text, offsets)
    for begin, end in offsets[offsets[:, 0] < offsets[:, 1]]:
      assert text[begin:end] == text[begin:end].strip()


@pytest.mark.parametrize('kind', scripts.DEBERTA)
def test_a_window_is_the_pair_of_transformers(golden, kind, tmp_path):
  reader = tokenizer_files.read_tokenizer(write(tmp_path, kind=kind))
  expected = golden[f'{kind} pair']
  window = windows_lib.make_windows(
      [Example('0', '東京 ab?', scripts.texts()[0][:20])], reader,
      max_length=90, window_overlap=1, max_question_length=60).gather(
          np.zeros(1, int), len(expected))
  assert window['token_ids'][0].tolist() == expected.tolist()
  assert window['token_type_ids'][0].tolist() == golden[
      f'{kind} types'].tolist()


@pytest.mark.parametrize('kind', scripts.DEBERTA)
def test_special_tokens_need_no_other_file_and_are_never_typed(kind, tmp_path):
  library = scripts.deberta_tokenizer(kind)
  library.save(str(tmp_path / 'tokenizer.json'))
  reader = tokenizer_files.read_tokenizer(tmp_path)
  assert reader.special == tokenizer_lib.SPECIAL
  ids = reader.encode([' '.join((*reader.special, *reader.special))
                       + ''.join(reader.special)]).ids.tolist()
  closed = {reader.index[t] for t in ('[PAD]', '[CLS]', '[SEP]', '[MASK]')}
  assert len(ids) > 10 and not closed.intersection(ids)
  before, after = library, tokenizers.Tokenizer.from_str(reader.to_json())
  rows = [x.encode('What is it?', CONTEXT) for x in (before, after)]
  assert rows[0].ids == rows[1].ids and rows[0].offsets == rows[1].offsets
  assert rows[0].type_ids == rows[1].type_ids


# --- use


def test_answers_have_no_spaces_at_their_ends(model):
  for (_, context), answer in zip(QUESTIONS, answers_of(model), strict=True):
    for candidate in answer.n_best:
      text = context[candidate['start']:candidate['end']]
      assert text == candidate['text'] == text.strip() != ''
    assert bool(answer.text) == bool(context)


def test_a_convolution_sees_no_neighbour_in_a_packed_row(tmp_path):
  write(tmp_path, 'conv', kind='deberta_4')
  for a, b in zip(*(answers_of(predict.load(
      tmp_path, packing=packing, **WINDOWS)) for packing in (False, True)),
                  strict=True):
    assert [(c['start'], c['end']) for c in a.n_best] == [
        (c['start'], c['end']) for c in b.n_best]
    np.testing.assert_allclose([c['score'] for c in a.n_best],
                               [c['score'] for c in b.n_best], atol=1e-5)


def test_an_exported_program_answers_as_its_model(model, tmp_path):
  programs.assert_answers_as_its_model(model, QUESTIONS, tmp_path)
