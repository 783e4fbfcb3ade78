"""Plans that assign windows to batches: order, buckets and padding rows.

Glossary of shapes: N windows, B batch, L bucket length, Q questions, S shards.

A plan is a list of (L, window indices [B]). Index -1 is a padding row of weight
0. The plan of an epoch depends on (seed, epoch) alone, so that a checkpoint can
store a position as two integers. A shard is the part of a batch that one
micro-step of one device sees.
"""

from collections.abc import Sequence

import numpy as np

from qa_jax.data import packing
from qa_jax.data import row_plans

Plan = list[tuple[int, np.ndarray]]


def plan_epoch(lengths: np.ndarray, indices: np.ndarray, *, batch_size: int,
               buckets: Sequence[int], seed: int, epoch: int) -> Plan:
  """Plans a training epoch: each window of `indices` once, in random order.

  Each bucket is cut into full batches. Its remaining windows move to the next
  longer bucket, so that only one batch of the ceil(N / B) has padding rows.
  """
  rng = np.random.default_rng([seed, epoch])
  plan = _fill(rng.permutation(indices), lengths,
               dict.fromkeys(buckets, batch_size))
  return [plan[k] for k in rng.permutation(len(plan))]


def _fill(order: np.ndarray, lengths: np.ndarray,
          rows_of: dict[int, int]) -> Plan:
  """Cuts windows into batches of each bucket; only the last one is padded.

  `rows_of` maps bucket lengths to the rows of a batch, shortest bucket first.
  """
  buckets = np.asarray([*rows_of])
  bucket_of = np.searchsorted(buckets, lengths[order])
  plan, left = [], order[:0]
  for b, (length, rows) in enumerate(rows_of.items()):
    left = np.concatenate([left, order[bucket_of == b]])
    full = len(left) // rows * rows
    plan += [(length, chunk) for chunk in left[:full].reshape(-1, rows)]
    left = left[full:]
  if len(left):
    fit = [*rows_of][np.searchsorted(buckets, lengths[left].max())]
    plan.append((fit, _pad(left, rows_of[fit])))
  return plan


def plan_grouped(lengths: np.ndarray, indices: np.ndarray,
                 question_of: np.ndarray, *, batch_size: int, shards: int,
                 buckets: Sequence[int], seed: int, epoch: int) -> Plan:
  """Plans a training epoch with all windows of a question in one shard.

  A batch is `shards` blocks of B / `shards` rows, each padded by itself. The
  seed draws the order of the questions. An epoch permutes only questions with
  equal buckets and equal numbers of windows, so that all epochs have equally
  many batches.
  """
  rows = batch_size // shards
  indices = indices[np.argsort(question_of[indices], kind='stable')]
  _, first, size = np.unique(
      question_of[indices], return_index=True, return_counts=True)  # [Q]
  bucket_of = np.searchsorted(
      np.asarray(buckets), np.maximum.reduceat(lengths[indices], first))
  order = np.random.default_rng(seed).permutation(len(first))
  rng = np.random.default_rng([seed, epoch])
  kind = (bucket_of * (rows + 1) + size)[order]
  for k in np.unique(kind):
    alike = np.flatnonzero(kind == k)
    order[alike] = rng.permutation(order[alike])

  def batch(packed: list[list[int]]) -> np.ndarray:  # [B]
    windows = [np.concatenate([indices[first[q]:first[q] + size[q]]
                               for q in shard]) for shard in packed]
    windows += [indices[:0]] * (shards - len(packed))
    return np.concatenate([_pad(shard, rows) for shard in windows])

  plan, left = [], []
  for b, length in enumerate(buckets):
    packed = _pack([*left, *order[bucket_of[order] == b]], size, rows)
    full = len(packed) // shards * shards
    plan += [(length, batch(packed[i:i + shards]))
             for i in range(0, full, shards)]
    left = [q for shard in packed[full:] for q in shard]
  if left:
    plan.append((buckets[bucket_of[left].max()], batch(packed[full:])))
  return [plan[k] for k in rng.permutation(len(plan))]


def _pack(questions: Sequence[int], size: np.ndarray,
          rows: int) -> list[list[int]]:
  """Packs questions by best fit in shards of `rows` windows, fullest first."""
  shards: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(rows + 1)]
  for q in questions:
    room = next((r for r in range(size[q], rows + 1) if with_room[r]), rows)
    if with_room[room]:
      shard = with_room[room].pop()
    else:
      shard = len(shards)
      shards.append([])
    shards[shard].append(q)
    with_room[room - size[q]].append(shard)
  return [shards[s] for same in with_room for s in same]


def eval_rows(batch_size: int, length: int, longest: int, multiple: int) -> int:
  """Returns the rows of an evaluation batch of bucket `length`.

  Every batch holds about `batch_size` x `longest` tokens, padding included.
  The rows are a multiple of `multiple`, the number of devices.
  """
  return -(-(batch_size * longest // length) // multiple) * multiple


def plan_eval(lengths: np.ndarray, *, batch_size: int, buckets: Sequence[int],
              multiple: int = 1) -> Plan:
  """Plans an evaluation: each window once, shortest first.

  A batch has `eval_rows` rows. As in `plan_epoch`, the remaining windows of a
  bucket move to the next longer one, so that only the last batch is padded.
  """
  most = -(-_enough_rows(len(lengths)) // multiple) * multiple
  rows_of = {length: min(most, eval_rows(
      batch_size, length, buckets[-1], multiple)) for length in buckets}
  return _fill(np.argsort(lengths, kind='stable'), lengths, rows_of)


def _enough_rows(windows: int) -> int:
  """Rounds up to a power of two, to limit the shapes of a service's batches."""
  return 1 << max(windows - 1, 0).bit_length()


def plan_packed(lengths: np.ndarray, *, batch_size: int, buckets: Sequence[int],
                multiple: int = 1) -> Plan:
  """Plans an evaluation with packed rows: each window once, in data order.

  Rows have the length of the longest bucket. A batch has `batch_size` windows,
  rounded up to a multiple of `multiple`, the number of its shards.
  """
  count = len(lengths)
  size = -(-min(batch_size, _enough_rows(count)) // multiple) * multiple
  chunks = (np.arange(a, min(a + size, count)) for a in range(0, count, size))
  return [(buckets[-1], deal_rows(_pad(chunk, size), lengths, multiple).ravel())
          for chunk in chunks]


# Rows and slots of batches of fixed rows are multiples of these, so that blocks
# of one data set have one shape. Few rows are not rounded.
FIXED_ROWS, FIXED_SLOTS = 8, 8


def plan_fixed_rows(
    lengths: np.ndarray, *, batch_size: int, buckets: Sequence[int],
    multiple: int = 1) -> list[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
  """Plans an evaluation with an equal number of packed rows in every batch.

  A plan entry is the row length, the windows [B] and the arrays of
  `packing.plan_rows`. A batch has `batch_size` windows on average, dealt to
  `multiple` shards; the rest of its B slots is empty (-1).
  """
  each = batch_size // multiple
  plan = row_plans.RowPlanner(
      lengths, np.arange(len(lengths)), None, batch_size=batch_size,
      shards=multiple, row_length=buckets[-1],
      multiple=FIXED_ROWS if each >= 8 * FIXED_ROWS else 1).plan(0, 0)
  empty = -plan.window.shape[-1] % FIXED_SLOTS

  def pad(values: np.ndarray, fill: int) -> np.ndarray:  # [S, W] → [B]
    return np.pad(values, ((0, 0), (0, empty)), constant_values=fill).ravel()

  entries = []
  for update, windows in enumerate(plan.window):
    places = plan.places(update)
    entries.append((buckets[-1], pad(windows, -1), {
        'first': pad(places['first'], 0), 'segment': pad(places['segment'], 0),
        'packed_row': places['packed_row']}))
  return entries


def deal_rows(rows: np.ndarray, lengths: np.ndarray, shards: int) -> np.ndarray:
  """Divides windows [B] into shards [S, B / S] of about equal token counts."""
  return rows[packing.deal_windows(
      np.where(rows >= 0, lengths[rows], 0), shards)]


def _pad(rows: np.ndarray, batch_size: int) -> np.ndarray:
  return np.concatenate([rows, np.full(batch_size - len(rows), -1)])
