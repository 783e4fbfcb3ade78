"""Tests of the precision of the products of encoder and head, and of scores."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import heads
from qa_jax import objectives
from qa_jax import span_scores
from qa_jax.models import qa
from qa_jax.training import trainer as trainer_lib
from tests.common import heads as heads_lib
from tests.common import tiny


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(tiny.config(model={'num_layers': 2}))


@pytest.fixture(scope='module')
def batch(trainer):
  return trainer.windows.gather(np.arange(8), 64)


@pytest.mark.slow
@pytest.mark.parametrize('head', sorted(heads.HEADS))
def test_float32_products_are_not_rounded_on_a_gpu_or_tpu(trainer, batch, head):
  model = trainer.model.clone(head=heads_lib.build_head(head))
  inputs = {**qa.model_inputs(batch), 'gold_start': np.full(8, 5)}

  def total(params):
    scores = model.apply({'params': params}, **inputs)
    return (span_scores.band(scores, batch['context_mask'], 8).sum()
            + scores.null_score.sum())

  def products(setting, platform='cuda'):
    with jax.default_matmul_precision(setting):
      program = jax.jit(jax.grad(total)).trace(qa.zero_params(model)).lower(
          lowering_platforms=(platform,)).as_text()
    return re.findall('stablehlo.dot_general.*', program)

  for platform in ('cuda', 'tpu'):
    assert products(None, platform)
    for product in products(None, platform):
      assert 'precision = [HIGHEST, HIGHEST]' in product, product
  # JAX's own option chooses TF32 for all products.
  assert not any('HIGHEST' in p for p in products('tensorfloat32'))


def test_tf32_rounds_the_encoder_and_its_gradient_but_not_the_head(
    trainer, batch):
  """Of XLA's names, HIGH is TF32 on a GPU, and HIGHEST is float32."""
  inputs = qa.model_inputs(batch)

  def products(of):
    model = trainer.model.clone(tf32=True)
    total = lambda params: sum(
        jnp.sum(x) for x in jax.tree.leaves(model.apply(
            {'params': params}, **inputs)) if x.dtype == jnp.float32)
    program = jax.jit(of(total)).trace(qa.zero_params(model)).lower(
        lowering_platforms=('cuda',)).as_text()
    lines = re.findall('stablehlo.dot_general.*', program)
    return ([line for line in lines if '[HIGH, HIGH]' in line],
            [line for line in lines if '[HIGHEST, HIGHEST]' in line], lines)

  # Query-key-value, scores, values and three outputs, in a function that all
  # layers share; the head has one product for start and end.
  rounded, exact, lines = products(lambda f: f)
  assert (len(rounded), len(exact)) == (6, len(lines) - 6)
  assert exact
  rounded, exact, lines = products(jax.grad)
  assert len(rounded) == 3 * 6 and len(rounded) + len(exact) == len(lines)


def test_tf32_changes_no_bit_on_a_cpu(trainer, batch):
  params = trainer.state.params
  scores = [trainer.model.clone(tf32=chosen).apply(
      {'params': params}, **qa.model_inputs(batch)) for chosen in (False, True)]
  np.testing.assert_array_equal(scores[0].start, scores[1].start)


class HalfPrecision(nn.Module):
  @nn.compact
  def __call__(self, inputs: heads.HeadInput) -> heads.SpanScores:
    x = nn.Dense(3, dtype=jnp.bfloat16)(inputs.hidden)
    return heads.SpanScores(
        start=x[..., 0], end=x[..., 1], pair=x, null=x[:, 0, 2])


def test_a_head_in_half_precision_has_a_float32_loss(trainer, batch):
  model = trainer.model.clone(head=HalfPrecision())
  params = qa.init_params(model, jax.random.key(0))
  scores = jax.jit(lambda: model.apply(
      {'params': params}, **qa.model_inputs(batch)))()
  for x in jax.tree.leaves(scores):
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, x.astype(jnp.bfloat16))
  loss = objectives.span_softmax(max_answer_length=3).loss(scores, batch)
  assert loss.dtype == jnp.float32
  assert (loss != loss.astype(jnp.bfloat16)).any()


def test_a_head_that_reads_the_mask_scores_every_layer(trainer, batch):
  """Shapes alone: the mask is repeated as often as the windows."""
  model = trainer.model.clone(head=heads_lib.build_head('conditional'))
  inputs = qa.model_inputs(batch)
  _, start, end = jax.eval_shape(
      lambda params: model.apply(
          {'params': params}, **inputs, method='by_layer'),
      qa.param_shapes(model))
  assert start.shape == end.shape == (1 + 2, *batch['token_ids'].shape)
