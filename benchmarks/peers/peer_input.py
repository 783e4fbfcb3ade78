"""Batches by torch's DataLoader over rows padded to 384, as in Trainer."""

import itertools
import time

import numpy as np
import peer_batches
import torch
import transformers

VARIANTS = {'DataLoader': 0, 'DataLoader, 2 workers': 2}


class Rows(torch.utils.data.Dataset):
  """Rows as dicts of lists of ints, as the datasets library gives them."""

  def __init__(self, arrays):
    mask = np.arange(arrays['token_ids'].shape[1]) < arrays['length'][:, None]
    self.rows = [
        {'input_ids': ids, 'token_type_ids': types, 'attention_mask': real,
         'start_positions': start, 'end_positions': end}
        for ids, types, real, start, end in zip(*(
            x.tolist() for x in (
                arrays['token_ids'], arrays['token_type_ids'],
                mask.astype(np.int64), arrays['start_positions'],
                arrays['end_positions'])), strict=True)]

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return self.rows[index]


class Input:

  def load(self, windows, batch_size):
    rows = Rows(dict(np.load(windows)))
    self.loaders = {name: torch.utils.data.DataLoader(
        rows, batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=transformers.default_data_collator)
        for name, workers in VARIANTS.items()}
    tokens = sum(int(batch['attention_mask'].sum())
                 for batch in self.loaders['DataLoader'])
    return {'tokens': tokens, 'variants': list(VARIANTS)}

  def run(self, name, batches):
    """Returns the seconds until `batches` batches are on the device."""
    loader = self.loaders[name]
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    began = time.perf_counter()
    for batch in itertools.islice(endless, batches):
      batch = {k: v.to(peer_batches.DEVICE) for k, v in batch.items()}
    peer_batches.wait()
    return time.perf_counter() - began


def calls():
  inputs = Input()
  return {'load': inputs.load, 'run': inputs.run}
