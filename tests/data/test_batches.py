"""Tests of batches: each window once, static shapes, restored positions."""

import itertools

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data import batch_plans
from qa_jax.data import batches as batches_lib
from tests.common import batches
from tests.common import windows

BUCKETS = (8, 10, 12)


def plan(n, batch_size=4, seed=0, epoch=0):
  lengths = np.random.default_rng(1).integers(5, 13, n)
  return lengths, batch_plans.plan_epoch(
      lengths, np.arange(n), batch_size=batch_size, buckets=BUCKETS,
      seed=seed, epoch=epoch)


@pytest.mark.parametrize('n', [1, 3, 4, 5, 33, 100])
def test_an_epoch_holds_every_window_once_in_ceil_batches(n):
  lengths, planned = plan(n)
  rows = np.concatenate([r for _, r in planned])
  assert sorted(rows[rows >= 0]) == list(range(n))
  assert len(planned) == -(-n // 4)
  assert all(lengths[r[r >= 0]].max() <= length for length, r in planned)
  assert all(len(r) == 4 for _, r in planned)


def test_order_depends_on_seed_and_epoch_alone():
  def flat(**kwargs):
    return np.concatenate([r for _, r in plan(50, **kwargs)[1]]).tolist()
  assert flat() == flat()
  assert flat() != flat(seed=1)
  assert flat() != flat(epoch=1)


def test_batches_of_an_epoch_are_shuffled_among_the_buckets():
  lengths = [length for length, _ in plan(400)[1]]
  assert lengths != sorted(lengths) and len(set(lengths)) == len(BUCKETS)


def test_windows_of_a_batch_are_in_other_batches_of_the_next_epoch():
  together = [{frozenset(rows.tolist()) for _, rows in plan(400, epoch=e)[1]}
              for e in (0, 1)]
  assert len(together[0] & together[1]) < 5


@pytest.mark.parametrize('count', [1, 3, 5, 9])
@pytest.mark.parametrize('make', [
    batch_plans.plan_eval, batch_plans.plan_packed])
def test_few_windows_are_rows_for_all_devices(count, make):
  made = make(np.full(count, 12), batch_size=64, buckets=BUCKETS, multiple=3)
  assert all(len(rows) % 3 == 0 for _, rows in made)
  assert sum((rows >= 0).sum() for _, rows in made) == count


@pytest.mark.parametrize('n', [1, 7, 64])
def test_eval_plan_holds_every_window_once(n):
  lengths, _ = plan(n)
  planned = batch_plans.plan_eval(lengths, batch_size=4, buckets=BUCKETS)
  rows = np.concatenate([r for _, r in planned])
  assert sorted(rows[rows >= 0]) == list(range(n))


@pytest.mark.parametrize(('n', 'size', 'multiple'), [
    (41, 8, 1), (300, 16, 4), (3000, 128, 2), (9, 8, 4)])
def test_fixed_rows_hold_every_window_once_and_have_one_shape(
    n, size, multiple):
  lengths = np.random.default_rng(0).integers(3, 41, n)
  planned = batch_plans.plan_fixed_rows(
      lengths, batch_size=size, buckets=(8, 16, 40), multiple=multiple)
  shapes, tokens, seen = set(), 0, []
  for length, indices, places in planned:
    shapes.add((length, indices.shape, places['packed_row'].shape))
    shards, rows = places['packed_row'].shape
    taken = np.zeros((shards, rows * length), bool)
    for slot in np.flatnonzero(indices >= 0):
      first, own = places['first'][slot], lengths[indices[slot]]
      shard = slot * shards // len(indices)
      assert first // length == (first + own - 1) // length  # in one row
      assert not taken[shard, first:first + own].any()
      taken[shard, first:first + own] = True
      seen.append(indices[slot])
    tokens += taken.size
    assert indices.size % (8 * shards) == 0
    assert rows % 8 == 0 or size < 64 * multiple
  assert len(shapes) == 1 and sorted(seen) == [*range(n)]
  if n == 3000:  # many windows leave few tokens empty
    assert lengths.sum() > 0.9 * tokens
    assert abs(n / len(planned) / size - 1) < 0.15


@pytest.mark.parametrize(('steps', 'size', 'packing', 'mean'), [
    (2, 12, 'rows', 16.0),  # 3 of 6 tokens a shard: 1.5 rows, rounded to 2
    (2, 16, 'rows', None), (1, 12, 'rows', None), (2, 12, True, None),
    (2, 12, False, None)])
def test_a_line_says_how_far_whole_rows_are_from_the_batch_size(
    steps, size, packing, mean):
  window_set = windows.cut(*[windows.example(1)] * 240)
  stream = batches_lib.TrainBatches(
      window_set, np.arange(240), size, (8, 12), seed=0, packing=packing,
      devices=steps, accumulation=steps)
  if packing == 'rows':
    assert stream.describe().endswith(
        f'packed in {next(stream)["packed_row"].size} rows of 12')
  real = np.mean([(next(stream)['weight'] > 0).sum()
                  for _ in range(stream.steps_per_epoch)])
  if mean:
    assert real == mean
    assert f'={size}, but an update has {mean} windows on average' in (
        stream.rounding_note())
  else:
    assert not stream.rounding_note() and abs(real - size) <= size / 10


@pytest.mark.parametrize('multiple', [1, 4])
def test_eval_batches_hold_about_as_many_tokens_whatever_their_length(
    multiple):
  lengths, _ = plan(500)
  planned = batch_plans.plan_eval(
      lengths, batch_size=8, buckets=BUCKETS, multiple=multiple)
  rows = np.concatenate([r for _, r in planned])
  assert sorted(rows[rows >= 0]) == list(range(500))
  assert {(length, len(r)) for length, r in planned} == {
      (8, 12), (10, 9 if multiple == 1 else 12), (12, 8)}
  assert all(lengths[r[r >= 0]].max() <= length for length, r in planned)
  assert all((r >= 0).all() for _, r in planned[:-1])


@pytest.mark.parametrize(('n', 'rows'), [(1, 1), (3, 4), (5, 8), (200, 64)])
@pytest.mark.parametrize('make', [
    batch_plans.plan_eval, batch_plans.plan_packed])
def test_few_windows_are_one_batch_of_a_power_of_two(n, rows, make):
  planned = make(np.full(n, 12), batch_size=64, buckets=BUCKETS)
  assert {len(r) for _, r in planned} == {rows}
  windows_of_all = np.concatenate([r for _, r in planned])
  assert sorted(windows_of_all[windows_of_all >= 0]) == list(range(n))


@pytest.mark.parametrize('layout', [
    {}, {'packing': True}, {'packing': 'rows'}])
def test_shapes_are_those_of_the_steps_to_come(layout):
  stream = batches.stream(**layout)
  for _ in range(3):
    next(stream)
  for steps in (1, 4, 10**6):
    shapes = [stream.gather(*s)['token_ids'].shape
              for s in stream.shapes(steps)]
    assert len(shapes) == len(set(shapes))
    other = batches.stream(**layout)
    other.seek(stream.position)
    left = min(steps, stream.steps_per_epoch - stream.index)
    assert set(shapes) == {
        next(other)['token_ids'].shape for _ in range(left)}


@pytest.mark.parametrize('layout', [
    {}, {'group_questions': True},
    {'packing': True, 'accumulation': 2},
    {'packing': 'rows', 'accumulation': 2},
    {'packing': 'rows', 'group_questions': True}])
@pytest.mark.parametrize('devices', [[0], [2, 3], [3, 1]])
def test_what_some_devices_see_is_gathered_alone(layout, devices):
  stream = batches.stream(devices=4, **layout)
  cut = lambda x: x.reshape(4, -1, *x.shape[1:])[devices].reshape(
      -1, *x.shape[1:])
  for _ in range(stream.steps_per_epoch):
    length, rows = stream.next_rows()
    whole = stream.gather(length, rows)
    part = stream.gather(length, {k: cut(v) for k, v in rows.items()})
    assert part.keys() == whole.keys()
    for name, value in whole.items():
      np.testing.assert_array_equal(part[name], cut(value), err_msg=name)


@pytest.mark.parametrize('layout', [
    {}, {'packing': True}, {'packing': 'rows'}])
def test_batches_that_are_alike_are_those_of_one_by_one(layout):
  stream, one_by_one = batches.stream(**layout), batches.stream(**layout)
  counts = []
  for most in [3, 1, 2] * stream.steps_per_epoch:
    length, alike = stream.next_alike(most)
    epoch = stream.epoch
    for rows in alike:
      expected = one_by_one.gather(*one_by_one.next_rows())
      for name, value in stream.gather(length, rows).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert stream.position == one_by_one.position and 0 < len(alike) <= most
    left = stream.steps_per_epoch - stream.index
    if len(alike) < most and left:  # the next batch has another shape
      other = batches.stream(**layout)
      other.seek(stream.position)
      assert next(other)['token_ids'].shape != (
          expected['token_ids'].shape)
    assert epoch == one_by_one.epoch  # no batches of two epochs
    counts.append(len(alike))
  assert len({*counts}) > 1


@pytest.mark.parametrize('grouping', [
    {}, batches.GROUPING[3], {'packing': 'rows'},
    {'packing': 'rows', **batches.GROUPING[3]}])
def test_a_restored_position_gives_the_same_next_batches(grouping):
  whole = batches.stream(**grouping)
  expected = list(itertools.islice(whole, 25))
  other = batches.stream(**grouping)
  for _ in range(11):
    next(other)
  resumed, skipped = batches.stream(**grouping), batches.stream(**grouping)
  resumed.seek(other.position)
  skipped.skip(11)
  for stream in (resumed, skipped):
    for a, b in zip(expected[11:], itertools.islice(stream, 14), strict=True):
      assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize('start', [0, 11, 40])
def test_a_stream_has_the_plan_of_each_epoch(start):
  """The plans come from batch_plans, not from another stream."""
  stream = batches.stream()
  lengths, indices = stream.windows.total_lengths, stream.indices
  expected = [(epoch, length, rows.tolist()) for epoch in range(4)
              for length, rows in batch_plans.plan_epoch(
                  lengths, indices, batch_size=4, buckets=(10, 12), seed=3,
                  epoch=epoch)]
  each = stream.steps_per_epoch
  stream.seek({'epoch': start // each, 'index': start % each})
  for epoch, length, windows_of_batch in expected[start:]:
    length_made, rows = stream.next_rows()
    assert (stream.epoch, length_made, rows['window'].tolist()) == (
        epoch, length, windows_of_batch)
  epochs = [[row for row in expected if row[0] == e] for e in range(4)]
  assert len({str([r[1:] for r in rows]) for rows in epochs}) == 4


@pytest.mark.parametrize('bad', [(0, 8), (-1,)])
def test_bucket_out_of_range_is_refused(bad):
  with pytest.raises(errors.UserError, match=r'data\.buckets'):
    batches_lib.check_buckets(bad, 12)


def test_longest_bucket_is_always_max_length():
  assert batches_lib.check_buckets((8, 8, 4), 12) == (4, 8, 12)
  assert batches_lib.check_buckets((8, 12, 4, 13), 12) == (4, 8, 12)
  assert batches_lib.check_buckets((13, 14), 12) == (12,)


@pytest.mark.parametrize('grouping', batches.GROUPING)
def test_windows_of_a_question_stand_where_one_micro_step_sees_them(grouping):
  stream = batches.stream(**grouping)
  rows = np.arange(16)
  device = rows // (16 // stream.devices)
  micro_step = rows % stream.accumulation
  for _ in range(stream.steps_per_epoch):
    batch = next(stream)
    indices = stream._plan[stream.index - 1][1]
    real = indices >= 0
    question = np.where(real, stream.windows.example_of[indices], -1 - rows)
    for q in set(question):
      mine = np.flatnonzero(question == q)
      assert len({*zip(device[mine], micro_step[mine], strict=True)}) == 1
      assert np.flatnonzero(
          batch['group'] == batch['group'][mine[0]]).tolist() == mine.tolist()
      assert batch['weight'][mine].tolist() == (
          [float(q >= 0)] + [0] * (len(mine) - 1))


@pytest.mark.parametrize('grouping', batches.GROUPING)
def test_a_grouped_epoch_holds_every_window_once_in_batches_of_one_size(
    grouping):
  stream = batches.stream(**grouping)
  for epoch in range(3):
    seen, weight, shapes = [], 0.0, set()
    for _ in range(stream.steps_per_epoch):
      batch = next(stream)
      seen += stream._plan[stream.index - 1][1].tolist()
      weight += batch['weight'].sum()
      shapes.add(batch['token_ids'].shape)
    assert (stream.epoch, stream.index) == (epoch, stream.steps_per_epoch)
    assert sorted(i for i in seen if i >= 0) == list(range(len(stream.windows)))
    assert weight == len(stream.windows.examples)
    assert shapes == {(16, 10), (16, 12)}


def test_grouped_epochs_differ_but_are_equally_long():
  size = np.random.default_rng(0).integers(1, 5, 400)
  question = np.repeat(np.arange(400), size)
  lengths = np.random.default_rng(1).integers(5, 13, len(question))
  planned = [batch_plans.plan_grouped(
      lengths, np.arange(len(question)), question, batch_size=16, shards=2,
      buckets=BUCKETS, seed=seed, epoch=epoch)
          for seed, epoch in ((0, 0), (0, 1), (0, 2), (0, 2), (1, 2))]
  flat = [np.concatenate([r for _, r in plan]).tolist() for plan in planned]
  assert len(planned[0]) == len(planned[1]) == len(planned[2])
  assert len(planned[0]) <= 1.03 * len(question) / 16 + 1
  assert flat[2] == flat[3]
  assert flat[0] != flat[1] and flat[2] != flat[4]
  together = [{frozenset(r[r >= 0].tolist()) for _, r in p} for p in planned]
  assert len(together[0] & together[1]) < 0.1 * len(planned[0])
  assert all(lengths[r[r >= 0]].max() <= length
             for plan in planned for length, r in plan)


def test_a_question_with_more_windows_than_rows_is_refused():
  w = windows.cut(*[windows.example(n) for n in range(1, 20)])
  with pytest.raises(errors.UserError, match=(
      r"question 'q16' has 4 windows, but train.batch_size 8 over 2 devices x "
      r'2 accumulation steps leaves 2 rows.* raise it to 16')) as e:
    batches_lib.TrainBatches(w, np.arange(len(w)), 8, (12,), seed=3,
                             group_questions=True, devices=2, accumulation=2)
  assert '\n' not in str(e.value)
