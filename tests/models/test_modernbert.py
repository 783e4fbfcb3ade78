"""Long rows of ModernBERT: both forms of attention, and the memory of a step.

tests/checkpoints/test_modernbert.py compares its values with transformers, and
test_encoders.py has the tests that every encoder passes.

Glossary of shapes: B rows, L row length, D hidden size.
"""

import functools
import subprocess
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import heads
from qa_jax import objectives
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.models.attention import chunked
from qa_jax.models.encoders.modernbert import ModernBertConfig
from tests.common import commands
from tests.common.refusals import refusal

SIZES = ModernBertConfig(
    vocab_size=60, hidden_size=16, num_layers=3, num_heads=2, mlp_size=24,
    local_attention=8, global_every=2, initializer_range=0.4)
LENGTH = 75  # neither a multiple of a local chunk, 16, nor of CHUNK
LENGTHS = np.array([LENGTH, 41])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
  monkeypatch.setattr(chunked, 'CHUNK', 16)


@pytest.fixture(scope='module')
def params():
  ids = jnp.zeros((1, 8), jnp.int32)
  return jax.jit(SIZES.build().init)(jax.random.key(0), ids, ids, ids)['params']


@functools.cache
def rows() -> dict[str, np.ndarray]:  # [B, L]
  rng = np.random.default_rng(0)
  mask = (np.arange(LENGTH) < LENGTHS[:, None]).astype(np.int32)
  ids = rng.integers(1, 60, mask.shape).astype(np.int32)
  return {'token_ids': ids, 'token_type_ids': 0 * ids, 'attention_mask': mask}


def value_and_gradient(params, attention, inputs, keys):
  """Computes all layers, and the gradient of a loss on the real tokens."""
  real = (inputs['attention_mask'] > 0)[:, :, None]

  def loss(params):
    layers = SIZES.build(attention=attention).apply(
        {'params': params}, **inputs, keys=keys)
    return jnp.where(real, jnp.sin(layers[-1]), 0).sum(), jnp.stack(layers)

  (_, layers), gradient = jax.jit(
      jax.value_and_grad(loss, has_aux=True))(params)
  return np.asarray(layers), gradient


def test_fresh_outputs_of_layers_are_smaller_by_the_root_of_their_number(
    params):
  """All draws are truncated at two deviations, as in test_bert.py."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for part in ('query_key_value', 'intermediate', 'output'):
    draws = np.concatenate([x.ravel() for name, x in flat.items()
                            if name.endswith(f'{part}/kernel')])
    expected = 0.8796 * 0.4 / ((2 * 3) ** 0.5 if part == 'output' else 1)
    off = 4 / (2 * draws.size) ** 0.5
    assert draws.std() == pytest.approx(expected, rel=off), part


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('dropped', [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_chunks_have_the_values_and_gradients_of_masked_rows(
    params, packed, dropped):
  inputs = rows()
  if packed:
    segments = np.repeat([[1, 2, 3]], [30, 3, 42], axis=1).repeat(2, axis=0)
    positions = np.concatenate([np.arange(n) for n in (30, 3, 42)])
    inputs = inputs | {
        'segment_ids': (segments * inputs['attention_mask']).astype(np.int32),
        'position_ids': np.stack([positions, positions]).astype(np.int32)}
  keys = dropout.DropoutKeys.from_rows(
      jax.random.key(1), jnp.arange(2)) if dropped else None
  real = inputs['attention_mask'] > 0
  expected, gradient = value_and_gradient(params, 'xla', inputs, keys)
  layers, found = value_and_gradient(params, 'chunked', inputs, keys)
  np.testing.assert_allclose(layers[:, real], expected[:, real], atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-5 * max(1.0, abs(b).max())), found, gradient)


def test_segments_of_a_packed_row_are_those_of_rows_alone(params):
  inputs, parts = rows(), (30, 45)
  segments = np.repeat([[1, 2]], parts, axis=1)
  positions = np.concatenate([np.arange(n) for n in parts])[None]
  encode = jax.jit(SIZES.build(attention='chunked').apply)
  row = {k: v[:1] for k, v in inputs.items()}
  packed = np.stack(encode({'params': params}, **row, segment_ids=segments,
                           position_ids=positions))
  for place in (slice(0, 30), slice(30, 75)):
    alone = encode({'params': params}, **{k: v[:, place]
                                          for k, v in row.items()})
    np.testing.assert_allclose(packed[:, :, place], np.stack(alone), atol=2e-5)


def test_a_local_layer_sees_its_window_alone():
  """The first layer is global, the second local with 4 tokens to either side.

  The other tokens of a row change through the first layer, unless its attention
  has no output.
  """
  sizes = ModernBertConfig(
      vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, mlp_size=24,
      local_attention=8, initializer_range=0.4)
  net, inputs = sizes.build(attention='chunked'), rows()
  params = jax.jit(net.init)(jax.random.key(0), **inputs)['params']
  first = params['layer_0']['attention']['output']
  first['kernel'] = jnp.zeros_like(first['kernel'])
  other = inputs | {'token_ids': inputs['token_ids'].copy()}
  other['token_ids'][:, 20] = inputs['token_ids'][:, 20] % 59 + 1
  encode = jax.jit(net.apply)
  moved = abs(encode({'params': params}, **inputs)[-1] - encode(
      {'params': params}, **other)[-1]).max(axis=-1)
  for row in (moved > 0) & (inputs['attention_mask'] > 0):
    assert np.flatnonzero(row).tolist() == [*range(16, 25)]


def test_every_layer_is_global_without_a_window():
  fields = {'hidden_size': 16, 'num_heads': 2, 'mlp_size': 24, 'vocab_size': 9}
  window = lambda layers, every: ModernBertConfig(
      num_layers=layers, global_every=every, **fields).attention_window
  assert (window(3, 3), window(2, 3), window(1, 3), window(3, 1)) == (
      64, 64, None, None)
  for bad, message in (({'global_every': 0}, 'global_every=0'),
                       ({'local_attention': 0}, 'local_attention=0'),
                       ({'type_vocab_size': 2}, 'it has no token types'),
                       ({'local_theta': -1.0}, 'local_theta=-1.0'),
                       ({'num_heads': 16}, 'must be divisible by 2')):
    assert message in refusal(lambda bad=bad: ModernBertConfig(
        num_layers=1, **fields | bad))


@pytest.mark.slow
def test_a_train_step_at_8192_tokens_fits_in_memory(monkeypatch):
  """The weights of one head alone take 256 MiB, and a gradient has several."""
  monkeypatch.setattr(chunked, 'CHUNK', 128)
  sizes = ModernBertConfig(vocab_size=100, hidden_size=32, num_layers=2,
                           num_heads=2, mlp_size=48)
  ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

  def temporary(attention):
    model = qa.QAModel(sizes, heads.HEADS['transformed'](), attention=attention)

    def loss(params, ids, key):
      mask, one = ids > 0, jnp.ones(1, jnp.int32)
      scores = model.apply({'params': params}, ids, ids, mask, mask, rows=one,
                           dropout_key=key)
      return objectives.cross_entropy().loss(scores, {
          'context_mask': mask, 'start_positions': one,
          'end_positions': one}).sum()

    return jax.jit(jax.grad(loss)).lower(
        jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0))), ids,
        jax.eval_shape(lambda: jax.random.key(0))).compile(
            ).memory_analysis().temp_size_in_bytes / 2**20

  assert temporary('auto') < 256 < 1024 < temporary('xla')


LONG_RUN = """
import resource, subprocess, sys
subprocess.run([sys.executable, '-m', 'experiments.train', *sys.argv[1:]],
               check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 2**10)  # MiB
"""


def test_the_attention_of_local_and_of_global_layers_is_named():
  config = config_lib.check_config({
      'model': {'encoder': 'modernbert', 'preset': 'tiny'},
      'data': {'max_length': 512, 'buckets': ()}, 'train': {'num_steps': 1}})
  named = lambda config: build.attention_in_use(
      config, build.encoder_config(config, 200, None))
  assert named(config) == 'chunked (local layers) and xla (global layers)'
  assert named(config_lib.check_config(config_lib.override(
      config.to_dict(), {'model.attention': 'xla'}))) == 'xla'


@pytest.mark.slow  # a step at full length
def test_training_at_8192_tokens_peaks_below_4_gib(tmp_path):
  """Trains two layers of ModernBERT-base, with dropout, on padded rows."""
  fields = {
      'model.encoder': 'modernbert', 'model.preset': 'base',
      'model.num_layers': 2, 'model.head': 'transformed',
      'data.train': 'synthetic(size=300)', 'data.max_length': 8192,
      'data.buckets': '()', 'data.eval': '', 'train.batch_size': 1,
      'train.num_epochs': 0.0, 'train.num_steps': 1,
      'parallel.num_devices': 1, 'data.cache': 'none'}
  done = subprocess.run(
      [sys.executable, '-c', LONG_RUN, '--config=configs/squad1.py:tiny',
       f'--workdir={tmp_path / "run"}',
       *(f'--config.{name}={value}' for name, value in fields.items())],
      cwd=commands.ROOT, text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  assert 256 < int(done.stdout.split()[-1]) < 4096, done.stdout
