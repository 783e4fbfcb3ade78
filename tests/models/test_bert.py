"""Tests of encoder and span head against recorded results of transformers.

Glossary of shapes: B batch, L length, D hidden size, N layers.
"""

import dataclasses
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import heads
from qa_jax import objectives
from qa_jax.checkpoints import architectures
from qa_jax.checkpoints import hugging_face
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.models.encoders import bert

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
TINY = GOLDEN / 'tiny_bert'

# N, D, attention heads, and the number of parameters with a vocabulary of
# 30,522 entries: that of BertForQuestionAnswering in transformers 5.23, without
# the bias of the head.
PRESETS = {
    'tiny': (2, 128, 2, 4_369_664), 'mini': (4, 256, 4, 11_105_280),
    'small': (4, 512, 8, 28_502_016), 'medium': (8, 512, 8, 41_111_552),
    'base': (12, 768, 12, 108_893_184), 'large': (24, 1024, 16, 334_094_336),
    'minilm_l6': (6, 384, 12, 22_566_144)}


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN / 'bert_golden.npz') as arrays:
    return dict(arrays)


def make_model(**fields) -> qa.QAModel:
  return qa.QAModel(hugging_face.read_config(TINY),
                    heads.HEADS['independent'](), **fields)


@pytest.fixture(scope='module')
def params():
  template = qa.init_params(make_model(), jax.random.key(0))
  return hugging_face.load_parameters(TINY, template)[0]


def inputs(golden) -> dict[str, np.ndarray]:
  return {k: golden[k]
          for k in ('token_ids', 'token_type_ids', 'attention_mask')}


def encode(params, arrays, **fields) -> np.ndarray:  # [N + 1, B, L, D]
  encoder = bert.BertEncoder(hugging_face.read_config(TINY), **fields)
  return np.stack(jax.jit(encoder.apply)(
      {'params': params['encoder']}, **arrays))


def score(params, arrays, **fields):
  return jax.jit(make_model(**fields).apply)(
      {'params': params}, **arrays,
      context_mask=arrays['token_type_ids'] > 0)


def test_every_layer_equals_transformers(golden, params):
  # This includes padding, which transformers computes in this way too.
  layers = encode(params, inputs(golden))
  assert len(layers) == 4
  np.testing.assert_allclose(layers, golden['hidden'], atol=1e-5, rtol=0)


def test_logits_equal_transformers_up_to_the_bias(golden, params):
  scores = score(params, inputs(golden))
  start_bias, end_bias = golden['bias']
  np.testing.assert_allclose(
      scores.start, golden['start_logits'] - start_bias, atol=1e-5, rtol=0)
  np.testing.assert_allclose(
      scores.end, golden['end_logits'] - end_bias, atol=1e-5, rtol=0)


def test_loss_and_gradients_equal_transformers(golden, params):
  objective = objectives.cross_entropy(domain='all')

  def loss_fn(params):
    return objective.loss(score(params, inputs(golden)), golden).mean()

  loss, gradients = jax.value_and_grad(loss_fn)(params)
  np.testing.assert_allclose(loss, golden['loss'], atol=1e-5)
  theirs = hugging_face.to_hugging_face(
      gradients, architectures.ARCHITECTURES['bert'])
  name = 'embeddings.word_embeddings.weight'
  theirs[name] = theirs[name].copy()
  theirs[name][0] = 0  # as torch does for its padding_idx
  # The atol is for the bias of keys. A softmax ignores it, so its gradient is 0
  # up to rounding.
  np.testing.assert_allclose(
      [np.linalg.norm(theirs[k]) for k in golden['gradient_names']],
      golden['gradient_norms'], rtol=1e-5, atol=1e-6)


def test_the_table_of_counts_covers_every_preset():
  assert set(PRESETS) == set(bert.BertConfig.PRESETS)


@pytest.mark.parametrize('preset', sorted(PRESETS))
def test_parameter_count_of_preset(preset):
  n, d, num_heads, expected = PRESETS[preset]
  config = bert.BertConfig(vocab_size=30522, **bert.BertConfig.PRESETS[preset])
  model = qa.QAModel(config, heads.HEADS['independent']())
  shapes = jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0)))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  m = 4 * d
  layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 2 * (2 * d)
  closed_form = (30522 + 512 + 2) * d + 2 * d + n * layer + 2 * d
  assert count == closed_form == expected
  assert config.num_heads == num_heads


def test_default_fields_are_berts():
  config = bert.BertConfig(vocab_size=9, **bert.BertConfig.PRESETS['tiny'])
  assert (config.max_position, config.type_vocab_size, config.dropout,
          config.attention_dropout, config.layer_norm_eps,
          config.initializer_range) == (512, 2, 0.1, 0.1, 1e-12, 0.02)


def test_initial_values_are_berts():
  config = bert.BertConfig(vocab_size=500, hidden_size=256, num_layers=1,
                           num_heads=4, mlp_size=512)
  model = qa.QAModel(config, heads.HEADS['independent']())
  flat = flax.traverse_util.flatten_dict(
      qa.init_params(model, jax.random.key(0)), sep='/')
  for name, value in flat.items():
    assert value.dtype == jnp.float32, name
    if name.endswith('bias'):
      assert not value.any(), name
    elif name.endswith('scale'):
      assert (value == 1).all(), name
    else:
      # As in BERT's code, values are Normal(0.02) truncated at two deviations,
      # whose deviation is 0.8796 · 0.02. The relative error of its estimate
      # from n draws is 1 / sqrt(2n); the test allows four times that.
      off = 4 / (2 * value.size) ** 0.5
      assert float(value.std()) == pytest.approx(0.02 * 0.8796, rel=off), name
      assert abs(value).max() <= 0.04 + 1e-6, name


def test_initializer_range_scales_only_the_encoder():
  config = bert.BertConfig(vocab_size=50, hidden_size=32, num_layers=1,
                           num_heads=2, mlp_size=64)
  narrow, wide = (qa.init_params(
      qa.QAModel(dataclasses.replace(config, initializer_range=scale),
                 heads.HEADS['independent']()), jax.random.key(0))
      for scale in (0.02, 0.08))
  for name, value in flax.traverse_util.flatten_dict(wide, sep='/').items():
    scale = 4 if name.startswith('encoder/') and not name.endswith(
        ('bias', 'scale')) else 1
    np.testing.assert_allclose(
        value, scale * flax.traverse_util.flatten_dict(narrow, sep='/')[name],
        rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_parameters_and_gradients_are_float32_also_with_64_bit_types():
  model = make_model()
  model = model.clone(config=dataclasses.replace(model.config, num_layers=1))
  ids = np.arange(1, 17, dtype=np.int32).reshape(2, 8)

  def score(params):
    return model.apply(
        {'params': params}, ids, 0 * ids, ids > 0, ids > 0).start.sum()

  def results():
    params = qa.init_params(model, jax.random.key(0))
    head = qa.init_head(model, jax.random.key(0))['head']
    return (params, head), jax.grad(score)(params)

  expected = results()
  with jax.enable_x64(True):
    actual = results()
  jax.tree.map(np.testing.assert_array_equal, expected[0], actual[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5), expected[1], actual[1])
  assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype('float32')}


def test_a_head_for_a_loaded_encoder_is_that_of_fresh_parameters():
  model, key = make_model(), jax.random.key(3)
  fresh, head_only = qa.init_params(model, key), qa.init_head(model, key)
  jax.tree.map(np.testing.assert_array_equal, fresh['head'], head_only['head'])
  assert (jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
          == jax.tree.map(lambda x: (x.shape, x.dtype), head_only))


@pytest.mark.parametrize('spec', heads.HEADS)
def test_shapes_of_parameters_are_those_of_fresh_parameters(spec):
  model = make_model().clone(head=heads.HEADS[spec]())
  shape_of = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(shape_of, jax.eval_shape(
      lambda: qa.init_params(model, jax.random.key(0)))) == jax.tree.map(
          shape_of, qa.param_shapes(model))


def test_rates_of_zero_drop_nothing(golden, params):
  config = dataclasses.replace(
      hugging_face.read_config(TINY), dropout=0.0, attention_dropout=0.0)
  encoder = bert.BertEncoder(config)
  keys = dropout.DropoutKeys.from_rows(jax.random.key(0), jnp.arange(4))
  layers = encoder.apply({'params': params['encoder']}, **inputs(golden),
                         keys=keys)
  np.testing.assert_allclose(np.stack(layers), golden['hidden'], atol=1e-5)
