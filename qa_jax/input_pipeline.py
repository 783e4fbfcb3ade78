"""Config → windows of a data set, from the cache or made."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import pathlib
import time

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import batches
from qa_jax.data import cache
from qa_jax.data import packing
from qa_jax.data import store as store_lib
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from qa_jax.data.examples import Example
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib


def load_windows(config: config_lib.Config, data: str | Sequence[Example],
                 words: tokenizer_lib.Tokenizer | cache.LearnedVocabulary
         ) -> tuple[windows.WindowSet, str]:
  """The windows of a SPEC or of examples, from the cache if they are there.

  And a line for the user, that says whether they were. A learned vocabulary is
  the tokenizer of the windows.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as bars:
    made = cache.cached_windows(data,
                                words,
                                where=cache.cache_directory(config.data.cache),
                                say=console.say,
                                progress=_progress(bars),
                                **window_lengths(config))
  how = ('from the cache' if isinstance(made.examples, store_lib.StoredExamples)
         else 'made')
  return made, (f'{len(made)} windows of {len(made.examples)} questions {how} '
                f'in {time.perf_counter() - began:.1f} s')


def _progress(bars: contextlib.ExitStack) -> Callable[[int, int], None]:
  """What shows a bar once something is made, until `bars` is left."""
  @functools.cache
  def bar(total: int) -> console.Progress:
    shown = console.Progress('tokenise', total)
    bars.callback(shown.close)
    return shown
  return lambda done, total: bar(total).update(done)


def evaluation_batch(made: windows.WindowSet, numbers: np.ndarray, length: int,
                     mesh: jax.sharding.Mesh | None, *, packed: bool
         ) -> dict[str, np.ndarray]:
  """A batch to evaluate, of windows by their `numbers` (-1: padding); of
  several processes each has what its devices see."""
  lengths = np.where(numbers >= 0, made.total_lengths[numbers], 0)
  found = {'window': numbers, 'length': lengths}
  if packed:
    shards = np.arange(len(numbers)).reshape(mesh.size if mesh else 1, -1)
    found |= packing.plan_rows(lengths, shards, length)
  if mesh:
    found = devices_lib.local_rows(found, mesh)
  batch = made.gather(found['window'], length)
  if packed:
    here = np.arange(len(found['window'])).reshape(
        len(found['packed_row']), -1)
    batch = packing.lay_out(batch, found, found['length'], here, length)
  return batch


def vocabulary_source(config: config_lib.Config, source: pathlib.Path | None
               ) -> tokenizer_lib.Tokenizer | cache.LearnedVocabulary:
  """That of data.vocab, else of `source`, else to be learned."""
  directory = pathlib.Path(config.data.vocab) if config.data.vocab else source
  if directory is not None:
    if not directory.is_dir():
      raise errors.UserError(
          f'config.data.vocab={str(directory)!r} is not a directory with '
          'vocab.txt or tokenizer.json')
    if RunDirectory(directory).is_run():
      directory = directory / 'tokenizer'
    return tokenizer_lib.read_tokenizer(directory, config.data.lowercase)
  return cache.LearnedVocabulary(config.data.vocab_size, config.data.lowercase)


def load_tokenizer(config: config_lib.Config, source: pathlib.Path | None,
                   examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
  """The same, learned from `examples` if it is to be."""
  words = vocabulary_source(config, source)
  return (words.tokenizer(examples)
          if isinstance(words, cache.LearnedVocabulary) else words)


def make_windows(config: config_lib.Config, examples: Sequence[Example],
                 words: tokenizer_lib.Tokenizer) -> windows.WindowSet:
  return windows.make_windows(examples, words, **window_lengths(config))


def window_lengths(config: config_lib.Config) -> dict[str, int]:
  """How windows are cut, in tokens."""
  return {'max_length': config.data.max_length,
          'window_overlap': config.data.window_overlap,
          'max_question_length': config.data.max_question_length}


def batch_buckets(config: config_lib.Config) -> tuple[int, ...]:
  return batches.check_buckets(config.data.buckets, config.data.max_length)


def eval_batch_size(config: config_lib.Config, devices: int) -> int:
  """Windows of max_length in a batch of evaluation, over all devices.

  On a CPU a batch of 1,500 tokens stays in its caches; packing wants more
  windows to choose from.
  """
  few = jax.default_backend() == 'cpu' and not config.data.packing
  return config.train.eval_batch_size or devices * (4 if few else 32)
