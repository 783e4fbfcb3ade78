"""Whole files or nothing: written by rename, read with one-line errors."""

from collections.abc import Iterable
import json
import os
import pathlib
from typing import Any

from qa_jax import errors


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text so that `path` is the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  try:
    partial.write_text(text, encoding='utf-8', newline='\n')
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  write_text(path, json.dumps(
      value, indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def write_jsonl(path: pathlib.Path, rows: Iterable[Any]) -> None:
  write_text(path, ''.join(
      json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n'
      for row in rows))


def read_text(path: pathlib.Path) -> str:
  """UTF-8 text, a byte-order mark dropped.

  Raises:
    UserError: missing, a directory, unreadable, or not UTF-8.
  """
  try:
    return path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as e:
    raise errors.UserError(
        f'{path}: not UTF-8 at byte {e.start}; re-encode it') from None
  except OSError as e:
    raise errors.UserError(f'{path}: {e.strerror or e}') from None


def parse_object(text: str, where: str | pathlib.Path,
                 **options: Any) -> dict[str, Any]:
  """The JSON object in `text`; `where` begins the UserError otherwise.

  `options` are those of json.loads.
  """
  try:
    value = json.loads(text, **options)
  except errors.UserError:
    raise
  except json.JSONDecodeError as e:
    raise errors.UserError(f'{where}: not JSON: {e.msg} at line {e.lineno}, '
                           f'column {e.colno}') from None
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f'{where}: not JSON: {e}') from None
  if not isinstance(value, dict):
    raise errors.UserError(
        f'{where}: {type(value).__name__}, expected a JSON object')
  return value


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object that a file holds."""
  return parse_object(read_text(path), path)
