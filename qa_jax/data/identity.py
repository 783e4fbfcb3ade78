"""What a data SPEC stands for right now: the data part of a cache's key.

A file is known by the sha256 of its bytes, so that a copy is the same data and
an edit is other data. Hashing costs 0.6 ms a megabyte, 20 ms for SQuAD, each
time a run starts; a hash is therefore noted beside size, times and inode of the
file, as git does in its index, and taken again when any of them differs.
"""

from collections.abc import Sequence
import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import re
import time
from typing import Any

from qa_jax import errors
from qa_jax import files
from qa_jax import registry
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data.examples import Example

# A file that was written this short a time ago may be written again without a
# change of its times, so its hash is not noted.
SETTLED_SECONDS = 2.0


def of(spec: str, notes: pathlib.Path) -> list[Any] | None:
  """What all parts of a SPEC stand for, as JSON; hashes are noted in `notes`.

  None if that cannot be told: a SPEC or file that `sources.load` refuses, or a
  TFDS data set that is still to be prepared.
  """
  try:
    parts = [_part(part, notes) for part in sources._parts(spec)]
  except (KeyError, OSError, TypeError, ValueError):  # load says why
    return None
  return None if None in parts else parts


def of_examples(examples: Sequence[Example]) -> list[Any]:
  """The same for examples that are in memory."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(repr(example).encode())
  return ['examples', digest.hexdigest()]


def _part(part: str, notes: pathlib.Path) -> list[Any] | None:
  if os.path.exists(part):
    return _file(part, notes)
  name, arguments = registry.parse(part)
  data: Any = None
  if name == 'tfds':
    data = _prepared(arguments['name'], arguments.get('data_dir', ''))
  elif 'path' in arguments:
    data = _file(arguments.pop('path'), notes)
  elif name == 'articles':
    data = of(arguments.pop('of'), notes)
  elif name == 'synthetic':
    data = []  # its code and arguments say all
  return None if data is None else [
      name, sorted([k, repr(v)] for k, v in arguments.items()), data]


def _file(path: str, notes: pathlib.Path) -> list[Any]:
  """The endings of the name choose the parser, and the bytes are the data; of
  a directory the names and bytes of its files."""
  where = pathlib.Path(path)
  if where.is_dir():
    return [[p.name, file_sha256(p, notes)]
            for p in sorted(where.iterdir()) if p.is_file()]
  return [where.suffixes[-2:], file_sha256(where, notes)]


def file_sha256(path: pathlib.Path, notes: pathlib.Path) -> str:
  """sha256 of a file, read only if it changed since it was noted.

  Raises:
    OSError: the file cannot be read; that a note cannot is no error.
  """
  where = str(path.resolve())
  note = notes / f'{hashlib.sha256(where.encode()).hexdigest()}.json'
  signature = _signature(path)
  with contextlib.suppress(OSError, store.DamagedError):
    noted = store.unseal(note.read_bytes())
    if noted['file'] == where and noted['signature'] == signature:
      return noted['sha256']
  now = time.time()
  digest = files.sha256(path)
  changed = max(path.stat().st_mtime, path.stat().st_ctime)
  if signature == _signature(path) and changed < now - SETTLED_SECONDS:
    with contextlib.suppress(errors.UserError):
      files.write_text(note, store.seal({
          'file': where, 'signature': signature, 'sha256': digest}).decode())
  return digest


def _signature(path: pathlib.Path) -> list[int]:
  s = path.stat()
  return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


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
