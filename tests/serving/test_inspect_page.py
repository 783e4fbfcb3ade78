"""Tests of the inspect page: structure, numbers, and no scripts."""

import base64
import dataclasses
import hashlib
from html import parser
import re
import tracemalloc
import types

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.inference import predict
from qa_jax.inference import span_view
from qa_jax.serving import inspect_page
from tests.common import commands
from tests.common.random_model import CONTEXT
from tests.common.random_model import QUESTION
from tests.common.random_model import random_qa
from tests.common.random_model import write_run

SCRIPT = '<script>alert(1)</script>'
VOID = {'meta', 'rect', 'path', 'br', 'link', 'img', 'input'}


class Tree(parser.HTMLParser):
  """The elements of a page as (tag, attributes, text)."""

  def __init__(self, html: str):
    super().__init__()
    self.all: list[list] = []
    self._open: list[list] = []
    self.feed(html)
    assert not self._open

  def handle_starttag(self, tag, attributes):
    names = [name for name, _ in attributes]
    assert len(names) == len(set(names))
    element = [tag, dict(attributes), '']
    self.all.append(element)
    if tag not in VOID:
      self._open.append(element)

  def handle_startendtag(self, tag, attributes):
    self.all.append([tag, dict(attributes), ''])

  def handle_endtag(self, tag):
    assert self._open.pop()[0] == tag

  def handle_data(self, data):
    for element in self._open:
      element[2] += data

  def find(self, tag: str, kind: str | None = None) -> list[list]:
    return [e for e in self.all if e[0] == tag and (
        kind is None or kind in (e[1].get('class') or '').split())]


def rendered(*questions, context=CONTEXT, head='independent', **decode):
  qa = random_qa(head, **decode)
  answered = inspect_page.answer_questions(qa, questions or [QUESTION], context)
  return Tree(inspect_page.render_page(qa, answered, context, title='A run'))


@pytest.fixture(scope='module')
def one() -> Tree:
  return rendered()


@pytest.fixture(scope='module')
def two() -> Tree:
  return rendered(QUESTION, 'What is in Oslo?')


def cells(tree: Tree, table: str) -> list[list[str]]:
  """Returns the cell texts of each row in the first table of a class."""
  rows, inside = [], False
  for tag, attributes, text in tree.all:
    if tag == 'table':
      if inside:
        break
      inside = attributes.get('class') == table
    elif inside and tag == 'tr':
      rows.append([])
    elif inside and tag == 'td':
      rows[-1].append(text)
  return [row for row in rows if row]


@pytest.mark.parametrize('context', [
    CONTEXT, '  Mira\n\tbuilt \r\n it.  ', 'É東京\u0301 👩\u200d🚀 & "x" <b>',
    '[SEP] Mira [CLS]'])
def test_the_passage_is_shown_unchanged(context):
  tree = rendered(context=context)
  assert tree.find('div', 'passage')[0][2] == context


def test_marks_are_shown_with_their_token():
  tree = rendered(context='Mir\u0301a\u200d e\u0301 \ufeffit\ufe0f')
  shown = ''.join(text for *_, text in tree.find('span', 't'))
  assert shown == 'Mir\u0301a\u200de\u0301\ufeffit\ufe0f'


def test_hovering_a_token_shows_its_scores_and_probabilities(one):
  view = random_qa('independent').spans(QUESTION, CONTEXT)
  keep = [i for i, inside in enumerate(view.context_mask) if inside]
  shown = one.find('span', 't')
  assert len(shown) == len(keep)
  for (_, attributes, _), i in zip(shown, keep, strict=True):
    token, start, end = attributes['data-tip'].split('\n')
    assert token == view.tokens[i]
    assert re.findall(r'-?\d+\.\d+', start + end) == [
        f'{view.start[i]:.2f}', f'{view.p_start[i]:.4f}',
        f'{view.end[i]:.2f}', f'{view.p_end[i]:.4f}']


def test_tint_grows_with_probability():
  qa = random_qa('independent')
  view = qa.spans(QUESTION, CONTEXT)
  band = view.band + np.linspace(0, 20, len(view.start))[:, None]
  view = dataclasses.replace(
      view, band=band, log_partition=np.logaddexp.reduce(band, axis=None))
  *pieces, _ = inspect_page._passage(
      view, qa.answer(question=QUESTION, context=CONTEXT), CONTEXT)
  tint = [piece['s'] for piece in pieces]
  assert tint == sorted(tint) and tint[0] == 0 and len(set(tint)) > 2
  assert [inspect_page._level(x) for x in (0, 0.004, 0.006, 0.5, 1)
         ] == [0, 0, 1, 5, 9]


def test_the_tokens_of_the_answer_are_marked():
  qa = random_qa('independent')
  answer = qa.answer(question=QUESTION, context=CONTEXT)
  declined = dataclasses.replace(answer, text='', start=0, end=0)
  last = dataclasses.replace(answer, text='.', start=len(CONTEXT) - 1,
                             end=len(CONTEXT))
  for given in (answer, declined, last):
    pieces = inspect_page._passage(
        qa.spans(QUESTION, CONTEXT), given, CONTEXT)
    marked = ''.join(piece['before'] + piece['text'] for piece in pieces
                     if piece.get('answer'))
    assert marked.strip() == given.text != CONTEXT


def test_best_spans_equal_the_n_best_of_predict(one):
  answer = random_qa('independent').answer(
      question=QUESTION, context=CONTEXT)
  *rows, null = cells(one, 'candidates')
  assert [row[1] for row in rows] == [c['text'] for c in answer.n_best]
  assert [row[2] for row in rows] == [
      f'{c["score"]:.3f}' for c in answer.n_best]
  assert [row[4] for row in rows] == [
      f'{c["start"]}–{c["end"]}' for c in answer.n_best]
  assert null[2] == f'{answer.null_score:.3f}'
  assert one.find('p', 'answer')[0][2] == f'→ {answer.text}'


def test_probabilities_of_all_spans_add_up_to_one():
  rows = cells(rendered(n_best=200), 'candidates')[:-1]
  assert sum(float(row[3]) for row in rows) == pytest.approx(1, abs=5e-3)


def test_null_has_its_probability_and_cells():
  options = dict(null_rule='min_null', n_best=200)
  tree = rendered(**options)
  answer = random_qa('independent', **options).answer(
      question=QUESTION, context=CONTEXT)
  *rows, null = cells(tree, 'candidates')
  assert null[3] == f'{answer.null_probability:.4f}'
  assert sum(float(row[3]) for row in [*rows, null]) == pytest.approx(
      1, abs=5e-3)
  tip = tree.find('span', 't')[-1][1]['data-tip']
  assert tip.startswith('[CLS]\n')
  assert tip.count(f'{answer.null_probability:.4f}') == 2  # start and end
  drawn = sum(e[1]['d'].count('M') for e in tree.find('path'))
  without = sum(e[1]['d'].count('M') for e in rendered().find('path'))
  assert drawn == without + 1 + 2 * 2  # the null score; [CLS] by layer
  first = sum(e[1]['d'].count('M0 0h') for e in tree.find('path'))
  assert first == 1 + 2  # they have the first row and column


def test_two_questions_share_one_colour_scale_and_one_set_of_labels():
  context = ' '.join(f'Mira built {n} in Oslo.' for n in range(8))
  tree = rendered(QUESTION, 'Where is it?', context=context)
  notes = [e[2].split('down:')[0].split() for e in tree.find('p', 'note')
           if 'down:' in e[2]]
  half = len(notes) // 2
  assert notes[:half] == notes[half:] and half == 2 * 3  # near and whole
  labels = [e[2].split() for e in tree.find('svg', 'top')]
  assert labels[:half] == labels[half:]
  assert len({e[1]['width'] for e in tree.find('svg', 'left')}) == 1


def test_a_long_passage_shows_the_window_of_its_best_span():
  context = CONTEXT + ' Oslo built it.' * 30
  tree = rendered(context=context)
  assert tree.find('div', 'passage')[0][2] == context
  assert re.search(r'scores are of window \d of \d+', tree.find(
      'article')[0][2])


def test_every_span_has_a_cell_and_the_best_a_frame(one):
  view = random_qa('independent').spans(QUESTION, CONTEXT)
  legal = int((view.band > -1e30).sum())
  tokens = int(view.context_mask.sum())
  drawn = sum(e[1]['d'].count('M') for e in one.find('path'))
  assert drawn == legal + 2 * 2 * tokens  # S·h and E·h, after 0 and 1 layers
  assert len(one.find('rect', 'over')) == inspect_page.MARKS + 2 * 2
  i, d = divmod(int(view.band.argmax()), view.band.shape[1])
  first = int(view.context_mask.argmax())
  assert any((int(e[1]['x']), int(e[1]['y'])) == (
      (i + d - first) * inspect_page.CELL, (i - first) * inspect_page.CELL)
      for e in one.find('rect', 'over')[:inspect_page.MARKS])
  best = random_qa('independent').answer(question=QUESTION, context=CONTEXT)
  assert f'1: {best.text}, {best.score:.2f}' in [
      text for *_, text in one.find('title')]


def test_tokens_that_are_left_out_leave_one_gap():
  places = np.array([3, 4, 6, 9])
  for null, expected in ((False, [3, 4, -1, 6, -1, 9]),
                         (True, [0, -1, 3, 4, -1, 6, -1, 9])):
    assert list(inspect_page._with_gaps(places, null=null)) == expected


@pytest.mark.parametrize('margin', [-0.01, 0.01])
def test_the_page_explains_the_decision_of_the_null_rule(margin):
  best = random_qa('independent').answer(question=QUESTION, context=CONTEXT)
  options = dict(null_rule='min_null', null_threshold=(
      best.null_score - best.score + margin))
  qa = random_qa('independent', **options)
  text = ' '.join(e[2] for e in rendered(**options).find('p', 'note'))
  silent = qa.answer(question=QUESTION, context=CONTEXT).text == ''
  assert silent == (margin < 0)
  assert ('so there is no answer' in text) == silent
  assert ('does not exceed the null threshold' in text) != silent


@pytest.mark.parametrize('rule', ['margin', 'posterior'])
def test_other_null_rules_agree_with_predict(rule):
  for threshold in (-1e3, 1e3):
    options = dict(null_rule=rule, null_threshold=threshold)
    text = rendered(**options).find('p', 'answer')[0][2]
    assert (text == '→ (no answer)') == (threshold < 0)
    note = ' '.join(e[2] for e in rendered(**options).find('p', 'note'))
    assert ('so there is no answer' in note) == (threshold < 0)


def test_two_questions_stand_side_by_side_on_the_same_tokens(two):
  assert [e[2] for e in two.find('h2')] == [QUESTION, 'What is in Oslo?']
  left, right = (e[2] for e in two.find('div', 'passage'))
  assert left == right == CONTEXT
  assert 'depends on the question' in two.find('p', 'point')[0][2]
  tips = [e[1]['data-tip'] for e in two.find('span', 't')]
  half = len(tips) // 2
  assert [t.split('\n')[0] for t in tips[:half]] == [
      t.split('\n')[0] for t in tips[half:]]
  assert all(a != b for a, b in zip(tips[:half], tips[half:], strict=True))
  # The table on top has a token's start score under both questions.
  qa = random_qa('independent')
  row = cells(two, 'moved')[0]
  scores = []
  for question in (QUESTION, 'What is in Oslo?'):
    view = qa.spans(question, CONTEXT)
    n = [e.split('\n')[0] for e in tips[:half]].index(row[0])
    scores.append(f'{view.start[view.context_mask][n]:.2f}')
  assert row[1:] == scores


@pytest.mark.parametrize('head', ['conditional', 'biaffine', 'mlp_span'])
def test_a_joint_head_is_shown_as_one(head):
  tree = rendered(head=head)
  text = ' '.join(e[2] for e in tree.find('article'))
  assert 'start + end + pair' in text and 'S·h' not in ' '.join(
      e[1]['data-tip'] for e in tree.find('span', 't'))
  assert ('are not shown: the head' in text) == (head != 'biaffine')


def test_markup_in_any_text_is_text():
  qa = random_qa('independent')
  context = f'Mira {SCRIPT} <b title="'
  answered = inspect_page.answer_questions(
      qa, [SCRIPT, '"onload="x'], context)
  tree = Tree(inspect_page.render_page(qa, answered, context, title=SCRIPT))
  assert not tree.find('script') and all(
      not e[1] for e in tree.find('b'))
  assert tree.find('title')[0][2] == tree.find('h2')[0][2] == SCRIPT
  for tag, attributes, _ in tree.all:
    assert tag != 'img' and not any(
        name.startswith('on') or name in ('src', 'href', 'style')
        for name in attributes), (tag, attributes)


def test_the_policy_allows_its_own_style_sheet_and_nothing_else(one):
  policy = next(e[1]['content'] for e in one.find('meta')
                if e[1].get('http-equiv') == 'Content-Security-Policy')
  style, = one.find('style')
  digest = base64.b64encode(hashlib.sha256(style[2].encode()).digest())
  assert policy.split('; ')[:2] == [
      "default-src 'none'", f"style-src 'sha256-{digest.decode()}'"]
  assert 'url(' not in style[2] and '@import' not in style[2]


@pytest.mark.parametrize('context', ['', ' \n'])
def test_a_context_without_tokens_is_refused(context):
  with pytest.raises(errors.UserError, match='no token to show'):
    rendered(context=context)


def test_a_context_without_a_legal_span_is_shown_with_its_null_score():
  long_words = 'banner translates'  # several tokens each
  strict = {'max_answer_length': 1, 'whole_words': True}
  tree = rendered(QUESTION, 'Who?', context=long_words, null_rule='min_null',
                  **strict)
  assert [e[2] for e in tree.find('p', 'answer')] == ['→ (no answer)'] * 2
  for questions in ((QUESTION,), (QUESTION, 'Who?')):
    with pytest.raises(errors.UserError, match='at most '
                       r'decode\.max_answer_length=1 tokens'):
      rendered(*questions, context=long_words, **strict)


# --- the command


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return write_run(random_qa('independent'),
                   tmp_path_factory.mktemp('runs') / 'run')


def test_command_writes_the_page_and_the_picture(run, tmp_path, monkeypatch):
  scored, score = [], predict.QA.spans
  monkeypatch.setattr(predict.QA, 'spans', lambda qa, question, context: (
      scored.append(question) or score(qa, question, context)))
  result = commands.command(
      'inspect_spans', f'--workdir={run}', f'--question={QUESTION}',
      '--second_question=', f'--context={CONTEXT}',
      f'--output={tmp_path}/new/a.html', f'--png={tmp_path}/a.png')
  assert (result.code, result.err) == (0, '')
  assert result.out == f'{tmp_path}/new/a.html, {tmp_path}/a.png\n'
  tree = Tree((tmp_path / 'new' / 'a.html').read_text('utf-8'))
  assert len(tree.find('article')) == 2
  assert scored == [QUESTION, '']  # once for both files
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(('changes', 'message'), [
    ({'workdir': None}, '--workdir is needed'),
    ({'output': None}, '--output is needed'),
    ({'question': None}, '--question is needed'),
    ({'context': None}, '--context is needed'),
    ({'context': ' '}, 'no token to show'),
    ({'context': ''}, 'no token to show'),
    ({'context': 'banner', 'decode.whole_words': True,
      'decode.max_answer_length': 1}, 'no legal span to show'),
    ({'question': '\udcff'}, 'question holds a lone surrogate'),
    ({'output': '{tmp}'}, 'a directory, expected a file'),
    ({'n_best': 0}, 'n_best=0 must be in 1 … 1000000'),
    ({'png': '/dev/null/a.png'}, 'cannot be written'),
    ({'png': '{tmp}/a.html'}, 'expected a name that ends in .png'),
    ({'png': '{tmp}/a.png', 'output': '{tmp}/../{name}/a.png'},
     'a.png is the file of --output')])
def test_a_mistake_is_one_line_and_leaves_no_file(
    run, tmp_path, changes, message):
  flags = {'workdir': run, 'question': QUESTION, 'context': CONTEXT,
           'output': tmp_path / 'a.html', **changes}
  text = commands.refusal('inspect_spans', *(
      f'--{name}={str(value).format(tmp=tmp_path, name=tmp_path.name)}'
      for name, value in flags.items() if value is not None))
  assert message in text
  assert not list(tmp_path.iterdir())


def test_the_map_of_a_long_window_has_the_cells_of_its_band_alone():
  """An array of all pairs of 8,192 tokens would take 64 MiB or more."""
  length, width = 8192, 4
  band = np.zeros((length, width))
  for d in range(width):
    band[length - d:, d] = -np.inf
  nothing = np.zeros(length)
  view = span_view.SpanView(
      tokens=('a',) * length, offsets=np.zeros((length, 2), int),
      start=nothing, end=nothing, context_mask=np.arange(length) > 0, band=band,
      null_score=0.0, joint=False, start_by_layer=None, end_by_layer=None,
      temperature=1.0, log_partition=0.0, null_probability=0.0,
      null_rule='never', na_score=0.0, window=0, windows=1)
  tracemalloc.start()
  (maps,) = inspect_page._maps([view], [types.SimpleNamespace(n_best=[])],
                               [np.arange(length - 1)])
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  (_, path), = maps['band']['paths']
  assert path.count('M') == width * (length - 1) - sum(range(width))
  assert peak < 32 * 2**20
