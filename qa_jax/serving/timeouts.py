"""HTTP connections with a deadline for the headers of each request.

uvicorn waits without limit for the end of a request's headers. A few clients
that send one byte a minute would then hold all sockets ("slowloris" attack).
Time after the headers is limited in server.py.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl


class DeadlineConnection(h11_impl.H11Protocol):
  """A connection that is closed if a request's headers take over `seconds`.

  Time starts at their first byte, or when the connection is opened.
  """

  def __init__(self, *, seconds: float, **options: Any):
    super().__init__(**options)
    self._seconds = seconds
    self._deadline: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._start_timer()

  def data_received(self, data: bytes) -> None:
    self._start_timer()
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_timer()  # the headers are complete

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    super().connection_lost(exc)

  def _start_timer(self) -> None:
    if self._deadline is None:
      self._deadline = self.loop.call_later(self._seconds, self.transport.close)

  def _stop_timer(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None
