"""What a data SPEC stands for right now: the data part of a cache's key.

A file is known by the sha256 of its bytes, so that a copy is the same data and
an edit is other data.
"""

from collections.abc import Sequence
import hashlib
import importlib.metadata
import os
import pathlib
import re
from typing import Any

from qa_jax import files
from qa_jax import registry
from qa_jax.data import sources
from qa_jax.data.examples import Example


def of(spec: str) -> list[Any] | None:
  """What all parts of a SPEC stand for, as JSON.

  None if that cannot be told: a SPEC or file that `sources.load` refuses, or a
  TFDS data set that is still to be prepared.
  """
  try:
    parts = [_part(part) for part in sources._parts(spec)]
  except (KeyError, OSError, TypeError, ValueError):  # load says why
    return None
  return None if None in parts else parts


def of_examples(examples: Sequence[Example]) -> list[Any]:
  """The same for examples that are in memory."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(repr(example).encode())
  return ['examples', digest.hexdigest()]


def _part(part: str) -> list[Any] | None:
  if os.path.exists(part):
    return _file(part)
  name, arguments = registry.parse(part)
  data: Any = None
  if name == 'tfds':
    data = _prepared(arguments['name'], arguments.get('data_dir', ''))
  elif 'path' in arguments:
    data = _file(arguments.pop('path'))
  elif name == 'articles':
    data = of(arguments.pop('of'))
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
