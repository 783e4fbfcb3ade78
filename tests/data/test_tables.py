"""Tests of tables: examples as from SQuAD JSON, and one-line errors."""

import csv
import gzip
import io
import json
import pathlib
import sys

import hypothesis
from hypothesis import strategies as st
import pyarrow as pa
from pyarrow import parquet
import pytest

from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from tests.common import examples
from tests.common.refusals import assert_examples_or_one_line
from tests.common.refusals import refusal

CONTEXT = 'Mira built\r\nthe "Osprey" in Tarn,\nsaid Zoë 😀.'
ROWS = [  # as in the hub's squad_v2: no is_impossible
    {'id': 'who', 'title': 'Osprey', 'context': CONTEXT,
     'question': 'Who built it?',
     'answers': {'text': ['Mira', 'Mira built'], 'answer_start': [0, 0]}},
    {'id': 'when', 'title': 'Osprey', 'context': CONTEXT, 'question': 'When?',
     'answers': {'text': [], 'answer_start': []}},
    {'id': 'says', 'title': 'Osprey', 'context': CONTEXT,
     'question': 'Who says "it", in one word?',
     'answers': {'text': ['Zoë'], 'answer_start': [CONTEXT.index('Zoë')]}}]
EXAMPLES = [
    Example('who', 'Who built it?', CONTEXT,
            (GoldAnswer('Mira', 0), GoldAnswer('Mira built', 0)),
            title='Osprey'),
    Example('when', 'When?', CONTEXT, (), True, 'Osprey'),
    Example('says', 'Who says "it", in one word?', CONTEXT,
            (GoldAnswer('Zoë', 39),), title='Osprey')]
SCHEMA = pa.schema([
    ('id', pa.string()), ('title', pa.string()), ('context', pa.string()),
    ('question', pa.string()), ('answers', pa.struct([
        ('text', pa.list_(pa.string())),
        ('answer_start', pa.list_(pa.int32()))]))])


def arrow_table(rows, schema=SCHEMA) -> pa.Table:
  return pa.Table.from_pylist(rows, schema)


def stream(table: pa.Table) -> bytes:
  """Writes an Arrow stream in small batches, as `datasets` does."""
  sink = pa.BufferOutputStream()
  with pa.ipc.new_stream(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)
  return sink.getvalue().to_pybytes()


def arrow_file(table: pa.Table) -> bytes:
  sink = pa.BufferOutputStream()
  with pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
  return sink.getvalue().to_pybytes()


def parquet_file(table: pa.Table) -> bytes:
  sink = pa.BufferOutputStream()
  parquet.write_table(table, sink)
  return sink.getvalue().to_pybytes()


def jsonl(rows) -> str:
  return ''.join(json.dumps(row) + '\n' for row in rows)


def csv_text(rows, cell=json.dumps) -> str:
  """The rows as CSV; `cell` writes what is neither text nor missing."""
  out = io.StringIO(newline='')
  writer = csv.DictWriter(out, list(rows[0]))
  writer.writeheader()
  for row in rows:
    writer.writerow({k: v if v is None or isinstance(v, str) else cell(v)
                     for k, v in row.items()})
  return out.getvalue()


def pandas_cell(answers) -> str:
  """How a struct of lists looks in CSV that pandas wrote."""
  text, start = answers['text'], answers['answer_start']
  return (f"{{'text': array({text!r}, dtype=object),\n"
          f" 'answer_start': array({start!r}, dtype=int32)}}")


def save_to_disk(where: pathlib.Path, *shards, **state) -> str:
  """The files of `datasets`' save_to_disk, version 4.0."""
  where.mkdir(parents=True)
  names = [f'data-{i:05d}-of-{len(shards):05d}.arrow'
           for i in range(len(shards))]
  for name, rows in zip(names, shards, strict=True):
    (where / name).write_bytes(stream(arrow_table(rows)))
  (where / 'dataset_info.json').write_text('{"splits": null}')
  (where / 'state.json').write_text(json.dumps({
      '_data_files': [{'filename': n} for n in names], '_fingerprint': 'f3a1',
      '_format_type': None, '_split': 'train', **state}))
  return str(where)


def write(path: pathlib.Path, content: bytes | str) -> str:
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return str(path)


WRITERS = {
    'a.parquet': lambda rows: parquet_file(arrow_table(rows)),
    'stream.arrow': lambda rows: stream(arrow_table(rows)),
    'file.arrow': lambda rows: arrow_file(arrow_table(rows)),
    'a.csv': csv_text,
    'pandas.csv': lambda rows: csv_text(rows, pandas_cell),
    'python.csv': lambda rows: csv_text(rows, repr),
    'excel.csv': lambda rows: b'\xef\xbb\xbf' + csv_text(rows).encode(),
    'a.csv.gz': lambda rows: gzip.compress(csv_text(rows).encode()),
    'a.jsonl': jsonl,
    'a.jsonl.gz': lambda rows: gzip.compress(jsonl(rows).encode())}


@pytest.mark.parametrize('name', WRITERS)
def test_every_format_gives_the_same_examples(tmp_path, name):
  spec = write(tmp_path / name, WRITERS[name](ROWS))
  assert sources.load_examples(spec) == EXAMPLES
  assert sources.load_examples(f'table(path="{spec}")') == EXAMPLES


@pytest.mark.parametrize('name', ['a.csv', 'a.parquet', 'file.arrow'])
def test_the_name_of_a_table_may_have_capitals(tmp_path, name):
  spec = write(tmp_path / name.upper(), WRITERS[name](ROWS))
  assert sources.load_examples(spec) == EXAMPLES


def test_saved_data_set_is_its_shards_in_their_order(tmp_path):
  spec = save_to_disk(tmp_path / 'squad' / 'train', ROWS[:2], ROWS[2:])
  (tmp_path / 'squad' / 'train' / 'cache-1.arrow').write_bytes(b'of map()')
  assert sources.load_examples(spec) == EXAMPLES


def test_saved_data_sets_mix_with_others(tmp_path):
  saved = save_to_disk(tmp_path / 'saved', ROWS[:1])
  other = write(tmp_path / 'a.csv', csv_text(ROWS[1:]))
  squad = examples.write(tmp_path / 'a.json', examples.SQUAD)
  mixed = sources.load_examples(f'{saved} + {other} + synthetic(size=2)')
  assert mixed[:3] == EXAMPLES and len(mixed) == 5
  assert 'twice' in refusal(sources.load_examples, f'{saved}+{squad}')


def test_several_splits_are_named(tmp_path):
  save_to_disk(tmp_path / 'squad' / 'train', ROWS)
  write(tmp_path / 'squad' / 'dataset_dict.json',
        '{"splits": ["train", "dev"]}')
  message = refusal(sources.load_examples, str(tmp_path / 'squad'))
  assert f'{tmp_path}/squad/train, {tmp_path}/squad/dev' in message


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl'])
@pytest.mark.parametrize(('fields', 'impossible', 'golds'), [
    ({}, False, 2), ({'answers': {'text': [], 'answer_start': []}}, True, 0),
    ({'answers': None}, False, 0),
    ({'is_impossible': True, 'answers': None}, True, 0),
    ({'is_impossible': None}, False, 2),
    ({'answers': {'text': [], 'answer_start': []}, 'is_impossible': False},
     False, 0)])
def test_is_impossible_decides_and_else_an_empty_list(
    tmp_path, name, fields, impossible, golds):
  content = (csv_text if name == 'a.csv' else jsonl)(
      [{**ROWS[0], **fields}, ROWS[2]])
  example, _ = sources.load_examples(write(tmp_path / name, content))
  assert (example.impossible, len(example.answers)) == (impossible, golds)


@pytest.mark.parametrize(('cell', 'impossible'), [
    *((cell, True) for cell in ('true', 'True', '1', '1.0')),
    *((cell, False) for cell in ('false', 'FALSE', '0', '0.0')),
    # Missing, so that the empty list of answers decides.
    *((cell, True) for cell in ('', 'nan', 'NA', 'None', 'null', '<NA>'))])
def test_cells_of_a_table_are_booleans_or_missing(tmp_path, cell, impossible):
  path = write(tmp_path / 'a.csv', csv_text([
      {**ROWS[0], 'answers': {'text': [], 'answer_start': []},
       'is_impossible': cell}, {**ROWS[1], 'is_impossible': 'false'}]))
  assert sources.load_examples(path)[0].impossible == impossible


def test_a_start_between_two_characters_is_refused(tmp_path):
  path = write(tmp_path / 'a.jsonl', jsonl([{
      'question': 'Who?', 'context': 'Ada met Bob.', 'answer_text': 'Bob',
      'answer_start': 8.5}]))
  assert 'answer_start is float' in refusal(sources.load_examples, path)


@pytest.mark.parametrize('name', ['a.parquet', 'a.csv', 'a.jsonl'])
def test_other_columns_are_not_read_and_optional_ones_may_lack(tmp_path, name):
  rows = [{'extra': 'x', **{k: row[k] for k in ('question', 'context', 'id')}}
          for row in ROWS]
  content = (jsonl(rows) if name == 'a.jsonl' else csv_text(rows)
             if name == 'a.csv' else parquet_file(pa.Table.from_pylist(rows)))
  assert sources.load_examples(write(tmp_path / name, content)) == [
      Example(e.id, e.question, e.context) for e in EXAMPLES]


def test_cells_may_be_longer_than_the_csv_module_allows(tmp_path):
  limit = csv.field_size_limit()
  row = {'id': 'a', 'question': 'q', 'context': 'x' * (limit + 1)}
  example, = sources.load_examples(write(tmp_path / 'a.csv', csv_text([row])))
  assert len(example.context) == limit + 1 == csv.field_size_limit() + 1


def test_strings_may_be_large_or_a_dictionary(tmp_path):
  table = arrow_table(ROWS)
  for i, kind in ((2, pa.large_string()),
                  (1, pa.dictionary(pa.int8(), pa.string()))):
    table = table.set_column(
        i, table.column_names[i], table.column(i).cast(kind))
  spec = write(tmp_path / 'a.parquet', parquet_file(table))
  assert sources.load_examples(spec) == EXAMPLES


def test_an_empty_cell_of_ids_is_missing(tmp_path):
  blank = [{**row, 'id': ''} for row in ROWS]
  spec = write(tmp_path / 'a.csv', csv_text(blank))
  assert [e.id for e in sources.load_examples(spec)] == ['0', '1', '2']
  write(tmp_path / 'a.csv', csv_text([ROWS[0], *blank[1:]]))
  assert "a.csv:7 has no 'id'; 1 of 3 questions have one" in refusal(
      sources.load_examples, spec)
  lines = write(tmp_path / 'a.jsonl', jsonl([ROWS[0], *blank[1:]]))
  assert 'a.jsonl:2.id is empty' in refusal(sources.load_examples, lines)


START = {'text': ['Mira'], 'answer_start': [len(CONTEXT) + 1]}


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl'])
@pytest.mark.parametrize(('row', 'message'), [
    ({**ROWS[1], 'answers': START}, 'answers[0].answer_start is 46, outside'),
    ({**ROWS[1], 'answers': {'text': ['a'], 'answer_start': [True]}},
     'answer_start is bool, expected int'),
    ({**ROWS[1], 'answers': {'text': ['a'], 'answer_start': [0.0]}},
     'answer_start is float, expected int'),
    ({**ROWS[1], 'answers': {'text': ['a'], 'answer_start': []}},
     'has 1 text and 0 answer_start'),
    ({**ROWS[1], 'answers': {'text': 'Mira', 'answer_start': [0]}},
     'text is str, expected list'),
    ({**ROWS[1], 'answers': {'text': [3], 'answer_start': [0]}},
     'text is int, expected str'),
    ({**ROWS[1], 'answers': {'text': []}}, "has no 'answer_start'"),
    ({**ROWS[1], 'answers': 7}, 'answers is int, expected a list of {"text"'),
    ({**ROWS[1], 'answers': [7]}, 'answers[0] is int'),
    ({**ROWS[1], 'is_impossible': 'maybe'}, 'is_impossible is ')])
def test_bad_row_is_named_with_its_line(tmp_path, name, row, message):
  rows = [{'is_impossible': None, **ROWS[0]}, {'is_impossible': None, **row}]
  if name == 'a.csv':
    path, line = write(tmp_path / name, csv_text(rows)), 7  # contexts take 3
  else:
    path, line = write(tmp_path / name, jsonl(rows)), 2
  text = refusal(sources.load_examples, path)
  assert message in text and text.startswith(f'{path}:{line}')


@pytest.mark.parametrize(('content', 'message'), [
    ('', 'holds no question'), ('id,context,question\n', 'holds no question'),
    ('id,text,question\n1,a,b\n', "no column 'context'"),
    ('id,context,qestion\n1,a,b\n', "did you mean 'qestion'"),
    ('id,context,context,question\n', "'context' twice"),
    ('id,context,question\n1,a\n', ':2 has 2 cells, the header 3'),
    ('id,context,question\n1,a,b,c\n', ':2 has 4 cells, the header 3'),
    ('id,context,question\n1,"a,b\n', 'not CSV: unexpected end of data'),
    ('id,context,question\n1,"a"b",c\n', '; quote each cell that holds a'),
    (b'id,context,question\n1,\xff,b\n', 'not UTF-8'),
    ('id,context,question,answers\n1,a,b,__import__("os")\n',
     'answers is \'__import__("os")\', expected'),
    ('id,context,question,answers\n1,a,b,' + '[' * 9999 + '\n', 'expected'),
    ('id,context,question,answers\n1,a,b,' + '(' * 99 + '\n', 'expected')])
def test_bad_csv_is_one_line(tmp_path, content, message):
  assert message in refusal(sources.load_examples,
                            write(tmp_path / 'a.csv', content))


@pytest.mark.parametrize('name', ['a.parquet', 'stream.arrow', 'file.arrow'])
def test_bad_value_in_arrow_is_named_with_its_row(tmp_path, name):
  path = write(tmp_path / name, WRITERS[name](
      [ROWS[0], {**ROWS[1], 'question': None}]))
  assert refusal(sources.load_examples, path) == (
      f'{path}: rows[1].question is NoneType, expected str')


@pytest.mark.parametrize(('column', 'kind', 'message'), [
    ('id', pa.float64(), 'rows[0].id is float, expected str'),
    ('context', pa.binary(), 'rows[0].context is bytes, expected str'),
    ('answers', pa.list_(pa.string()), 'answers[0] is str')])
def test_column_of_another_type_is_named(tmp_path, column, kind, message):
  value = {'id': 7.0, 'context': b'a', 'answers': ['Mira']}[column]
  row = {**ROWS[0], column: value}
  schema = pa.schema([f if f.name != column else (column, kind)
                      for f in SCHEMA])
  path = write(tmp_path / 'a.parquet', parquet_file(arrow_table([row], schema)))
  assert message in refusal(sources.load_examples, path)


@pytest.mark.parametrize('name', ['a.parquet', 'stream.arrow', 'file.arrow',
                                  'a.csv', 'a.jsonl'])
def test_missing_file_is_one_line(tmp_path, name):
  assert 'No such file' in refusal(sources.load_examples, str(tmp_path / name))
  for odd, message in (('\0', 'null'), ('\ud800', 'surrogates'),
                       ('x' * 300, 'too long')):
    assert message in refusal(sources.load_examples, odd + name)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda d: (d / 'state.json').write_text('{'), 'not JSON'),
    (lambda d: (d / 'state.json').write_text('{}'), "has no '_data_files'"),
    (lambda d: (d / 'state.json').write_text('{"_data_files": [{}]}'),
     "_data_files[0] has no 'filename'"),
    (lambda d: (d / 'data-00000-of-00001.arrow').unlink(), 'No such file'),
    (lambda d: (d / 'data-00000-of-00001.arrow').write_bytes(b''), 'arrow: '),
    (lambda d: (d / 'dataset_dict.json').write_text('[]'), 'JSON object')])
def test_damaged_directory_is_one_line(tmp_path, change, message):
  spec = save_to_disk(tmp_path / 'saved', ROWS)
  change(tmp_path / 'saved')
  text = refusal(sources.load_examples, spec)
  assert message in text and text.startswith(spec)


def test_rows_chosen_by_indices_are_refused(tmp_path):
  spec = save_to_disk(tmp_path / 'saved', ROWS,
                      _indices_data_files=[{'filename': 'indices.arrow'}])
  assert 'save it again' in refusal(sources.load_examples, spec)


@pytest.mark.parametrize(('path', 'message'), [
    ('a.txt', 'a.txt: No such file'), ('.', "it has no state.json")])
def test_what_is_no_table_is_one_line(path, message):
  assert message in refusal(sources.load_examples, f'table(path="{path}")')


def test_missing_library_is_one_line_with_its_extra(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.parquet', WRITERS['a.parquet'](ROWS))
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  assert "pip install -e '.[arrow]'" in refusal(sources.load_examples, path)
  assert sources.load_examples(write(tmp_path / 'a.csv',
                                     csv_text(ROWS))) == EXAMPLES


BINARY = {name: WRITERS[name](ROWS)
          for name in ('a.parquet', 'stream.arrow', 'file.arrow')}


@hypothesis.given(st.sampled_from(sorted(BINARY)), st.data())
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_bytes_are_examples_or_one_line(tmp_path_factory, name, data):
  content = bytearray(BINARY[name])
  for _ in range(data.draw(st.integers(0, 3))):
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
  cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
  path = write(tmp_path_factory.getbasetemp() / name, bytes(content[:cut]))
  assert_examples_or_one_line(path)


def test_directory_is_known_to_the_cache_by_its_files(tmp_path):
  def known(name, *shards):
    return cache.data_identity(save_to_disk(tmp_path / name, *shards))
  first = known('a', ROWS)
  assert first == known('b', ROWS) != known('c', ROWS[:2])
  (tmp_path / 'b' / 'data-00000-of-00001.arrow').write_bytes(
      stream(arrow_table(ROWS[1:])))
  assert first != cache.data_identity(str(tmp_path / 'b'))
