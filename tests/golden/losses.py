"""The loss of a span model of transformers, for the recorders."""

import numpy as np
import torch


def loss_of(result, batch: dict[str, np.ndarray]) -> torch.Tensor:
  """Computes the cross-entropy over the context and [CLS], mean of both."""
  outside = ~torch.tensor(batch['context_mask'])
  outside[:, 0] = False
  return sum(torch.nn.functional.cross_entropy(
      getattr(result, f'{end}_logits').masked_fill(outside, -1e9),
      torch.tensor(batch[f'{end}_positions'].astype(np.int64)))
             for end in ('start', 'end')) / 2
