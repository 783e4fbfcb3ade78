"""Reading and writing of text, JSON and JSONL files.

Files are written under another name and renamed, so that a reader sees the old
file or the whole new one. Every failure is a UserError of one line.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, TextIO
import zlib

from qa_jax import errors

# A .gz file may unzip to UNZIPPED_TIMES its size, or to UNZIPPED_FREE bytes if
# more. Text shrinks to a tenth of its size, a gzip bomb to a thousandth.
UNZIPPED_TIMES, UNZIPPED_FREE = 100, 2**26
# The first bytes of a file that is no text → what to do with it.
NO_TEXT = {
    b'\x1f\x8b': 'it is a gzip file, so give it a name that ends in .gz',
    b'PAR1': 'it is a Parquet file: give it, unzipped, a name that ends in '
             '.parquet'}
PARTIAL = '.partial'  # ending of the name of an unfinished file or directory


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text as `write_bytes` does, zipped if `path` ends in .gz."""
  content = text.encode()
  write_bytes(path, gzip.compress(content, mtime=0)
              if path.suffix == '.gz' else content)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes `content` to `path` and creates its parent directories.

  A UserError is raised if this fails. An old file then stays unchanged.
  """
  partial = path.with_name(f'{path.name}.{os.getpid()}{PARTIAL}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    os.replace(partial, path)
  except OSError as e:
    raise errors.UserError(f'{path}: cannot be written: {e.strerror}') from None
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def write_directory(target: pathlib.Path,
                    fill: Callable[[pathlib.Path], None]) -> None:
  """Writes a temporary directory with `fill` and renames it to `target`.

  A rename cannot replace a mount point, the working directory, or a directory
  whose parent is read-only. Such a target gets its files one after another,
  config.json last, because it marks a run. A UserError is raised if `target` is
  not empty or cannot be written.
  """
  final = target.resolve()
  stays = final.is_dir() and (
      os.path.ismount(final) or os.path.samefile(final, os.curdir)
      or not os.access(final.parent, os.W_OK))
  name = f'{final.name}.{os.getpid()}{PARTIAL}'
  partial = final / name if stays else final.with_name(name)
  try:
    if stays and any(final.iterdir()):
      raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    # In containers, a killed process may have had this process id.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    if stays:
      for path in sorted(partial.iterdir(),
                         key=lambda path: path.name == 'config.json'):
        path.replace(final / path.name)
    else:
      partial.replace(final)
  except OSError as e:
    raise errors.UserError(
        f'{target}: cannot be written: {e.strerror}') from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def cache_home() -> pathlib.Path | None:
  """Returns this user's cache directory (XDG), or None without a home."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  # Without a home directory, expanduser leaves "~" as it is.
  return pathlib.Path(home) / 'qa_jax' if os.path.isabs(home) else None


def check_writable(path: pathlib.Path) -> None:
  """Raises a UserError if `path` cannot be written, before long work."""
  if path.is_dir():
    raise errors.UserError(f'{path}: a directory, expected a file to write')
  if path.exists() and not path.is_file():  # a rename would replace it
    raise errors.UserError(f'{path}: a device or a pipe, expected a file')
  above = next(p for p in path.absolute().parents if os.path.exists(p))
  try:
    tempfile.TemporaryFile(dir=above).close()  # permissions do not say enough
  except OSError as e:
    raise errors.UserError(
        f'{path}: cannot be written: {above} is not a directory to write in '
        f'({e.strerror})') from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes one value as indented JSON; NaN and infinity are a ValueError."""
  write_text(path, json.dumps(
      value, indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def write_jsonl(path: pathlib.Path, rows: Iterable[Any]) -> None:
  """Writes one JSON value a line; NaN and infinity are a ValueError."""
  write_text(path, ''.join(
      json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n'
      for row in rows))


def read_text(path: pathlib.Path, *, newline: str | None = None) -> str:
  """Reads UTF-8 text, and unzips it if `path` ends in .gz.

  A byte-order mark is dropped. Line ends become "\\n", unless `newline` is ''.
  A UserError is raised if the file is missing, a directory, unreadable, damaged
  or not UTF-8, or if a .gz file exceeds the bounds above when unzipped.
  """
  name = str(path) if str(path).isprintable() else repr(str(path))
  try:
    with _open(path, name, newline) as f:
      return f.read()
  except UnicodeDecodeError as e:
    fix = next((fix for begin, fix in NO_TEXT.items()
                if e.object.startswith(begin)), 're-encode it')
    raise errors.UserError(
        f'{name}: not UTF-8 at byte {e.start}; {fix}') from None
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise errors.UserError(
        f'{name}: not a whole gzip file ({e}); fetch it again') from None
  except OSError as e:
    raise errors.UserError(f'{name}: {e.strerror or e}') from None
  except errors.UserError:
    raise
  except ValueError as e:  # a name no file can have, such as one with NUL
    raise errors.UserError(f'{str(path)!r}: {e}') from None


def _open(path: pathlib.Path, name: str, newline: str | None) -> TextIO:
  options = {'encoding': 'utf-8-sig', 'newline': newline}
  if path.suffix != '.gz':
    return open(path, **options)
  content = bytearray()
  most = max(UNZIPPED_FREE, UNZIPPED_TIMES * path.stat().st_size)
  with gzip.open(path) as f:
    while part := f.read(2**20):
      content += part
      if len(content) > most:
        raise errors.UserError(
            f'{name}: unzips to more than {most} bytes, {UNZIPPED_TIMES} times '
            'its size; if that is right, unzip it and give the file itself')
  return io.TextIOWrapper(io.BytesIO(content), **options)


def parse_object(text: str, where: str | pathlib.Path,
                 **options: Any) -> dict[str, Any]:
  """Returns the JSON object in `text`, read by json.loads with `options`.

  A UserError that begins with `where` is raised if `text` is anything else.
  """
  try:
    value = json.loads(text, **options)
  except errors.UserError:
    raise
  except json.JSONDecodeError as e:
    raise errors.UserError(f'{where}: not JSON: {e.msg} at line {e.lineno}, '
                           f'column {e.colno}') from None
  except (ValueError, RecursionError) as e:  # too many digits or brackets
    raise errors.UserError(f'{where}: JSON out of bounds: {e}') from None
  if not isinstance(value, dict):
    raise errors.UserError(
        f'{where}: {type(value).__name__}, expected a JSON object')
  return value


def sha256(path: pathlib.Path) -> str:
  """Returns the SHA-256 hash of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, JSON object) for every line of a JSONL file.

  `place` is "PATH:LINE" for messages. Blank lines are skipped. Lines end only
  at \\n, since texts may hold other line separators.
  """
  yield from parse_rows(read_text(path), path)


def parse_rows(text: str, path: pathlib.Path
               ) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, JSON object) like `read_rows`, from the text of a file."""
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      yield (where := f'{path}:{number}'), parse_object(line, where)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Reads the JSON object in a file."""
  return parse_object(read_text(path), path)
