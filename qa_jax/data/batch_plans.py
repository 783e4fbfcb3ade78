"""Which windows stand in which batch: permutation, buckets, padding rows.

Glossary of shapes: N windows, B batch, L bucket length, Q questions, S shards.

A plan is a list of (L, indices [B]); index -1 is a padding row of weight 0. An
epoch's plan is a function of (seed, epoch) alone, so a position in the data is
two integers that a checkpoint can hold.
"""

from collections.abc import Sequence

import numpy as np

from qa_jax.data import packing

Plan = list[tuple[int, np.ndarray]]


def plan_epoch(lengths: np.ndarray, indices: np.ndarray, *, batch_size: int,
               buckets: Sequence[int], seed: int, epoch: int) -> Plan:
  """A training epoch: every one of `indices` once, in a seeded random order.

  Full batches are cut per bucket; what a bucket leaves over moves up to the
  next longer one, so all batches but one are full: ceil(N / B) in all.
  """
  rng = np.random.default_rng([seed, epoch])
  plan = _fill(rng.permutation(indices), lengths,
               dict.fromkeys(buckets, batch_size))
  return [plan[k] for k in rng.permutation(len(plan))]


def _fill(order: np.ndarray, lengths: np.ndarray,
          rows_of: dict[int, int]) -> Plan:
  """Windows in this order → full batches of each bucket, the last one padded.

  `rows_of` gives the rows of a batch of each bucket, the shortest first.
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
  """As `plan_epoch`, but all windows of a question stand in one shard.

  A batch is `shards` runs of B / shards rows, each padded by itself. The seed
  draws the order of the questions, an epoch exchanges those that are alike in
  bucket and number of windows: so all epochs have as many batches.
  """
  rows = batch_size // shards
  indices = indices[np.argsort(question_of[indices], kind='stable')]
  _, first, size = np.unique(
      question_of[indices], return_index=True, return_counts=True)  # [Q]
  bucket_of = np.searchsorted(
      np.asarray(buckets), np.maximum.reduceat(lengths[indices], first))
  order = np.random.default_rng(seed).permutation(len(first))
  rng = np.random.default_rng([seed, epoch])
  kind = bucket_of * (rows + 1) + size
  for k in np.unique(kind):
    alike = np.flatnonzero(kind[order] == k)
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
  """Questions → shards of at most `rows` windows, the fullest first.

  Best fit: each question goes where it leaves the least room.
  """
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
  """Rows of an evaluation batch, so that all batches hold as many tokens.

  About `batch_size` x `longest` of them, padding included, rounded up to a
  `multiple` of rows: the number of devices.
  """
  return -(-(batch_size * longest // length) // multiple) * multiple


def plan_eval(lengths: np.ndarray, *, batch_size: int, buckets: Sequence[int],
              multiple: int = 1) -> Plan:
  """Every window once, shortest first, in batches of `eval_rows` rows.

  As in `plan_epoch`, what a bucket leaves over moves up, so that all batches
  but the last are full.
  """
  few = -(-_few(len(lengths)) // multiple) * multiple
  rows_of = {length: min(few, eval_rows(
      batch_size, length, buckets[-1], multiple)) for length in buckets}
  return _fill(np.argsort(lengths, kind='stable'), lengths, rows_of)


def _few(windows: int) -> int:
  """Rows that are enough, a power of two: few questions at a time, whatever
  their number, compile few programs."""
  return 1 << max(windows - 1, 0).bit_length()


def plan_packed(lengths: np.ndarray, *, batch_size: int, buckets: Sequence[int],
                multiple: int = 1) -> Plan:
  """Every window once, in order, each batch dealt to `multiple` shards.

  Rows are of the longest bucket; a batch has `batch_size` windows, rounded up.
  """
  size = -(-min(batch_size, _few(len(lengths))) // multiple) * multiple
  plan = []
  for begin in range(0, len(lengths), size):
    rows = np.arange(begin, min(begin + size, len(lengths)))
    plan.append((buckets[-1], deal_rows(_pad(rows, size), lengths,
                                        multiple).reshape(-1)))
  return plan


def deal_rows(rows: np.ndarray, lengths: np.ndarray,
              shards: int) -> np.ndarray:  # [B] → [S, B / S]
  """The windows `rows` as shards of about as many tokens."""
  return rows[packing.deal_windows(np.where(rows >= 0, lengths[rows], 0),
                                   shards)]


def _pad(rows: np.ndarray, batch_size: int) -> np.ndarray:
  return np.concatenate([rows, np.full(batch_size - len(rows), -1)])
