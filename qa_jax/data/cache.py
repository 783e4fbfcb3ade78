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
import importlib.metadata
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
from qa_jax import registry
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.io import files

MAX_BYTES = 4 * 2**30  # about 80 data sets of SQuAD's size
ABANDONED_SECONDS = 24 * 3600.0  # a partial entry of this age has no writer


@dataclasses.dataclass(frozen=True)
class LearnedVocabulary:
  """A vocabulary that is to be learned from the data it will tokenise."""

  vocab_size: int
  lowercase: bool

  @property
  def fingerprint(self) -> str:
    return f'learned, {self.vocab_size} entries, lowercase={self.lowercase}'

  def tokenizer(self, examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
    texts = dict.fromkeys(e.context for e in examples)
    texts |= dict.fromkeys(e.question for e in examples)
    return tokenizer_lib.train_tokenizer(
        texts, vocab_size=self.vocab_size, lowercase=self.lowercase)


def cache_directory(setting: str) -> pathlib.Path | None:
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


def cached_windows(data: str | Sequence[Example],
                   vocabulary: tokenizer_lib.Tokenizer | LearnedVocabulary, *,
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
  words = None if isinstance(vocabulary, LearnedVocabulary) else vocabulary

  def make() -> windows_lib.WindowSet:
    examples = sources.load_examples(data) if isinstance(data, str) else data
    return windows_lib.make_windows(
        examples, words or vocabulary.tokenizer(examples), progress=progress,
        **lengths)

  def identify() -> dict[str, Any] | None:
    known = (data_identity(data) if isinstance(data, str)
             else examples_identity(data))
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
    found = store.read_store(entry, about, words=words)
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
    store.write_store(partial, made, about, with_vocabulary=learned)
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


def data_identity(spec: str) -> list[Any] | None:
  """What all parts of a SPEC stand for, as JSON.

  None if that cannot be told: a SPEC or file that `sources.load` refuses, or a
  TFDS data set that is still to be prepared.
  """
  try:
    parts = [_part(part) for part in sources.split_mixture(spec)]
  except (KeyError, OSError, TypeError, ValueError):  # load says why
    return None
  return None if None in parts else parts


def examples_identity(examples: Sequence[Example]) -> list[Any]:
  """The same for examples that are in memory."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(repr(example).encode())
  return ['examples', digest.hexdigest()]


def _part(part: str) -> list[Any] | None:
  if os.path.exists(part):
    return _file(part)
  name, arguments = registry.parse_spec(part)
  data: Any = None
  if name == 'tfds':
    data = _prepared(arguments['name'], arguments.get('data_dir', ''))
  elif 'path' in arguments:
    data = _file(arguments.pop('path'))
  elif name == 'articles':
    data = data_identity(arguments.pop('of'))
  elif name == 'synthetic':
    data = []  # its code and arguments say all
  return None if data is None else [
      name, sorted([k, repr(v)] for k, v in arguments.items()), data]


def _file(path: str) -> list[Any]:
  """The endings of the name choose the parser, and the bytes are the data; of
  a directory the names and bytes of its files."""
  where = pathlib.Path(path)
  if where.is_dir():
    return [[p.name, files.sha256(p)]
            for p in sorted(where.iterdir()) if p.is_file()]
  return [where.suffixes[-2:], files.sha256(where)]


def _prepared(name: str, data_dir: str) -> list[Any] | None:
  """What TFDS prepared, by names, sizes and times: hashing gigabytes of a data
  set of which a slice is read would cost more than the cache saves."""
  base = re.match(r'\w*', name)[0]  # of name/config:version
  root = pathlib.Path(os.path.expanduser(data_dir or os.environ.get(
      'TFDS_DATA_DIR', '~/tensorflow_datasets'))) / base
  found = sorted(p for p in root.rglob('*') if p.is_file()) if base else []
  return [importlib.metadata.version('tensorflow-datasets'), *(
      [str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns]
      for p in found)] if found else None
