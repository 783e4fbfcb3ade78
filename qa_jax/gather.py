"""Batches gathered on the device, inside the step, from tokens that stay there.

Glossary of shapes: N windows, T tokens, G gold spans of a window, B batch, L
window length; if packed: S shards, R rows of a shard, P = L row length, A
micro-steps.

The same arrays as data/windows.py and data/packing.py make on the host: no
value is computed, only moved. What crosses to the device is numbers of windows.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

MAX_TOKENS = 2**31 - 1  # positions in the store are int32


@flax.struct.dataclass
class TokenStore:
  """All windows of a data set."""

  contexts: jax.Array  # [T] uint16 or int32, T at least 1
  questions: jax.Array  # [T]
  context_first: jax.Array  # [N] int32, in `contexts`
  context_length: jax.Array  # [N] int32
  question_first: jax.Array  # [N] int32, in `questions`
  question_length: jax.Array  # [N] int32
  owned: jax.Array  # [N, 2] int32: context tokens that may start an answer
  gold_spans: jax.Array  # [N, G, 2] int32
  pad_id: int = flax.struct.field(pytree_node=False)
  cls_id: int = flax.struct.field(pytree_node=False)
  sep_id: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Rows:
  """A batch by the numbers of its windows."""

  # int32 [B] window (-1: padding) and row, perhaps group; if packed also first
  # and segment [B], packed_row [S, R]. See TrainBatches.next_rows.
  arrays: dict[str, jax.Array]
  length: int = flax.struct.field(pytree_node=False)  # L


def inside(step: Callable[..., Any], accumulation: int) -> Callable[..., Any]:
  """A step whose batch is a pair (Rows, TokenStore)."""
  def on_device(state, batch, axis_name=None):
    rows, store = batch
    return step(state, gather(store, rows, accumulation=accumulation),
                axis_name)
  return on_device


def gather(store: TokenStore, rows: Rows, *,
           accumulation: int) -> dict[str, jax.Array]:
  """The batch that `rows` number, or a device's part of it."""
  arrays, length = rows.arrays, rows.length
  batch = _windows(store, arrays['window'], length)
  batch['row'] = arrays['row']
  if 'group' in arrays:
    batch['group'] = arrays['group']
    batch['weight'] *= arrays['group'] == arrays['row']
  if 'packed_row' in arrays:
    batch |= _packed(batch, arrays, length, accumulation)
  return batch


def _windows(store: TokenStore, window: jax.Array,  # [B]
             length: int) -> dict[str, jax.Array]:
  """As WindowSet.gather."""
  row = jnp.maximum(window, 0)
  real = (window >= 0)[:, None]  # [B, 1]
  column = jnp.arange(length)[None]  # [1, L]
  first = store.question_length[row][:, None] + 2  # [B, 1], of the context
  count = store.context_length[row][:, None]
  local = column - first  # context token, counted within the window
  in_context = (local >= 0) & (local < count) & real
  in_question = (column >= 1) & (column < first - 1) & real
  total = jnp.where(real, first + count + 1, 1)
  owned = store.owned[row]  # [B, 2]

  def take(tokens, begin):  # [T], [B, L] → [B, L]
    return tokens.at[begin].get(mode='clip').astype(jnp.int32)

  ids = jnp.where(column < total, store.sep_id, store.pad_id)
  ids = jnp.where(column == 0, store.cls_id, ids)
  ids = jnp.where(in_context, take(
      store.contexts, store.context_first[row][:, None] + local), ids)
  ids = jnp.where(in_question, take(
      store.questions, store.question_first[row][:, None] + column - 1), ids)
  golds = jnp.where(real[:, :, None], store.gold_spans[row], -1)
  return {
      'token_ids': ids,
      'token_type_ids': ((column >= first) & (column < total)
                         & real).astype(jnp.int32),
      'attention_mask': (column < total).astype(jnp.int32),
      'context_mask': in_context,
      'start_mask': (in_context & (local >= owned[:, :1])
                     & (local < owned[:, 1:])),
      'start_positions': jnp.maximum(golds[:, 0, 0], 0),
      'end_positions': jnp.maximum(golds[:, 0, 1], 0),
      'gold_spans': golds,
      'weight': real[:, 0].astype(jnp.float32),
  }


def _packed(batch: dict[str, jax.Array], arrays: dict[str, jax.Array],
            row_length: int, accumulation: int) -> dict[str, jax.Array]:
  """As packing.lay_out, of as many shards as packed_row has here."""
  shards, rows = arrays['packed_row'].shape

  def deal(x):  # [B, …] → [S, B / S, …]: row r to micro-step r mod A
    return x.reshape(-1, x.shape[0] // shards, accumulation,
                     *x.shape[1:]).swapaxes(1, 2).reshape(
                         shards, -1, *x.shape[1:])

  column = jnp.arange(batch['token_ids'].shape[1])[None]  # [1, L]
  real = (batch['attention_mask'] > 0) & (arrays['window'] >= 0)[:, None]
  outside = rows * row_length  # is dropped
  target = deal(jnp.where(real, arrays['first'][:, None] + column, outside))

  def place(values):  # [B, L] → [S, R, P]
    empty = jnp.zeros(outside, jnp.int32)
    return jax.vmap(lambda at, x: empty.at[at].set(x, mode='drop'))(
        target, deal(jnp.broadcast_to(values, real.shape))).reshape(
            shards, rows, row_length)

  return {'token_ids': place(batch['token_ids']),
          'token_type_ids': place(batch['token_type_ids']),
          'segment_ids': place(arrays['segment'][:, None]),
          'position_ids': place(column),
          'packed_row': arrays['packed_row'], 'first': arrays['first']}
