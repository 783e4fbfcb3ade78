"""Concurrent questions → batches: whatever waits when the model is free."""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
from typing import Any

from qa_jax.runtime import console


class ModelError(Exception):
  """The model could not do what was asked; the cause is in the log."""


class Batcher:
  """One thread that owns the model, and the questions that wait for it.

  A batch is not waited for: the first question goes alone, and those that
  come meanwhile go together. `run` gets rows and returns one result a row;
  `observe` is told the size of each batch.
  """

  def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], *,
               max_batch: int):
    self._run, self._max_batch = run, max_batch
    self.observe: Callable[[int], None] = lambda size: None
    self._waiting: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'model')

  async def ask(self, row: Any) -> Any:
    """The result of one row.

    Raises:
      Failed: the model failed on this row, even alone.
    """
    result: asyncio.Future = asyncio.get_running_loop().create_future()
    self._waiting.put_nowait((row, result))
    return await result

  async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """A call of the model's thread, in turn with the batches."""
    return _unwrap(await asyncio.get_running_loop().run_in_executor(
        self._thread, _guarded, function, *arguments))

  async def drain(self) -> None:
    """Runs batches until cancelled."""
    while True:
      batch = [await self._waiting.get()]
      while len(batch) < self._max_batch and not self._waiting.empty():
        batch.append(self._waiting.get_nowait())
      batch = [(row, result) for row, result in batch
               if not result.done()]  # its client has given up
      if not batch:
        continue
      self.observe(len(batch))
      found = await asyncio.get_running_loop().run_in_executor(
          self._thread, self._each, [row for row, _ in batch])
      for (_, result), value in zip(batch, found, strict=True):
        if not result.done():
          if isinstance(value, ModelError):
            result.set_exception(value)
          else:
            result.set_result(value)

  def _each(self, rows: Sequence[Any]) -> Sequence[Any]:
    """Results, a Failed in place of those of rows that fail alone, too."""
    found = _guarded(self._run, rows)
    if not isinstance(found, ModelError):
      return found
    if len(rows) == 1:
      return [found]
    return [self._each([row])[0] for row in rows]

  def close(self) -> None:
    self._thread.shutdown(cancel_futures=True)


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
  """What the call returns, or the Failed that stands for any exception.

  The edge of the worker: a panic of the tokenizer is no `Exception`, and a
  thread that dies would leave every later question waiting.
  """
  try:
    return function(*arguments)
  except BaseException as e:
    console.say(f'error: {type(e).__name__}: {" ".join(str(e).split())[:300]}')
    return ModelError(str(e))


def _unwrap(value: Any) -> Any:
  if isinstance(value, ModelError):
    raise value
  return value
