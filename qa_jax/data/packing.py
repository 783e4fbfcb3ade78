"""Sequence packing: several windows in one row of the encoder.

Glossary of shapes: S shards, B windows over all of them, R rows of a shard,
P row length, L window length.

Krell et al. (2021): in rows of 384 tokens, windows of SQuAD's lengths leave 2 %
for padding instead of 55 %. Only the encoder sees rows. What it returns is laid
out again as one window a row (models/qa.py), so heads, objectives and searches
know nothing of it.

A shard is what one micro-step of one device sees; its windows are packed among
themselves. So rows depend on the number of devices, and dropout is keyed by
row: with both, losses are equal on one number of devices alone. To key it by
window would take a seed for every token, and for every query in each kernel of
attention.
"""

import numpy as np


def fit_rows(lengths: np.ndarray,  # [B]
             row_length: int) -> tuple[np.ndarray, np.ndarray]:  # [B], [B]
  """(row, first position in it) of each window: best fit, longest first."""
  row, first = np.zeros_like(lengths), np.zeros_like(lengths)
  room: list[int] = []
  for i in np.argsort(-lengths, kind='stable'):
    fits = [r for r, free in enumerate(room) if free >= lengths[i]]
    if fits:
      best = min(fits, key=lambda r: room[r])
    else:
      best = len(room)
      room.append(row_length)
    row[i], first[i] = best, row_length - room[best]
    room[best] -= lengths[i]
  return row, first


def deal_windows(lengths: np.ndarray,  # [B]
                 shards: int) -> np.ndarray:  # [S, B / S]
  """Windows → shards of as many windows and about as many tokens.

  Longest first, forth and back over the shards.
  """
  table = np.argsort(-lengths, kind='stable').reshape(-1, shards)
  table[1::2] = table[1::2, ::-1]
  return table.T


def plan_rows(lengths: np.ndarray,  # [B]; 0: no place
              shards: np.ndarray,  # [S, B / S]
              row_length: int) -> dict[str, np.ndarray]:
  """Where windows stand that are packed by shards of places in the batch.

  first [B] is where in its shard's R·P tokens a window begins, segment [B] its
  number in the row, from 1; packed_row [S, R] numbers the rows. R is rounded up
  to a sixteenth of a shard's windows, so that batches of a data set have few
  shapes.
  """
  places = [fit_rows(lengths[windows], row_length) for windows in shards]
  rows = max(int(row.max()) + 1 for row, _ in places)
  multiple = -(-shards.shape[1] // 16)
  rows = -(-rows // multiple) * multiple
  first, segment = (np.zeros(len(lengths), np.int32) for _ in range(2))
  for windows, (row, at) in zip(shards, places, strict=True):
    first[windows] = row * row_length + at
    segment[windows] = _ordinal(row, at)
  return {'first': first, 'segment': segment,
          'packed_row': np.arange(len(shards) * rows, dtype=np.int32).reshape(
              len(shards), rows)}


def pack_batch(batch: dict[str, np.ndarray], shards: np.ndarray,  # [S, B / S]
               row_length: int, *, real: np.ndarray,  # [B] bool
         ) -> dict[str, np.ndarray]:
  """A batch of windows, as WindowSet.gather makes it, with its rows packed.

  `shards` names the windows, by place in the batch, that are packed together.
  What is not `real` gets no place.
  """
  lengths = batch['attention_mask'].sum(axis=1) * real
  return lay_out(batch, plan_rows(lengths, shards, row_length), lengths, shards,
                 row_length)


def lay_out(batch: dict[str, np.ndarray], places: dict[str, np.ndarray],
            lengths: np.ndarray,  # [B], as `places` were planned for
            shards: np.ndarray,  # [S, B / S]
            row_length: int) -> dict[str, np.ndarray]:
  """Replaces token_ids and token_type_ids by [S, R, P] and adds segment_ids
  (0 is padding), position_ids, packed_row and first."""
  shape = *places['packed_row'].shape, row_length
  start = places['first'].astype(np.int64)  # in the S·R·P tokens
  start[shards] += (np.arange(shape[0]) * shape[1] * row_length)[:, None]
  column = np.arange(batch['token_ids'].shape[1])[None, :]  # [1, L]
  real = column < lengths[:, None]  # [B, L]
  target = (start[:, None] + column)[real]

  def place(values: np.ndarray) -> np.ndarray:
    out = np.zeros(shape, np.int32)
    out.reshape(-1)[target] = np.broadcast_to(values, real.shape)[real]
    return out

  return {
      **batch,
      'token_ids': place(batch['token_ids']),
      'token_type_ids': place(batch['token_type_ids']),
      'segment_ids': place(places['segment'][:, None]),
      'position_ids': place(column),
      'packed_row': places['packed_row'],
      'first': places['first'],
  }


def _ordinal(row: np.ndarray, first: np.ndarray) -> np.ndarray:
  """1 for the first window of its row, 2 for the second, …"""
  order = np.lexsort((first, row))
  begin = np.searchsorted(row[order], row[order])
  out = np.empty_like(row)
  out[order] = np.arange(len(row)) - begin + 1
  return out
