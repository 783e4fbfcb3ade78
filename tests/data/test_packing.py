"""Tests that packed rows equal padded ones: scores, gradients, losses, spans.

Glossary of shapes: S shards, B windows over all of them, R rows of a shard,
P row length.
"""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import heads
from qa_jax import objectives
from qa_jax import registry
from qa_jax import span_scores
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import packing
from qa_jax.inference import decode
from qa_jax.models import qa
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import tiny

NO_DROPOUT = {'dropout': 0.0, 'attention_dropout': 0.0}
P = 128

lengths_of = st.lists(st.integers(1, P), min_size=1, max_size=40).map(np.array)


@given(lengths_of)
def test_windows_of_a_row_do_not_overlap(lengths):
  row, first = packing.fit_rows(lengths, P)
  taken = np.zeros((row.max() + 1, P), int)
  for r, begin, length in zip(row, first, lengths, strict=True):
    assert begin + length <= P
    taken[r, begin:begin + length] += 1
  assert taken.max() == 1


@given(lengths_of)
def test_a_row_is_opened_only_when_no_other_has_room(lengths):
  row, _ = packing.fit_rows(lengths, P)
  filled = np.bincount(row, weights=lengths)
  for r in range(1, len(filled)):  # its longest window fitted nowhere before
    assert (filled[:r] + lengths[row == r].max() > P).all()


def test_best_fit_takes_the_fullest_row_that_has_room():
  row, first = packing.fit_rows(np.array([40, 50, 10, 14]), 64)
  np.testing.assert_array_equal(row, [1, 0, 1, 0])
  np.testing.assert_array_equal(first, [0, 0, 40, 50])
  # 50 leaves 14, and 40 with 20 leaves 4. Both have room for 3; first fit would
  # take row 0.
  row, first = packing.fit_rows(np.array([40, 3, 50, 20]), 64)
  np.testing.assert_array_equal(row, [1, 1, 0, 1])
  np.testing.assert_array_equal(first, [0, 60, 0, 40])


def test_windows_are_dealt_forth_and_back():
  dealt = packing.deal_windows(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]), 3)
  # 9 8 7, then 4 5 6 and 3 2 1: the order of the shards turns at each pass.
  np.testing.assert_array_equal(dealt + 1, [[9, 4, 3], [8, 5, 2], [7, 6, 1]])


@pytest.mark.parametrize(('windows', 'rows'), [
    (1, 1), (32, 32), (17, 18), (33, 33), (40, 42), (48, 48), (49, 52)])
def test_packed_rows_are_rounded_up_to_a_sixteenth_of_the_windows(
    windows, rows):
  plan = packing.plan_rows(np.full(2 * windows, P),  # each needs its own row
                           np.arange(2 * windows).reshape(2, -1), P)
  np.testing.assert_array_equal(plan['packed_row'],
                                np.arange(2 * rows).reshape(2, -1))
  np.testing.assert_array_equal(np.sort(plan['first'].reshape(2, -1)),
                                [P * np.arange(windows)] * 2)


@given(st.integers(1, 8), st.integers(1, 6), st.randoms())
def test_shards_hold_each_window_once_and_are_about_equal(shards, size, random):
  lengths = np.array([random.randint(1, P) for _ in range(shards * size)])
  dealt = packing.deal_windows(lengths, shards)
  assert dealt.shape == (shards, size)
  np.testing.assert_array_equal(np.sort(dealt.reshape(-1)),
                                np.arange(len(lengths)))
  load = lengths[dealt].sum(axis=1)
  assert load.max() - load.min() <= lengths.max()


def config(packed: bool, devices: int = 1, *, accumulation: int = 1, **fields):
  return tiny.config(**{
      'model': {**tiny.FIELDS['model'], 'num_layers': 2, **NO_DROPOUT},
      'data': {**tiny.FIELDS['data'], 'max_length': P, 'packing': packed},
      'train': {**tiny.FIELDS['train'], 'batch_size': 16, 'num_steps': 4,
                'grad_accumulation': accumulation},
      'parallel': {'num_devices': devices}, **fields})


@pytest.fixture(scope='module')
def padded() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(config(False))


def scores_and_gradient(trainer, batch):
  """Returns start scores of context and [CLS] by window, and the gradient."""
  def loss(params):
    scores = trainer.model.apply({'params': params},
                                 **qa.model_inputs(batch))
    rows = objectives.OBJECTIVES['cross_entropy']().loss(scores, batch)
    return (rows * batch['weight']).sum(), scores

  (_, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      trainer.state.params)
  domain = span_scores.softmax_domain(batch['context_mask'])
  return np.where(domain, scores.start, 0), gradient


def pack_batch(batch, shards, row_length, real):
  lengths = batch['attention_mask'].sum(axis=1) * real
  return packing.lay_out(batch, packing.plan_rows(lengths, shards, row_length),
                         lengths, shards, row_length)


@pytest.mark.parametrize('shards', [1, 4])
def test_scores_and_gradients_equal_those_of_padded_rows(padded, shards):
  rows = np.concatenate([np.arange(14), [-1, -1]])
  batch = padded.windows.gather(rows, P)
  packed = pack_batch(batch, np.arange(16).reshape(shards, -1), P, rows >= 0)
  assert packed['token_ids'].shape[1] < 16 // shards
  scores, gradient = scores_and_gradient(padded, batch)
  other_scores, other_gradient = scores_and_gradient(padded, packed)
  np.testing.assert_allclose(other_scores[:14], scores[:14], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               other_gradient, gradient)


def test_a_batch_of_fixed_rows_has_the_gradient_of_its_windows_padded(padded):
  stream = trainer_lib.build_trainer(config(
      True, 2, accumulation=2, data={
          **tiny.FIELDS['data'], 'max_length': P, 'packing': 'rows'})).batches
  packed = next(stream)
  windows = stream._plan[0][1]
  assert (windows < 0).any() and packed['token_ids'].shape[0] == 4  # shards
  batch = padded.windows.gather(windows, P)
  scores, gradient = scores_and_gradient(padded, batch)
  # Row r of a device is of its micro-step r mod 2, but unpacking takes the rows
  # of one shard together.
  order = np.arange(len(windows)).reshape(2, -1, 2).swapaxes(1, 2).reshape(-1)
  packed = {k: v if (v.ndim > 1 and len(v) == 4) or k == 'packed_row'
            else v[order] for k, v in packed.items()}
  other_scores, other_gradient = scores_and_gradient(padded, packed)
  real = windows[order] >= 0
  np.testing.assert_allclose(
      other_scores[real], scores[order][real], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               other_gradient, gradient)


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'devices', 'accumulation'), [
    ('pmap', 4, 1), ('mesh', 2, 2)])
def test_fixed_rows_have_equal_losses_on_any_devices(
    tmp_path, one_device, mode, devices, accumulation):
  """Four shards a batch: dropout, too, is keyed by their packed rows."""
  np.testing.assert_allclose(
      losses(tmp_path, fixed_rows(mode, devices, accumulation)), one_device,
      atol=1e-5)


def fixed_rows(mode: str, devices: int, accumulation: int):
  return config(True, accumulation=accumulation,
                parallel={'mode': mode, 'num_devices': devices},
                model={**tiny.FIELDS['model'], 'dropout': 0.1},
                data={**tiny.FIELDS['data'], 'eval': '', 'packing': 'rows'})


@pytest.fixture(scope='module')
def one_device(tmp_path_factory) -> list[float]:
  return losses(tmp_path_factory.mktemp('runs') / 'jit',
                fixed_rows('jit', 1, 4))


def test_a_window_does_not_see_its_neighbours_in_the_row(padded):
  batch = padded.windows.gather(np.arange(16), P)
  packed = pack_batch(batch, np.arange(16)[None], P, np.ones(16, bool))
  assert packed['segment_ids'].max() > 1
  other = packed['segment_ids'] > 1
  changed = {**packed, 'token_ids': np.where(other, 7, packed['token_ids'])}
  before, _ = scores_and_gradient(padded, packed)
  after, _ = scores_and_gradient(padded, changed)
  first = (packed['segment_ids'].reshape(-1)[packed['first']] == 1)
  np.testing.assert_array_equal(after[first], before[first])
  assert abs(after[~first] - before[~first]).max() > 1e-3


def test_dropout_of_a_packed_row_is_that_of_a_row_of_its_number(padded):
  model = padded.model.clone(config=dataclasses.replace(
      padded.model.config, dropout=0.2, attention_dropout=0.2))
  batch = padded.windows.gather(np.zeros(2, int), P)  # one window twice
  numbers = np.array([4, 9], np.int32)
  packed = packing.lay_out(
      batch, {'first': np.array([0, P], np.int32),
              'segment': np.ones(2, np.int32), 'packed_row': numbers[None]},
      batch['attention_mask'].sum(axis=1), np.arange(2)[None], P)
  apply = jax.jit(lambda batch, rows: model.apply(
      {'params': padded.state.params}, **qa.model_inputs(batch),
      dropout_key=jax.random.key(3), rows=rows).start)
  domain = span_scores.softmax_domain(batch['context_mask'])
  expected = np.where(domain, apply(batch, numbers), 0)
  np.testing.assert_allclose(
      np.where(domain, apply(packed, None), 0), expected, atol=1e-5)
  assert abs(expected[0] - expected[1]).max() > 1e-3


@pytest.fixture(scope='module')
def below_zero(padded):
  """Returns a model and parameters whose scores of tokens are all negative."""
  model = padded.model.clone(head=heads.HEADS['biased']())
  params = qa.init_params(model, jax.random.key(1))
  params['head'] = {name: {'kernel': 30 * part['kernel'],
                           'bias': part['bias'] - 40}
                    for name, part in params['head'].items()}
  return model, params


@pytest.fixture(scope='module')
def alone(padded, below_zero):
  """Returns the start and end scores of 6 windows, each alone and unpadded."""
  model, params = below_zero
  apply = jax.jit(model.apply)
  rows = []
  for window in range(6):
    length = int(padded.windows.total_lengths[window])
    scores = apply({'params': params}, **qa.model_inputs(
        padded.windows.gather(np.array([window]), length)))
    rows.append((np.float64(scores.start[0]), np.float64(scores.end[0])))
    assert max(map(np.max, rows[-1])) < 0 and np.ptp(rows[-1][0]) > 1
  return rows


@pytest.mark.parametrize(('packing_mode', 'longest'), [
    (False, P), (False, P + 32), (True, P)])
@pytest.mark.parametrize('k', [2, 20])
def test_padding_is_not_among_the_best_starts_and_ends(
    padded, below_zero, alone, packing_mode, longest, k):
  spans = decode.score_windows(*below_zero, padded.windows, config(
      packing_mode, data={**tiny.FIELDS['data'], 'max_length': longest,
                          'packing': packing_mode},
      decode={'search': f'top_k(k={k})', 'n_best': 100,
              'max_answer_length': 5}))
  batch = padded.windows.gather(np.arange(6), P)
  empty = 0
  for row, (start, end) in enumerate(alone):
    best = [np.argsort(-x)[:k] for x in (start, end)]
    expected = {(i, j) for i in best[0] for j in best[1]
                if batch['start_mask'][row, i] and batch['context_mask'][row, j]
                and 0 <= j - i < 5}
    empty += not expected
    assert expected == {
        (int(i), int(j)) for i, j, valid in zip(
            spans.start[row], spans.end[row], spans.valid[row], strict=True)
        if valid}
  assert k == 2 or not empty


@pytest.mark.parametrize('spec', [
    'cross_entropy(domain="all")', "label_smoothing(domain = 'all')",
    'boundary_kernel(domain="all")'])
def test_a_softmax_over_padding_takes_no_packed_rows(spec):
  for mode in (True, 'rows'):
    with pytest.raises(errors.UserError, match='normalises over padding'):
      trainer_lib.build_parts(tiny.config(
          objective=spec, data={**tiny.FIELDS['data'], 'packing': mode}), 1)
  for objective in (spec, f'answerability(base={json.dumps(spec)})'):
    auto = tiny.config(objective=objective, data={
        **tiny.FIELDS['data'], 'packing': 'auto'})
    assert config_lib.packing(auto, 'gpu') is False
  assert registry.build(objectives.OBJECTIVES, spec,
                        what='objective').reads_padding
  assert not registry.build(objectives.OBJECTIVES, spec.replace(
      'all', 'context'), what='objective').reads_padding


def losses(workdir, settings) -> list[float]:
  train.train(settings, workdir)
  return [row['loss'] for row in RunDirectory(workdir).read_metrics()
          if row['split'] == 'train']


@pytest.fixture(scope='module')
def reference(tmp_path_factory) -> list[float]:
  return losses(tmp_path_factory.mktemp('runs') / 'padded', config(False))


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'devices', 'accumulation'), [
    ('pmap', 1, 1), ('pmap', 4, 2), ('mesh', 4, 2)])
def test_training_has_the_same_losses_packed_or_padded(
    tmp_path, reference, mode, devices, accumulation):
  settings = config(True, accumulation=accumulation,
                    parallel={'mode': mode, 'num_devices': devices},
                    data={**tiny.FIELDS['data'], 'max_length': P,
                          'packing': True})
  np.testing.assert_allclose(
      losses(tmp_path / 'packed', settings), reference, atol=1e-5)


@pytest.mark.slow
def test_questions_stay_together_when_packed(tmp_path):
  """Packs for shared_norm, whose questions must stay in one shard."""
  fields = {'objective': 'shared_norm'}
  data = {**tiny.FIELDS['data'], 'max_length': 40}
  both = [config(packed, 2, data={**data, 'packing': packed}, **fields)
          for packed in (False, True)]
  curves = [losses(tmp_path / str(i), c) for i, c in enumerate(both)]
  np.testing.assert_allclose(*curves, atol=1e-5)


def test_best_spans_equal_those_of_buckets(padded):
  spans = [decode.score_windows(
      padded.model, padded.state.params, padded.windows, settings)
      for settings in (config(False, data={
          **tiny.FIELDS['data'], 'max_length': P, 'buckets': (48, 64)}),
                       config(True))]
  np.testing.assert_allclose(spans[1].score, spans[0].score, atol=1e-5)
  np.testing.assert_allclose(spans[1].null, spans[0].null, atol=1e-5)
  np.testing.assert_array_equal(spans[1].start, spans[0].start)
  np.testing.assert_array_equal(spans[1].end, spans[0].end)


def test_an_epoch_has_few_shapes():
  settings = config(True, train={**tiny.FIELDS['train'], 'batch_size': 32},
                    data={**tiny.FIELDS['data'], 'packing': True,
                          'train': 'synthetic(size=400)'})
  stream = trainer_lib.build_trainer(settings).batches
  shapes = {next(stream)['token_ids'].shape
            for _ in range(stream.steps_per_epoch - 1)}
  assert len(shapes) <= 4
