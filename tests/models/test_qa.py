"""Tests of encoder and head: the scores of a window depend on it alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import heads
from qa_jax import span_scores
from qa_jax.models import qa
from qa_jax.training import trainer as trainer_lib
from tests.common import heads as heads_lib
from tests.common import tiny


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(tiny.config(model={'num_layers': 2}))


@pytest.fixture(scope='module')
def score(trainer):
  apply = jax.jit(trainer.model.apply)
  return lambda batch: jax.device_get(apply(
      {'params': trainer.state.params}, **qa.model_inputs(batch)))


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


@pytest.fixture(scope='module')
def batch(trainer):
  return trainer.windows.gather(np.arange(8), 64)


def test_the_order_of_a_batch_changes_no_score(score, batch):
  order = np.random.default_rng(0).permutation(8)
  scores, moved = score(batch), score({k: v[order] for k, v in batch.items()})
  assert_close((scores.start[order], scores.end[order]),
               (moved.start, moved.end))


def test_other_text_in_one_window_changes_no_other(score, batch):
  other = {**batch, 'token_ids': batch['token_ids'].copy()}
  other['token_ids'][3] = np.where(
      batch['attention_mask'][3], 7, other['token_ids'][3])
  scores, changed = score(batch), score(other)
  assert np.abs(scores.start[3] - changed.start[3]).max() > 1e-4
  rest = np.arange(8) != 3
  assert_close((scores.start[rest], scores.end[rest]),
               (changed.start[rest], changed.end[rest]))


def test_the_question_reaches_every_context_token(score, batch):
  """Checks why one start vector can serve every question."""
  other = {**batch, 'token_ids': batch['token_ids'].copy()}
  in_question = ((batch['token_type_ids'] == 0)
                 & (batch['attention_mask'] == 1))[:, 1:]
  other['token_ids'][:, 1:][in_question] = 7
  context = batch['context_mask']
  moved = np.abs(score(batch).start - score(other).start)
  assert (moved[context] > 1e-7).mean() > 0.99


def test_padding_rows_and_columns_change_no_score(trainer, score, batch):
  wide = trainer.windows.gather(np.concatenate([np.arange(8), [-1, -1]]), 80)
  scores, padded = score(batch), score(wide)
  assert_close((scores.start * batch['attention_mask'],
                scores.end * batch['attention_mask']),
               (padded.start[:8, :64] * batch['attention_mask'],
                padded.end[:8, :64] * batch['attention_mask']))


@pytest.mark.parametrize('head', sorted(heads.HEADS))
def test_float32_products_are_not_rounded_on_a_gpu(trainer, batch, head):
  model = trainer.model.clone(head=heads_lib.build_head(head))
  inputs = {**qa.model_inputs(batch), 'gold_start': np.full(8, 5)}

  def total(params):
    scores = model.apply({'params': params}, **inputs)
    return (span_scores.band(scores, batch['context_mask'], 8).sum()
            + scores.null_score.sum())

  def products(setting):
    with jax.default_matmul_precision(setting):
      program = jax.jit(jax.grad(total)).trace(qa.zero_params(model)).lower(
          lowering_platforms=('cuda',)).as_text()
    return re.findall('stablehlo.dot_general.*', program)

  assert products(None)
  for product in products(None):
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
