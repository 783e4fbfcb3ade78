"""Config → windows of a data set, from the cache or made."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import time

import jax
import numpy as np

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import logs
from qa_jax import processes
from qa_jax.data import cache
from qa_jax.data import packing
from qa_jax.data import store
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from qa_jax.data.examples import Example


def load(config: config_lib.Config, data: str | Sequence[Example],
         words: tokenizer_lib.Tokenizer | cache.Learned
         ) -> tuple[windows.WindowSet, str]:
  """The windows of a SPEC or of examples, from the cache if they are there.

  And a line for the user, that says whether they were. A learned vocabulary is
  the tokenizer of the windows.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as bars:
    made = cache.windows(
        data, words, where=cache.directory(config.data.cache), say=logs.say,
        progress=_progress(bars), **build.lengths(config))
  how = ('from the cache' if isinstance(made.examples, store.StoredExamples)
         else 'made')
  return made, (f'{len(made)} windows of {len(made.examples)} questions {how} '
                f'in {time.perf_counter() - began:.1f} s')


def _progress(bars: contextlib.ExitStack) -> Callable[[int, int], None]:
  """What shows a bar once something is made, until `bars` is left."""
  @functools.cache
  def bar(total: int) -> logs.Progress:
    shown = logs.Progress('tokenise', total)
    bars.callback(shown.close)
    return shown
  return lambda done, total: bar(total).update(done)


def rows(made: windows.WindowSet, numbers: np.ndarray, length: int,
         mesh: jax.sharding.Mesh | None, *, packed: bool
         ) -> dict[str, np.ndarray]:
  """A batch to evaluate, of windows by their `numbers` (-1: padding); of
  several processes each has what its devices see."""
  lengths = np.where(numbers >= 0, made.total_lengths[numbers], 0)
  found = {'window': numbers, 'length': lengths}
  if packed:
    shards = np.arange(len(numbers)).reshape(mesh.size if mesh else 1, -1)
    found |= packing.plan(lengths, shards, length)
  if mesh:
    found = processes.part(found, mesh)
  batch = made.gather(found['window'], length)
  if packed:
    here = np.arange(len(found['window'])).reshape(
        len(found['packed_row']), -1)
    batch = packing.lay_out(batch, found, found['length'], here, length)
  return batch

