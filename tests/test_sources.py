"""Data files: what is read out of them, and one line for what is not."""

import copy
import gzip
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import pytest

from qa_jax import errors
from qa_jax import metrics
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from tests.refusals import assert_examples_or_one_line

CONTEXT = 'Mira built the Osprey in Tarn. The Osprey sank.'
SQUAD = {'version': 'v2.0', 'data': [{'title': 'Osprey', 'paragraphs': [{
    'context': CONTEXT, 'qas': [
        {'id': 'who', 'question': 'Who built it?', 'is_impossible': False,
         'answers': [{'text': 'Mira', 'answer_start': 0}]},
        {'id': 'what', 'question': 'What sank?', 'is_impossible': False,
         'answers': [{'text': 'the Osprey', 'answer_start': 11},
                     {'text': 'Osprey', 'answer_start': 35}]},
        {'id': 'when', 'question': 'When?', 'is_impossible': True,
         'answers': [],
         'plausible_answers': [{'text': 'Tarn', 'answer_start': 25}]}]}]}]}
SQUAD_EXAMPLES = [
    Example('who', 'Who built it?', CONTEXT, (GoldAnswer('Mira', 0),),
            title='Osprey'),
    Example('what', 'What sank?', CONTEXT,
            (GoldAnswer('the Osprey', 11), GoldAnswer('Osprey', 35)),
            title='Osprey'),
    Example('when', 'When?', CONTEXT, (), True, 'Osprey')]
MRQA_ROW = {'id': '', 'context': CONTEXT, 'qas': [
    {'qid': 'what', 'question': 'What sank?', 'answers': ['osprey'],
     'detected_answers': [
         {'text': 'Osprey', 'char_spans': [[15, 20], [35, 40], [15, 20]],
          'token_spans': [[3, 3], [8, 8], [3, 3]]},
         {'text': 'Tarn', 'char_spans': [[25, 28]]}]}]}
MRQA = (json.dumps({'header': {'dataset': 'invented', 'split': 'dev'}}) + '\n'
        + json.dumps(MRQA_ROW) + '\n')
GOLDS = (GoldAnswer('Osprey', 15), GoldAnswer('Osprey', 35),
         GoldAnswer('Tarn', 25))
MRQA_EXAMPLES = [Example('what', 'What sank?', CONTEXT, GOLDS,
                         accepted=('osprey',))]


def write(path: pathlib.Path, content) -> str:
  """Writes bytes, text or, of anything else, JSON; the path as a SPEC."""
  if not isinstance(content, (bytes, str)):
    content = json.dumps(content)
  path.write_bytes(content if isinstance(content, bytes)
                   else content.encode('utf-8', 'surrogatepass'))
  return str(path)


def refusal(spec: str) -> str:
  with pytest.raises(errors.UserError) as caught:
    sources.load(spec)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 500
  return message


def changed(tree, path, value):
  """A copy of a JSON tree with the value at `path` replaced."""
  if not path:
    return value
  tree = copy.deepcopy(tree)
  holder = tree
  for key in path[:-1]:
    holder = holder[key]
  holder[path[-1]] = value
  return tree


def places(tree, path=()):
  """The path of every value of a JSON tree, its own included."""
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
  assert sources.load(write(tmp_path / 'a.json', SQUAD)) == SQUAD_EXAMPLES


def test_unanswerable_questions_can_be_left_out(tmp_path):
  spec = write(tmp_path / 'a.json', SQUAD)
  assert sources.load(f'squad_json(path="{spec}", impossible=False)') == [
      e for e in SQUAD_EXAMPLES if e.answers]


def test_version_1_needs_neither_title_nor_is_impossible(tmp_path):
  data = changed(SQUAD, ('data', 0, 'paragraphs', 0, 'qas'), [
      {'id': 'who', 'question': 'Who?',
       'answers': [{'text': 'Mira', 'answer_start': 0}]}])
  del data['data'][0]['title'], data['version']
  assert sources.load(write(tmp_path / 'a.json', data)) == [
      Example('who', 'Who?', CONTEXT, (GoldAnswer('Mira', 0),))]


def test_answers_of_an_impossible_question_are_not_answers(tmp_path):
  data = changed(SQUAD, ('data', 0, 'paragraphs', 0, 'qas', 0,
                         'is_impossible'), True)
  example = sources.load(write(tmp_path / 'a.json', data))[0]
  assert example.impossible and not example.answers


def test_byte_order_mark_is_dropped(tmp_path):
  text = '\ufeff' + json.dumps(SQUAD)
  assert sources.load(write(tmp_path / 'a.json', text)) == SQUAD_EXAMPLES


def test_mrqa_ends_are_inclusive_and_repeated_spans_are_one(tmp_path):
  assert sources.load(write(tmp_path / 'a.jsonl', MRQA)) == MRQA_EXAMPLES


def test_mrqa_is_scored_with_answers_and_trained_on_what_was_detected(
    tmp_path):
  """The official script reads `answers` alone; by hand, 1.1's rules."""
  row = changed(MRQA_ROW, ('qas', 0, 'answers'), ['The Osprey ship', 'a boat'])
  examples = sources.load(write(tmp_path / 'a.jsonl', json.dumps(row)))
  assert examples[0].answers == GOLDS
  for said, em, f1 in (('the osprey ship', 1, 1), ('Osprey', 0, 2 / 3),
                       ('boat', 1, 1), ('Tarn', 0, 0)):
    found = metrics.per_question(examples, {'what': said})
    assert [float(x[0]) for x in found] == pytest.approx([em, f1])
  del row['qas'][0]['answers']
  examples = sources.load(write(tmp_path / 'b.jsonl', json.dumps(row)))
  assert examples[0].gold_texts == ('Osprey', 'Osprey', 'Tarn')


def test_markers_can_be_blanked_and_no_offset_moves(tmp_path):
  context = '[TLE] Osprey [PAR] It sank in [Tarn]. [SEP] [DOC] End'
  row = {'context': context, 'qas': [{
      'qid': 'q', 'question': '?', 'answers': ['Tarn'], 'detected_answers': [{
          'char_spans': [[31, 34], [6, 11]]}]}]}
  path = write(tmp_path / 'a.jsonl', json.dumps(row))
  with_them, = sources.load(f'mrqa(path="{path}")')
  without, = sources.load(f'mrqa(path="{path}", markers=False)')
  assert with_them.context == context
  assert without.context == (
      ' ' * 6 + 'Osprey' + ' ' * 7 + 'It sank in [Tarn].' + ' ' * 13 + 'End')
  assert with_them.answers == without.answers == (
      GoldAnswer('Tarn', 31), GoldAnswer('Osprey', 6))
  for e in (with_them, without):
    assert all(e.context[a.start:].startswith(a.text) for a in e.answers)


@pytest.mark.parametrize(('name', 'content', 'expected'), [
    ('a.json.gz', json.dumps(SQUAD), SQUAD_EXAMPLES),
    ('a.jsonl.gz', MRQA, MRQA_EXAMPLES),
    ('a.jsonl.gz', '\ufeff' + MRQA.replace('\n', '\r\n \r\n'), MRQA_EXAMPLES)])
def test_gzip_is_unzipped(tmp_path, name, content, expected):
  spec = write(tmp_path / name, gzip.compress(content.encode()))
  assert sources.load(spec) == expected


def test_call_reads_what_the_path_reads(tmp_path):
  squad, mrqa = (write(tmp_path / n, c) for n, c in (
      ('any name', SQUAD), ('other', MRQA)))
  assert sources.load(f'squad_json(path="{squad}")') == SQUAD_EXAMPLES
  assert sources.load(f"mrqa(path='{mrqa}')") == MRQA_EXAMPLES


def test_bare_name_is_a_source_with_its_defaults():
  assert sources.load('synthetic') == sources.load('synthetic()')


def test_mixture_is_the_parts_in_their_order(tmp_path):
  squad = write(tmp_path / "it's.json", SQUAD)
  parts = [f'{squad}', 'synthetic(size=3)',
           'synthetic(size=2, seed=1)', 'synthetic(size=1, split="eval")']
  assert sources.load(' + '.join(parts)) == [
      e for part in parts for e in sources.load(part)]


def test_plus_in_quotes_and_in_the_name_of_a_file_parts_nothing(tmp_path):
  spec = write(tmp_path / 'a)+b.json', SQUAD)
  assert sources.load(spec) == SQUAD_EXAMPLES
  assert sources.load(f'squad_json(path="{spec}")') == SQUAD_EXAMPLES


def test_mixture_may_be_longer_than_a_file_name():
  spec = '+'.join(f'synthetic(seed={i}, size=1)' for i in range(20))
  assert len(spec) > 255 and len(sources.load(spec)) == 20


def test_articles_are_parted_whole_whatever_their_order(tmp_path):
  data = [{'title': f'T{n}', 'paragraphs': [
      {'context': f'{CONTEXT} {n} {p}', 'qas': [
          {'id': f'{n}-{p}', 'question': '?', 'answers': []}]}
      for p in range(3)]} for n in range(400)]
  one, other = (write(tmp_path / name, {'data': rows}) for name, rows in (
      ('a.json', data), ('b.json', data[::-1])))
  low = sources.load(f'articles(of="{one}", high=0.3)')
  high = sources.load(f'articles(of="{one}", low=0.3)')
  assert sorted(e.id for e in low + high) == sorted(
      e.id for e in sources.load(one))
  assert not {e.title for e in low} & {e.title for e in high}
  assert len(low) / 1200 == pytest.approx(0.3, abs=0.07)  # 3 sd of 400 draws
  assert {e.id for e in low} == {
      e.id for e in sources.load(f'articles(of="{other}", high=0.3)')}
  assert low != sources.load(f'articles(of="{one}", high=0.3, seed=1)')


def test_without_titles_a_context_is_an_article(tmp_path):
  rows = ''.join(json.dumps({**MRQA_ROW, 'context': f'{CONTEXT} {n}', 'qas': [
      {**MRQA_ROW['qas'][0], 'qid': f'{n}-{q}'} for q in range(2)]}) + '\n'
                 for n in range(50))
  spec = write(tmp_path / 'a.jsonl', rows)
  found = sources.load(f'articles(of="{spec}", low=0.5)')
  assert 0 < len(found) < 100
  assert {e.id[:-2] + q for e in found for q in ('-0', '-1')} == {
      e.id for e in found}


@pytest.mark.parametrize(('spec', 'message'), [
    ('articles(of="synthetic", low=0.5, high=0.5)', 'low=0.5 and high=0.5'),
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
  assert 'Is a directory' in refusal(str(tmp_path / name))


@pytest.mark.parametrize(('content', 'message'), [
    ('', 'not JSON'), ('words', 'not JSON'), ('[1', 'not JSON'),
    (json.dumps(SQUAD)[:-9], 'not JSON'), (json.dumps(SQUAD) * 2, 'Extra'),
    (json.dumps(SQUAD).replace('Mira', 'Mi\0ra'), 'Invalid control'),
    (b'\xff{}', 'not UTF-8 at byte 0'), ('\ud800', 'not UTF-8'),
    ('[]', 'expected a JSON object'), ('"text"', 'expected a JSON object'),
    ('NaN', 'expected a JSON object'), ('{}', "has no 'data'"),
    ('{"data": []}', 'holds no question'),
    ('{"data": NaN}', 'data is float, expected list'),
    ('{"data": {}}', 'data is dict, expected list'),
    ('{"data": [[]]}', 'data[0] is list'),
    ('{"data": [{"paragraphs": [{}]}]}', "paragraphs[0] has no 'context'"),
    ('{"data": ' + '1' * 5000 + '}', 'out of bounds'),
    ('{"data": ' + '[' * 100_000, 'out of bounds'),
    ({'version': '1.1', 'data': MRQA_ROW}, 'data is dict, expected list')])
def test_file_of_another_shape_is_one_line(tmp_path, content, message):
  path = write(tmp_path / 'a.json', content)
  assert refusal(path).startswith(path)
  assert message in refusal(path)


QA = ('data', 0, 'paragraphs', 0, 'qas', 0)
START = (*QA, 'answers', 0, 'answer_start')


@pytest.mark.parametrize(('path', 'value', 'message'), [
    (START, -1, 'answer_start is -1, outside the 47 characters'),
    (START, 48, 'answer_start is 48, outside the 47 characters'),
    (START, 10**30, 'outside the 47 characters'),
    (START, True, 'answer_start is bool'), (START, 0.0, 'is float'),
    (START, float('nan'), 'is float'), (START, '0', 'is str'),
    (START, None, 'is NoneType'),
    ((*QA, 'answers'), 'Mira', 'answers is str, expected list'),
    ((*QA, 'answers'), [{'text': 'Mira'}], "has no 'answer_start'"),
    ((*QA, 'answers'), [{'answer_start': 0}], "has no 'text'"),
    ((*QA, 'answers', 0, 'text'), 'a\udfffb', 'U+DFFF at character 1'),
    ((*QA, 'is_impossible'), 'False', 'is_impossible is str'),
    ((*QA, 'is_impossible'), 0, 'is_impossible is int'),
    ((*QA, 'id'), 7, 'id is int'), ((*QA, 'id'), '', 'id is empty'),
    ((*QA, 'id'), '\ud800', 'surrogate U+D800 at character 0'),
    ((*QA, 'question'), None, 'question is NoneType'),
    ((*QA, 'question'), 'Who \ud83d?', 'surrogate U+D83D at character 4'),
    (QA, ['id'], "is list, expected an object with 'id'"),
    ((*QA[:4], 'context'), 'x\ud800', 'surrogate U+D800 at character 1'),
    (('data', 0, 'title'), 3, 'title is int')])
def test_bad_field_is_named_with_its_place(tmp_path, path, value, message):
  text = refusal(write(tmp_path / 'a.json', changed(SQUAD, path, value)))
  assert message in text and f'{tmp_path}/a.json: data[0]' in text


def test_an_id_twice_is_named(tmp_path):
  data = changed(SQUAD, (*QA, 'id'), 'what')
  assert "'what' stands there twice" in refusal(
      write(tmp_path / 'a.json', data))


@pytest.mark.parametrize('path', [p for p in places(SQUAD) if p and p[-1] in (
    'data', 'paragraphs', 'context', 'qas', 'id', 'question', 'answer_start',
    'text') and 'plausible_answers' not in p])
def test_missing_field_is_named(tmp_path, path):
  data = copy.deepcopy(SQUAD)
  holder = data
  for key in path[:-1]:
    holder = holder[key]
  del holder[path[-1]]
  assert f'has no {path[-1]!r}' in refusal(write(tmp_path / 'a.json', data))


@pytest.mark.parametrize(('path', 'value', 'message'), [
    ((), [], 'list, expected a JSON object'),
    (('context',), 3, 'context is int'),
    (('qas',), None, 'qas is NoneType'),
    (('qas', 0, 'qid'), '', 'qid is empty'),
    (('qas', 0, 'answers'), 'osprey', 'answers is str, expected list'),
    (('qas', 0, 'answers'), [3], 'answers is int, expected a string'),
    (('qas', 0, 'answers', 0), '\ud800', 'U+D800'),
    (('qas', 0, 'detected_answers'), {}, 'detected_answers is dict')] + [
        (('qas', 0, 'detected_answers', 0, 'char_spans', 0), span, 'char_spans')
        for span in ([5], [0, 1, 2], [3, 2], [-1, 2], [0, 47], [0, True],
                     [0, 1.0], '01', None, deep(900), [0, 10**30])])
def test_bad_mrqa_line_is_named_by_its_number(tmp_path, path, value, message):
  lines = MRQA.split('\n')
  lines[1] = json.dumps(changed(MRQA_ROW, path, value))
  text = refusal(write(tmp_path / 'a.jsonl', '\n'.join(lines)))
  assert message in text and f'{tmp_path}/a.jsonl:2' in text


def test_missing_mrqa_answers_are_named(tmp_path):
  row = copy.deepcopy(MRQA_ROW)
  del row['qas'][0]['detected_answers']
  assert "has no 'detected_answers'" in refusal(
      write(tmp_path / 'a.jsonl', row))


@pytest.mark.parametrize('cut', [3, 12, -20, -3])
def test_damaged_gzip_is_one_line(tmp_path, cut):
  whole = gzip.compress(MRQA.encode())
  assert 'not a whole gzip file' in refusal(
      write(tmp_path / 'a.jsonl.gz', whole[:cut]))
  for damaged in (b'no' + whole, whole[:30] + b'?????' + whole[35:]):
    assert 'not a whole gzip file' in refusal(
        write(tmp_path / 'b.jsonl.gz', damaged))


def test_last_of_two_equal_keys_counts_as_in_any_json_reader(tmp_path):
  text = json.dumps(SQUAD).replace(
      '"id": "who"', '"id": "other", "id": "who"')
  assert sources.load(write(tmp_path / 'a.json', text)) == SQUAD_EXAMPLES


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4)
    | st.integers(-10**30, 10**30)
    | st.sampled_from(['\ud800', '\0', '', 'Mira', 10**400, deep(900)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(['id', 'text', 'qas', 'context', 'answer_start']),
        inner, max_size=3), max_leaves=6)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_anywhere_is_examples_or_one_line(tmp_path_factory, data):
  tree, name = data.draw(st.sampled_from([
      (SQUAD, 'a.json'), (MRQA_ROW, 'a.jsonl')]))
  for _ in range(data.draw(st.integers(1, 2))):
    place = data.draw(st.sampled_from(list(places(tree))))
    tree = changed(tree, place, data.draw(ANY_JSON))
  path = write(tmp_path_factory.getbasetemp() / name, json.dumps(tree))
  assert_examples_or_one_line(path)


WHOLE = json.dumps(SQUAD).encode()


@hypothesis.given(st.binary(max_size=40) | st.integers(
    0, len(WHOLE) - 1).map(lambda n: WHOLE[:n]))
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes_are_one_line(tmp_path_factory, content):
  for name in ('a.json', 'a.jsonl', 'a.jsonl.gz'):
    refusal(write(tmp_path_factory.getbasetemp() / name, content))
