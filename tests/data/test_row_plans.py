"""Tests of plans of packed rows: each window once, one shape, full rows.

Glossary of shapes: K blocks, S shards of an update, P row length.
"""

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data import row_plans
from tests.common import batches

P = 48


def planner(lengths, question_of=None, *, batch_size=8, shards=1,
            row_length=P):
  return row_plans.RowPlanner(
      lengths, np.arange(len(lengths)), question_of, batch_size=batch_size,
      shards=shards, row_length=row_length)


def squad_lengths(count):
  """Draws lengths whose mean and spread are about those of SQuAD in 384."""
  drawn = np.random.default_rng(0).lognormal(5.1, 0.35, count)
  return np.clip(drawn, 40, 384).astype(int)


@pytest.mark.parametrize('seed', range(40))
def test_an_epoch_holds_every_window_once_and_no_two_in_one_place(seed):
  rng = np.random.default_rng(seed)
  count, shards = int(rng.integers(1, 90)), int(rng.choice([1, 2, 4]))
  lengths = rng.integers(3, P + 1, count + 5)
  indices = rng.choice(count + 5, count, replace=False)
  question_of = (np.sort(rng.integers(0, max(1, count // 2), count + 5))
                 if seed % 2 else None)
  for batch_size in range(int(rng.integers(1, 9)), 99):
    made = row_plans.RowPlanner(
        lengths, indices, question_of, shards=shards, row_length=P,
        batch_size=batch_size * shards)
    if made.largest[1] <= made.rows:  # the largest question may fill a shard
      break
  plan = made.plan(seed, 1)
  seen, shard_of = [], {}
  taken = np.zeros((*plan.window.shape[:2], made.rows, P), int)
  for u, s, slot in np.argwhere(plan.window >= 0):
    window, first = plan.window[u, s, slot], plan.first[u, s, slot]
    assert first + lengths[window] <= P
    taken[u, s, plan.row[u, s, slot], first:first + lengths[window]] += 1
    seen.append(window)
    if question_of is not None:
      assert shard_of.setdefault(question_of[window], (u, s)) == (u, s)
  assert sorted(seen) == sorted(indices) and taken.max() == 1
  assert (plan.window >= 0).any(axis=(1, 2)).all()  # no update is empty


@pytest.mark.parametrize(('lengths', 'batch_size', 'count'), [
    ((20, 13, 7, 12, 5, 3), 2, 6),  # the order of three full rows
    ((15, 5, 5, 5, 5, 5), 3, 10),  # and the window that is beside the first
    ((20, 19, 18, 17), 2, 6)])  # the pairs of rows, and their order
def test_epochs_and_seeds_permute_all_that_is_equal(
    lengths, batch_size, count):
  made = planner(np.array(lengths), batch_size=batch_size, row_length=20)
  for plans in ([made.plan(0, epoch) for epoch in range(100)],
                [made.plan(seed, 0) for seed in range(100)]):
    assert len({tuple(frozenset(update[update >= 0].tolist())
                      for update in plan.window) for plan in plans}) == count


@pytest.mark.parametrize('grouped', [False, True])
def test_all_epochs_of_all_seeds_have_one_shape(grouped):
  lengths = squad_lengths(3000)
  question_of = np.arange(3000) * 3 // 4 if grouped else None
  made = planner(lengths, question_of, batch_size=32, shards=2, row_length=384)
  plans = [made.plan(seed, epoch) for seed, epoch in (
      (0, 0), (0, 1), (0, 1), (7, 5))]
  assert len({p.window.shape for p in plans}) == 1
  flat = [p.window.ravel().tolist() for p in plans]
  assert flat[1] == flat[2] and flat[0] != flat[1] and flat[1] != flat[3]


@pytest.mark.parametrize(('batch_size', 'shards'), [(32, 1), (64, 4), (16, 1)])
def test_few_tokens_and_slots_are_padding_at_the_lengths_of_squad(
    batch_size, shards):
  lengths = squad_lengths(20_000)
  made = planner(lengths, batch_size=batch_size, shards=shards, row_length=384)
  plan = made.plan(0, 0)
  updates = len(plan.window)
  assert lengths.sum() > 0.96 * updates * shards * made.rows * 384
  assert abs(len(lengths) / updates / batch_size - 1) < 0.15
  assert len(lengths) > 0.9 * plan.window.size
  assert (updates, plan.window.shape[1] * plan.window.shape[2]) == (
      made.updates, made.slots)


def test_windows_of_an_update_part_in_the_next_epoch():
  made = planner(squad_lengths(3000), batch_size=32, row_length=384)
  together = []
  for epoch in (0, 1):
    pairs = set()
    for update in made.plan(0, epoch).window[:, 0]:
      windows = np.sort(update[update >= 0])
      pairs |= {(a, b) for n, a in enumerate(windows) for b in windows[n + 1:]}
    together.append(pairs)
  assert len(together[0] & together[1]) < 0.1 * len(together[0])


def test_questions_of_several_rows_share_their_emptiest_ones():
  """Each of two questions fills a row of its own; one row has the rest."""
  made = planner(np.array([48, 10, 48, 12, 20]), np.array([0, 0, 1, 1, 2]),
                 batch_size=5)
  assert (made.rows, made.updates) == (3, 1)
  plan = made.plan(0, 0)
  alone = plan.window[np.isin(plan.window, (0, 2))]
  assert sorted(alone) == [0, 2]
  assert len({*plan.row[np.isin(plan.window, (1, 3, 4))]}) == 1


def test_blocks_of_several_rows_fit_best_and_the_rest_is_dealt_evenly():
  size = np.array([3, 2, 1, 1, 1, 1, 1])
  windows = np.array([5, 2, 4, 3, 3, 1, 1])
  shard, base, shards, slots = row_plans.deal_blocks(size, windows, 5, 1)
  # 3 + 2 rows fill shard 0; the other five fill shard 1.
  assert shard.tolist() == [0, 0, 1, 1, 1, 1, 1]
  assert base.tolist() == [0, 3, 0, 1, 2, 3, 4]
  assert (shards, slots) == (2, 12)
  # Two shards: 4 | 3, then the lighter one gets 3 first: 5 | 6, then 6 | 6.
  shard, _, shards, slots = row_plans.deal_blocks(
      np.ones(5, int), np.array([4, 3, 3, 1, 1]), 3, 2)
  assert shard.tolist() == [0, 1, 1, 0, 0] and (shards, slots) == (2, 6)


def test_a_question_with_more_rows_than_a_shard_is_refused():
  with pytest.raises(errors.UserError, match=(
      r"question 'q\d+' needs \d packed rows, but train.batch_size 16 over 8 "
      r'devices x 1 .* leaves 2 to keep')) as e:
    batches.stream(group_questions=True, packing='rows', devices=8)
  assert '\n' not in str(e.value)
