"""Config → windows of a data set, from the cache or made, and on the device."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import time

import jax
import numpy as np

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import gather
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


def token_store(made: windows.WindowSet) -> gather.TokenStore:
  """All of `made` as flat arrays, for steps to gather from.

  Raises:
    UserError: more tokens than positions of 32 bits.
  """
  if max(len(made.contexts.ids), len(made.questions.ids)) > gather.MAX_TOKENS:
    raise errors.UserError(
        f'config.data.on_device=True: {len(made.contexts.ids)} tokens are more '
        f'than {gather.MAX_TOKENS}; set it to False')
  row = made.example_of
  tokens = lambda rows: np.pad(rows.ids, (0, not len(rows.ids)))
  narrow = lambda x: x.astype(np.int32)
  return gather.TokenStore(
      contexts=tokens(made.contexts), questions=tokens(made.questions),
      context_first=narrow(
          made.contexts.ptr[made.context_of[row]] + made.begin),
      context_length=narrow(made.length),
      question_first=narrow(made.questions.ptr[row]),
      question_length=narrow(made.questions.lengths[row]),
      owned=narrow(np.stack([made.best_begin - made.begin,
                             made.best_end - made.begin], axis=1)),
      gold_spans=made.gold_spans, pad_id=made.tokenizer.pad_id,
      cls_id=made.tokenizer.cls_id, sep_id=made.tokenizer.sep_id)
