"""The input pipeline of a config: tokenizer, windows and evaluation batches."""

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
from qa_jax.data import batch_plans
from qa_jax.data import batches
from qa_jax.data import cache
from qa_jax.data import packing as packing_lib
from qa_jax.data import store as store_lib
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.data import windows
from qa_jax.data.examples import Example
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib


def vocabulary_source(config: config_lib.Config, source: pathlib.Path | None,
               ) -> tokenizer_lib.Tokenizer | cache.LearnedVocabulary:
  """Returns the tokenizer of config.data.vocab, or else of `source`.

  Each is a run directory or a directory with vocab.txt or tokenizer.json. If
  both are missing, returns the settings of a vocabulary to learn.

  Raises:
    UserError: the directory is missing or has no usable vocabulary, or its
      model_max_length is less than config.data.max_length.
  """
  directory = pathlib.Path(config.data.vocab) if config.data.vocab else source
  if directory is None:
    return cache.LearnedVocabulary(
        config.data.vocab_size, config.data.lowercase)
  if not directory.is_dir():
    raise errors.UserError(
        f'config.data.vocab={str(directory)!r} is not a directory with '
        'vocab.txt or tokenizer.json')
  if RunDirectory(directory).is_run():
    directory = directory / 'tokenizer'
  tokenizer = tokenizer_files.read_tokenizer(directory, config.data.lowercase)
  windows.check_limit(config.data.max_length, tokenizer)
  return tokenizer


def load_tokenizer(config: config_lib.Config, source: pathlib.Path | None,
                   examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a config, learned from `examples` if needed."""
  vocabulary = vocabulary_source(config, source)
  return (vocabulary.tokenizer(examples)
          if isinstance(vocabulary, cache.LearnedVocabulary) else vocabulary)


def window_lengths(config: config_lib.Config) -> dict[str, int]:
  """Returns the length arguments of `windows.make_windows`, in tokens."""
  return {'max_length': config.data.max_length,
          'window_overlap': config.data.window_overlap,
          'max_question_length': config.data.max_question_length}


def make_windows(config: config_lib.Config, examples: Sequence[Example],
                 tokenizer: tokenizer_lib.Tokenizer) -> windows.WindowSet:
  """Cuts examples into windows, without the cache."""
  return windows.make_windows(examples, tokenizer, **window_lengths(config))


def load_windows(
    config: config_lib.Config, data: str | Sequence[Example],
    vocabulary: tokenizer_lib.Tokenizer | cache.LearnedVocabulary,
) -> tuple[windows.WindowSet, str]:
  """Returns the windows of a data SPEC or of examples, and a line about them.

  The line has their number, the time, whether they are from the cache, and how
  many questions count as unanswerable without being marked or are cut. The
  tokenizer of the windows holds a learned vocabulary.
  """
  began = time.perf_counter()
  what = data if isinstance(data, str) else f'{len(data)} questions'
  learns = isinstance(vocabulary, cache.LearnedVocabulary)
  with contextlib.ExitStack() as bars:
    is_read = bars.enter_context(console.say_if_slow(
        f'reading {what}' + ', and learning a vocabulary' * learns))
    window_set = cache.cached_windows(
        data, vocabulary, where=cache.cache_directory(config.data.cache),
        say=console.say, progress=_progress(bars, is_read),
        **window_lengths(config))
  cached = isinstance(window_set.examples, store_lib.StoredExamples)
  unmarked, cut = window_set.audit['unmarked'], cut_note(config, window_set)
  entries = len(window_set.tokenizer.vocab)
  return window_set, (
      f'{len(window_set)} windows of {len(window_set.examples)} questions '
      f'{"from the cache" if cached else "made"} in '
      f'{time.perf_counter() - began:.1f} s' + (
          f'; {unmarked} of them, whose list of answers is empty, count as '
          'unanswerable' if unmarked else '') + (cut and f'; {cut}') + (
              f'; the vocabulary has {entries} entries, above data.vocab_size, '
              'since it keeps all letters of the data'
              if learns and entries > config.data.vocab_size else ''))


def cut_note(config: config_lib.Config, made: windows.WindowSet) -> str:
  """Returns how many questions are cut, or '' if none is."""
  count = made.audit['cut']
  return ('questions cut to data.max_question_length='
          f'{config.data.max_question_length} tokens: {count}') if count else ''


def packing(config: config_lib.Config) -> bool | str:
  """Returns data.packing, with 'auto' resolved for this process."""
  return config_lib.packing(config, jax.default_backend())


def batch_buckets(config: config_lib.Config) -> tuple[int, ...]:
  """Returns the bucket lengths in tokens, ascending, the last max_length."""
  return batches.check_buckets(
      config_lib.buckets(config, jax.default_backend()), config.data.max_length)


def buckets_note(config: config_lib.Config) -> str:
  """Returns a line if data.buckets has lengths that packing leaves unused."""
  if not packing(config) or len(config.data.buckets) < 2:
    return ''
  return (f'data.buckets={config.data.buckets} is not used: data.packing='
          f'{config.data.packing} fills rows of data.max_length')


def eval_batch_size(config: config_lib.Config, devices: int,
                    platform: str | None = None) -> int:
  """Returns the windows of length max_length in an evaluation batch.

  A CPU is fastest with batches of about 1,500 tokens, which fit in its caches.
  Packing needs more windows to choose from. An accelerator with the default
  size gets enough work to hide the time of the host. A `platform` of None is
  that of this process.
  """
  if platform is None:
    platform = jax.default_backend()
  each = (128 if platform != 'cpu' else
          32 if config_lib.packing(config, platform) else 4)
  return config.train.eval_batch_size or devices * each


# Row length in tokens, numbers of the windows, and their places in packed rows
# if these are planned already.
EvaluationPlan = list[tuple[int, np.ndarray, dict[str, np.ndarray] | None]]


def plan_evaluation(config: config_lib.Config, lengths: np.ndarray,
                    devices: int) -> EvaluationPlan:
  """Plans the evaluation batches of windows with `lengths`, for `devices`.

  With data.packing='rows', the batches of one data set have one shape, which is
  compiled once. One batch is enough for few windows. It has as many packed rows
  as they need.
  """
  packed = packing(config)
  common = dict(batch_size=eval_batch_size(config, devices), multiple=devices,
                buckets=batch_buckets(config))
  if packed == 'rows' and len(lengths) > common['batch_size']:
    return batch_plans.plan_fixed_rows(lengths, **common)
  plan = batch_plans.plan_packed if packed else batch_plans.plan_eval
  return [(*batch, None) for batch in plan(lengths, **common)]


def evaluation_batch(
    window_set: windows.WindowSet, indices: np.ndarray, length: int,
    mesh: jax.sharding.Mesh | None, *, packed: bool, whole_words: bool,
    places: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
  """Returns the evaluation batch of the windows `indices`; -1 is a padding row.

  `whole_words` is that of WindowSet.gather. Without `places`, the packed rows
  are planned here. With several processes, each process gets the rows of its
  devices.
  """
  lengths = np.where(indices >= 0, window_set.total_lengths[indices], 0)
  rows = {'window': indices, 'length': lengths}
  if packed:
    shards = np.arange(len(indices)).reshape(mesh.size if mesh else 1, -1)
    rows |= places or packing_lib.plan_rows(lengths, shards, length)
  if mesh:
    rows = devices_lib.local_rows(rows, mesh)
  batch = window_set.gather(rows['window'], length, whole_words=whole_words)
  if packed:
    count = len(rows['window'])
    shards = np.arange(count).reshape(len(rows['packed_row']), -1)
    batch = packing_lib.lay_out(batch, rows, rows['length'], shards, length)
  return batch


def _progress(bars: contextlib.ExitStack, begun: Callable[[], None]
              ) -> Callable[[int, int], None]:
  # The bar appears at the first call, so that cached windows show none.
  @functools.cache
  def bar(total: int) -> console.Progress:
    begun()
    progress = console.Progress('tokenise', total)
    bars.callback(progress.close)
    return progress
  return lambda done, total: bar(total).update(done)
