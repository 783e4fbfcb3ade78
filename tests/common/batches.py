"""Streams of training batches that tests share."""

import numpy as np

from qa_jax.data import batches
from tests.common import windows


def stream(**grouping):
  """Returns training batches of questions with 1 to 4 windows each."""
  sizes = [*range(1, 20), *[1, 2, 3] * 12]
  window_set = windows.cut(*[windows.example(n) for n in sizes])
  return batches.TrainBatches(
      window_set, np.arange(len(window_set)), 16 if grouping else 4, (10, 12),
      seed=3, **grouping)


GROUPING = [dict(group_questions=True, devices=d, accumulation=a)
            for d, a in ((1, 1), (2, 1), (1, 4), (2, 2))]
