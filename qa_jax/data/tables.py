"""Tables with SQuAD's columns: Hugging Face `datasets`, parquet, CSV, JSON.

The columns question and context are required; id, answers, title and
is_impossible are optional; two columns of `examples.FLAT` may stand for
answers. Further columns are not read, but a column whose name resembles that of
a missing one is refused. `examples.question_example` reads a row. A CSV cell
holds `answers` as JSON or as pandas writes it. An empty cell of an optional
column counts as a missing value.
"""

import ast
from collections.abc import Callable, Iterator
import contextlib
import csv
import functools
import io
import json
import os
import pathlib
import re
import reprlib
import sys
from typing import Any, BinaryIO

from qa_jax import errors
from qa_jax.data import examples
from qa_jax.data.examples import Example
from qa_jax.data.examples import id_field
from qa_jax.data.examples import required_field
from qa_jax.data.examples import text_field
from qa_jax.io import files

REQUIRED = ('context', 'question')
OPTIONAL = ('id', 'answers', 'title', 'is_impossible')
BOOLEANS = {'true': True, 'false': False, '1': True, '0': False, '1.0': True,
            '0.0': False}
# Cells of answers and is_impossible that stand for a missing value.
MISSING = ('', 'nan', 'na', 'none', 'null', '<na>')


def read_table(*, path: str, locate_answers: bool = False) -> list[Example]:
  """Reads a table, from a file or a directory.

  A file is .parquet, .arrow, .csv(.gz), .tsv(.gz), or else JSON: one row a
  line, or a list of rows. A directory is from `Dataset.save_to_disk` of Hugging
  Face. With `locate_answers`, answers may lack answer_start.

  Raises:
    UserError: the file is of another kind or damaged, a column or value is
      missing or of another type, or pyarrow is needed and not installed.
  """
  where = pathlib.Path(path)
  if os.path.isdir(path):
    rows = _saved(where)
  else:
    match = NAMES.search(where.name)
    rows = (READERS[(match[1] or match[2]).lower()](where) if match
            else read_json(where))
  return examples.finish_examples((
      (at, row_example(row, at, locate=locate_answers))
      for at, row in rows), path)


def is_table(path: str) -> bool:
  """Returns whether a path is a directory or has the name of a table.

  A file of another name is JSON, whose content decides.
  """
  # isdir is False for a name no file can have.
  return os.path.isdir(path) or bool(NAMES.search(path))


def row_example(row: Any, at: str, *, locate: bool) -> Example:
  """Returns the example of a row that has its own context and title."""
  context = text_field(row, 'context', at)
  return examples.question_example(
      row, context, row.get('title'), at, locate=locate)


Rows = Iterator[tuple[str, dict[str, Any]]]  # (place for messages, row)


def read_json(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields (place, value) for each row or article of a JSON file.

  The file is one value a line, a list of values, or an object with the list
  `data`. Blank lines are skipped.

  Raises:
    UserError: the file is none of these.
  """
  text = files.read_text(path)
  if not text.strip():
    return  # no line, and so no row
  begin = len(text) - len(text.lstrip())
  errors.require(
      text[begin] in '[{',
      f'{path}: not JSON of questions: it begins with '
      f'{text[begin:begin + 20]!r}, expected a JSON object or list; the name '
      f'of a table ends in {", ".join(f".{name}" for name in READERS)}')
  try:
    value, end = json.JSONDecoder().raw_decode(text, begin)
  except (ValueError, RecursionError):
    value, end = files.parse_object(text, path), len(text)  # raises the reason
  rest = text[end:].lstrip(' \t\r')
  if rest.strip() and rest[0] == '\n' and '\n' not in text[begin:end]:
    yield from files.parse_rows(text, path)
    return
  if rest.strip():
    files.parse_object(text, path)  # raises the reason
  if isinstance(value, list):
    yield from ((f'{path}: [{i}]', row) for i, row in enumerate(value))
  elif isinstance(value.get('question'), dict | list):
    raise errors.UserError(
        f"{path}: 'question' is {type(value['question']).__name__}: the file "
        "has columns, not rows; write it with to_json(orient='records')")
  elif 'data' not in value and {
      'question', 'context', 'qas', 'paragraphs', 'header'} & value.keys():
    yield f'{path}:{1 + text.count(chr(10), 0, begin)}', value  # a single line
  else:
    yield from ((f'{path}: data[{i}]', row) for i, row in enumerate(
        required_field(value, 'data', list, str(path))))


def _csv(path: pathlib.Path, delimiter: str = ',') -> Rows:
  text = files.read_text(path, newline='')  # offsets count quoted "\r\n"
  limit = csv.field_size_limit(sys.maxsize)  # default: 131,072 characters
  try:
    reader = csv.reader(io.StringIO(text, newline=''), strict=True,
                        delimiter=delimiter)
    lines = [(reader.line_num, cells) for cells in reader if cells]
  except csv.Error as e:
    raise errors.UserError(
        f'{path}:{reader.line_num}: not CSV: {e}; quote each cell that holds a '
        'quote or a line end, as csv.writer and pandas do') from None
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
  for name in ('id', 'title'):
    row[name] = row.get(name) or None
  text, literal = examples.flat_columns(row) or ('', 'answers')
  for name in (literal, 'is_impossible'):
    if row.get(name, '').strip().lower() in MISSING:
      row[name] = None
  if row[literal] is not None:
    row[literal] = _literal(row[literal], f'{at}.{literal}')
  if text:  # a literal only beside a list of starts
    row[text] = (_literal(row[text], f'{at}.{text}') if isinstance(
        row[literal], list) else row[text] or None)
  if (impossible := row['is_impossible']) is not None:
    if impossible.lower() not in BOOLEANS:
      raise errors.UserError(
          f'{at}.is_impossible is {reprlib.repr(impossible)}, expected true, '
          'false, 0 or 1')
    row['is_impossible'] = BOOLEANS[impossible.lower()]
  return row


def _literal(cell: str, at: str) -> Any:
  """Parses a CSV cell: JSON, or a Python literal as pandas writes it.

  Lists of such a literal may be written as array([…], dtype=…), and numbers as
  np.int64(…).
  """
  with contextlib.suppress(ValueError, RecursionError):
    return json.loads(cell)
  try:
    return ast.literal_eval(_Arrays().visit(ast.parse(cell, mode='eval')))
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    raise errors.UserError(
        f'{at} is {reprlib.repr(cell)}, expected JSON such as '
        '{"text": […], "answer_start": […]}, as json.dumps writes it') from None


class _Arrays(ast.NodeTransformer):
  """A transformer of array([…], dtype=…) to […], and of np.int64(…) to …."""

  def visit_Call(self, node: ast.Call) -> ast.AST:
    node = self.generic_visit(node)
    name = (node.func.id if isinstance(node.func, ast.Name) else
            node.func.attr if isinstance(node.func, ast.Attribute) else '')
    return node.args[0] if len(node.args) == 1 and name in (
        'array', 'int64', 'int32', 'str_') else node


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
        f"{path}: takes pyarrow to read; pip install -e '.[arrow]'") from None
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
    inside = sorted(str(p) for depth in ('*', '*/*')
                    for p in directory.glob(depth)
                    if NAMES.search(p.name) or p.suffix in ('.json', '.jsonl'))
    raise errors.UserError(
        f'{directory}: Is a directory, and not one of save_to_disk: it has no '
        'state.json' + (f'; give a file, such as {inside[0]}, or several '
                        'joined by "+"' if inside else ''))
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
  known = (*REQUIRED, *OPTIONAL, *(examples.flat_columns(names) or ()))
  for name in known:
    if name in REQUIRED and name not in names:
      raise errors.UserError(
          f'{path} has no column {name!r}{errors.did_you_mean(name, names)}')
    if names.count(name) > 1:
      raise errors.UserError(f'{path} has the column {name!r} twice')
  examples.check_names(names, str(path))
  return [n for n in known if n in names]


READERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    'csv': _csv, 'tsv': functools.partial(_csv, delimiter='\t'),
    'parquet': _parquet, 'arrow': _arrow}
NAMES = re.compile(r'\.(csv|tsv)(?:\.gz)?$|\.(parquet|arrow)$', re.IGNORECASE)
