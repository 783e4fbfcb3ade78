"""Training batches of static shape, from a position that can be restored.

Glossary of shapes: N windows, B batch (window slots of an update), S shards.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from qa_jax import errors
from qa_jax.data import batch_plans
from qa_jax.data import packing as packing_lib
from qa_jax.data import row_plans
from qa_jax.data import windows as windows_lib


def check_buckets(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
  """Returns the bucket lengths in ascending order, the last `max_length`.

  Lengths above `max_length` are left out, so that it can be lowered alone.

  Raises:
    UserError: a length is not positive.
  """
  shortest = min(buckets, default=max_length)
  errors.require(shortest > 0, f'data.buckets has {shortest}, expected lengths '
                 'of at least 1')
  return tuple(sorted({*(b for b in buckets if b < max_length), max_length}))


@dataclasses.dataclass
class TrainBatches:
  """An endless stream of training batches whose position can be restored.

  With `group_questions`, all windows of a question are in one shard: the rows
  that one micro-step of one device sees. They share a value of 'group', and
  only the first of them has weight 1, the others 0. Batches then depend on
  `devices` and `accumulation`.

  With `packing`, windows share rows of the longest bucket; see packing.py. If
  it is True, a batch has `batch_size` windows, in a number of rows that varies.
  If it is 'rows', the number of rows is fixed, and `batch_size` windows are the
  mean; see row_plans.py.
  """

  windows: windows_lib.WindowSet
  indices: np.ndarray  # [N] windows to train on
  batch_size: int
  buckets: tuple[int, ...]
  seed: int
  group_questions: bool = False
  packing: bool | str = False
  devices: int = 1
  accumulation: int = 1
  epoch: int = 0
  index: int = 0

  def __post_init__(self):
    if not len(self.indices):
      raise errors.UserError(
          'no window to train on: no example has an answer that was found')
    self._lengths = self.windows.total_lengths
    self._planner = self._make_planner() if self.packing == 'rows' else None
    self._slots = (self._planner.slots if self._planner else  # B
                   self.batch_size)
    self._plan = self._make_plan()

  def _make_planner(self) -> row_plans.RowPlanner:
    shards = self.devices * self.accumulation
    planner = row_plans.RowPlanner(
        self._lengths, self.indices,
        self.windows.example_of if self.group_questions else None,
        batch_size=self.batch_size, shards=shards, row_length=self.buckets[-1])
    window, needed = planner.largest
    if needed > planner.rows:
      question = self.windows.examples[self.windows.example_of[window]].id
      least = -(-self.batch_size * needed // planner.rows)
      raise errors.UserError(
          f'question {question!r} needs {needed} packed rows, but '
          f'train.batch_size {self.batch_size} over {self.devices} devices x '
          f'{self.accumulation} accumulation steps leaves {planner.rows} to '
          f'keep its windows in; raise it to about '
          f'{-(-least // shards) * shards} or use fewer devices or steps')
    return planner

  def _make_plan(self) -> batch_plans.Plan:
    if self._planner:
      self._row_plan = self._planner.plan(self.seed, self.epoch)
      return [(self.buckets[-1], self._interleave(windows))
              for windows in self._row_plan.window]
    common = dict(
        batch_size=self.batch_size, seed=self.seed, epoch=self.epoch,
        buckets=self.buckets[-1:] if self.packing else self.buckets)
    shards = self.devices * self.accumulation
    if self.group_questions:
      count = np.bincount(self.windows.example_of[self.indices])
      most = int(count.argmax())
      if count[most] > self.batch_size // shards:
        raise errors.UserError(
            f'question {self.windows.examples[most].id!r} has {count[most]} '
            f'windows, but train.batch_size {self.batch_size} over '
            f'{self.devices} devices x {self.accumulation} accumulation steps '
            f'leaves {self.batch_size // shards} rows to keep them in; raise '
            f'it to {count[most] * shards} or use fewer devices or steps')
      plan = batch_plans.plan_grouped(
          self._lengths, self.indices, self.windows.example_of, shards=shards,
          **common)
      return [(length, self._interleave(rows.reshape(shards, -1)))
              for length, rows in plan]
    plan = batch_plans.plan_epoch(self._lengths, self.indices, **common)
    if self.packing:
      plan = [(length, self._interleave(
          batch_plans.deal_rows(rows, self._lengths, shards)))
              for length, rows in plan]
    return plan

  def _interleave(self, shards: np.ndarray) -> np.ndarray:  # [S, B / S] → [B]
    # Row r of a device belongs to its micro-step r mod `accumulation`.
    return shards.reshape(self.devices, self.accumulation, -1).swapaxes(
        1, 2).reshape(-1)

  @property
  def steps_per_epoch(self) -> int:
    return len(self._plan)

  @property
  def one_shape(self) -> bool:
    """Returns whether all batches of all epochs have one shape."""
    if self.packing:
      return self.packing == 'rows'
    return len(self.buckets) == 1

  def describe(self) -> str:
    """Returns the windows of an update and their layout, for the user."""
    rows = self.buckets[-1]
    if not self._planner:
      return f'{self.batch_size} windows, ' + (
          f'packed in rows of {rows}' if self.packing else
          f'padded to {", ".join(map(str, self.buckets))}')
    count = self._planner.rows * self.devices * self.accumulation
    return (f'{self._mean_windows:.1f} windows on average, packed in {count} '
            f'rows of {rows}')

  def rounding_note(self) -> str:
    """Returns a line if the mean of an update is far from `batch_size`.

    It is '' up to 10 %.
    """
    mean = self._mean_windows
    if not self._planner or abs(mean - self.batch_size) <= self.batch_size / 10:
      return ''
    return (f'train.batch_size={self.batch_size}, but an update has '
            f'{mean:.1f} windows on average: with data.packing=rows each of '
            f'{self.devices * self.accumulation} shards has whole rows')

  @property
  def _mean_windows(self) -> float:
    return len(self.indices) / len(self._plan)

  @property
  def depends_on_devices(self) -> bool:
    """Returns whether the windows of an update depend on the devices."""
    return bool(self._planner) or self.group_questions

  @property
  def mean_length(self) -> float:
    """Returns the mean row length in tokens over the batches of this epoch."""
    return float(np.mean([length for length, _ in self._plan]))

  @property
  def position(self) -> dict[str, int]:
    return {'epoch': self.epoch, 'index': self.index}

  def seek(self, position: dict[str, int]) -> None:
    """Moves the stream to `position`, so that its next batch follows it."""
    self.index = position['index']
    if position['epoch'] != self.epoch:
      self.epoch = position['epoch']
      self._plan = self._make_plan()

  def skip(self, batches: int) -> None:
    """Moves the stream forward by a number of batches."""
    while batches:
      self._start_epoch_if_done()
      step = min(batches, len(self._plan) - self.index)
      self.index += step
      batches -= step

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return self.gather(*self.next_rows())

  def next_rows(self) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the length and the rows of the next batch.

    The rows are int32 arrays [B]: 'window' (-1 is padding), 'row' and, with
    `group_questions`, 'group'; with `packing` also those of `plan_rows`.
    """
    self._start_epoch_if_done()
    self.index += 1
    return self._rows(self.index - 1)

  def gather(self, length: int,
             rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the batch of rows of `next_rows`, of all or some devices."""
    batch = self.windows.gather(rows['window'], length)
    batch['row'] = rows['row']
    if self.group_questions:
      batch['group'] = rows['group']
      batch['weight'] *= batch['group'] == batch['row']
    if self.packing:
      batch = packing_lib.lay_out(
          batch, rows, self._tokens(rows['window']),
          self._shards(len(rows['window'])), length)
    return batch

  def lengths_of(self, windows: np.ndarray) -> np.ndarray:
    """Returns the token counts of the windows of a batch, without padding."""
    return self._lengths[windows[windows >= 0]]

  def shapes(self, steps: int) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Returns one batch of each shape among the next `steps` of this epoch.

    A batch is a pair as `next_rows` returns it.
    """
    self._start_epoch_if_done()
    first_of = {}
    left = range(self.index, min(self.index + steps, len(self._plan)))
    for index in left[:1] if self._planner else left:
      length = self._plan[index][0]
      if self.packing or length not in first_of:
        rows = self._rows(index)[1]
        first_of.setdefault(_shape(length, rows), (length, rows))
    return [*first_of.values()]

  def count_alike(self, most: int) -> int:
    """Returns the number of next batches of this epoch that have one shape.

    It is at least one, and `most` at most.
    """
    self._start_epoch_if_done()
    last = min(self.index + most, len(self._plan))
    if self.one_shape or last - self.index == 1:
      return last - self.index
    shape = self._shape_at(self.index)
    return next((i - self.index for i in range(self.index + 1, last)
                 if self._shape_at(i) != shape), last - self.index)

  def next_alike(self, most: int) -> tuple[int, list[dict[str, np.ndarray]]]:
    """Returns the length and the rows of the next batches of one shape.

    They are `next_rows` of this epoch, one at least and `most` at most.
    """
    batches = [self.next_rows() for _ in range(self.count_alike(most))]
    return batches[0][0], [rows for _, rows in batches]

  def _shape_at(self, index: int) -> tuple[int, ...]:
    length, _ = self._plan[index]
    return _shape(length, self._rows(index)[1] if self.packing else {})

  def _rows(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
    length, windows = self._plan[index]
    rows = {'window': windows.astype(np.int32),
            'row': np.arange(self._slots, dtype=np.int32)}  # dropout key
    if self.group_questions:
      # Each padding row counts as a separate question.
      question = np.where(
          windows >= 0, self.windows.example_of[windows], -1 - rows['row'])
      _, first, inverse = np.unique(
          question, return_index=True, return_inverse=True)
      rows['group'] = first[inverse].astype(np.int32)
    if self._planner:
      rows |= self._fixed_places(index)
    elif self.packing:
      rows |= packing_lib.plan_rows(
          self._tokens(windows), self._shards(self._slots), length)
    return length, rows

  def _fixed_places(self, index: int) -> dict[str, np.ndarray]:
    """Returns the arrays of `plan_rows` from the row plan of the epoch."""
    places = self._row_plan.places(index)
    return {**places, 'first': self._interleave(places['first']),
            'segment': self._interleave(places['segment'])}

  def _tokens(self, windows: np.ndarray) -> np.ndarray:  # [B] → [B]
    return np.where(windows >= 0, self._lengths[windows], 0)

  def _shards(self, count: int) -> np.ndarray:  # [S, B / S]
    """Returns the shards of all `count` rows of one or more devices."""
    each = self._slots // self.devices // self.accumulation
    rows = np.arange(count).reshape(-1, each, self.accumulation)
    return rows.swapaxes(1, 2).reshape(-1, each)

  def _start_epoch_if_done(self) -> None:
    if self.index == len(self._plan):
      self.seek({'epoch': self.epoch + 1, 'index': 0})


def _shape(length: int, rows: dict[str, np.ndarray]) -> tuple[int, ...]:
  return length, *(rows['packed_row'].shape if 'packed_row' in rows else ())
