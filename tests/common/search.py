"""A brute-force span search, to which tests compare the searches."""

import functools

import jax
import numpy as np

from qa_jax.decoding import search
from qa_jax.span_scores import SpanScores

NAMES = sorted(search.EXACT)


def brute_force(start, end, pair, start_mask, end_mask, longest, count):
  """Returns [(i, j, score)] of one window, best first, in plain loops."""
  floor = lambda x: max(np.float32(x), np.float32(search.LOWEST))
  spans = []
  for i in np.flatnonzero(start_mask):
    for j in range(i, min(i + longest, len(start))):
      if end_mask[j]:
        right = floor(end[j])
        if pair is not None:
          right = floor(right + floor(pair[i, j - i]))
        spans.append((-floor(floor(start[i]) + right), int(i), j))
  return [(i, j, -s) for s, i, j in sorted(spans)[:count]]


@functools.cache
def compiled(spec, longest, count):
  """Returns the jitted search with maximal length `longest` and n-best."""
  return jax.jit(functools.partial(
      search.find_search(spec), max_answer_length=longest, n_best=count))


def assert_equals_brute_force(name, start, end, pair, start_mask, end_mask,
                              longest, count):
  """Asserts that a search finds the spans of `brute_force`, bit for bit."""
  spans = jax.device_get(compiled(name, longest, count)(
      SpanScores(start, end, pair), start_mask, end_mask))
  for field, dtype in (('start', np.int32), ('end', np.int32),
                       ('score', np.float32), ('valid', np.bool_)):
    value = getattr(spans, field)
    assert (value.shape, value.dtype) == ((len(start), count), dtype)
  for b in range(len(start)):
    expected = brute_force(
        start[b], end[b], None if pair is None else pair[b], start_mask[b],
        end_mask[b], longest, count)
    n = len(expected)
    assert spans.valid[b].tolist() == [True] * n + [False] * (count - n)
    assert list(zip(spans.start[b][:n].tolist(), spans.end[b][:n].tolist(),
                    spans.score[b][:n].tolist(), strict=True)) == expected
    assert not spans.start[b][n:].any() and not spans.end[b][n:].any()
    assert (spans.score[b][n:] == np.float32(search.ILLEGAL)).all()
