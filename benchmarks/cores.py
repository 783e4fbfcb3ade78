"""The CPU cores that a side of a benchmark may use; imports no jax."""

from collections.abc import Iterator
import contextlib
import os
import sys


def available() -> list[int]:
  """Returns the cores that this process may use."""
  return (sorted(os.sched_getaffinity(0)) if sys.platform == 'linux'
          else list(range(os.cpu_count() or 1)))


def limit(count: int) -> None:
  """Limits this process and those that it starts to `count` of its cores."""
  if sys.platform == 'linux':  # XLA:CPU starts a thread for each core
    os.sched_setaffinity(0, available()[:count])


@contextlib.contextmanager
def limited(count: int) -> Iterator[None]:
  """Limits this process as `limit` does, until the context ends."""
  before = available()
  limit(count)
  try:
    yield
  finally:
    if sys.platform == 'linux':
      os.sched_setaffinity(0, before)
