"""Checksums of a directory's files, kept with them: is it what was written?

Arrays have none of their own: of orbax's a flipped bit is read as it is.
"""

import hashlib
import os
import pathlib

from qa_jax.io import files

NAME = 'MANIFEST.sha256'  # `sha256sum -c` reads it


def write_manifest(directory: pathlib.Path) -> None:
  """Vouches for all files of a directory, atomically.

  Raises:
    UserError: no space, no permission, …
  """
  files.write_text(directory / NAME, _text(_sums(directory)))


def find_damage(directory: pathlib.Path, *, within: str = '') -> str:
  """'' if each file is what was vouched for, else 'FILE: what is wrong'.

  Of the files `within` a part of it alone, if that is given. Bytes that are
  added, changed, moved or missing are found wherever they are, in the manifest
  too; so are files that came later.
  """
  try:
    text = (directory / NAME).read_bytes().decode(errors='replace')
  except FileNotFoundError:
    return f'{NAME}: missing, as if never finished'
  except OSError as e:
    return f'{NAME}: {e.strerror}'
  sums = {}
  for line in text.split('\n')[:-2]:
    digest, _, name = line.partition('  ')
    sums[name] = digest
  if text != _text(sums):
    return f'{NAME}: damaged'
  try:
    found = _sums(directory, within)
  except OSError as e:
    return f'{os.path.relpath(e.filename, directory)}: {e.strerror}'
  expected = {n: s for n, s in sums.items() if n.startswith(within)}
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f'{name}: missing'
    if name not in expected:
      return f'{name}: not in {NAME}'
    if found[name] != expected[name]:
      return f'{name}: not the bytes that were written (sha256)'
  return ''


def _sums(directory: pathlib.Path, within: str = '') -> dict[str, str]:
  """{name: sha256} of the files below a directory."""
  sums = {}
  for path in directory.rglob('*'):
    name = path.relative_to(directory).as_posix()
    if name != NAME and name.startswith(within) and not path.is_dir():
      sums[name] = files.sha256(path)
  return sums


def _text(sums: dict[str, str]) -> str:
  """A line a file, and a comment that vouches for these lines."""
  lines = ''.join(f'{sums[name]}  {name}\n' for name in sorted(sums))
  return f'{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n'
