"""A manifest: the checksums of all files of a directory, stored beside them.

Orbax stores arrays without checksums and would read a flipped bit as a number.
"""

import hashlib
import os
import pathlib

from qa_jax.io import files

NAME = 'MANIFEST.sha256'  # `sha256sum -c` reads it


def write_manifest(directory: pathlib.Path) -> None:
  """Writes the manifest of a directory, or raises `write_text`'s UserError."""
  files.write_text(directory / NAME, _text(_sums(directory)))


def find_damage(directory: pathlib.Path, *, within: str = '') -> str:
  """Returns 'FILE: fault' of the first file unlike the manifest, '' for none.

  A file that is missing, changed or new is a fault, and so is a changed
  manifest. Only files whose path begins with `within` are read.
  """
  try:
    text = (directory / NAME).read_bytes().decode(errors='replace')
  except FileNotFoundError:
    return f'{NAME}: missing, as if never finished'
  except OSError as e:
    return f'{NAME}: {e.strerror}'
  rows = (line.partition('  ') for line in text.split('\n')[:-2])
  sums = {name: digest for digest, _, name in rows}
  if text != _text(sums):
    return f'{NAME}: damaged'
  try:
    actual = _sums(directory, within)
  except OSError as e:
    return f'{os.path.relpath(e.filename, directory)}: {e.strerror}'
  expected = {n: s for n, s in sums.items() if n.startswith(within)}
  for name in sorted(expected.keys() | actual.keys()):
    if name not in actual:
      return f'{name}: missing'
    if name not in expected:
      return f'{name}: not in {NAME}'
    if actual[name] != expected[name]:
      return f'{name}: not the bytes that were written (sha256)'
  return ''


def _sums(directory: pathlib.Path, within: str = '') -> dict[str, str]:
  """Returns {name: sha256} of the files below a directory."""
  sums = {}
  for path in directory.rglob('*'):
    name = path.relative_to(directory).as_posix()
    if name != NAME and name.startswith(within) and not path.is_dir():
      sums[name] = files.sha256(path)
  return sums


def _text(sums: dict[str, str]) -> str:
  """Returns one line a file, and a comment with the sha256 of these lines."""
  lines = ''.join(f'{sums[name]}  {name}\n' for name in sorted(sums))
  return f'{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n'
