"""HTTP connections that must come to the point: uvicorn's, with a deadline.

uvicorn waits for the end of a request's headers as long as it takes; so few
who send a byte a minute would hold all the sockets there are ("slowloris").
What comes after the headers has a limit of its own, see server.py.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl


class DeadlineConnection(h11_impl.H11Protocol):
  """Closed if the headers of a request take `seconds` from their first byte,
  those of the first one from when it was opened."""

  def __init__(self, *, seconds: float, **options: Any):
    super().__init__(**options)
    self._seconds = seconds
    self._deadline: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    self._watch()
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._leave()  # the headers are whole

  def connection_lost(self, exc: Exception | None) -> None:
    self._leave()
    super().connection_lost(exc)

  def _watch(self) -> None:
    if self._deadline is None:
      self._deadline = self.loop.call_later(
          self._seconds, self.transport.close)

  def _leave(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None
