"""Every entry of ENCODERS keeps the promises of an encoder.

A new entry passes these tests without a line here. Its results are compared
with transformers in tests/checkpoints.

Glossary of shapes: B rows, L row length, N layers, D hidden size.
"""

import dataclasses
import functools
import itertools
import math
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import build
from qa_jax import objectives
from qa_jax.checkpoints import architectures
from qa_jax.checkpoints import weight_names
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.export import hugging_face as export_lib
from qa_jax.inference import predict
from qa_jax.models import dropout
from qa_jax.models import qa as qa_lib
from qa_jax.models.encoders import ENCODERS
from qa_jax.span_scores import HeadInput
from qa_jax.training import optimizer
from tests.common import programs
from tests.common import random_model
from tests.common import tiny
from tests.common.refusals import refusal

ROWS, LENGTH, VOCAB = 4, 24, 60
LENGTHS = np.array([24, 17, 9, 5])  # of the windows
CONTEXTS = np.array([8, 6, 4, 2])  # their first tokens of the context
QUESTION, CONTEXT = 'Who built it?', 'Mira built the Osprey in Oslo.'


# The only head with which an encoder becomes a span model of transformers, if
# that is not a pair of S and E.
EXPORTED_HEADS = {'modernbert': 'transformed(bias=True, eps=0.001)'}


# The encoder that is built, if the name alone leaves a part of it out.
SPECS = {'deberta_v2': 'deberta_v2(conv_kernel_size=3)'}
# Those whose layers have code of their own; the others run by make test-slow.
QUICK = ('bert', 'deberta_v2', 'modernbert')


@pytest.fixture(scope='module', params=[
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ENCODERS])
def qa(request) -> predict.QA:
  """Returns an untrained model whose parameters are all normal draws."""
  head = EXPORTED_HEADS.get(request.param, 'biased')
  config = tiny.config(
      model={'encoder': SPECS.get(request.param, request.param),
             'num_layers': 2, 'head': head},
      decode={'max_answer_length': 4, 'n_best': 6, 'null_rule': 'never'})
  learned = tokenizer_lib.train_tokenizer([QUESTION + CONTEXT],
                                          vocab_size=VOCAB)
  pad, unknown, *others = learned.vocab  # padding is 1, as fairseq has it
  tokenizer = dataclasses.replace(learned, vocab=(unknown, pad, *others))
  sizes = dataclasses.replace(build.encoder_config(config, VOCAB, None),
                              layer_norm_eps=1e-3)  # no default is 1e-3
  assert type(sizes) is ENCODERS[request.param]
  return random_model.draw_qa(config, sizes, tokenizer, seed=6, scale=0.3)


@pytest.fixture(scope='module')
def arrays() -> dict[str, np.ndarray]:  # [B, L] each
  rng = np.random.default_rng(0)
  column = np.arange(LENGTH)[None]
  inside = column < LENGTHS[:, None]
  return {'token_ids': np.where(
              inside, rng.integers(5, VOCAB, inside.shape), 1).astype(np.int32),
          'token_type_ids': (inside & (column >= CONTEXTS[:, None])).astype(
              np.int32),
          'attention_mask': inside.astype(np.int32)}


@functools.cache
def compiled(model: qa_lib.QAModel):
  """Returns the compiled function of parameters, arrays and keys → layers."""
  encoder = model.config.build(model.compute_dtype, 'xla')
  return jax.jit(lambda params, inputs, keys: jnp.stack(
      encoder.apply({'params': params}, **inputs, keys=keys)))


def encode(qa, inputs, keys=None) -> np.ndarray:  # [N + 1, B, L, D]
  return np.asarray(compiled(qa.model)(qa.params['encoder'], inputs, keys))


def keys_of(seed: int, rows, lengths=None) -> dropout.DropoutKeys:
  return dropout.DropoutKeys.from_rows(
      jax.random.key(seed), jnp.asarray(rows), lengths)


def real_tokens(arrays) -> np.ndarray:  # [B, L] bool
  return arrays['attention_mask'] > 0


def score(qa, params, arrays, **fields):
  return qa.model.clone(**fields).apply(
      {'params': params}, **arrays, context_mask=arrays['token_type_ids'] > 0)


def named(tree) -> dict[str, jax.Array]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


# --- a window and its neighbours


def test_there_is_a_state_of_every_layer(qa, arrays):
  layers = encode(qa, arrays)
  sizes = qa.model.config
  assert layers.shape == (
      sizes.num_layers + 1, ROWS, LENGTH, sizes.hidden_size)
  assert layers.dtype == np.float32 and np.isfinite(layers).all()
  for before, after in itertools.pairwise(layers):
    assert abs(before - after).max() > 1e-2


def test_padding_and_neighbours_change_no_state(qa, arrays):
  real = real_tokens(arrays)
  rng = np.random.default_rng(1)
  dirty = {**arrays, 'token_ids': np.where(
      real, arrays['token_ids'], rng.integers(5, VOCAB, real.shape))}
  dirty['token_type_ids'] = np.where(real, arrays['token_type_ids'], 1)
  dirty['token_ids'][3] = rng.integers(5, VOCAB, LENGTH)  # another window
  plain, changed = encode(qa, arrays), encode(
      qa, {k: v.astype(np.int32) for k, v in dirty.items()})
  # One program computes both, and masked weights are exactly 0, so the states
  # are equal bit for bit.
  np.testing.assert_array_equal(plain[:, :3][:, real[:3]],
                                changed[:, :3][:, real[:3]])
  assert abs(plain[-1, 3, :5] - changed[-1, 3, :5]).max() > 1e-2


def test_the_order_of_a_batch_changes_no_state(qa, arrays):
  order = np.array([2, 0, 3, 1])
  moved = encode(qa, {k: v[order] for k, v in arrays.items()})
  np.testing.assert_allclose(moved, encode(qa, arrays)[:, order], atol=1e-6)


def test_the_mask_the_types_and_the_positions_are_not_ignored(qa, arrays):
  # Without this test, those of padding could pass for an encoder that reads no
  # mask. There are no token types where the encoder has only one.
  plain = encode(qa, arrays)[-1, 1]
  for key in ('attention_mask', 'token_type_ids'):
    flipped = encode(qa, {**arrays, key: 1 - arrays[key]})[-1, 1]
    has_types = qa.model.config.type_vocab_size > 1
    if key == 'attention_mask' or has_types:
      assert abs(flipped - plain).max() > 1e-2, key
    else:
      np.testing.assert_array_equal(flipped, plain)
  swapped = {**arrays, 'token_ids': arrays['token_ids'].copy()}
  swapped['token_ids'][1, [9, 14]] = swapped['token_ids'][1, [14, 9]]
  assert swapped['token_ids'][1, 9] != swapped['token_ids'][1, 14]
  assert abs(encode(qa, swapped)[-1, 1, 5] - plain[5]).max() > 1e-4


def test_the_question_reaches_every_context_token(qa, arrays):
  """Checks why one start vector can serve every question."""
  other = {**arrays, 'token_ids': arrays['token_ids'].copy()}
  other['token_ids'][:, 1] = 7
  context = arrays['token_type_ids'] > 0
  moved = abs(encode(qa, arrays)[-1] - encode(qa, other)[-1]).max(axis=-1)
  assert (moved[context] > 1e-6).all()


def test_a_longer_row_changes_no_state_and_no_dropout(qa, arrays):
  real = real_tokens(arrays)
  longer = {k: np.pad(v, ((0, 0), (0, 16))) for k, v in arrays.items()}
  lengths = jnp.full(ROWS, LENGTH, jnp.int32)
  for keys, padded in ((None, None), (keys_of(5, np.arange(ROWS)),
                                      keys_of(5, np.arange(ROWS), lengths))):
    states = encode(qa, longer, padded)[:, :, :LENGTH]
    # A sum over 40 keys is grouped differently from a sum over 24.
    np.testing.assert_allclose(
        states[:, real], encode(qa, arrays, keys)[:, real], atol=1e-5, rtol=0)


def test_windows_of_a_packed_row_are_those_of_windows_alone(qa, arrays):
  parts = (3, 1)  # 5 and 17 tokens, then 2 of padding
  packed = {k: np.concatenate(
      [v[i, :LENGTHS[i]] for i in parts] + [np.zeros(2, np.int32)])[None]
            for k, v in arrays.items()}
  segments = np.repeat([1, 2, 0], [5, 17, 2])[None].astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in (5, 17, 2)])[None]
  states = encode(qa, {
      **packed, 'attention_mask': segments, 'segment_ids': segments,
      'position_ids': positions.astype(np.int32)})[:, 0]
  alone = encode(qa, arrays)
  for part, place in zip(parts, (slice(0, 5), slice(5, 22)), strict=True):
    np.testing.assert_allclose(
        states[:, place], alone[:, part, :LENGTHS[part]], atol=1e-5, rtol=0)


def test_without_jit_the_states_are_equal(qa, arrays):
  with jax.disable_jit():
    eager = qa.model.config.build(jnp.float32, 'xla').apply(
        {'params': qa.params['encoder']}, **arrays)
  np.testing.assert_allclose(np.stack(eager), encode(qa, arrays), atol=1e-5)


# --- dropout


def test_dropout_depends_on_key_and_row_alone(qa, arrays):
  real = real_tokens(arrays)
  rows = np.array([10, 11, 12, 13])
  plain, whole = encode(qa, arrays), encode(qa, arrays, keys_of(5, rows))
  order = np.array([3, 1, 0, 2])
  moved = encode(qa, {k: v[order] for k, v in arrays.items()},
                 keys_of(5, rows[order]))
  np.testing.assert_allclose(moved, whole[:, order], atol=1e-6)
  for other in (plain, encode(qa, arrays, keys_of(6, rows)),
                encode(qa, arrays, keys_of(5, rows + 1))):
    assert (abs(whole - other).max(axis=-1)[:, real] > 1e-3).mean() > 0.9


def test_layers_and_places_drop_independently(qa, arrays, monkeypatch):
  real, seen, rates = dropout.unit_mask, [], []
  sizes = dataclasses.replace(
      qa.model.config, dropout=0.2, attention_dropout=0.3)

  def spy(shape, rate, keys, place, index=None):
    seen.append(real((1, 4096), 0.1, keys, place)[0])
    rates.append((shape[1:] == (sizes.num_heads, LENGTH, LENGTH), rate))
    return jnp.ones(shape, bool)

  monkeypatch.setattr(dropout, 'unit_mask', spy)
  with jax.disable_jit():  # under jit all layers share one trace
    sizes.build(jnp.float32, 'xla').apply(
        {'params': qa.params['encoder']},
        **{k: v[:1] for k, v in arrays.items()}, keys=keys_of(1, [0]))
  masks = np.asarray(seen, np.float64)
  # Embeddings, and at least weights and output of attention in each layer.
  assert len(masks) >= 1 + 2 * sizes.num_layers
  correlation = np.corrcoef(masks) - np.eye(len(masks))
  assert abs(correlation).max() < 5 / 4096**0.5
  weights, units = ([rate for kind, rate in rates if kind == of_weights]
                    for of_weights in (True, False))
  assert weights == [0.3] * sizes.num_layers
  # ModernBERT's attention_dropout is also that of the output of attention.
  assert units == ([0.2, *[0.3, 0.2] * sizes.num_layers]
                   if sizes.architecture == 'modernbert' else
                   [0.2] * len(units))


# --- dtypes and gradients


def test_bfloat16_is_near_float32_and_returns_float32(qa, arrays):
  rounded = dataclasses.replace(
      qa, model=qa.model.clone(compute_dtype=jnp.bfloat16))
  states, exact = encode(rounded, arrays), encode(qa, arrays)
  assert states.dtype == np.float32
  error = abs(states - exact) / abs(exact).max()
  # bfloat16 rounds to 8 bits. The lower bound would show that compute_dtype is
  # ignored.
  assert 1e-4 < error.max() < 0.05
  assert error.mean() < 0.005


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_every_product_takes_the_compute_dtype_and_sums_in_float32(
    qa, arrays, dtype, platform):
  encoder = qa.model.config.build(dtype, 'xla')
  program = jax.jit(lambda p, a: encoder.apply({'params': p}, **a)).trace(
      qa.params['encoder'], arrays).lower(
          lowering_platforms=(platform,)).as_text()
  products = re.findall('stablehlo.dot_general.*', program)
  assert len(products) >= 6
  barriers = program.count('optimization_barrier')
  assert (barriers > 0) == (platform == 'cpu' and dtype == jnp.bfloat16)
  name = {jnp.float32: 'f32', jnp.bfloat16: 'bf16'}[dtype]
  for product in products:
    types = re.search(r': \((.*)\) -> (.*)', product)
    assert types[1].count(f'x{name}>') == 2, product
    # Only a Dense layer, and not on a CPU, rounds in its kernel.
    rounds = platform != 'cpu' and 'batching_dims' not in product
    assert types[2].endswith('xf32>') or (
        rounds and types[2].endswith(f'x{name}>')), product
    # TF32 and bfloat16 passes would be float32 by name only.
    assert ('precision = [HIGHEST, HIGHEST]' in product) == (
        dtype == jnp.float32), product


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_reach_every_parameter(qa, arrays, dtype):
  """Adds a row without real tokens, whose softmax has nothing to choose."""
  inputs = {**arrays, 'attention_mask': arrays['attention_mask'].copy()}
  inputs['attention_mask'][3] = 0

  def loss_fn(params):
    scores = score(qa, params, inputs, compute_dtype=dtype)
    return jnp.sin(scores.start).sum() + jnp.sin(scores.end).sum()

  loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(qa.params)
  assert np.isfinite(loss)
  for name, gradient in named(gradients).items():
    assert gradient.dtype == jnp.float32 and np.isfinite(gradient).all(), name
    assert gradient.any(), name


def test_thirty_steps_from_scratch_lower_the_loss(qa, arrays):
  adamw = optimizer.adamw(lambda t: 1e-2)
  objective = objectives.cross_entropy(domain='all')
  spans = {'start_positions': jnp.asarray(CONTEXTS),
           'end_positions': jnp.asarray(CONTEXTS + 2)}

  def step(carry, _):
    params, state = carry
    loss, gradients = jax.value_and_grad(lambda p: objective.loss(
        score(qa, p, arrays), spans).mean())(params)
    updates, state = adamw.update(gradients, state, params)
    return (jax.tree.map(jnp.add, params, updates), state), loss

  params = qa_lib.init_params(qa.model, jax.random.key(0))
  _, losses = jax.jit(lambda p: jax.lax.scan(
      step, (p, adamw.init(p)), length=30))(params)
  # The loss of fresh parameters is that of a uniform distribution.
  assert 2 < losses[0] < 4 and losses[-3:].mean() < 0.5 * losses[0]


# --- parameters


def test_decay_spares_vectors_and_layer_wise_rates_cover_everything(qa):
  sizes = qa.model.config
  mask = named(optimizer.decay_mask(qa.params, sizes.BIAS_TABLE))
  if sizes.BIAS_TABLE:
    assert not mask.pop(f'encoder/{sizes.BIAS_TABLE}')
  for name, decays in mask.items():
    assert decays == (named(qa.params)[name].ndim > 1), name
  if sizes.SHARES_LAYERS:
    config = dataclasses.replace(qa.config, optim=dataclasses.replace(
        qa.config.optim, layer_decay=0.5))
    assert 'layer_decay=0.5' in refusal(build.check_layer_decay, config, sizes)
    return
  scales = named(optimizer.layer_scales(qa.params, 0.5, sizes.num_layers))
  assert scales.keys() == named(qa.params).keys()
  rates = {'embeddings': 0.5 ** (sizes.num_layers + 1)} | {
      f'layer_{i}': 0.5 ** (sizes.num_layers - i)
      for i in range(sizes.num_layers)}
  parts = [name.split('/')[1] for name in scales if name.startswith('encoder/')]
  assert rates.keys() <= {*parts}
  for name, scale in scales.items():
    assert scale == rates.get(name.split('/')[1], 1.0), name


def test_fresh_parameters_do_not_depend_on_the_length(qa):
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  short, long = (qa_lib.init_params(qa.model, jax.random.key(3), length=n)
                 for n in (8, 12))
  jax.tree.map(np.testing.assert_array_equal, short, long)
  assert shapes(short) == shapes(qa.params)
  for name, value in named(short).items():
    assert value.dtype == jnp.float32, name
    if name.endswith(('bias', 'scale')):
      assert (value == name.endswith('scale')).all(), name


def test_the_name_table_covers_every_parameter_both_ways(qa):
  architecture = architectures.ARCHITECTURES[qa.model.config.architecture]
  assert architecture.encoder is type(qa.model.config)
  flat = named({'encoder': qa.params['encoder']})
  theirs = weight_names.from_paths(flat, architecture)
  assert sum(x.size for x in theirs.values()) == sum(
      x.size for x in flat.values())
  back = weight_names.to_paths(theirs, flat, architecture)
  assert back.keys() == flat.keys()
  for name, value in flat.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)
  for name in theirs:  # and a safetensors file with these names is read
    assert weight_names.from_hugging_face(
        architecture.prefix + name, qa.model.config.architecture) == name


# --- files


@pytest.fixture(scope='module')
def answer(qa) -> predict.Answer:
  return qa.answer(QUESTION, CONTEXT)


def assert_same(answer: predict.Answer, other: predict.Answer) -> None:
  assert (answer.text, answer.start, answer.end) == (
      other.text, other.start, other.end)
  assert [c['score'] for c in answer.n_best] == pytest.approx(
      [c['score'] for c in other.n_best], abs=1e-5)


def test_a_run_and_its_export_have_equal_parameters(qa, answer, tmp_path):
  run = random_model.write_run(qa, tmp_path / 'run')
  assert RunDirectory(run).read_encoder_config() == qa.model.config
  export_lib.write_hugging_face(
      export_lib.read_source(str(run)), tmp_path / 'hf')
  for path in (run, tmp_path / 'hf'):
    loaded = predict.load(path)
    rates = {rate: getattr(qa.model.config, rate) for rate in (
        'dropout', 'attention_dropout', 'initializer_range')}
    assert dataclasses.replace(
        loaded.model.config, **rates) == qa.model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, qa.params)
    assert_same(loaded.answer(QUESTION, CONTEXT), answer)


def test_an_exported_program_answers_as_its_model(qa, tmp_path):
  programs.assert_answers_as_its_model(qa, [(QUESTION, CONTEXT)], tmp_path)


def test_the_answer_of_each_layer_ends_in_that_of_the_head(qa, arrays):
  context = arrays['token_type_ids'] > 0
  scores, start, end = jax.jit(functools.partial(
      qa.model.apply, method='by_layer'))(
          {'params': qa.params}, **arrays, context_mask=context)
  layers = encode(qa, arrays)
  assert start.shape == end.shape == (*layers.shape[:2], LENGTH)
  for by_layer, name in ((start, 'start'), (end, 'end')):
    np.testing.assert_allclose(
        by_layer[-1], getattr(scores, name), atol=1e-5)
    for layer, ours in zip(layers, by_layer, strict=True):
      alone = qa.model.head.apply({'params': qa.params['head']}, HeadInput(
          (jnp.asarray(layer),), jnp.asarray(context)))
      np.testing.assert_allclose(
          np.where(context, ours, 0),
          np.where(context, getattr(alone, name), 0), atol=1e-5)


@pytest.mark.parametrize(('name', 'field', 'value'), [
    *((name, *wrong) for name in ENCODERS for wrong in (
        ('type_vocab_size', -1), ('layer_norm_eps', -1.0))),
    ('bert', 'layer_norm_eps', math.inf),
    *((name, 'embedding_size', -4) for name in ('electra', 'albert'))])
def test_a_constant_that_no_encoder_can_have_is_one_line(name, field, value):
  spec = f'{name}({field}={value})'.replace('inf', '1e999')
  assert refusal(build.encoder_config, tiny.config(model={'encoder': spec}),
                 VOCAB, None).startswith(f'encoder: {field}={value} must be ')


@pytest.mark.parametrize(('spec', 'message'), [
    ('bert(type_vocab_size=0)', 'type_vocab_size is 0'),
    ('electra(embedding_size=0)', 'embedding_size is 0'),
    ('mpnet(type_vocab_size=2)', 'MPNetForQuestionAnswering of transformers '
                                 'has no type_vocab_size=2')])
def test_constants_that_transformers_lacks_are_not_exported(
    spec, message, tmp_path):
  learned = tokenizer_lib.train_tokenizer([QUESTION + CONTEXT],
                                          vocab_size=VOCAB)
  pad, unknown, *others = learned.vocab  # padding is 1, as MPNet has it
  tokenizer = dataclasses.replace(learned, vocab=(unknown, pad, *others))
  config = tiny.config(model={'encoder': spec, 'num_layers': 1})
  sizes = build.encoder_config(config, VOCAB, None)
  run = random_model.write_run(
      random_model.draw_qa(config, sizes, tokenizer), tmp_path / 'run')
  assert message in refusal(export_lib.write_hugging_face,
                            export_lib.read_source(str(run)), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
