"""Sequence packing: several windows in one row of the encoder.

Glossary of shapes: S shards, B windows over all of them, R rows of a shard,
P row length, L window length.

Krell et al. (2021): in rows of 384 tokens, windows of SQuAD's lengths leave 2 %
for padding instead of 55 %. Only the encoder sees packed rows. Its output is
unpacked to one window a row (models/qa.py), so heads, objectives and searches
do not depend on packing.

A shard is the part of a batch that one micro-step of one device sees. Only
windows of one shard are packed together, and dropout is keyed by packed row, so
losses with packing and dropout are reproducible only for a fixed number of
devices. Keys by window would need a seed for every token, and for every query
in each attention kernel.
"""

import heapq

import numpy as np


def fit_rows(lengths: np.ndarray,  # [B]
             row_length: int, *,
             extra: np.ndarray | None = None,  # [B]
             most_extra: int = 0,
             ) -> tuple[np.ndarray, np.ndarray]:  # [B], [B]
  """Assigns each window a packed row and its first position in that row.

  Best fit: the longest window goes first, into the row with the least room. If
  a window needs `extra` rows beside its own, the windows of one packed row need
  at most `most_extra` of them together.
  """
  row, first = np.zeros_like(lengths), np.zeros_like(lengths)
  with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # heaps
  rooms = 0  # bit r is set if a row has room for r more tokens
  needed: list[int] = []  # extra rows of each packed row
  extras = [0] * len(lengths) if extra is None else extra.tolist()
  order = np.argsort(-lengths, kind='stable')
  for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
    fits, room, r = rooms >> length, row_length, len(needed)
    if fits:
      room = length + (fits & -fits).bit_length() - 1
      r = with_room[room][0]
    if fits and needed[r] + extras[i] <= most_extra:
      heapq.heappop(with_room[room])
      if not with_room[room]:
        rooms ^= 1 << room
    else:
      room, r = row_length, len(needed)
      needed.append(0)
    needed[r] += extras[i]
    row[i], first[i] = r, row_length - room
    heapq.heappush(with_room[room - length], r)
    rooms |= 1 << (room - length)
  return row, first


def deal_windows(lengths: np.ndarray,  # [B]
                 shards: int) -> np.ndarray:  # [S, B / S]
  """Divides windows into shards with equal window counts.

  Longest windows go first, and the order of the shards is reversed after each
  pass, so that the token counts are about equal.
  """
  table = np.argsort(-lengths, kind='stable').reshape(-1, shards)
  table[1::2] = table[1::2, ::-1]
  return table.T


def plan_rows(lengths: np.ndarray,  # [B]; 0: no place
              shards: np.ndarray,  # [S, B / S]
              row_length: int) -> dict[str, np.ndarray]:
  """Plans the packed rows of a batch, whose windows are divided into shards.

  `shards` holds positions in the batch. Returns int32 arrays: 'first' [B] is
  the position of a window's first token in the R·P tokens of its shard,
  'segment' [B] is the window's number in its packed row, from 1, and
  'packed_row' [S, R] numbers the packed rows. R is rounded up to a multiple of
  a sixteenth of a shard's windows, so that batches have few shapes.
  """
  places = [fit_rows(lengths[windows], row_length) for windows in shards]
  multiple = -(-shards.shape[1] // 16)
  last = max(int(row.max()) for row, _ in places)
  rows = (last // multiple + 1) * multiple
  first, segment = (np.zeros(len(lengths), np.int32) for _ in range(2))
  for windows, (row, at) in zip(shards, places, strict=True):
    first[windows] = row * row_length + at
    segment[windows] = number_segments(row, at)
  return {'first': first, 'segment': segment,
          'packed_row': np.arange(len(shards) * rows, dtype=np.int32).reshape(
              len(shards), rows)}


def lay_out(batch: dict[str, np.ndarray], places: dict[str, np.ndarray],
            lengths: np.ndarray, shards: np.ndarray,
            row_length: int) -> dict[str, np.ndarray]:
  """Returns the batch with its tokens laid out in packed rows [S, R, P].

  `places` is the result of `plan_rows` for the last three arguments. token_ids
  and token_type_ids are replaced; segment_ids (0 is padding), position_ids,
  packed_row and first are added.
  """
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

  return {**batch, 'token_ids': place(batch['token_ids']),
          'token_type_ids': place(batch['token_type_ids']),
          'segment_ids': place(places['segment'][:, None]),
          'position_ids': place(column), 'packed_row': places['packed_row'],
          'first': places['first']}


def number_segments(row: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Numbers the windows of each packed row from 1, by first position."""
  order = np.lexsort((first, row))
  begin = np.searchsorted(row[order], row[order])
  out = np.empty_like(row)
  out[order] = np.arange(len(row)) - begin + 1
  return out
