"""Batches for torch: padded to 384, to the longest row, or length-grouped."""

import random

import numpy as np
import torch
import torch_squad

LAYOUTS = ('pad 384', 'pad to longest', 'length-grouped')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class Windows:
  """The windows that the worker of qa_jax wrote: rows of ids and lengths."""

  def __init__(self, path):
    self._arrays = dict(np.load(path))
    self.length = self._arrays['length']
    self.width = self._arrays['token_ids'].shape[1]

  def plan(self, layout, batch_size, *, shuffled):
    """Returns an epoch: a list of (rows, length to pad to)."""
    order, rng = list(range(len(self.length))), random.Random(0)
    if layout == 'length-grouped' and shuffled:
      chunks = torch_squad.length_grouped(
          [{'input_ids': range(n)} for n in self.length], batch_size, rng)
    else:
      if shuffled:
        rng.shuffle(order)
      elif layout == 'length-grouped':
        order.sort(key=lambda k: self.length[k])
      chunks = [order[i:i + batch_size]
                for i in range(0, len(order), batch_size)]
    return [(np.array(rows), self.width if layout == 'pad 384'
             else int(self.length[rows].max())) for rows in chunks]

  def batch(self, rows, length, *, labels):
    """Returns the arguments of a BertForQuestionAnswering."""
    column = np.arange(length)[None]
    out = {'input_ids': self._arrays['token_ids'][rows, :length],
           'token_type_ids': self._arrays['token_type_ids'][rows, :length],
           'attention_mask': column < self.length[rows, None]}
    if labels:
      out['start_positions'] = self._arrays['start_positions'][rows]
      out['end_positions'] = self._arrays['end_positions'][rows]
    return tensors(out)


def tensors(arrays):
  return {key: torch.from_numpy(np.ascontiguousarray(value, np.int64)).to(
      DEVICE, non_blocking=True) for key, value in arrays.items()}


def spread(plan, count):
  """Returns `count` batches, evenly spread over the order by length."""
  plan = sorted(plan, key=lambda batch: batch[1])
  count = min(count, len(plan))
  return [plan[int((i + 0.5) * len(plan) / count)] for i in range(count)]


def autocast(dtype):
  return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == 'bfloat16')


def wait():
  if DEVICE == 'cuda':
    torch.cuda.synchronize()
