"""Plans of training epochs whose updates have a fixed number of packed rows.

Every update then has one shape, so that the train step is compiled once, and
few tokens are padding: an update takes as many windows as its rows hold.

Glossary of shapes: N windows, Q questions, K blocks, S shards of an update,
U updates, P row length, W window slots of a shard.

A question stands for a single window where questions may be divided. Its
windows fill packed rows of their own, except that it shares the emptiest one
with other questions. The questions that share a row, with all their rows, are a
block. Blocks are dealt to the shards. All of this depends on the lengths alone.
An epoch permutes questions of equal lengths, blocks of equal sizes, and shards.
The numbers of updates, rows and slots are therefore those of every epoch and
seed.
"""

import dataclasses
import functools

import numpy as np

from qa_jax.data import packing


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """The windows of an epoch and their places in the packed rows."""

  window: np.ndarray  # [U, S, W] window indices; -1 is an empty slot
  row: np.ndarray  # [U, S, W] packed row in its shard, from 0
  first: np.ndarray  # [U, S, W] position of the first token in its packed row
  rows: int  # packed rows of a shard
  row_length: int  # P, in tokens

  def places(self, update: int) -> dict[str, np.ndarray]:
    """Returns the arrays of `packing.plan_rows` for the windows of an update.

    'first' and 'segment' are [S, W].
    """
    row, first = self.row[update], self.first[update]
    numbers = np.arange(len(row) * self.rows, dtype=np.int32)
    numbers = numbers.reshape(len(row), -1)
    real, segment = self.window[update] >= 0, np.zeros_like(row)
    segment[real] = packing.number_segments(
        (numbers[:, :1] + row)[real], first[real])
    return {'first': row * self.row_length + first, 'segment': segment,
            'packed_row': numbers}


@dataclasses.dataclass(frozen=True)
class _Template:
  """The places of an epoch, before windows are put into them."""

  block: np.ndarray  # [N] block of a place; places are in the order of kinds
  row: np.ndarray  # [N] packed row in its block, from 0
  first: np.ndarray  # [N]
  block_kind: np.ndarray  # [K] ascending; equal blocks have equal kinds
  shard: np.ndarray  # [K] shard of the epoch
  base: np.ndarray  # [K] first packed row of a block in its shard
  shards: int  # of the epoch
  slots: int  # W


class RowPlanner:
  """Plans epochs of `indices`, whose windows have `lengths` [all windows].

  `question_of` maps windows to questions whose windows must be in one shard; it
  is None if there is no such rule. A shard has as many packed rows as hold
  batch_size / `shards` windows on average, in whole multiples of `multiple`.
  """

  def __init__(self, lengths: np.ndarray, indices: np.ndarray,
               question_of: np.ndarray | None, *, batch_size: int,
               shards: int, row_length: int, multiple: int = 1):
    self._shards, self._row_length = shards, row_length
    question = indices if question_of is None else question_of[indices]
    # Windows in the order of their questions, longest first.
    order = np.lexsort((-lengths[indices], question))
    self._windows, self._lengths = indices[order], lengths[indices[order]]
    self._begin, self._count = np.unique(
        question[order], return_index=True, return_counts=True)[1:]  # [Q]
    row, _ = packing.fit_rows(self._lengths, row_length)
    self.rows = multiple * max(1, round(
        batch_size / shards * (int(row.max()) + 1) / len(indices) / multiple))
    # Row 0 of a question is the one that it shares.
    self._row, self._first = np.zeros_like(order), np.zeros_like(order)  # [N]
    self._size = np.ones_like(self._begin)  # [Q] packed rows
    for q in np.flatnonzero(self._count > 1):
      mine = slice(self._begin[q], self._begin[q] + self._count[q])
      row, self._first[mine] = packing.fit_rows(
          self._lengths[mine], row_length)
      filled = np.bincount(row, weights=self._lengths[mine])
      self._row[mine] = np.argsort(np.argsort(filled, kind='stable'))[row]
      self._size[q] = len(filled)

  @property
  def largest(self) -> tuple[int, int]:
    """Returns a window of the question with most packed rows, and their number.

    They must not exceed `rows`.
    """
    q = int(self._size.argmax())
    return int(self._windows[self._begin[q]]), int(self._size[q])

  @property
  def updates(self) -> int:
    """Returns the number of updates of an epoch."""
    return self._template.shards // self._shards

  @property
  def slots(self) -> int:
    """Returns the number of window slots of an update."""
    return self._template.slots * self._shards

  def plan(self, seed: int, epoch: int) -> RowPlan:
    """Plans an epoch, in which each window of `indices` is once."""
    rng, to = np.random.default_rng([seed, epoch]), self._template
    questions = _shuffle_equal(rng, self._kind)
    window = self._windows[self._flatten(questions)]  # [N]
    # Equal blocks change places.
    place = np.empty_like(to.shard)
    place[_shuffle_equal(rng, to.block_kind)] = np.arange(len(place))
    shard = rng.permutation(to.shards)[to.shard[place]][to.block]
    row = to.base[place][to.block] + to.row
    order = np.lexsort((to.first, row, shard))
    slot = np.arange(len(order)) - np.searchsorted(
        shard[order], shard[order])
    shape = self.updates, self._shards, to.slots

    def lay(values: np.ndarray, empty: int) -> np.ndarray:
      out = np.full((to.shards, to.slots), empty, np.int32)
      out[shard[order], slot] = values[order]
      return out.reshape(shape)

    return RowPlan(lay(window, -1), lay(row, 0), lay(to.first, 0), self.rows,
                   self._row_length)

  @functools.cached_property
  def _kind(self) -> np.ndarray:  # [Q]
    """Numbers the lists of lengths of questions: longest shared rows first."""
    lists = [self._lengths[a:a + n] for a, n in zip(
        self._begin, self._count, strict=True)]
    shared = np.bincount(
        np.repeat(np.arange(len(lists)), self._count),
        weights=np.where(self._row == 0, self._lengths, 0)).astype(int)
    keys = [(-fill, -size, lengths.tobytes()) for fill, size, lengths in zip(
        shared.tolist(), self._size.tolist(), lists, strict=True)]
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.array([number[key] for key in keys])

  @functools.cached_property
  def _template(self) -> _Template:
    questions = np.argsort(self._kind, kind='stable')  # [Q]
    flat, count = self._flatten(questions), self._count[questions]
    place = np.repeat(np.arange(len(questions)), count)  # [N] → [Q]
    row, first, length = self._row[flat], self._first[flat], self._lengths[flat]
    fill = np.bincount(
        place, weights=np.where(row == 0, length, 0)).astype(int)
    more = self._size[questions] - 1  # rows that are not shared
    block, at = packing.fit_rows(
        fill, self._row_length, extra=more, most_extra=self.rows - 1)
    windows = np.bincount(block, weights=count).astype(int)  # [K]
    size = 1 + np.bincount(block, weights=more).astype(int)  # [K]
    # Rows of one question follow those of the questions before it in the block.
    order = np.argsort(block, kind='stable')
    before = np.empty_like(more)
    total = np.cumsum(more[order]) - more[order]
    before[order] = total - total[np.searchsorted(block[order], block[order])]
    # Blocks are numbered anew: most packed rows first, then most windows.
    by_size = np.lexsort((-windows, -size))
    new = np.empty_like(by_size)
    new[by_size] = np.arange(len(by_size))
    size, windows = size[by_size], windows[by_size]
    kind = np.unique(np.stack([-size, -windows]), axis=1, return_inverse=True)
    shard, base, shards, slots = deal_blocks(
        size, windows, self.rows, self._shards)
    return _Template(
        block=new[block][place],
        row=np.where(row > 0, before[place] + row, 0),
        first=np.where(row > 0, first, at[place] + first),
        block_kind=kind[1].reshape(-1), shard=shard, base=base, shards=shards,
        slots=slots)

  def _flatten(self, questions: np.ndarray) -> np.ndarray:  # [Q] → [N]
    """Returns the positions of the windows of questions, one after another."""
    count = self._count[questions]
    skipped = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(
        self._begin[questions] - skipped, count)


def deal_blocks(size: np.ndarray,  # [K] packed rows; descending
                windows: np.ndarray,  # [K]
                rows: int, multiple: int,
                ) -> tuple[np.ndarray, np.ndarray, int, int]:
  """Deals blocks to shards of `rows` packed rows, about equally many windows.

  Returns the shard and the first packed row of each block [K], the number of
  shards, which is a multiple of `multiple`, and the most windows of a shard.
  Blocks of several packed rows go where they fit best. The rest is dealt in
  passes: the next block goes to the shard that has the fewest windows.
  """
  several = int((size > 1).sum())
  shard, base = np.zeros_like(size), np.zeros_like(size)
  shard[:several], base[:several] = packing.fit_rows(size[:several], rows)
  needed = max(-(-int(size.sum()) // rows),
               int(shard[:several].max(initial=-1)) + 1)
  shards = -(-needed // multiple) * multiple
  full, load = (np.bincount(
      shard[:several], weights=x[:several], minlength=shards).astype(int)
                for x in (size, windows))
  at = several
  while at < len(size):
    open_ = np.flatnonzero(full < rows)
    chosen = open_[np.argsort(load[open_], kind='stable')][:len(size) - at]
    here = slice(at, at + len(chosen))
    shard[here], base[here] = chosen, full[chosen]
    full[chosen] += 1
    load[chosen] += windows[here]
    at += len(chosen)
  return shard, base, shards, int(load.max())


def _shuffle_equal(rng: np.random.Generator, kind: np.ndarray) -> np.ndarray:
  """Returns positions in ascending order of kind, equal kinds shuffled."""
  order = rng.permutation(len(kind))
  return order[np.argsort(kind[order], kind='stable')]
