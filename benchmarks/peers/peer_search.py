"""Span search of a window as in run_qa's post-processing."""

import time

import numpy as np

N_BEST, CAP = 20, 30


def best_spans(start, end, offsets):
  """Returns the legal spans among 20 best starts times 20 best ends.

  `offsets` is None where there is no context token, as in run_qa.
  """
  starts = np.argsort(start)[-1:-N_BEST - 1:-1].tolist()
  ends = np.argsort(end)[-1:-N_BEST - 1:-1].tolist()
  spans = []
  for i in starts:
    for j in ends:
      if (i >= len(offsets) or j >= len(offsets)
          or offsets[i] is None or len(offsets[i]) < 2
          or offsets[j] is None or len(offsets[j]) < 2):
        continue
      if j < i or j - i + 1 > CAP:
        continue
      spans.append({'offsets': (offsets[i][0], offsets[j][1]),
                    'score': start[i] + end[j], 'start_logit': start[i],
                    'end_logit': end[j]})
  return sorted(spans, key=lambda x: x['score'], reverse=True)[:N_BEST]


def enumerated(start, end, mask):
  """Returns the 20 best scores of all legal spans, -inf beyond the last."""
  start, end = np.where(mask, start, -np.inf), np.where(mask, end, -np.inf)
  scores = np.concatenate([start[:len(start) - w] + end[w:]
                           for w in range(min(CAP, len(start)))])
  scores = np.sort(scores)[::-1][:N_BEST]
  return np.pad(scores, (0, N_BEST - len(scores)), constant_values=-np.inf)


class Search:

  def load(self, path):
    arrays = np.load(path)
    self.masks = arrays['mask']
    offsets = [[(k, k + 1) if real else None for k, real in enumerate(mask)]
               for mask in self.masks.tolist()]
    self.rows = list(zip(arrays['start'], arrays['end'], offsets, strict=True))

  def find(self, target):
    loop = np.array([spans[0]['score'] if spans else -np.inf for spans in (
        best_spans(*row) for row in self.rows)], np.float32)
    exact = np.stack([enumerated(start, end, mask) for (start, end, _), mask
                      in zip(self.rows, self.masks, strict=True)])
    np.savez(target, loop=loop, exact=exact.astype(np.float32))
    return {'missed': int((loop < exact[:, 0]).sum())}

  def run(self):
    began = time.perf_counter()
    for row in self.rows:
      best_spans(*row)
    return time.perf_counter() - began


def calls():
  search = Search()
  return {'load': search.load, 'find': search.find, 'run': search.run}
