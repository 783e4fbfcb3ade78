"""Batches of concurrent questions for a model that runs in one thread."""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
from typing import Any

from qa_jax.runtime import console


class ModelError(Exception):
  """Raised if the model fails on a question; the cause is in the log."""


class Batcher:
  """The thread that runs the model, with a queue of waiting questions.

  The thread never waits for a batch to fill: the first question is answered
  alone, and the questions that arrive meanwhile are the next batch. `run` gets
  rows and returns one result a row; `observe` gets the size of each batch.
  """

  def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], *,
               max_batch: int):
    self._run, self._max_batch = run, max_batch
    self.observe: Callable[[int], None] = lambda size: None
    self._waiting: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'model')

  async def ask(self, row: Any) -> Any:
    """Returns the result of one row, or raises a ModelError."""
    result: asyncio.Future = asyncio.get_running_loop().create_future()
    self._waiting.put_nowait((row, result))
    return await result

  async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a call in the model's thread, between batches."""
    return await asyncio.get_running_loop().run_in_executor(
        self._thread, _guarded, function, *arguments)

  async def drain(self) -> None:
    """Runs batches until cancelled."""
    while True:
      batch = [await self._waiting.get()]
      while len(batch) < self._max_batch and not self._waiting.empty():
        batch.append(self._waiting.get_nowait())
      # The result is done already if the client has disconnected.
      batch = [(row, result) for row, result in batch if not result.done()]
      if not batch:
        continue
      self.observe(len(batch))
      values = await self.call(self._run_rows, [row for row, _ in batch])
      for (_, result), value in zip(batch, values, strict=True):
        if not result.done():
          (result.set_exception if isinstance(value, ModelError)
           else result.set_result)(value)

  def _run_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
    """Returns one result a row, a ModelError for each row that fails alone."""
    try:
      return _guarded(self._run, rows)
    except ModelError as e:
      return [e] if len(rows) == 1 else [
          self._run_rows([row])[0] for row in rows]

  def close(self) -> None:
    """Ends the thread after its current batch."""
    self._thread.shutdown(cancel_futures=True)


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns the result of a call; any exception becomes a ModelError.

  A thread that ends would leave every later question waiting. A panic of the
  tokenizer is a BaseException but no Exception.
  """
  try:
    return function(*arguments)
  except BaseException as e:
    console.say(f'error: {type(e).__name__}: {" ".join(str(e).split())[:300]}')
    raise ModelError(str(e)) from None
