"""Tables with SQuAD's columns: Hugging Face `datasets`, parquet, CSV, JSONL.

The columns id, question and context are required; answers, title and
is_impossible are optional. Further columns are not read. `answers` is {"text":
[…], "answer_start": […]} as in data sets of the Hugging Face hub, or SQuAD's
list of {"text": …, "answer_start": …}. A CSV cell holds either form as JSON or
as pandas writes it. Without a column is_impossible, an empty list of answers
marks an unanswerable question, as in the hub's squad_v2. An empty cell of an
optional column counts as a missing value.
"""

import ast
from collections.abc import Callable, Iterator
import contextlib
import csv
import gzip
import io
import json
import os
import pathlib
import re
import reprlib
import sys
from typing import Any, BinaryIO
import zlib

from qa_jax import errors
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import gold_answer
from qa_jax.data.examples import id_field
from qa_jax.data.examples import required_field
from qa_jax.data.examples import text_field
from qa_jax.io import files

REQUIRED = ('id', 'context', 'question')
OPTIONAL = ('answers', 'title', 'is_impossible')
BOOLEANS = {'true': True, 'false': False, '1': True, '0': False}


def read_table(*, path: str) -> list[Example]:
  """Reads a table, from a file or a directory.

  A file is .parquet, .arrow, .csv(.gz) or .jsonl(.gz). A directory is from
  `Dataset.save_to_disk` of Hugging Face.

  Raises:
    UserError: the file is of another kind or damaged, a column or value is
      missing or of another type, or pyarrow is needed and not installed.
  """
  where = pathlib.Path(path)
  if os.path.isdir(path):
    rows = _saved(where)
  else:
    match = re.search(r'\.(csv|jsonl)(?:\.gz)?$|\.(parquet|arrow)$', where.name)
    if not match:
      raise errors.UserError(
          f'{path}: a table ends in .csv, .jsonl, .parquet or .arrow')
    rows = READERS[match[1] or match[2]](where)
  return [_example(row, at) for at, row in rows]


def is_table(path: str) -> bool:
  """Returns whether `read_table` reads the file or directory at `path`.

  The name decides. A JSONL file is a table if its first row has a question.
  """
  where = pathlib.Path(path)
  if os.path.isdir(path):  # False for a name no file can have
    return any(
        (where / n).is_file() for n in ('state.json', 'dataset_dict.json'))
  if re.search(r'\.jsonl(\.gz)?$', path):
    try:
      with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
        first = json.loads(f.readline(files.UNZIPPED_FREE).decode('utf-8-sig'))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
      return False  # reading the file raises an error with the reason
    return isinstance(first, dict) and 'question' in first
  return bool(re.search(r'\.(csv(\.gz)?|parquet|arrow)$', path))


def _example(row: dict[str, Any], at: str) -> Example:
  row = {k: v for k, v in row.items() if v is not None or k not in OPTIONAL}
  key = id_field(row, 'id', at)
  question = text_field(row, 'question', at)
  context = text_field(row, 'context', at)
  golds = (_golds(row['answers'], context, f'{at}.answers')
           if 'answers' in row else ())
  impossible = (required_field(row, 'is_impossible', bool, at)
                if 'is_impossible' in row else 'answers' in row and not golds)
  title = text_field(row, 'title', at) if 'title' in row else ''
  return Example(key, question, context, () if impossible else golds,
                 impossible, title)


def _golds(answers: Any, context: str, at: str) -> tuple[GoldAnswer, ...]:
  if isinstance(answers, dict):
    texts = required_field(answers, 'text', list, at)
    starts = required_field(answers, 'answer_start', list, at)
    if len(texts) != len(starts):
      raise errors.UserError(
          f'{at} has {len(texts)} text and {len(starts)} answer_start')
    answers = [{'text': t, 'answer_start': s}
               for t, s in zip(texts, starts, strict=True)]
  if not isinstance(answers, list):
    raise errors.UserError(
        f'{at} is {type(answers).__name__}, expected {{"text": […], '
        '"answer_start": […]}')
  return tuple(gold_answer(a, context, f'{at}[{i}]')
               for i, a in enumerate(answers))


Rows = Iterator[tuple[str, dict[str, Any]]]  # (place for messages, row)


def _csv(path: pathlib.Path) -> Rows:
  text = files.read_text(path, newline='')  # offsets count quoted "\r\n"
  limit = csv.field_size_limit(sys.maxsize)  # default: 131,072 characters
  try:
    reader = csv.reader(io.StringIO(text, newline=''), strict=True)
    lines = [(reader.line_num, cells) for cells in reader if cells]
  except csv.Error as e:
    raise errors.UserError(f'{path}:{reader.line_num}: not CSV: {e}') from None
  finally:
    csv.field_size_limit(limit)
  if not lines:
    return
  header = lines[0][1]
  _check_columns(header, path)
  for number, cells in lines[1:]:
    at = f'{path}:{number}'
    if len(cells) != len(header):
      raise errors.UserError(
          f'{at} has {len(cells)} cells, the header {len(header)}')
    yield at, _decoded(dict(zip(header, cells, strict=True)), at)


def _decoded(row: dict[str, Any], at: str) -> dict[str, Any]:
  """Returns a CSV row with decoded optional cells; an empty cell is None."""
  for name in OPTIONAL:
    row[name] = row.get(name) or None
  if row['answers'] is not None:
    row['answers'] = _literal(row['answers'], f'{at}.answers')
  if (impossible := row['is_impossible']) is not None:
    if impossible.lower() not in BOOLEANS:
      raise errors.UserError(
          f'{at}.is_impossible is {reprlib.repr(impossible)}, expected true or '
          'false')
    row['is_impossible'] = BOOLEANS[impossible.lower()]
  return row


def _literal(cell: str, at: str) -> Any:
  """Parses a CSV cell: JSON, or a Python literal as pandas writes it.

  Lists of such a literal may be written as array([…], dtype=…).
  """
  with contextlib.suppress(ValueError, RecursionError):
    return json.loads(cell)
  try:
    return ast.literal_eval(_Arrays().visit(ast.parse(cell, mode='eval')))
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    raise errors.UserError(
        f'{at} is {reprlib.repr(cell)}, expected {{"text": […], '
        '"answer_start": […]}') from None


class _Arrays(ast.NodeTransformer):
  """A transformer of array([…], dtype=…) to […]."""

  def visit_Call(self, node: ast.Call) -> ast.AST:
    is_array = isinstance(node.func, ast.Name) and node.func.id == 'array'
    return node.args[0] if is_array and len(node.args) == 1 else node


def _parquet(path: pathlib.Path) -> Rows:
  def read(arrow: Any, stored: BinaryIO) -> Any:
    with arrow.parquet.ParquetFile(stored) as f:
      return f.read(_check_columns(f.schema_arrow.names, path),
                    use_threads=False)
  return _arrow_rows(path, read)


def _arrow(path: pathlib.Path) -> Rows:
  """Reads Arrow's file format, or its stream format as `datasets` writes."""
  def read(arrow: Any, stored: BinaryIO) -> Any:
    is_file = stored.read(6) == b'ARROW1'
    stored.seek(0)
    table = (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(
        stored).read_all()
    return table.select(_check_columns(table.column_names, path))
  return _arrow_rows(path, read)


def _arrow_rows(path: pathlib.Path,
                read: Callable[[Any, BinaryIO], Any]) -> Rows:
  try:
    import pyarrow  # here, because the import takes 0.1 s
    import pyarrow.parquet
  except ImportError:
    raise errors.UserError(
        f"{path}: takes pyarrow to read; pip install 'qa_jax[arrow]'") from None
  try:
    with open(path, 'rb') as stored:
      table = read(pyarrow, stored)
    table.validate(full=True)  # otherwise damaged offsets crash the process
    rows = table.to_pylist()
  except errors.UserError:
    raise
  except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as e:
    reason = ' '.join(str(getattr(e, 'strerror', None) or e).split())[:200]
    raise errors.UserError(f'{path}: {reason or "damaged"}') from None
  for i, row in enumerate(rows):
    yield f'{path}: rows[{i}]', row


def _saved(directory: pathlib.Path) -> Rows:
  """Reads the Arrow files that the state.json of a directory lists."""
  splits = directory / 'dataset_dict.json'
  if splits.is_file():
    names = required_field(
        files.read_object(splits), 'splits', list, str(splits))
    raise errors.UserError(
        f'{directory} has several splits; give one: '
        f'{", ".join(f"{directory}/{name}" for name in names)}')
  path = directory / 'state.json'
  if not path.is_file():
    raise errors.UserError(
        f'{directory}: Is a directory, and not one of save_to_disk: it has no '
        'state.json')
  state = files.read_object(path)
  if state.get('_indices_data_files'):
    raise errors.UserError(
        f'{path}: the rows are chosen by indices; save it again with a newer '
        '`datasets`')
  for i, entry in enumerate(
      required_field(state, '_data_files', list, str(path))):
    name = id_field(entry, 'filename', f'{path}: _data_files[{i}]')
    yield from _arrow(directory / pathlib.PurePath(name).name)


def _check_columns(names: list[str], path: pathlib.Path) -> list[str]:
  """Returns the columns to read; a UserError if one is missing or doubled."""
  for name in REQUIRED + OPTIONAL:
    if name in REQUIRED and name not in names:
      raise errors.UserError(
          f'{path} has no column {name!r}{errors.did_you_mean(name, names)}')
    if names.count(name) > 1:
      raise errors.UserError(f'{path} has the column {name!r} twice')
  return [n for n in REQUIRED + OPTIONAL if n in names]


READERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    'csv': _csv, 'jsonl': files.read_rows, 'parquet': _parquet, 'arrow': _arrow}
