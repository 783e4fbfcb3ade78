"""Windows → static-shape numpy batches: permutation, buckets, padding rows.

Glossary of shapes: N windows, B batch, L bucket length, Q questions.

A plan is a list of (L, indices [B]); index -1 is a padding row of weight 0. An
epoch's plan is a function of (seed, epoch) alone, so a position in the data is
two integers that a checkpoint can hold.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from qa_jax import errors
from qa_jax.data import packing
from qa_jax.data import windows as windows_lib

Plan = list[tuple[int, np.ndarray]]


def check_buckets(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
  """The bucket lengths, ascending, the last being `max_length`.

  Raises:
    UserError: a length that is not positive or exceeds `max_length`.
  """
  bad = [b for b in buckets if not 0 < b <= max_length]
  if bad:
    raise errors.UserError(
        f'data.buckets has {bad[0]}, outside 1 … data.max_length '
        f'{max_length}')
  return tuple(sorted({*buckets, max_length}))


def plan_epoch(lengths: np.ndarray, indices: np.ndarray, *, batch_size: int,
               buckets: Sequence[int], seed: int, epoch: int) -> Plan:
  """A training epoch: every one of `indices` once, in a seeded random order.

  Full batches are cut per bucket; what a bucket leaves over moves up to the
  next longer one, so all batches but one are full: ceil(N / B) in all.
  """
  rng = np.random.default_rng([seed, epoch])
  order = rng.permutation(indices)
  bucket_of = np.searchsorted(np.asarray(buckets), lengths[order])
  plan, left = [], order[:0]
  for b, length in enumerate(buckets):
    rows = np.concatenate([left, order[bucket_of == b]])
    full = len(rows) // batch_size * batch_size
    plan += [(length, chunk) for chunk in rows[:full].reshape(-1, batch_size)]
    left = rows[full:]
  if len(left):
    fit = buckets[np.searchsorted(np.asarray(buckets), lengths[left].max())]
    plan.append((fit, _pad(left, batch_size)))
  return [plan[k] for k in rng.permutation(len(plan))]


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


def plan_eval(lengths: np.ndarray, *, batch_size: int,
              buckets: Sequence[int]) -> Plan:
  """Every window once, shortest first, so that little is padding."""
  order = np.argsort(lengths, kind='stable')
  plan = []
  for begin in range(0, len(order), batch_size):
    chunk = order[begin:begin + batch_size]
    fit = np.searchsorted(np.asarray(buckets), lengths[chunk].max())
    plan.append((buckets[fit], _pad(chunk, batch_size)))
  return plan


def plan_packed(lengths: np.ndarray, *, batch_size: int, row_length: int,
                shards: int) -> Plan:
  """Every window once, in order, each batch dealt to its shards in turn."""
  plan = []
  for begin in range(0, len(lengths), batch_size):
    rows = np.arange(begin, min(begin + batch_size, len(lengths)))
    plan.append((row_length, _deal(_pad(rows, batch_size), lengths,
                                   shards).reshape(-1)))
  return plan


def _deal(rows: np.ndarray, lengths: np.ndarray,
          shards: int) -> np.ndarray:  # [B] → [S, B / S]
  return rows[packing.deal(np.where(rows >= 0, lengths[rows], 0), shards)]


def _pad(rows: np.ndarray, batch_size: int) -> np.ndarray:
  return np.concatenate([rows, np.full(batch_size - len(rows), -1)])


@dataclasses.dataclass
class TrainBatches:
  """An endless stream of training batches whose position can be restored.

  With `group_questions` all windows of a question stand in the rows that one
  micro-step of one device sees, 'group' is equal in them, and the weight of
  the question, 1, is on the first. Batches then depend on `devices` and
  `accumulation`.
  """

  windows: windows_lib.WindowSet
  indices: np.ndarray  # [N] windows to train on
  batch_size: int
  buckets: tuple[int, ...]
  seed: int
  group_questions: bool = False
  packing: bool = False  # rows of the longest bucket, see packing.py
  devices: int = 1
  accumulation: int = 1
  epoch: int = 0
  index: int = 0

  def __post_init__(self):
    if not len(self.indices):
      raise errors.UserError(
          'no window to train on: no example has an answer that was found')
    if self.group_questions:
      self._check_groups()
    self._lengths = self.windows.total_lengths
    self._plan = self._make_plan()

  def _check_groups(self) -> None:
    shards = self.devices * self.accumulation
    count = np.bincount(self.windows.example_of[self.indices])
    most = int(count.argmax())
    if count[most] > self.batch_size // shards:
      raise errors.UserError(
          f'question {self.windows.examples[most].id!r} has {count[most]} '
          f'windows, but train.batch_size {self.batch_size} over '
          f'{self.devices} devices x {self.accumulation} accumulation steps '
          f'leaves {self.batch_size // shards} rows to keep them in; raise it '
          f'to {count[most] * shards} or use fewer devices or steps')

  def _make_plan(self) -> Plan:
    common = dict(
        batch_size=self.batch_size, seed=self.seed, epoch=self.epoch,
        buckets=self.buckets[-1:] if self.packing else self.buckets)
    shards = self.devices * self.accumulation
    if self.group_questions:
      plan = plan_grouped(self._lengths, self.indices, self.windows.example_of,
                          shards=shards, **common)
      return [(length, self._spread(rows.reshape(shards, -1)))
              for length, rows in plan]
    plan = plan_epoch(self._lengths, self.indices, **common)
    if self.packing:
      plan = [(length, self._spread(_deal(rows, self._lengths, shards)))
              for length, rows in plan]
    return plan

  def _spread(self, shards: np.ndarray) -> np.ndarray:  # [S, B / S] → [B]
    """Row r of a device goes to its micro-step r mod `accumulation`."""
    return shards.reshape(self.devices, self.accumulation, -1).swapaxes(
        1, 2).reshape(-1)

  @property
  def steps_per_epoch(self) -> int:
    return len(self._plan)

  @property
  def position(self) -> dict[str, int]:
    return {'epoch': self.epoch, 'index': self.index}

  def seek(self, position: dict[str, int]) -> None:
    """Goes to a `position`; the next batch is the one that came after it."""
    self.index = position['index']
    if position['epoch'] != self.epoch:
      self.epoch = position['epoch']
      self._plan = self._make_plan()

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self.index == len(self._plan):
      self.seek({'epoch': self.epoch + 1, 'index': 0})
    length, rows = self._plan[self.index]
    self.index += 1
    batch = self.windows.gather(rows, length)
    batch['row'] = np.arange(self.batch_size, dtype=np.int32)  # keys dropout
    if self.group_questions:
      # A padding row is a question of its own.
      question = np.where(
          rows >= 0, self.windows.example_of[rows], -1 - batch['row'])
      _, first, inverse = np.unique(
          question, return_index=True, return_inverse=True)
      batch['group'] = first[inverse].astype(np.int32)
      batch['weight'] *= batch['group'] == batch['row']
    if self.packing:
      shards = batch['row'].reshape(self.devices, -1, self.accumulation)
      batch = packing.pack(
          batch, shards.swapaxes(1, 2).reshape(
              self.devices * self.accumulation, -1), length,
          real=rows >= 0)
    return batch
