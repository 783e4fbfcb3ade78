"""Tests of every data source and form of a file against one list of examples.

The rows below are written in each form that users have, and each form must give
equal examples, or a refusal in one line that names the way.
"""

import csv
import io
import json
import pathlib
import re
import types

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from qa_jax.data import alignment
from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import tokenizer
from qa_jax.data.examples import FLAT
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from tests.common import examples as examples_lib
from tests.common.refusals import refusal

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
CONTEXT = 'Mira built the\n"Osprey" in Tarn, said Zoë 😀.'
ROWS = [
    {'id': 262, 'title': None, 'context': CONTEXT, 'question': 'Who\tbuilt it?',
     'answers': [{'text': 'Mira', 'answer_start': 0}]},
    {'id': 263, 'title': None, 'context': CONTEXT, 'question': 'When?',
     'answers': []},
    {'id': 264, 'title': None, 'context': CONTEXT, 'question': 'Who says "it"?',
     'answers': [{'text': 'Zoë', 'answer_start': CONTEXT.index('Zoë')},
                 {'text': 'said Zoë', 'answer_start': CONTEXT.index('said')}]}]
EXAMPLES = [
    Example('262', 'Who\tbuilt it?', CONTEXT, (GoldAnswer('Mira', 0),)),
    Example('263', 'When?', CONTEXT, (), True),
    Example('264', 'Who says "it"?', CONTEXT,
            (GoldAnswer('Zoë', 38), GoldAnswer('said Zoë', 33)))]


def lists(answers):
  """Returns a list of answers as the hub's object of two lists."""
  return {name: [a[name] for a in answers]
          for name in ('text', 'answer_start')
          if all(name in a for a in answers)}


def articles(rows, answers=list) -> str:
  return json.dumps({'data': [{'title': row.get('title'), 'paragraphs': [{
      'context': row['context'], 'qas': [{
          k: answers(v) if k == 'answers' and isinstance(v, list) else v
          for k, v in row.items() if k not in ('title', 'context')}]}]}
                              for row in rows]})


def lines(rows) -> str:
  return '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)


def with_lists(rows):
  return [{k: lists(v) if k == 'answers' and isinstance(v, list) else v
           for k, v in row.items()} for row in rows]


def delimited(rows, delimiter=',', cell=repr) -> str:
  """Returns the text that to_csv of pandas writes, with its index column."""
  out = io.StringIO(newline='')
  writer = csv.writer(out, delimiter=delimiter, lineterminator='\n')
  names = list(rows[0])
  writer.writerow(['', *names])
  for n, row in enumerate(rows):
    writer.writerow([n, *(
        '' if row[k] is None else row[k] if isinstance(row[k], str)
        else cell(row[k]) for k in names)])
  return out.getvalue()


def numpy_cell(value) -> str:
  """Returns a cell as pandas prints the arrays of a parquet file."""
  if not isinstance(value, list):
    return str(value)
  arrays = (f'{name!r}: array({values!r}, dtype=object)'
            for name, values in lists(value).items())
  return f'{{{", ".join(arrays)}}}'


def parquet_bytes(rows) -> bytes:
  sink = pa.BufferOutputStream()
  parquet.write_table(pa.Table.from_pylist(rows), sink)
  return sink.getvalue().to_pybytes()


def arrow_bytes(rows) -> bytes:
  table = pa.Table.from_pylist(rows)
  sink = pa.BufferOutputStream()
  with pa.ipc.new_stream(sink, table.schema) as writer:
    writer.write_table(table)
  return sink.getvalue().to_pybytes()


# Form → (name of the file, function from rows to its content).
FORMS = {
    'SQuAD': ('a.json', articles),
    'SQuAD, lists': ('a.json', lambda rows: articles(rows, lists)),
    'SQuAD, a line': ('a.jsonl', articles),
    'run_qa': ('a.json', lambda rows: {'data': rows}),
    'run_qa, lists': ('a.json', lambda rows: {'data': with_lists(rows)}),
    'list': ('a.json', lambda rows: json.dumps(rows, indent=1)),
    'list of articles': ('a.json', lambda rows: json.loads(articles(rows))[
        'data']),
    'JSON lines': ('a.jsonl', lines),
    'JSON lines, lists': ('a.jsonl', lambda rows: lines(with_lists(rows))),
    'JSON lines in .json': ('a.json', lines),
    'JSON lines in .txt': ('rows.txt', lines),
    'JSON lines, no ending': ('rows', lines),
    'blank lines': ('a.jsonl', lambda rows: '\n \r\n' + lines(rows).replace(
        '\n', '\n\n\t\n') + '\n\n'),
    'byte-order mark': ('a.json', lambda rows: '\ufeff\n' + lines(rows)),
    'articles in lines': ('a.jsonl', lambda rows: lines(
        json.loads(articles(rows))['data'])),
    'paragraphs in lines': ('a.jsonl', lambda rows: lines(
        a['paragraphs'][0] for a in json.loads(articles(rows))['data'])),
    'CSV': ('a.csv', delimited),
    'CSV, JSON cells': ('a.csv', lambda rows: delimited(
        rows, cell=json.dumps)),
    'CSV, arrays': ('a.csv', lambda rows: delimited(rows, cell=numpy_cell)),
    'CSV, NumPy numbers': ('a.csv', lambda rows: delimited(rows).replace(
        "'answer_start': 0", "'answer_start': np.int64(0)")),
    'CSV, mark': ('a.csv', lambda rows: '\ufeff' + delimited(rows)),
    'TSV': ('a.tsv', lambda rows: delimited(rows, '\t')),
    'parquet': ('a.parquet', parquet_bytes),
    'parquet, lists': ('a.parquet', lambda rows: parquet_bytes(
        with_lists(rows))),
    'Arrow': ('a.arrow', arrow_bytes)}


def write(folder: pathlib.Path, form: str, rows) -> str:
  name, content = FORMS[form]
  return examples_lib.write(folder / name, content(rows))


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_equal_examples(tmp_path, form):
  assert sources.load_examples(write(tmp_path, form, ROWS)) == EXAMPLES


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('values', [(False, True, False), (0, 1, 0),
                                    (None, 1, None), (None, True, None)])
def test_is_impossible_may_be_a_number_or_missing(tmp_path, form, values):
  rows = [{**row, 'is_impossible': value}
          for row, value in zip(ROWS, values, strict=True)]
  examples = sources.load_examples(write(tmp_path, form, rows))
  assert examples == EXAMPLES and not any(e.unmarked for e in examples)


@pytest.mark.parametrize('form', FORMS)
def test_questions_without_ids_are_numbered(tmp_path, form):
  rows = [{k: v for k, v in row.items() if k != 'id'} for row in ROWS]
  examples = sources.load_examples(write(tmp_path, form, rows))
  assert [e.id for e in examples] == ['0', '1', '2']
  assert [e.answers for e in examples] == [e.answers for e in EXAMPLES]


def test_numbers_are_those_of_the_whole_file(tmp_path):
  rows = [{k: v for k, v in row.items() if k != 'id'} for row in ROWS]
  spec = write(tmp_path, 'SQuAD', rows)
  examples = sources.load_examples(
      f'squad_json(path="{spec}", impossible=False)')
  assert [e.id for e in examples] == ['0', '2']


def test_numbers_in_a_mixture_follow_the_index_of_their_part(tmp_path):
  rows = [{k: v for k, v in row.items() if k != 'id'} for row in ROWS]
  plain = write(tmp_path, 'SQuAD', rows)
  for name in ('named', 'more'):
    (tmp_path / name).mkdir()
  named = write(tmp_path / 'named', 'SQuAD', ROWS)
  more = write(tmp_path / 'more', 'CSV', rows)
  load = lambda spec: [e.id for e in sources.load_examples(spec)]
  own = ['262', '263', '264']
  assert load(f'{plain}+{named}+{more}') == [
      '0-0', '0-1', '0-2', *own, '2-0', '2-1', '2-2']
  assert load(f'articles(of="{more}")+articles(of="{plain}+{more}")') == [
      '0-0', '0-1', '0-2', '1-0-0', '1-0-1', '1-0-2', '1-1-0', '1-1-1', '1-1-2']
  assert "the question id '262' stands there twice" in refusal(
      sources.load_examples, f'{named}+{named}')


@pytest.mark.parametrize('form', ['SQuAD', 'list', 'JSON lines'])
def test_an_id_that_only_some_questions_lack_is_refused(tmp_path, form):
  rows = [ROWS[0], {k: v for k, v in ROWS[1].items() if k != 'id'}, ROWS[2]]
  assert "has no 'id'; 2 of 3 questions have one" in refusal(
      sources.load_examples, write(tmp_path, form, rows))


@pytest.mark.parametrize('form', FORMS)
def test_empty_lists_without_a_mark_are_unanswerable_and_counted(
    tmp_path, form):
  rows = [*ROWS, {**ROWS[1], 'id': 265}]
  examples = sources.load_examples(write(tmp_path, form, rows))
  assert [e.impossible for e in examples] == [False, True, False, True]
  assert sum(e.unmarked for e in examples) == 2


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('answered', 'empty', 'refused'), [
    (5, 35, True), (3, 9, False), (3, 10, True), (1, 3, False)])
def test_a_file_that_lost_its_answers_is_refused(
    tmp_path, form, answered, empty, refused):
  rows = [{**ROWS[0], 'id': n} for n in range(answered)] + [
      {**ROWS[1], 'id': answered + n} for n in range(empty)]
  spec = write(tmp_path, form, rows)
  if refused:
    assert (f"'answers' is empty for {empty} of {answered + empty} questions"
            in refusal(sources.load_examples, spec))
    # One mark is enough.
    spec = write(tmp_path, form, [
        {**row, 'is_impossible': row is rows[-1] or None} for row in rows])
  examples = sources.load_examples(spec)
  assert sum(e.impossible for e in examples) == empty


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('answers', [[], None, 'no such column'])
def test_a_file_without_any_answer_is_a_test_set(tmp_path, form, answers):
  rows = [{**row, 'answers': answers} for row in ROWS]
  if answers == 'no such column':
    for row in rows:
      del row['answers']
  spec = write(tmp_path, form, rows)
  examples = sources.load_examples(spec)
  assert not any(e.impossible or e.answers for e in examples)
  assert 'none of the 3 questions has answers' in refusal(
      sources.load_answered, spec)


@pytest.mark.parametrize('form', ['SQuAD', 'run_qa', 'JSON lines'])
@pytest.mark.parametrize('row', [
    {k: v for k, v in ROWS[0].items() if k != 'answers'},
    {**ROWS[0], 'answers': [], 'is_impossible': False},
    {**ROWS[0], 'answers': None}])
def test_a_question_without_answers_among_others_is_not_scored(
    tmp_path, form, row):
  spec = write(tmp_path, form, [*ROWS[1:], row])
  assert ("1 of 3 questions have neither answers nor a mark, the first is "
          "'262'") in refusal(sources.load_answered, spec)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('name', 'wanted'), [
    ('Answer', 'answers'), ('Answers', 'answers'),
    ('gold_answers', 'answers'), ('impossible', 'is_impossible'),
    ('isImpossible', 'is_impossible'), ('question_id', 'id'), ('ID', 'id')])
def test_a_name_that_is_nearly_right_is_refused(tmp_path, form, name, wanted):
  rows = [{k: v for k, v in row.items() if k != wanted} | {
      name: row.get(wanted)} for row in ROWS]
  if isinstance(rows[0][name], list):
    rows = [{**row, name: 'Mira'} for row in rows]
  assert f'has {name!r} and no {wanted!r}; rename it' in refusal(
      sources.load_examples, write(tmp_path, form, rows))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('names', FLAT, ids=str)
def test_two_columns_may_stand_for_answers(tmp_path, form, names):
  """An answer without its text and its place is missing."""
  rows = [{k: v for k, v in row.items() if k != 'answers'} for row in ROWS]
  for row, before in zip(rows, ROWS, strict=True):
    answer = before['answers'][0] if before['answers'] else {
        'text': None, 'answer_start': None}
    row |= dict(zip(names, (answer['text'], answer['answer_start']),
                    strict=True))
  found = sources.load_examples(write(tmp_path, form, rows))
  assert [e.answers for e in found] == [e.answers[:1] for e in EXAMPLES]
  assert 'outside the' in refusal(sources.load_examples, write(
      tmp_path, form, [{**row, names[1]: 10**6} for row in rows]))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['answer', 'answer_text', 'answers.text'])
def test_a_column_of_texts_alone_is_located_by_the_option(tmp_path, form, name):
  rows = [{k: v for k, v in row.items() if k != 'answers'} | {
      name: row['answers'][0]['text'] if row['answers'] else None}
          for row in ROWS]
  spec = write(tmp_path, form, rows)
  assert 'the option locate_answers=True' in refusal(
      sources.load_examples, spec)
  assert [[(a.text, a.start) for a in e.answers] for e in
          sources.load_examples(located(form, spec))] == [
              [(a.text, -1) for a in e.answers[:1]] for e in EXAMPLES]


@pytest.mark.parametrize('form', ['SQuAD', 'JSON lines', 'CSV', 'parquet'])
def test_a_column_text_without_places_may_be_something_else(tmp_path, form):
  rows = [{k: v for k, v in row.items() if k != 'answers'} | {'text': 'Note'}
          for row in ROWS]
  found = sources.load_examples(write(tmp_path, form, rows))
  assert not any(e.impossible or e.answers for e in found)


@pytest.mark.parametrize('answers', [{'text': ['Mira'], 'answer_start': [0]},
                                     [{'text': 'Mira', 'answer_start': 0}]])
def test_answers_under_the_name_of_a_text_are_to_be_renamed(tmp_path, answers):
  row = {'context': 'Mira', 'question': 'Who?', 'answer': answers}
  assert "has 'answer' and no 'answers'; rename it to 'answers'" in refusal(
      sources.load_examples, write(tmp_path, 'list', [row]))


@pytest.mark.parametrize('form', sorted({*FORMS} - {'CSV, arrays'}))
def test_a_flattened_table_keeps_lists_of_answers(tmp_path, form):
  rows = [{k: v for k, v in row.items() if k != 'answers'} | {
      f'answers.{key}': [a[key] for a in row['answers']]
      for key in ('text', 'answer_start')} for row in ROWS]
  assert sources.load_examples(write(tmp_path, form, rows)) == EXAMPLES


@pytest.mark.parametrize('form', FORMS)
def test_a_place_without_a_text_asks_for_the_text(tmp_path, form):
  rows = [{k: v for k, v in row.items() if k != 'answers'} | {
      'answer_start': 0, 'gold': 'x'} for row in ROWS]
  message = refusal(sources.load_examples, write(tmp_path, form, rows))
  assert "has 'answer_start' and no 'answers'; call the field" in message


def test_other_names_are_left_alone(tmp_path):
  rows = [{**row, 'plausible_answers': [], 'document_id': 3, 'source': 'x',
           'detected': 1, 'level': 'hard'} for row in ROWS]
  assert sources.load_examples(write(tmp_path, 'list', rows)) == EXAMPLES


def located(form, path) -> str:
  """Returns the SPEC of a file whose answers have no position."""
  source = 'squad_json' if FORMS[form][0] not in (
      'a.csv', 'a.tsv', 'a.parquet', 'a.arrow') else 'table'
  return f'{source}(path="{path}", locate_answers=True)'


def start_less(rows):
  return [{**row, 'answers': [{'text': a['text']} for a in row['answers']]}
          for row in rows]


@pytest.mark.parametrize('form', FORMS)
def test_an_answer_without_answer_start_is_located_by_an_option(
    tmp_path, form):
  spec = write(tmp_path, form, start_less(ROWS))
  assert 'the option locate_answers=True' in refusal(
      sources.load_examples, spec)
  examples = sources.load_examples(located(form, spec))
  assert [[(a.text, a.start) for a in e.answers] for e in examples] == [
      [(a.text, -1) for a in e.answers] for e in EXAMPLES]


VOCABULARY = tokenizer.Tokenizer(
    (*tokenizer.SPECIAL, *'abcdefghijklmnopqrstuvwxyz', *(
        f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'), '.', '?', '"'), True)
LENGTHS = dict(max_length=90, window_overlap=16, max_question_length=12)


def windows(spec, where=None):
  return cache.cached_windows(
      spec, VOCABULARY, where=where, say=print, **LENGTHS)


@pytest.mark.parametrize('answers', [
    ['Tarn', 'osprey'], [{'text': 'Tarn'}, {'text': 'osprey'}],
    [{'text': 'Tarn', 'answer_start': None},
     {'text': 'osprey', 'answer_start': -1}],
    {'text': ['Tarn', 'osprey']}, [' ' * 30 + 'Tarn', 'osprey'],
    {'text': ['Tarn', 'osprey'], 'answer_start': [None, None]}])
def test_located_answers_are_counted_and_lost_ones_too(tmp_path, answers):
  """Only "Tarn" occurs; its first occurrence is the span."""
  context = 'Mira saw Tarn. The Osprey left Tarn.'
  spec = examples_lib.write(tmp_path / 'a.json', [
      {'question': 'Where?', 'context': context, 'answers': answers}])
  found = windows(f'squad_json(path="{spec}", locate_answers=True)')
  assert found.audit == {**dict.fromkeys(alignment.AUDIT, 0), 'located': 1,
                         'unrecoverable': 1}
  begin, end = found.char_spans(
      np.zeros(1, int), found.start_positions[:1], found.end_positions[:1])
  assert (begin[0], end[0]) == (9, 13)


def test_mrqa_answers_are_located_by_the_option(tmp_path):
  row = json.loads(json.dumps(examples_lib.MRQA_ROW))
  del row['qas'][0]['detected_answers']
  row['qas'][0]['answers'] = ['Osprey', 'a ship']
  spec = examples_lib.write(tmp_path / 'a.jsonl', json.dumps(row))
  assert "has no 'detected_answers'; the option locate_answers=True" in refusal(
      sources.load_examples, spec)
  example, = sources.load_examples(f'mrqa(path="{spec}", locate_answers=True)')
  assert example.answers == (GoldAnswer('Osprey', -1), GoldAnswer('a ship', -1))
  assert example.gold_texts == ('Osprey', 'a ship')
  row['qas'][0]['answers'] = []
  spec = examples_lib.write(tmp_path / 'a.jsonl', json.dumps(row))
  assert "has no 'detected_answers'" in refusal(
      sources.load_examples, f'mrqa(path="{spec}", locate_answers=True)')


@pytest.mark.parametrize(('context', 'answer', 'start', 'fate', 'text'), [
    ('The great  city of\nTarn is old.', 'The great city of Tarn', 0, 'spaces',
     'The great  city of\nTarn'),
    ('The city\r\nof Tarn is old.', 'city\nof Tarn', 4, 'spaces',
     'city\r\nof Tarn'),
    ('The city\xa0of\u3000Tarn', ' city of Tarn\n', 3, 'spaces',
     'city\xa0of\u3000Tarn'),
    ('The \t city of Tarn', '  city  of', 3, 'spaces', 'city of'),
    ('old Tarn. The old  Tarn.', 'old Tarn', 14, 'spaces', 'old  Tarn'),
    ('Oh, the old  Tarn.', 'old Tarn', 0, 'repaired', 'old  Tarn'),
    ('old  Tarn, old\tTarn', 'old Tarn', 9, 'repaired', 'old\tTarn'),
    # The same white space goes before the nearest place.
    ('old Tarn, old\tTarn', 'old Tarn', 8, 'repaired', 'old Tarn'),
    ('old  Tarn', 'old Tarn', 9, 'repaired', 'old  Tarn'),  # at the end
    ('old Tarn', 'old Tarn', 0, 'exact', 'old Tarn'),
    ('oldTarn', 'old Tarn', 0, 'unrecoverable', None)])
def test_an_answer_may_differ_from_the_context_in_white_space(
    tmp_path, context, answer, start, fate, text):
  spec = examples_lib.write(tmp_path / 'a.json', [
      {'question': 'What?', 'context': context,
       'answers': [{'text': answer, 'answer_start': start}]}])
  found = windows(spec)
  assert found.audit == {**dict.fromkeys(alignment.AUDIT, 0), fate: 1}
  if text:
    begin, end = found.char_spans(
        np.zeros(1, int), found.start_positions[:1], found.end_positions[:1])
    assert context[begin[0]:end[0]] == text


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.json', '{"question": {"0": "Who?"}, "context": {"0": "x"}}',
     "has columns, not rows; write it with to_json(orient='records')"),
    ('a.json', '[{"question": "Who?"}]', "a.json: [0] has no 'context'"),
    ('a.json', '{"context": "x", "answers": []}', "a.json:1 has no 'question'"),
    ('a.json', '[3]', "a.json: [0] is int, expected an object"),
    ('a.json', '{"data": [{"context": "x"}]}', "data[0] has no 'question'"),
    ('a.json', '\n\n{"question": "Who?", "context": 3}',
     'a.json:3.context is int'),
    ('a.json', '{"question": "a", "context": "b"}\n{"question": "a"}',
     "a.json:2 has no 'context'"),
    ('a.json', '{"question": "a", "context": "b"}\n{"questio', 'a.json:2: not'),
    ('a.json', '{\n"data": []\n}\n{}', 'not JSON: Extra data at line 4'),
    ('a.json', '[{"question": "a", "context": "b", "title": 3}]',
     'title is int'),
    ('a.tsv', 'id,context,question\n', "a.tsv has no column 'context'"),
    ('a.csv', 'context,question,answers\nx,y,"[{\'text\': 1}\n {}]"',
     'as json.dumps writes it'),
    ('a.csv', 'context,question,Answer\nx,y,z', "'Answer' and no 'answers'"),
    ('a.csv', 'context,question,text,answer_start\nx,y,,0', '.text is ')])
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
  assert message in refusal(
      sources.load_examples, examples_lib.write(tmp_path / name, content))


@pytest.mark.parametrize('names', [
    ('a (1).json', 'b (2).json'), ('a(1.json', 'b.json'),
    ('c++.json', 'b.json'), ('a+b.json', 'c+d.json'), ('a)+b.json', 'c.json'),
    ('f(x=1.json', 'b.json'), ("it's.json", 'b.json'), ('+.json', '開発.json')])
def test_files_of_any_name_can_be_mixed(tmp_path, names):
  paths = [examples_lib.write(tmp_path / name, [{**ROWS[0], 'id': n}])
           for n, name in enumerate(names)]
  for join in ('+', ' + '):
    assert [e.id for e in sources.load_examples(join.join(paths))] == ['0', '1']
    assert [e.id for e in sources.load_examples(
        join.join([*paths, 'synthetic(size=1)', 'synthetic(size=1, seed=1)']))
            ][:2] == ['0', '1']
  (tmp_path / names[0]).unlink()
  assert f'{tmp_path}/{names[0]}' in refusal(
      sources.load_examples, '+'.join(paths))


@pytest.mark.parametrize('block', [
    block for block in re.findall(
        r'```(?:json|text)\n(.*?)```', PAGE.read_text('utf-8'), re.DOTALL)
    if 'struct<' not in block])
def test_the_examples_of_the_page_about_data_are_read(tmp_path, block):
  name = ('a.csv' if block.startswith(',') else
          'a.tsv' if '→' in block else 'a.json')
  spec = examples_lib.write(tmp_path / name, block.replace('→', '\t'))
  first, *_ = sources.load_examples(spec)
  assert first.context == 'Ada met Bob.'
  assert first.answers == (GoldAnswer('Ada', 0),)


class PreparedDataSet:
  """A stand-in for a prepared data set of TFDS with the rows above."""

  def __init__(self, folder):
    self.data_dir = folder
    self.info = types.SimpleNamespace(
        features={'id', 'question', 'context', 'answers'}, splits={
            'train': types.SimpleNamespace(num_examples=len(ROWS))})

  def as_data_source(self, split):
    del split
    return [{'id': str(row['id']).encode(), 'context': CONTEXT.encode(),
             'question': row['question'].encode(), 'answers': {
                 'text': [a['text'].encode() for a in row['answers']],
                 'answer_start': np.array([a['answer_start']
                                           for a in row['answers']], int)}}
            for row in ROWS]


# Source → SPEC, in which FILE is a file of the rows above.
CALLS = {
    'squad_json': 'squad_json(path="FILE")',
    'table': 'table(path="FILE")',
    'mrqa': 'mrqa(path="FILE")',
    'tfds': 'tfds(name="invented", split="train")',
    'synthetic': 'synthetic(size=3, impossible=0.5)',
    'articles': 'articles(of="FILE")',
    'passage_only': 'passage_only(of="FILE")'}
CACHED = {
    *cache.ONE_FILE, 'tfds', 'synthetic', 'articles', 'passage_only'}
# The content of FILE if it is not `lines`.
CONTENT = {'squad_json': articles, 'mrqa': lambda _: examples_lib.MRQA}


@pytest.fixture(params=sources.SOURCES)
def source(request, tmp_path, monkeypatch):
  """Returns the name of a source and its SPEC, ready to be read."""
  if request.param == 'tfds':
    import tensorflow_datasets
    monkeypatch.setattr(tensorflow_datasets, 'builder',
                        lambda *_, **__: PreparedDataSet(tmp_path))
  path = examples_lib.write(tmp_path / 'rows', CONTENT.get(
      request.param, lines)(ROWS))
  return request.param, CALLS[request.param].replace('FILE', path)


def test_every_source_gives_whole_examples(source):
  name, spec = source
  examples = sources.load_examples(spec)
  assert examples == sources.load_examples(spec)
  if name in ('squad_json', 'table', 'tfds', 'articles'):
    assert examples == EXAMPLES and examples[1].unmarked
  assert len({e.id for e in examples}) == len(examples)
  for e in examples:
    assert e.id and e.question and bool(e.answers) != e.impossible
    for answer in e.answers:
      start = answer.start if answer.start >= 0 else e.context.find(answer.text)
      assert e.context[start:].startswith(answer.text) and start >= 0
  assert sources.load_answered(spec) == examples


def test_every_source_refuses_an_unknown_option_by_name(source):
  name, spec = source
  spec = spec.replace(')', ', nosuch=1)')
  assert f"source {name!r} has no argument 'nosuch'" in refusal(
      sources.load_examples, spec)


def test_every_source_mixes_with_others(source):
  _, spec = source
  mixed = sources.load_examples(f'synthetic(size=2, seed=7) + {spec}')
  assert mixed[2:] == sources.load_examples(spec)


def test_windows_of_every_source_keep_their_audit_in_the_cache(
    source, tmp_path, monkeypatch):
  name, spec = source
  monkeypatch.setattr(cache, '_tfds_identity', lambda *_: ['prepared'])
  cold, warm = (windows(spec, tmp_path / 'c') for _ in range(2))
  assert list(warm.examples) == list(cold.examples)
  assert isinstance(warm.examples, store.StoredExamples) == (name in CACHED)
  assert warm.audit == cold.audit
  assert cold.audit['unmarked'] == sum(
      e.unmarked for e in sources.load_examples(spec))
  if name in ('squad_json', 'table', 'tfds', 'articles', 'passage_only'):
    assert cold.audit['unmarked'] == 1
  assert cold.audit['unanswered'] == 0
