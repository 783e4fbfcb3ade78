"""The batch of record_encoders.py, and the values that it records.

Glossary of shapes: B batch, L length.
"""

import numpy as np

COUNT = 12  # values of each tensor
LENGTHS = {'mpnet': 140}  # of the longest row; MPNet's reaches every bucket
# The token of padding has the id 1, and there is at most one token type.
FAIRSEQ = ('roberta', 'mpnet', 'xlm_roberta', 'camembert')


def inputs(kind: str) -> dict[str, np.ndarray]:
  """Draws a batch of three rows [B, L], with gold spans."""
  length = LENGTHS.get(kind, 28)
  rng = np.random.default_rng(0)
  column = np.arange(length)[None]
  inside = column < np.array([length, 19, 8])[:, None]
  context = inside & (column >= np.array([9, 6, 3])[:, None])
  return {
      'token_ids': np.where(inside, rng.integers(4, 60, inside.shape),
                            int(kind in FAIRSEQ)).astype(np.int32),
      'token_type_ids': context.astype(np.int32),
      'attention_mask': inside.astype(np.int32), 'context_mask': context,
      'start_positions': np.array([12, 0, 4], np.int32),
      'end_positions': np.array([17, 0, 4], np.int32)}


def recorded_tokens(batch: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the mask [B, L] of the tokens whose states are recorded."""
  mask = batch['attention_mask'] > 0
  mask[0, 28:] = False
  return mask


def some(value: np.ndarray) -> np.ndarray:  # [COUNT]
  """Returns values from all parts of a tensor, after zeros if it is small."""
  flat = value.reshape(-1)
  places = np.linspace(0, flat.size - 1, min(COUNT, flat.size)).astype(int)
  return np.pad(flat[places], (COUNT - len(places), 0))
