"""The train step for a TPU: what it lowers to, and that libtpu compiles it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu
from benchmarks.gpu import cases
from qa_jax import errors
from qa_jax import heads
from qa_jax import span_scores
from qa_jax.decoding import search
from qa_jax.inference import decode
from qa_jax.models import attention
from qa_jax.models import dropout
from qa_jax.models import qa
from qa_jax.models.attention import pallas_tpu
from qa_jax.models.encoders import ENCODERS
from qa_jax.runtime import devices
from qa_jax.training import trainer as trainer_lib

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs [tpu]')
OBJECTIVES = {  # of the heads that cross_entropy does not fit
    'conditional': 'conditional', 'compound': 'compound',
    'answerability': 'answerability', 'biaffine': 'joint',
    'trilinear': 'joint', 'mlp_span': 'joint', 'length_prior': 'span_softmax'}


def config(directory, *, chips=1, mode='pmap', **fields):
  return cases.config(directory, **{
      'preset': 'tiny', 'batch': 8, 'length': 64, 'dtype': 'auto',
      'questions': 60, 'vocab_size': 2500, 'packing': 'auto',
      'parallel__num_devices': chips, 'parallel__mode': mode, **fields})


def test_the_default_step_for_a_tpu_has_kernels_and_no_running_sum(tmp_path):
  """XLA for TPUs took 100 seconds to compile a running log Σ exp."""
  with tpu.lowering():
    trainer = trainer_lib.build_trainer(config(tmp_path, length=96))
    text = jax.jit(trainer.step).trace(
        trainer.state, next(trainer.batches)).lower(
            lowering_platforms=('tpu',)).as_text()
  assert 'stablehlo.dot_general' in text and 'bf16' in text
  assert 'reduce_window' not in text
  # A forward and a backward kernel for all layers, and no attention weights.
  assert text.count('@tpu_custom_call') == 2
  assert 'x96x96x' not in text


TEXT = '''HloModule step

%body (p.1: (f32[8,16])) -> (f32[8,16]) {
  %p.1 = (f32[8,16]{1,0:T(8,128)}) parameter(0)
  %g.1 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=0
  %f.1 = f32[8,16]{1,0:T(8,128)S(1)} fusion(%g.1, %g.1), kind=kLoop
  %f.2 = f32[8,16]{1,0:T(8,128)} fusion(%f.1), kind=kLoop
  ROOT %t.1 = (f32[8,16]{1,0:T(8,128)}) tuple(%f.2)
}

ENTRY %main (a: f32[8,16], b: bf16[64,16]) -> (f32[8,16]) {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(1)
  %s = ((bf16[64,16]{1,0:T(8,128)(2,1)}), bf16[4,16]{1,0:T(8,128)(2,1)S(1)}, \
s32[]{:S(2)}) slice-start(%b), slice={[0:4], [0:16]}
  %d = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %c = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} custom-call(%d), \
custom_call_target="ConcatBitcast"
  %u = (f32[8,16]{1,0:T(8,128)}) tuple(%a)
  ROOT %w = (f32[8,16]{1,0:T(8,128)}) while(%u), condition=%less, body=%body
}
'''


def test_bytes_are_those_of_the_memory_and_not_of_the_caches():
  read_and_written, sliced = 2 * 8 * 16 * 4, 4 * 16 * 2
  assert tpu.memory_bytes(TEXT) == read_and_written + sliced


@pytest.mark.slow
@needs_libtpu
def test_chips_add_their_gradients_or_also_gather_their_parameters(tmp_path):
  whole, halves = (tpu.compile_step(config(
      tmp_path, chips=4, mode=mode, **fields)) for mode, fields in (
          ('pmap', {}), ('mesh', {'parallel__mesh__fsdp': 2})))
  assert whole.collectives == {'all-reduce': 1}
  assert halves.collectives['all-gather'] > 1
  assert halves.arguments < 0.55 * whole.arguments


@pytest.mark.slow
@needs_libtpu
def test_the_evaluation_on_several_chips_compiles_for_a_tpu(tmp_path):
  """XLA cannot divide a kernel, so each chip calls it for its rows."""
  chips = devices.make_mesh(tpu.describe_chips(4), {'data': 4})
  def array(dtype, *shape, axes=()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=(
        jax.sharding.NamedSharding(chips, jax.sharding.PartitionSpec(*axes))))

  settings = config(tmp_path, chips=4)
  trainer = trainer_lib.build_trainer(settings)
  batch = {k: array(dtype, 8, 64, axes=['data'])
           for names, dtype in ((qa.INPUTS, np.int32),
                                (['context_mask', 'start_mask'], bool))
           for k in names}
  with tpu.lowering():
    text = decode.build_program(trainer.model, settings.decode, chips).lower(
        jax.tree.map(lambda x: array(x.dtype, *x.shape), trainer.state.params),
        batch, array(np.float32, 1)).compile().as_text()
  assert 'tpu_custom_call' in text


@pytest.mark.slow
@needs_libtpu
def test_the_attention_of_many_short_rows_compiles_for_a_tpu():
  """Seeds of 2,048 rows would not fit into the scalar memory."""
  on = jax.sharding.SingleDeviceSharding(tpu.describe_chips(1)[0])
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
  x = of(jnp.bfloat16, 2048, 2, 64, 64)
  attend = lambda q, k, v, mask, seeds: pallas_tpu.attend(
      q, k, v, attention.Visible(mask),
      attention.Drop(dropout.DropoutKeys(seeds), 0.1))
  with tpu.lowering():
    text = jax.jit(attend).lower(x, x, x, of(bool, 2048, 64), of(
        jnp.uint32, 2048, 2)).compile().as_text()
  assert 'tpu_custom_call' in text


@pytest.mark.slow
@needs_libtpu
def test_the_flops_are_those_of_the_encoder(tmp_path):
  program = tpu.compile_step(config(
      tmp_path, packing='False', length=128, vocab_size=30_522))
  assert program.batch == (8, 128)
  expected = cases.flops('tiny', [128] * 8)
  assert expected < program.flops < 1.3 * expected


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('name', ENCODERS)
def test_the_step_of_every_encoder_compiles_for_a_tpu(tmp_path, name):
  assert tpu.compile_step(config(tmp_path, model__encoder=name)).flops > 1e8


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('head', sorted(heads.HEADS))
def test_the_step_of_every_head_compiles_for_a_tpu(tmp_path, head):
  objective = OBJECTIVES.get(head, 'cross_entropy')
  assert tpu.compile_step(config(
      tmp_path, model__head=head, objective=objective)).flops > 1e8


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('spec', search.SEARCHES)
def test_every_search_compiles_for_a_tpu(spec):
  replicated = jax.sharding.NamedSharding(
      jax.sharding.Mesh(tpu.describe_chips(1), ('data',)),
      jax.sharding.PartitionSpec())
  of = lambda dtype: jax.ShapeDtypeStruct((4, 64), dtype, sharding=replicated)
  program = jax.jit(lambda start, end, mask: search.find_search(spec)(
      span_scores.SpanScores(start, end), mask, mask, max_answer_length=30,
      n_best=5), out_shardings=replicated).trace(
          of(np.float32), of(np.float32), of(bool)).lower().compile()
  assert 'S(1)' in program.as_text()  # a memory space of a TPU


def test_a_missing_libtpu_is_one_line_with_the_extra(monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError('no libtpu\nmore')
  monkeypatch.setattr(tpu.topologies, 'get_topology_desc', fail)
  monkeypatch.setattr(tpu.os, 'environ', {})
  with pytest.raises(errors.UserError, match='tpu') as e:
    tpu.describe_chips(1)
  assert '\n' not in str(e.value)
