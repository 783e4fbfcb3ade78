"""Faults at the dispatch of a train step."""

from collections.abc import Callable, Iterator
import contextlib
from unittest import mock

from qa_jax.runtime import devices


@contextlib.contextmanager
def fault_at(step: int | None, fault: Callable[[], object]) -> Iterator[None]:
  """Calls `fault` when the update with train step `step` is dispatched.

  The update is then in flight, and its metrics are not yet read. Without a
  `step`, nothing is called.
  """
  push = devices.RunAhead.push

  def pushing(self, item, metrics):
    if isinstance(item, range) and step in item:  # not of an evaluation
      fault()
    return push(self, item, metrics)

  with mock.patch.object(devices.RunAhead, 'push', pushing):
    yield
