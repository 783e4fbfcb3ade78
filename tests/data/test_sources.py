"""Tests of data sources: their examples, and one-line errors."""

import copy
import dataclasses
import gzip
import json

import hypothesis
from hypothesis import strategies as st
import pytest

from qa_jax import errors
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.metrics import squad as squad_lib
from tests.common import examples as examples_lib
from tests.common.refusals import assert_examples_or_one_line

SQUAD_EXAMPLES = [
    Example('who',
            'Who built it?',
            examples_lib.CONTEXT, (GoldAnswer('Mira', 0),),
            title='Osprey'),
    Example('what',
            'What sank?',
            examples_lib.CONTEXT,
            (GoldAnswer('the Osprey', 11), GoldAnswer('Osprey', 35)),
            title='Osprey'),
    Example('when', 'When?', examples_lib.CONTEXT, (), True, 'Osprey')
]


def refusal(spec: str) -> str:
  with pytest.raises(errors.UserError) as caught:
    sources.load_examples(spec)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 500
  return message


def places(tree, path=()):
  """Returns the path of every value of a JSON tree, the root included."""
  yield path
  items = (tree.items() if isinstance(tree, dict) else
           enumerate(tree) if isinstance(tree, list) else ())
  for key, value in items:
    yield from places(value, (*path, key))


def deep(levels: int):
  tree = []
  for _ in range(levels):
    tree = [tree]
  return tree


def test_squad_json_is_read_in_order_with_all_golds(tmp_path):
  assert sources.load_examples(
      examples_lib.write(tmp_path / 'a.json',
                         examples_lib.SQUAD)) == SQUAD_EXAMPLES


def test_unanswerable_questions_can_be_left_out(tmp_path):
  spec = examples_lib.write(tmp_path / 'a.json', examples_lib.SQUAD)
  assert sources.load_examples(
      f'squad_json(path="{spec}", impossible=False)') == [
          e for e in SQUAD_EXAMPLES if e.answers
      ]


def test_version_1_needs_neither_title_nor_is_impossible(tmp_path):
  data = examples_lib.changed(
      examples_lib.SQUAD, ('data', 0, 'paragraphs', 0, 'qas'), [{
          'id': 'who',
          'question': 'Who?',
          'answers': [{
              'text': 'Mira',
              'answer_start': 0
          }]
      }])
  del data['data'][0]['title'], data['version']
  assert sources.load_examples(examples_lib.write(
      tmp_path / 'a.json', data)) == [
          Example('who', 'Who?', examples_lib.CONTEXT, (GoldAnswer('Mira', 0),))
      ]


def test_an_unanswerable_question_with_answers_is_refused(tmp_path):
  """The official script takes the answers, and no one can tell who is right."""
  data = examples_lib.changed(
      examples_lib.SQUAD,
      ('data', 0, 'paragraphs', 0, 'qas', 0, 'is_impossible'), True)
  message = refusal(examples_lib.write(tmp_path / 'a.json', data))
  assert ('data[0].paragraphs[0].qas[0]: is_impossible is true, but there are '
          'answers') in message


def test_byte_order_mark_is_dropped(tmp_path):
  text = '\ufeff' + json.dumps(examples_lib.SQUAD)
  assert sources.load_examples(examples_lib.write(tmp_path / 'a.json',
                                                  text)) == SQUAD_EXAMPLES


def test_mrqa_ends_are_inclusive_and_repeated_spans_are_one(tmp_path):
  assert sources.load_examples(
      examples_lib.write(tmp_path / 'a.jsonl',
                         examples_lib.MRQA)) == examples_lib.MRQA_EXAMPLES


def test_mrqa_is_scored_with_answers_and_trained_on_what_was_detected(tmp_path):
  """The official script reads `answers` alone; by hand, 1.1's rules."""
  row = examples_lib.changed(examples_lib.MRQA_ROW, ('qas', 0, 'answers'),
                             ['The Osprey ship', 'a boat'])
  examples = sources.load_examples(
      examples_lib.write(tmp_path / 'a.jsonl', json.dumps(row)))
  assert examples[0].answers == examples_lib.GOLDS
  for prediction, em, f1 in (('the osprey ship', 1, 1), ('Osprey', 0, 2 / 3),
                       ('boat', 1, 1), ('Tarn', 0, 0)):
    scores = squad_lib.per_question(examples, {'what': prediction})
    assert [float(x[0]) for x in scores] == pytest.approx([em, f1])
  del row['qas'][0]['answers']
  examples = sources.load_examples(
      examples_lib.write(tmp_path / 'b.jsonl', json.dumps(row)))
  assert examples[0].gold_texts == ('Osprey', 'Osprey', 'Tarn')


def test_markers_can_be_blanked_and_no_offset_moves(tmp_path):
  context = '[TLE] Osprey [PAR] It sank in [Tarn]. [SEP] [DOC] End'
  row = {
      'context':
          context,
      'qas': [{
          'qid': 'q',
          'question': '?',
          'answers': ['Tarn'],
          'detected_answers': [{
              'char_spans': [[31, 34], [6, 11]]
          }]
      }]
  }
  path = examples_lib.write(tmp_path / 'a.jsonl', json.dumps(row))
  with_them, = sources.load_examples(f'mrqa(path="{path}")')
  without, = sources.load_examples(f'mrqa(path="{path}", markers=False)')
  assert with_them.context == context
  assert without.context == (' ' * 6 + 'Osprey' + ' ' * 7 +
                             'It sank in [Tarn].' + ' ' * 13 + 'End')
  assert with_them.answers == without.answers == (GoldAnswer(
      'Tarn', 31), GoldAnswer('Osprey', 6))
  for e in (with_them, without):
    assert all(e.context[a.start:].startswith(a.text) for a in e.answers)


@pytest.mark.parametrize(
    ('name', 'content', 'expected'),
    [('a.json.gz', json.dumps(examples_lib.SQUAD), SQUAD_EXAMPLES),
     ('a.jsonl.gz', examples_lib.MRQA, examples_lib.MRQA_EXAMPLES),
     ('a.jsonl.gz', '\ufeff' + examples_lib.MRQA.replace('\n', '\r\n \r\n'),
      examples_lib.MRQA_EXAMPLES)])
def test_gzip_is_unzipped(tmp_path, name, content, expected):
  spec = examples_lib.write(tmp_path / name, gzip.compress(content.encode()))
  assert sources.load_examples(spec) == expected


def test_call_reads_what_the_path_reads(tmp_path):
  squad, mrqa = (examples_lib.write(tmp_path / n, c)
                 for n, c in (('any name', examples_lib.SQUAD),
                              ('other', examples_lib.MRQA)))
  assert sources.load_examples(f'squad_json(path="{squad}")') == SQUAD_EXAMPLES
  assert sources.load_examples(
      f"mrqa(path='{mrqa}')") == examples_lib.MRQA_EXAMPLES


def test_bare_name_is_a_source_with_its_defaults():
  assert sources.load_examples('synthetic') == sources.load_examples(
      'synthetic()')


def test_mixture_is_the_parts_in_their_order(tmp_path):
  squad = examples_lib.write(tmp_path / "it's.json", examples_lib.SQUAD)
  parts = [
      f'{squad}', 'synthetic(size=3)', 'synthetic(size=2, seed=1)',
      'synthetic(size=1, split="eval")'
  ]
  assert sources.load_examples(' + '.join(parts)) == [
      e for part in parts for e in sources.load_examples(part)
  ]


def test_plus_in_quotes_and_in_the_name_of_a_file_parts_nothing(tmp_path):
  spec = examples_lib.write(tmp_path / 'a)+b.json', examples_lib.SQUAD)
  assert sources.load_examples(spec) == SQUAD_EXAMPLES
  assert sources.load_examples(f'squad_json(path="{spec}")') == SQUAD_EXAMPLES


def test_mixture_may_be_longer_than_a_file_name():
  spec = '+'.join(f'synthetic(seed={i}, size=1)' for i in range(20))
  assert len(spec) > 255 and len(sources.load_examples(spec)) == 20


def test_articles_are_parted_whole_whatever_their_order(tmp_path):
  data = [{
      'title':
          f'T{n}',
      'paragraphs': [{
          'context': f'{examples_lib.CONTEXT} {n} {p}',
          'qas': [{
              'id': f'{n}-{p}',
              'question': '?',
              'answers': []
          }]
      } for p in range(3)]
  } for n in range(400)]
  one, other = (examples_lib.write(tmp_path / name, {'data': rows})
                for name, rows in (('a.json', data), ('b.json', data[::-1])))
  low = sources.load_examples(f'articles(of="{one}", high=0.3)')
  high = sources.load_examples(f'articles(of="{one}", low=0.3)')
  assert sorted(e.id for e in low + high) == sorted(
      e.id for e in sources.load_examples(one))
  assert not {e.title for e in low} & {e.title for e in high}
  assert len(low) / 1200 == pytest.approx(0.3, abs=0.07)  # 3 sd of 400 draws
  assert {e.id for e in low} == {
      e.id for e in sources.load_examples(f'articles(of="{other}", high=0.3)')
  }
  assert low != sources.load_examples(f'articles(of="{one}", high=0.3, seed=1)')


def test_passage_only_hides_the_question_and_nothing_else():
  whole = sources.load_examples('synthetic(size=9, impossible=0.5)')
  hidden = sources.load_examples(
      'passage_only(of="synthetic(size=9, impossible=0.5)")')
  assert {e.question for e in hidden} == {'?'} and len(hidden) == 9
  assert [(e.id, e.context, e.answers, e.impossible, e.title) for e in hidden
          ] == [(e.id, e.context, e.answers, e.impossible, e.title)
                for e in whole]


def test_without_titles_a_context_is_an_article(tmp_path):
  rows = ''.join(
      json.dumps({
          **examples_lib.MRQA_ROW, 'context':
              f'{examples_lib.CONTEXT} {n}',
          'qas': [{
              **examples_lib.MRQA_ROW['qas'][0], 'qid': f'{n}-{q}'
          } for q in range(2)]
      }) + '\n' for n in range(50))
  spec = examples_lib.write(tmp_path / 'a.jsonl', rows)
  half = sources.load_examples(f'articles(of="{spec}", low=0.5)')
  assert 0 < len(half) < 100
  assert {e.id[:-2] + q for e in half for q in ('-0', '-1')
         } == {e.id for e in half}


@pytest.mark.parametrize(
    ('spec', 'message'),
    [('articles(of="synthetic", low=0.5, high=0.5)', 'low=0.5 and high=0.5'),
     ('articles(of="synthetic", high=1.1)', '0 <= low < high <= 1'),
     ('articles(of="synthetic", high=1e-9)', 'holds no question'),
     ('articles(of="nowhere.json")', 'No such file'),
     ('articles', "needs the argument 'of'"),
     ('squad_jsn', "did you mean 'squad_json'"),
     ('sythetic(size=3)', "did you mean 'synthetic'"),
     ('synthetic(siz=3)', "did you mean 'size'"),
     ('synthetic(size=3', 'not of the form'),
     ('squad_json(path=3)', 'expected str'),
     ('squad_json', "needs the argument 'path'"),
     ('tfds(name="squad/v1.1"', 'not of the form'),
     ('synthetic+', 'empty part'), ('+synthetic', 'empty part'),
     ('synthetic++synthetic', 'empty part'), ('', 'empty part'),
     ('synthetic(size=2)+synthetic(size=1)', "'synthetic-train-0-0' stands"),
     ('nowhere/a.json', 'No such file'), ('a.jsonl', 'No such file'),
     ('a.json.gz', 'No such file'), ('x' * 300 + '.json', 'too long'),
     ('a\0.json', 'null'), ('a\ud800.json', 'surrogates'),
     ('a\0b', 'neither a file nor a source')])
def test_bad_spec_is_one_line(spec, message):
  assert message in refusal(spec)


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.jsonl.gz', 'plain'])
def test_directory_where_a_file_is_meant_is_one_line(tmp_path, name):
  (tmp_path / name).mkdir()
  message = refusal(str(tmp_path / name))
  assert 'Is a directory' in message and message.endswith('no state.json')


def test_a_directory_of_shards_names_a_file(tmp_path):
  """As the hub stores a data set."""
  (tmp_path / 'data').mkdir()
  for n in (1, 0):
    (tmp_path / 'data' / f'train-0000{n}-of-00002.parquet').touch()
  for folder in (tmp_path, tmp_path / 'data'):
    assert (f'give a file, such as {tmp_path}/data/train-00000-of-00002.parquet'
            ', or several joined by "+"') in refusal(str(folder))


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a', 'a.csv'])
@pytest.mark.parametrize('content', ['', '\n\n'])
def test_an_empty_file_holds_no_question(tmp_path, name, content):
  path = tmp_path / name
  path.write_text(content)
  assert refusal(str(path)) == f'{path}: holds no question'




@pytest.mark.parametrize(
    ('content', 'message'),
    [('', 'holds no question'), ('words', 'not JSON'), ('[1', 'not JSON'),
     (' id,x\n1,y', "it begins with 'id,x\\n1,y', expected a JSON object"),
     ('id,question\n1,x', 'the name of a table ends in .csv, .tsv, .parquet'),
     (json.dumps(examples_lib.SQUAD)[:-9], 'not JSON'),
     (json.dumps(examples_lib.SQUAD) * 2, 'Extra'),
     (json.dumps(examples_lib.SQUAD).replace('Mira',
                                             'Mi\0ra'), 'Invalid control'),
     (b'\xff{}', 'not UTF-8 at byte 0'), ('\ud800', 'not UTF-8'),
     ('[]', 'holds no question'), ('"text"', 'expected a JSON object'),
     ('NaN', 'expected a JSON object'), ('{}', "has no 'data'"),
     ('{"data": []}', 'holds no question'),
     ('{"data": NaN}', 'data is float, expected list'),
     ('{"data": {}}', 'data is dict, expected list'),
     ('{"data": [[]]}', 'data[0] is list'),
     ('{"data": [{"paragraphs": [{}]}]}', "paragraphs[0] has no 'context'"),
     ('{"data": ' + '1' * 5000 + '}', 'out of bounds'),
     ('{"data": ' + '[' * 100_000, 'out of bounds'),
     ({
         'version': '1.1',
         'data': examples_lib.MRQA_ROW
     }, 'data is dict, expected list')])
def test_file_of_another_shape_is_one_line(tmp_path, content, message):
  path = examples_lib.write(tmp_path / 'a.json', content)
  assert refusal(path).startswith(path)
  assert message in refusal(path)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [(examples_lib.START, -1, 'is -1, outside the 47 characters of the context;'
      ' correct it, or leave it out: the option locate_answers=True of '),
     (examples_lib.START, 48, 'answer_start is 48, outside the 47 characters'),
     (examples_lib.START, 10**30, 'outside the 47 characters'),
     (examples_lib.START, True, 'answer_start is bool'),
     (examples_lib.START, 0.0, 'is float'),
     (examples_lib.START, float('nan'), 'is float'),
     (examples_lib.START, '0', 'is str'),
     (examples_lib.START, None, 'is NoneType'),
     ((*examples_lib.QA, 'answers'), 'Mira', 'answers is str, expected a list'),
     ((*examples_lib.QA, 'answers'), [{
         'text': 'Mira'
     }], "has no 'answer_start'"),
     ((*examples_lib.QA, 'answers'), [{
         'answer_start': 0
     }], "has no 'text'"),
     ((*examples_lib.QA, 'answers', 0, 'text'), 'a\udfffb',
      'U+DFFF at character 1'),
     ((*examples_lib.QA, 'is_impossible'), 'False', 'is_impossible is str'),
     ((*examples_lib.QA, 'is_impossible'), 2, 'is_impossible is int 2'),
     ((*examples_lib.QA, 'is_impossible'), 0.5, 'expected true, false, 0 or 1'),
     ((*examples_lib.QA, 'id'), True, 'id is bool'),
     ((*examples_lib.QA, 'id'), 7.0, 'id is float'),
     ((*examples_lib.QA, 'id'), '', 'id is empty'),
     ((*examples_lib.QA, 'id'), '\ud800', 'surrogate U+D800 at character 0'),
     ((*examples_lib.QA, 'question'), None, 'question is NoneType'),
     ((*examples_lib.QA, 'question'), 'Who \ud83d?',
      'surrogate U+D83D at character 4'),
     (examples_lib.QA, ['id'], "is list, expected an object with 'question'"),
     ((*examples_lib.QA[:4], 'context'), 'x\ud800',
      'surrogate U+D800 at character 1'),
     (('data', 0, 'title'), 3, 'title is int')])
def test_bad_field_is_named_with_its_place(tmp_path, path, value, message):
  text = refusal(
      examples_lib.write(tmp_path / 'a.json',
                         examples_lib.changed(examples_lib.SQUAD, path, value)))
  assert message in text and f'{tmp_path}/a.json: data[0]' in text


def test_one_example_object_twice_is_named(monkeypatch):
  monkeypatch.setitem(sources.SOURCES, 'mine', lambda: [Example(
      'what', 'Who?', 'Ada.', (GoldAnswer('Ada', 0),))] * 2)
  assert ("'what' stands there twice; give each question an id of its own"
          in refusal('mine()'))


@pytest.mark.parametrize(('fields', 'message'), [
    ({'id': 3}, "'mine()': [1].id is int, expected a string"),
    ({'id': ''}, '[1].id is empty'),
    ({'question': None}, '[1].question is NoneType, expected a string'),
    ({'context': 'x\ud800'}, 'surrogate U+D800 at character 1'),
    ({'title': None}, '[1].title is NoneType'),
    ({'impossible': 1}, '[1].impossible is int, expected bool'),
    ({'answers': None}, '[1].answers is NoneType, expected a tuple'),
    ({'answers': 'Ada'}, '[1].answers is str, expected a tuple'),
    ({'answers': ('Ada',)}, '[1].answers[0] is str, expected qa_jax.data.Gold'),
    ({'answers': ({'text': 'Ada', 'answer_start': 0},)}, 'answers[0] is dict'),
    ({'answers': (GoldAnswer('Ada', 0.0),)}, 'answers[0].start is 0.0'),
    ({'answers': (GoldAnswer('Ada', -2),)}, 'answers[0].start is -2'),
    ({'answers': (GoldAnswer('Ada', 5),)}, 'within the 4 characters'),
    ({'answers': (GoldAnswer(None, 0),)}, 'answers[0].text is NoneType'),
    ({'accepted': 'Ada'}, '[1].accepted is str, expected a tuple'),
    ({'accepted': (3,)}, '[1].accepted[0] is int'),
    ({'impossible': True}, 'but there are answers')], ids=str)
def test_a_wrong_field_of_an_example_of_a_source_is_named(
    monkeypatch, fields, message):
  right = Example('a', 'Who?', 'Ada.', (GoldAnswer('Ada', 0),))
  monkeypatch.setitem(sources.SOURCES, 'mine', lambda: [
      right, dataclasses.replace(right, **{'id': 'b', **fields})])
  assert message in refusal('mine()')


def test_a_source_may_give_lists_and_answers_without_a_position(monkeypatch):
  monkeypatch.setitem(sources.SOURCES, 'mine', lambda: [
      Example('a', 'Who?', 'Ada.', [GoldAnswer('Ada', -1)], accepted=['Ada'])])
  example, = sources.load_examples('mine()')
  assert example == Example(
      'a', 'Who?', 'Ada.', (GoldAnswer('Ada', -1),), accepted=('Ada',))


def test_an_id_twice_is_named(tmp_path):
  data = examples_lib.changed(examples_lib.SQUAD, (*examples_lib.QA, 'id'),
                              'what')
  assert "'what' stands there twice" in refusal(
      examples_lib.write(tmp_path / 'a.json', data))


@pytest.mark.parametrize('path', [
    p for p in places(examples_lib.SQUAD)
    if p and p[-1] in ('data', 'paragraphs', 'context', 'qas', 'id', 'question',
                       'answer_start', 'text') and 'plausible_answers' not in p
])
def test_missing_field_is_named(tmp_path, path):
  data = copy.deepcopy(examples_lib.SQUAD)
  holder = data
  for key in path[:-1]:
    holder = holder[key]
  del holder[path[-1]]
  assert f'has no {path[-1]!r}' in refusal(
      examples_lib.write(tmp_path / 'a.json', data))


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [((), [], 'list, expected a JSON object'),
     (('context',), 3, 'context is int'), (('qas',), None, 'qas is NoneType'),
     (('qas', 0, 'qid'), '', 'qid is empty'),
     (('qas', 0, 'answers'), 'osprey', 'answers is str, expected list'),
     (('qas', 0, 'answers'), [3], 'answers is int, expected a string'),
     (('qas', 0, 'answers', 0), '\ud800', 'U+D800'),
     (('qas', 0, 'detected_answers'), {}, 'detected_answers is dict')] +
    [(('qas', 0, 'detected_answers', 0, 'char_spans', 0), span, 'char_spans')
     for span in ([5], [0, 1, 2], [3, 2], [-1, 2], [0, 47], [0, True], [0, 1.0],
                  '01', None, deep(900), [0, 10**30])])
def test_bad_mrqa_line_is_named_by_its_number(tmp_path, path, value, message):
  lines = examples_lib.MRQA.split('\n')
  lines[1] = json.dumps(examples_lib.changed(examples_lib.MRQA_ROW, path,
                                             value))
  text = refusal(examples_lib.write(tmp_path / 'a.jsonl', '\n'.join(lines)))
  assert message in text and f'{tmp_path}/a.jsonl:2' in text


@pytest.mark.parametrize(('text', 'refused'), [
    ('Mira', True), ('Mira ', False), ('mira', False), ('', False),
    (None, False)])
def test_an_mrqa_span_with_an_exclusive_end_is_refused(
    tmp_path, text, refused):
  row = {'context': 'Mira met Tol.', 'qas': [{
      'qid': 'a', 'question': 'Who?', 'answers': ['Mira'],
      'detected_answers': [{'text': text, 'char_spans': [[0, 4]]}]}]}
  path = examples_lib.write(tmp_path / 'a.jsonl', '\n'.join(
      map(json.dumps, ({'header': {}}, row))))
  if refused:
    assert "[0, 4], whose last character is beyond 'Mira'; both" in refusal(
        path)
  else:
    assert sources.load_examples(str(path))[0].answers[0].text == 'Mira '


@pytest.mark.parametrize('cut', [3, 12, -20, -3])
def test_damaged_gzip_is_one_line(tmp_path, cut):
  whole = gzip.compress(examples_lib.MRQA.encode())
  assert 'not a whole gzip file' in refusal(
      examples_lib.write(tmp_path / 'a.jsonl.gz', whole[:cut]))
  for damaged in (b'no' + whole, whole[:30] + b'?????' + whole[35:]):
    assert 'not a whole gzip file' in refusal(
        examples_lib.write(tmp_path / 'b.jsonl.gz', damaged))


def test_last_of_two_equal_keys_counts_as_in_any_json_reader(tmp_path):
  text = json.dumps(examples_lib.SQUAD).replace('"id": "who"',
                                                '"id": "other", "id": "who"')
  assert sources.load_examples(examples_lib.write(tmp_path / 'a.json',
                                                  text)) == SQUAD_EXAMPLES


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) |
    st.integers(-10**30, 10**30) |
    st.sampled_from(['\ud800', '\0', '', 'Mira', 10**400,
                     deep(900)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ['id', 'text', 'qas', 'context', 'answer_start']),
                                                                inner,
                                                                max_size=3),
    max_leaves=6)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_anywhere_is_examples_or_one_line(tmp_path_factory, data):
  tree, name = data.draw(
      st.sampled_from([(examples_lib.SQUAD, 'a.json'),
                       (examples_lib.MRQA_ROW, 'a.jsonl')]))
  for _ in range(data.draw(st.integers(1, 2))):
    place = data.draw(st.sampled_from(list(places(tree))))
    tree = examples_lib.changed(tree, place, data.draw(ANY_JSON))
  path = examples_lib.write(tmp_path_factory.getbasetemp() / name,
                            json.dumps(tree))
  assert_examples_or_one_line(path)


WHOLE = json.dumps(examples_lib.SQUAD).encode()


@hypothesis.given(
    st.binary(max_size=40) |
    st.integers(0,
                len(WHOLE) - 1).map(lambda n: WHOLE[:n]))
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes_are_one_line(tmp_path_factory, content):
  for name in ('a.json', 'a.jsonl', 'a.jsonl.gz'):
    refusal(examples_lib.write(tmp_path_factory.getbasetemp() / name, content))
