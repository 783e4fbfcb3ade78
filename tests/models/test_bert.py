"""Tests of encoder and span head against recorded results of transformers.

Glossary of shapes: B batch, L length, D hidden size, N layers.
"""

import dataclasses
import pathlib
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import heads
from qa_jax import objectives
from qa_jax.checkpoints import hugging_face
from qa_jax.models import bert
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.training import optimizer

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


@pytest.mark.parametrize('layer', range(4))
def test_every_layer_equals_transformers(golden, params, layer):
  # This includes padding, which transformers computes in this way too.
  np.testing.assert_allclose(encode(params, inputs(golden))[layer],
                             golden['hidden'][layer], atol=1e-5, rtol=0)


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
  theirs = hugging_face.to_hugging_face(gradients)
  name = 'embeddings.word_embeddings.weight'
  theirs[name] = theirs[name].copy()
  theirs[name][0] = 0  # as torch does for its padding_idx
  # The atol is for the bias of keys. A softmax ignores it, so its gradient is 0
  # up to rounding.
  np.testing.assert_allclose(
      [np.linalg.norm(theirs[k]) for k in golden['gradient_names']],
      golden['gradient_norms'], rtol=1e-5, atol=1e-6)


def test_the_table_of_counts_covers_every_preset():
  assert set(PRESETS) == set(bert.PRESETS)


@pytest.mark.parametrize('preset', sorted(PRESETS))
def test_parameter_count_of_preset(preset):
  n, d, num_heads, expected = PRESETS[preset]
  config = bert.BertConfig(vocab_size=30522, **bert.PRESETS[preset])
  model = qa.QAModel(config, heads.HEADS['independent']())
  shapes = jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0)))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  m = 4 * d
  layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 2 * (2 * d)
  closed_form = (30522 + 512 + 2) * d + 2 * d + n * layer + 2 * d
  assert count == closed_form == expected
  assert config.num_heads == num_heads


def test_default_fields_are_berts():
  config = bert.BertConfig(vocab_size=9, **bert.PRESETS['tiny'])
  assert (config.max_position, config.type_vocab_size, config.dropout,
          config.attention_dropout, config.layer_norm_eps,
          config.initializer_range) == (512, 2, 0.1, 0.1, 1e-12, 0.02)


def test_garbage_in_padding_changes_no_real_position(golden, params):
  arrays = inputs(golden)
  real = arrays['attention_mask'] > 0
  rng = np.random.default_rng(1)
  dirty = arrays | {
      'token_ids': np.where(real, arrays['token_ids'], rng.integers(
          0, 100, real.shape, dtype=np.int32)),
      'token_type_ids': np.where(real, arrays['token_type_ids'], 1)}
  # Both are computed by one program, and masked weights are exactly 0, so the
  # results are equal bit for bit.
  np.testing.assert_array_equal(encode(params, arrays)[:, real],
                                encode(params, dirty)[:, real])


def test_a_longer_bucket_changes_nothing(golden, params):
  arrays = inputs(golden)
  real = arrays['attention_mask'] > 0
  longer = {k: np.pad(v, ((0, 0), (0, 16))) for k, v in arrays.items()}
  # 2e-6: states reach 4, and a sum over 40 keys is grouped differently from a
  # sum over 24; 1.3e-6 was measured.
  np.testing.assert_allclose(
      encode(params, longer)[:, :, :24][:, real],
      encode(params, arrays)[:, real], atol=2e-6, rtol=0)


def test_the_mask_and_token_types_are_not_ignored(golden, params):
  # Without this test, the tests of padding could pass for an encoder that reads
  # neither.
  arrays = inputs(golden)
  plain = encode(params, arrays)[-1, 1]
  for key in ('attention_mask', 'token_type_ids'):
    flipped = arrays | {key: 1 - arrays[key]}
    assert abs(encode(params, flipped)[-1, 1] - plain).max() > 1e-2


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_row_without_real_tokens_has_finite_scores_and_gradients(
    golden, params, dtype):
  arrays = inputs(golden)
  arrays['attention_mask'] = arrays['attention_mask'].copy()
  arrays['attention_mask'][2] = 0
  objective = objectives.cross_entropy(domain='context')

  def loss_fn(params):
    scores = score(params, arrays, compute_dtype=dtype)
    batch = golden | {
        'context_mask': jnp.asarray(arrays['token_type_ids'] > 0)}
    return objective.loss(scores, batch).sum()

  loss, gradients = jax.value_and_grad(loss_fn)(params)
  assert np.isfinite(loss)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_bfloat16_is_near_float32_and_returns_float32(golden, params):
  layers = encode(params, inputs(golden), compute_dtype=jnp.bfloat16)
  assert layers.dtype == np.float32
  error = abs(layers - golden['hidden'])
  # bfloat16 rounds to 8 bits and states reach 4; errors of 0.030 at most and
  # 0.004 on average were measured. Float32 is within 2e-6, so the lower bound
  # would show that compute_dtype is ignored.
  assert 1e-3 < error.max() < 0.06
  assert error.mean() < 0.008


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_every_product_takes_the_compute_dtype_and_gives_float32(
    golden, params, dtype, platform):
  encoder = bert.BertEncoder(hugging_face.read_config(TINY),
                             compute_dtype=dtype)
  program = jax.jit(lambda p, a: encoder.apply({'params': p}, **a)).trace(
      params['encoder'], inputs(golden)).lower(
          lowering_platforms=(platform,)).as_text()
  products = re.findall('stablehlo.dot_general.*', program)
  # QKV, scores, values, 3 outputs, in one function for all layers; a CPU has
  # the values in a layout of its own, and no other platform has that.
  assert len(products) == 6
  barriers = program.count('optimization_barrier')
  assert (barriers > 0) == (platform == 'cpu' and dtype == jnp.bfloat16)
  name = {jnp.float32: 'f32', jnp.bfloat16: 'bf16'}[dtype]
  for product in products:
    types = re.search(r': \((.*)\) -> (.*)', product)
    assert types[1].count(f'x{name}>') == 2, product
    assert types[2].endswith('xf32>'), product
    # TF32 and bfloat16 passes would be float32 by name only.
    assert ('precision = [HIGHEST, HIGHEST]' in product) == (
        dtype == jnp.float32), product


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_are_float32_and_reach_every_parameter(
    golden, params, dtype):
  gradients = jax.grad(lambda p: (score(
      p, inputs(golden), compute_dtype=dtype).start ** 2).sum())(params)
  for name, g in flax.traverse_util.flatten_dict(gradients, sep='/').items():
    assert g.dtype == jnp.float32, name
    assert bool(g.any()) == (name != 'head/end/kernel'), name


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


def test_initial_values_do_not_depend_on_the_length():
  model = qa.QAModel(
      dataclasses.replace(hugging_face.read_config(TINY), num_layers=1),
      heads.HEADS['independent']())
  short, long = (qa.init_params(model, jax.random.key(3), length=n)
                 for n in (8, 40))
  jax.tree.map(np.testing.assert_array_equal, short, long)


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


def test_decay_spares_every_bias_and_layer_norm_of_the_encoder(params):
  mask = flax.traverse_util.flatten_dict(optimizer.decay_mask(params), sep='/')
  decayed = {k for k, v in mask.items() if v}
  assert decayed == {k for k in mask
                     if k.endswith(('/kernel', '/embedding'))}
  assert len(mask) - len(decayed) == 2 + 3 * (4 + 2 * 2)


def test_layer_wise_rates_cover_every_parameter_of_the_encoder(params):
  scales = flax.traverse_util.flatten_dict(
      optimizer.layer_scales(params, 0.5, 3), sep='/')
  assert scales['encoder/embeddings/layer_norm/scale'] == 0.5**4
  assert scales['encoder/layer_0/attention/query_key_value/kernel'] == 0.5**3
  assert scales['encoder/layer_2/mlp/layer_norm/bias'] == 0.5


def test_dropout_of_a_row_does_not_depend_on_its_neighbours(golden, params):
  arrays = inputs(golden)
  model = make_model()

  @jax.jit
  def start(rows):
    return model.apply(
        {'params': params}, **{k: jnp.asarray(v)[rows]
                               for k, v in arrays.items()},
        context_mask=jnp.asarray(arrays['token_type_ids'])[rows] > 0,
        dropout_key=jax.random.key(5), rows=rows).start

  whole = start(jnp.arange(4))
  # 2e-6: two shapes have two programs, which group sums differently.
  np.testing.assert_allclose(
      start(jnp.array([3, 1])), whole[jnp.array([3, 1])], atol=2e-6)
  assert abs(whole - score(params, arrays).start).max() > 1e-2


def test_layers_and_places_drop_independently(params, monkeypatch):
  real, seen = dropout.counter_hash, []

  def spy(keys, count, rate, index=None):
    seen.append(real(keys, 4096, rate)[0])
    return jnp.ones((len(keys), count), bool)

  monkeypatch.setattr(dropout, 'counter_hash', spy)
  ids = jnp.ones((1, 8), jnp.int32)
  with jax.disable_jit():  # under jit all layers share one trace
    make_model().apply(
        {'params': params}, ids, ids, ids, ids > 0,
        dropout_key=jax.random.key(1), rows=jnp.arange(1))
  masks = np.asarray(seen, np.float64)
  assert len(masks) == 1 + 3 * 3
  correlation = np.corrcoef(masks) - np.eye(len(masks))
  assert abs(correlation).max() < 5 / 4096**0.5


def test_rates_of_zero_drop_nothing(golden, params):
  config = dataclasses.replace(
      hugging_face.read_config(TINY), dropout=0.0, attention_dropout=0.0)
  encoder = bert.BertEncoder(config)
  keys = dropout.DropoutKeys.from_rows(jax.random.key(0), jnp.arange(4))
  layers = encoder.apply({'params': params['encoder']}, **inputs(golden),
                         keys=keys)
  np.testing.assert_allclose(np.stack(layers), golden['hidden'], atol=1e-5)
