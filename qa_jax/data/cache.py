"""Windows from the cache, or made and left there for the next run.

An entry is a directory of `store`, named by the sha256 of everything that made
it: data, vocabulary, lengths, the code of this package, versions. So nothing is
ever invalidated: what changed has another name, and what is no longer asked for
is the first to go when the cache outgrows MAX_BYTES.

A cache must not be able to stop a run or to change its result. A damaged entry
is made anew, a disk that is full or read-only leaves the run without a cache;
each is told in one line.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
import time
from typing import Any

import tokenizers

from qa_jax import errors
from qa_jax import files
from qa_jax import registry
from qa_jax.data import identity
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example

MAX_BYTES = 4 * 2**30  # about 80 data sets of SQuAD's size
ABANDONED_SECONDS = 24 * 3600.0  # a partial entry of this age has no writer


@dataclasses.dataclass(frozen=True)
class Learned:
  """A vocabulary that is to be learned from the data it will tokenise."""

  vocab_size: int
  lowercase: bool

  @property
  def fingerprint(self) -> str:
    return f'learned, {self.vocab_size} entries, lowercase={self.lowercase}'

  def tokenizer(self, examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
    texts = dict.fromkeys(e.context for e in examples)
    texts |= dict.fromkeys(e.question for e in examples)
    return tokenizer_lib.train(
        texts, vocab_size=self.vocab_size, lowercase=self.lowercase)


def directory(setting: str) -> pathlib.Path | None:
  """data.cache → where the cache is: 'none' is nowhere, 'auto' the user's own.

  Raises:
    UserError: a name that no directory can have.
  """
  if not setting or '\0' in setting:
    raise errors.UserError(
        f'config.data.cache={setting!r} is no name of a directory; choose '
        "'auto', 'none' or a directory")
  if setting == 'auto':
    return files.cache_home()
  return None if setting == 'none' else pathlib.Path(
      os.path.expanduser(setting))


def windows(data: str | Sequence[Example],
            vocabulary: tokenizer_lib.Tokenizer | Learned, *,
            where: pathlib.Path | None, say: Callable[[str], None],
            max_length: int, window_overlap: int,
            max_question_length: int,
            progress: Callable[[int, int], None] | None = None,
            ) -> windows_lib.WindowSet:
  """`make_windows` of a SPEC for `sources.load`, or of examples; once for all
  runs.

  A learned vocabulary is the tokenizer of the result. `where=None` makes the
  windows each time; `say` gets the line if a cache is of no use, `progress`
  what `make_windows` tells.

  Raises:
    UserError: as `sources.load` and `make_windows`; never for the cache.
  """
  lengths = {'max_length': max_length, 'window_overlap': window_overlap,
             'max_question_length': max_question_length}
  words = None if isinstance(vocabulary, Learned) else vocabulary

  def make() -> windows_lib.WindowSet:
    examples = sources.load(data) if isinstance(data, str) else data
    return windows_lib.make_windows(
        examples, words or vocabulary.tokenizer(examples), progress=progress,
        **lengths)

  def identify() -> dict[str, Any] | None:
    known = (identity.of(data) if isinstance(data, str)
             else identity.of_examples(data))
    return known and {'data': known, 'vocabulary': vocabulary.fingerprint,
                      'code': code_version(), 'versions': _versions(),
                      **lengths}

  about = identify() if where else None
  if about is None:
    return make()
  entry = where / 'features' / hashlib.sha256(
      json.dumps(about, sort_keys=True).encode()).hexdigest()
  damaged = False
  try:
    found = store.read(entry, about, words=words)
    with contextlib.suppress(OSError):  # a cache of somebody else
      os.utime(entry)
    return found
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (store.DamagedError, OSError) as e:
    damaged = True
    say(f'feature cache {entry}: {_reason(e)}; made anew')
  made = make()
  if identify() == about:  # else the data changed while it was read
    try:
      _keep(entry, made, about, damaged, learned=words is None)
    except OSError as e:
      say(f'feature cache {where}: {_reason(e)}; the run goes on without it')
  return made


@functools.cache
def code_version() -> str:
  """sha256 of the source of all that turns files into windows."""
  here = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in [*sorted(here.glob('*.py')), pathlib.Path(files.__file__),
               pathlib.Path(registry.__file__), pathlib.Path(errors.__file__)]:
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


def _versions() -> dict[str, str]:
  """What else decides how text is read: Python's Unicode, the tokenizer."""
  python = '.'.join(map(str, sys.version_info[:2]))
  return {'python': python, 'tokenizers': tokenizers.__version__}


def _keep(entry: pathlib.Path, made: windows_lib.WindowSet,
          about: dict[str, Any], damaged: bool, *, learned: bool) -> None:
  """Puts an entry in its place whole; one that came first stays."""
  partial = _aside(entry)
  partial.mkdir(parents=True)
  try:
    store.write(partial, made, about, with_vocabulary=learned)
    _flush(partial)
    if damaged:
      _remove(entry)
    try:
      partial.rename(entry)
    except OSError as e:
      if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
    _flush(entry.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  _evict(entry)


def _aside(entry: pathlib.Path) -> pathlib.Path:
  return entry.with_name(
      f'.{entry.name}.{os.getpid()}-{secrets.token_hex(4)}.partial')


def _remove(entry: pathlib.Path) -> None:
  """Takes an entry away whole, so that nobody finds half of it."""
  partial = _aside(entry)
  with contextlib.suppress(FileNotFoundError):  # another process took it
    entry.rename(partial)
  shutil.rmtree(partial, ignore_errors=True)


def _evict(newest: pathlib.Path) -> None:
  """Removes the entries used least recently, and what killed runs left.

  Only names that this file gives are touched, whatever else lies there.
  """
  entries = []  # (last use, bytes, path)
  for path in newest.parent.iterdir():
    with contextlib.suppress(OSError):
      if re.fullmatch(r'\.[0-9a-f]{64}\.\d+-[0-9a-f]{8}\.partial', path.name):
        if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
          shutil.rmtree(path, ignore_errors=True)
      elif re.fullmatch('[0-9a-f]{64}', path.name) and path != newest:
        entries.append((path.stat().st_mtime, _size(path), path))
  total = _size(newest)
  for _, size, path in sorted(entries, reverse=True):
    total += size
    if total > MAX_BYTES:
      _remove(path)


def _size(entry: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in entry.iterdir())


def _flush(path: pathlib.Path) -> None:
  """Has the disk confirm the names in a directory."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _reason(e: Exception) -> str:
  return (e.strerror or str(e)) if isinstance(e, OSError) else str(e)
