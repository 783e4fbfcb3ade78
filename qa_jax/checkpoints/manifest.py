"""A manifest: the checksums of all files of a directory, stored beside them.

Orbax stores arrays without checksums and would read a flipped bit as a number.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib

from qa_jax import errors
from qa_jax.io import files

NAME = 'MANIFEST.sha256'  # `sha256sum -c` reads it
NEXT = f'{NAME}.next'  # replaces the manifest after files were added


def is_sealed(directory: pathlib.Path) -> bool:
  """Returns whether a directory has a manifest."""
  return any((directory / name).is_file() for name in (NAME, NEXT))


def write_manifest(directory: pathlib.Path) -> None:
  """Writes the manifest of a directory, or raises `write_text`'s UserError."""
  files.write_text(directory / NAME, _text(_sums(directory)))


def complete_manifests(directories: Sequence[pathlib.Path]) -> None:
  """Writes the manifests of directories if none of them has one.

  A directory without a manifest is unfinished if another one has a manifest. So
  the manifests appear under their names only after all are written. What a
  process left that was killed here or in `add_file` is completed or removed.
  """
  if not any((directory / NAME).is_file() for directory in directories):
    for directory in directories:
      files.write_text(directory / NEXT, _text(_sums(directory)))
  for directory in directories:
    if (directory / NEXT).is_file():
      if _find_damage(directory, NEXT):
        (directory / NEXT).unlink()
      else:
        (directory / NEXT).replace(directory / NAME)


def add_file(directory: pathlib.Path, name: str, text: str) -> None:
  """Adds a file to a sealed directory, which matches a manifest all the time.

  Raises `write_text`'s UserError, or a UserError if the manifest is damaged.
  """
  sums = _read(directory / NAME)
  if sums is None:
    raise errors.UserError(f'{directory / NAME}: damaged')
  digest = hashlib.sha256(text.encode()).hexdigest()
  files.write_text(directory / NEXT, _text({**sums, name: digest}))
  files.write_text(directory / name, text)
  (directory / NEXT).replace(directory / NAME)


def find_damage(directory: pathlib.Path, *, within: str = '') -> str:
  """Returns 'FILE: fault' of the first file unlike the manifest, '' for none.

  A file that is missing, changed or new is a fault, and so is a changed
  manifest. Only files whose path begins with `within` are read.
  """
  fault = _find_damage(directory, NAME, within)
  if fault and (directory / NEXT).is_file():  # killed within `add_file`
    return _find_damage(directory, NEXT, within) and fault
  return fault


def _find_damage(directory: pathlib.Path, manifest: str,
                 within: str = '') -> str:
  try:
    expected = _read(directory / manifest)
  except FileNotFoundError:
    return f'{manifest}: missing, as if never finished'
  except OSError as e:
    return f'{manifest}: {e.strerror}'
  if expected is None:
    return f'{manifest}: damaged'
  try:
    actual = _sums(directory, within)
  except OSError as e:
    return f'{os.path.relpath(e.filename, directory)}: {e.strerror}'
  expected = {n: s for n, s in expected.items() if n.startswith(within)}
  for name in sorted(expected.keys() | actual.keys()):
    if name not in actual:
      return f'{name}: missing'
    if name not in expected:
      return f'{name}: not in {NAME}'
    if actual[name] != expected[name]:
      return f'{name}: not the bytes that were written (sha256)'
  return ''


def _read(path: pathlib.Path) -> dict[str, str] | None:
  """Returns {name: sha256} of a manifest, None if it is damaged."""
  text = path.read_bytes().decode(errors='replace')
  rows = (line.partition('  ') for line in text.split('\n')[:-2])
  sums = {name: digest for digest, _, name in rows}
  return sums if text == _text(sums) else None


def _sums(directory: pathlib.Path, within: str = '') -> dict[str, str]:
  """Returns {name: sha256} of the files below a directory.

  Manifests are left out, and so are files that a killed `write_text` left.
  """
  sums = {}
  for path in directory.rglob('*'):
    name = path.relative_to(directory).as_posix()
    if (name not in (NAME, NEXT) and not name.endswith(files.PARTIAL)
        and name.startswith(within) and not path.is_dir()):
      sums[name] = files.sha256(path)
  return sums


def _text(sums: dict[str, str]) -> str:
  """Returns one line a file, and a comment with the sha256 of these lines."""
  lines = ''.join(f'{sums[name]}  {name}\n' for name in sorted(sums))
  return f'{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n'
