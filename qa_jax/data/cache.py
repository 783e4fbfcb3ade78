"""The feature cache: windows of a data SPEC, stored for later runs.

An entry is a directory of `store`. Its name is the sha256 of everything that
determines its windows: data, vocabulary, lengths, code and library versions.
Entries are therefore never invalidated: a change gives another name. When the
cache exceeds MAX_BYTES, the least recently used entries are removed.

A cache must neither stop a run nor change its result. A damaged entry is built
again, and a run with a full or read-only disk goes on without a cache.
"""

import ast
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
from qa_jax.data import tfds
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.io import files

MAX_BYTES = 4 * 2**30  # about 80 data sets of SQuAD's size
ABANDONED_SECONDS = 24 * 3600.0  # a partial entry of this age has no writer
# The sources that read the file or directory `path` and nothing else. A new
# source is not cached, because it may read more than its `path`.
ONE_FILE = frozenset({'squad_json', 'mrqa', 'table'})


@dataclasses.dataclass(frozen=True)
class LearnedVocabulary:
  """The settings of a vocabulary that is learned from the data of a run."""

  vocab_size: int
  lowercase: bool

  @property
  def fingerprint(self) -> str:
    return f'learned, {self.vocab_size} entries, lowercase={self.lowercase}'

  def tokenizer(self, examples: Sequence[Example]) -> tokenizer_lib.Tokenizer:
    texts = dict.fromkeys([e.context for e in examples]
                          + [e.question for e in examples])
    return tokenizer_lib.train_tokenizer(
        texts, vocab_size=self.vocab_size, lowercase=self.lowercase)


def cache_directory(setting: str) -> pathlib.Path | None:
  """Returns the directory of the cache that config.data.cache names.

  'auto' is the cache directory of the user, 'none' is no cache (None).

  Raises:
    UserError: no directory can have this name.
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
                   progress: Callable[[int, int], None] | None = None,
                   **lengths: int) -> windows_lib.WindowSet:
  """Returns the windows of a data SPEC or of examples, cached if possible.

  `where` is the directory of the cache, None for no cache. `say` gets a message
  if the cache cannot be used. `progress` and `lengths` are those of
  `make_windows`. The tokenizer of the result holds a learned vocabulary.

  Raises:
    UserError: by `sources.load_examples` or `windows.make_windows`. The cache
      itself raises nothing.
  """
  tokenizer = None if isinstance(vocabulary, LearnedVocabulary) else vocabulary

  def make() -> windows_lib.WindowSet:
    examples = sources.load_examples(data) if isinstance(data, str) else data
    return windows_lib.make_windows(
        examples, tokenizer or vocabulary.tokenizer(examples),
        progress=progress, **lengths)

  def identify() -> dict[str, Any] | None:
    identity = (data_identity(data) if isinstance(data, str)
                else _examples_identity(data))
    return identity and {
        'data': identity, 'vocabulary': vocabulary.fingerprint,
        'code': code_version(), 'tokenizers': tokenizers.__version__,
        'python': [*sys.version_info[:2]], **lengths}  # for its Unicode

  about = identify() if where else None
  if about is None:
    return make()
  entry = where / 'features' / hashlib.sha256(
      json.dumps(about, sort_keys=True).encode()).hexdigest()
  damaged = False
  try:
    windows = store.read_store(entry, about, tokenizer=tokenizer)
    with contextlib.suppress(OSError):  # the cache of another user
      os.utime(entry)
    return windows
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (store.DamagedError, OSError) as e:
    damaged = True
    say(f'feature cache {entry}: {_reason(e)}; made anew')
  windows = make()
  if identify() == about:  # else the data changed while it was read
    try:
      _write_entry(entry, windows, about, damaged, learned=tokenizer is None)
    except OSError as e:
      say(f'feature cache {where}: {_reason(e)}; the run goes on without it')
  return windows


@functools.cache
def code_version() -> str:
  """Returns a sha256 of the code that turns text into windows.

  Comments, layout and docstrings do not count, so that editing them does not
  make users tokenise their data again.
  """
  here = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in [*sorted(here.rglob('*.py')), pathlib.Path(files.__file__),
               pathlib.Path(registry.__file__), pathlib.Path(errors.__file__)]:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
          ast.get_docstring(node, clean=False) is not None):
        del node.body[0]
    digest.update(ast.dump(tree).encode())
  return digest.hexdigest()


def _file_identity(path: str) -> list[Any]:
  # The suffixes of a file choose its parser.
  where = pathlib.Path(path)
  if where.is_dir():
    return [[p.name, files.sha256(p)]
            for p in sorted(where.iterdir()) if p.is_file()]
  return [where.suffixes[-2:], files.sha256(where)]


def _tfds_identity(name: str, data_dir: str) -> list[Any] | None:
  """Returns names, sizes and times of the files that TFDS prepared.

  Hashing gigabytes, of which perhaps a slice is read, would take longer than
  the cache saves.
  """
  base = re.match(r'\w*', name)[0]  # of name/config:version
  root = tfds.data_directory(data_dir) / base
  paths = sorted(p for p in root.rglob('*') if p.is_file()) if base else []
  return [importlib.metadata.version('tensorflow-datasets'), *(
      [str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns]
      for p in paths)] if paths else None


def _part_identity(part: str) -> list[Any] | None:
  if os.path.exists(part):
    return _file_identity(part)
  name, arguments = registry.parse_spec(part)
  data: Any = None
  if ':' in name:
    return None  # code of the user, which may change
  if name == 'tfds':
    data = _tfds_identity(arguments['name'], arguments.get('data_dir', ''))
  elif name in ONE_FILE:
    data = _file_identity(arguments.pop('path'))
  elif name in ('articles', 'passage_only'):
    data = data_identity(arguments.pop('of'))
  elif name == 'synthetic':
    data = []  # its code and arguments determine the data
  return None if data is None else [
      name, sorted([k, repr(v)] for k, v in arguments.items()), data]


def data_identity(spec: str) -> list[Any] | None:
  """Returns a JSON value that identifies the data of a SPEC.

  Returns None if `sources.load_examples` would refuse the SPEC or a file, or
  if a TFDS data set is not prepared yet.
  """
  try:
    parts = [_part_identity(part) for part in sources.split_mixture(spec)]
  except (KeyError, OSError, TypeError, ValueError):
    return None  # reading the data raises an error that explains the reason
  return None if None in parts else parts


def _examples_identity(examples: Sequence[Example]) -> list[Any]:
  digest = hashlib.sha256()
  for example in examples:
    digest.update(repr(example).encode())
  return ['examples', digest.hexdigest()]


def _reason(e: Exception) -> str:
  return (e.strerror or str(e)) if isinstance(e, OSError) else str(e)


def _write_entry(entry: pathlib.Path, windows: windows_lib.WindowSet,
                 about: Any, damaged: bool, *, learned: bool) -> None:
  """Writes an entry, which appears complete by a rename.

  An entry that another process wrote first stays, unless it is `damaged`.
  """
  partial = _partial_path(entry)
  partial.mkdir(parents=True)
  try:
    store.write_store(partial, windows, about, with_vocabulary=learned)
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


def _partial_path(entry: pathlib.Path) -> pathlib.Path:
  return entry.with_name(
      f'.{entry.name}.{os.getpid()}-{secrets.token_hex(4)}.partial')


def _remove(entry: pathlib.Path) -> None:
  """Removes an entry by a rename, so that no process reads half of it."""
  partial = _partial_path(entry)
  with contextlib.suppress(FileNotFoundError):  # another process took it
    entry.rename(partial)
  shutil.rmtree(partial, ignore_errors=True)


def _evict(newest: pathlib.Path) -> None:
  """Removes the least recently used entries, and files of killed runs.

  Only names that this module creates are removed; others share the directory.
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
  """Writes the file names of a directory to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
