"""Evaluation in packed rows: the spans of windows that are padded alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import input_pipeline
from qa_jax.data import tokenizer
from qa_jax.data.examples import Example
from qa_jax.heads import layers
from qa_jax.heads.independent import Independent
from qa_jax.inference import decode
from qa_jax.models.encoders import bert
from qa_jax.runtime import devices
from qa_jax.span_scores import SpanScores
from tests.common import random_model
from tests.common import tiny

LETTERS = 'abcdefghijklmnop'
TOKENIZER = tokenizer.Tokenizer(
    (*tokenizer.SPECIAL, *LETTERS), lowercase=True)
SIZES = bert.BertConfig(
    vocab_size=len(TOKENIZER.vocab), hidden_size=16, num_layers=2, num_heads=2,
    mlp_size=32, max_position=40, initializer_range=0.5)


class Neighbours(Independent):
  """A subclass of a token-wise head that also reads the mask and neighbours."""

  @nn.compact
  def __call__(self, inputs):
    x = inputs.hidden * inputs.context_mask[..., None]
    x = x + jnp.roll(x, 1, axis=1)
    return SpanScores(layers.project('start', x), layers.project('end', x))


def make(packing, head='independent', batch=6):
  config = config_lib.check_config({
      'model': {'preset': '', 'head': head},
      'train': {'num_steps': 1, 'eval_batch_size': batch},
      'data': {'max_length': 40, 'window_overlap': 9, 'packing': packing,
               'max_question_length': 8},
      'decode': {'max_answer_length': 12, 'n_best': 7}})
  return random_model.draw_qa(config, SIZES, TOKENIZER)


def windows_of(qa, count=50):
  rng = np.random.default_rng(0)
  text = lambda most: ' '.join(rng.choice([*LETTERS], rng.integers(1, most)))
  return input_pipeline.make_windows(qa.config, [
      Example(str(i), text(6), text(60), ()) for i in range(count)], TOKENIZER)


@pytest.mark.parametrize(('head', 'count'), [
    ('independent', 1), ('independent', 4), (f'{__name__}:Neighbours', 1),
    pytest.param('biaffine(width=12)', 1, marks=pytest.mark.slow),
    pytest.param('answerability', 2, marks=pytest.mark.slow)])
def test_fixed_rows_have_the_spans_of_padded_windows(monkeypatch, head, count):
  mesh = devices.make_mesh(jax.devices()[:count], {'data': count})
  shapes, batch_of = set(), input_pipeline.evaluation_batch

  def noting(*args, **options):
    batch = batch_of(*args, **options)
    shapes.add((batch['token_ids'].shape, batch['start_mask'].shape))
    return batch

  spans = {}
  for packing in (False, 'rows'):
    qa = make(packing, head, batch=6 * count)
    windows = windows_of(qa)
    shapes.clear()
    monkeypatch.setattr(input_pipeline, 'evaluation_batch', noting)
    spans[packing] = decode.score_windows(
        qa.model, qa.params, windows, qa.config, mesh=mesh,
        temperatures=(1.0, 2.0))
  assert len(windows) > 12 * count and len(shapes) == 1
  (rows, _), = shapes
  assert rows[0] == count and rows[1] < 6  # fewer rows than windows
  padded, packed = spans.values()
  np.testing.assert_array_equal(packed.valid, padded.valid)
  for name in ('start', 'end'):
    np.testing.assert_array_equal(*(np.where(
        s.valid, getattr(s, name), 0) for s in (packed, padded)))
  for name in ('score', 'null', 'log_partition'):
    np.testing.assert_allclose(*(np.where(
        s.valid if name == 'score' else True, getattr(s, name), 0)
        for s in (packed, padded)), atol=1e-5)


def test_few_windows_are_one_batch_of_the_rows_they_need():
  config = make('rows').config
  (length, windows, places), = input_pipeline.plan_evaluation(
      config, np.full(5, 12), devices=1)
  assert length == 40 and places is None
  assert sorted(windows[windows >= 0]) == [*range(5)]


@pytest.mark.parametrize(('packing', 'lengths', 'first'), [
    (False, [32, 32, 64], 1), (True, 5 * [64], 0)])
def test_windows_are_planned_by_length_or_packed_in_the_order_of_the_data(
    packing, lengths, first):
  plan = input_pipeline.plan_evaluation(
      tiny.config(data={'packing': packing, 'buckets': [32, 64]},
                  train={'eval_batch_size': 2}),
      np.array([60, *8 * [20]]), devices=1)
  assert [length for length, _, _ in plan] == lengths
  windows = np.concatenate([windows for _, windows, _ in plan])
  assert windows[0] == first
  assert sorted(windows[windows >= 0]) == [*range(9)]
