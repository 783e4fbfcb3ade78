"""Windows → static-shape numpy batches: permutation, buckets, padding rows.

Glossary of shapes: N windows, B batch, L bucket length.

A plan is a list of (L, indices [B]); index -1 is a padding row of weight 0. An
epoch's plan is a function of (seed, epoch) alone, so a position in the data is
two integers that a checkpoint can hold.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from qa_jax import errors
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


def _pad(rows: np.ndarray, batch_size: int) -> np.ndarray:
  return np.concatenate([rows, np.full(batch_size - len(rows), -1)])


@dataclasses.dataclass
class TrainBatches:
  """An endless stream of training batches whose position can be restored."""

  windows: windows_lib.WindowSet
  indices: np.ndarray  # [N] windows to train on
  batch_size: int
  buckets: tuple[int, ...]
  seed: int
  epoch: int = 0
  index: int = 0

  def __post_init__(self):
    if not len(self.indices):
      raise errors.UserError(
          'no window to train on: no example has an answer that was found')
    self._lengths = self.windows.total_lengths
    self._plan = self._make_plan()

  def _make_plan(self) -> Plan:
    return plan_epoch(
        self._lengths, self.indices, batch_size=self.batch_size,
        buckets=self.buckets, seed=self.seed, epoch=self.epoch)

  @property
  def steps_per_epoch(self) -> int:
    return -(-len(self.indices) // self.batch_size)

  @property
  def position(self) -> dict[str, int]:
    return {'epoch': self.epoch, 'index': self.index}

  def seek(self, position: dict[str, int]) -> None:
    """Goes to a `position`; the next batch is the one that came after it."""
    self.epoch, self.index = position['epoch'], position['index']
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
    return batch
