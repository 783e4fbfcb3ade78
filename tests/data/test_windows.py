"""Tests of windows: coverage, labels, maximal context, alignment audit."""

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data import alignment
from qa_jax.data import tokenizer
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import GoldAnswer
from tests.common import windows


def bert_spans(tokens, room, step):
  """Computes (start, length) as convert_examples_to_features of BERT does."""
  spans, start = [], 0
  while start < tokens:
    length = min(tokens - start, room)
    spans.append((start, length))
    if start + length == tokens:
      break
    start += min(length, step)
  return spans


def bert_max_context(spans, token):
  """Returns the window that _check_is_max_context of BERT chooses."""
  best, winner = None, None
  for i, (start, length) in enumerate(spans):
    if start <= token < start + length:
      score = (min(token - start, start + length - 1 - token)
               + 0.01 * length)
      if best is None or score > best:
        best, winner = score, i
  return winner


@pytest.mark.parametrize('tokens', [1, 6, 7, 8, 9, 11, 12, 13, 30, 101])
@pytest.mark.parametrize(('max_length', 'overlap'),
                         [(12, 0), (12, 3), (12, 6), (40, 20), (40, 33)])
def test_windows_are_those_of_bert(tokens, max_length, overlap):
  w = windows.cut(windows.example(tokens),
                  max_length=max_length,
                  window_overlap=overlap,
                  max_question_length=2)
  room = max_length - 2 - 3
  expected = bert_spans(tokens, room, room - overlap)
  assert list(zip(w.begin, w.length, strict=True)) == expected
  for token in range(tokens):
    owned = (token >= w.best_begin) & (token < w.best_end)
    assert np.flatnonzero(owned).tolist() == [
        bert_max_context(expected, token)], token


def test_max_context_of_random_cuts_is_that_of_bert():
  rng = np.random.default_rng(0)
  for _ in range(60):
    tokens, room = int(rng.integers(1, 400)), int(rng.integers(5, 120))
    overlap = int(rng.integers(0, room))
    w = windows.cut(windows.example(tokens, question='a'), max_length=room + 4,
                    window_overlap=overlap, max_question_length=1)
    spans = bert_spans(tokens, room, room - overlap)
    for token in range(0, tokens, 3):
      owned = (token >= w.best_begin) & (token < w.best_end)
      assert np.flatnonzero(owned).tolist() == [
          bert_max_context(spans, token)], (tokens, room, overlap, token)


@pytest.mark.parametrize('word', [
    'cafe\u0301', 'e\u0301a\u0308', 'b\ufe0f', 'c\u200d', 'a\u05b8\u05bf',
    'g\u0651', 'h\u0e48', 'i\u094d', 'j\xad', '\ufeffd', '\u200bk\u200b'])
def test_a_gold_span_keeps_the_marks_of_its_word(word):
  for before, after in (('', ''), ('x ', ' y'), ('(', ')'), ('x\n', '.')):
    if before == '(' and not word[0].isalpha():
      continue  # a mark belongs to the bracket before it
    context = before + word + after
    w = windows.cut(windows.example(
        context=context, answers=[(word, len(before))]), max_length=30)
    begin, end = w.char_spans(
        np.zeros(1, int), w.start_positions[:1], w.end_positions[:1])
    assert context[begin[0]:end[0]] == word
    assert w.audit == {**dict.fromkeys(alignment.AUDIT, 0), 'exact': 1}


def test_a_gold_span_without_the_mark_of_its_word_is_widened():
  w = windows.cut(windows.example(
      context='x cafe\u0301 y', answers=[('cafe', 2)]), max_length=30)
  assert w.audit['widened'] == 1


@pytest.mark.parametrize(('room', 'overlap'), [(369, 128), (240, 60)])
def test_max_context_of_long_windows_is_berts(room, overlap):
  """In hundreds of tokens 0.01 · length decides between two windows.

  A last window that is 100 tokens shorter loses a tie of one token.
  """
  decided = 0
  for tokens in range(room + 1, room + 700, 37):
    w = windows.cut(windows.example(tokens, question='a'), max_length=room + 4,
                    window_overlap=overlap, max_question_length=1)
    spans = bert_spans(tokens, room, room - overlap)
    owner = [bert_max_context(spans, t) for t in range(tokens)]
    assert [np.flatnonzero((t >= w.best_begin) & (t < w.best_end)).tolist()
            for t in range(tokens)] == [[n] for n in owner], tokens
    around = np.array([[min(t - a, a + n - 1 - t) for a, n in spans]
                       for t in range(tokens)])
    decided += int((around.argmax(axis=1) != owner).sum())
  assert decided > 5  # the bonus, and no tie


def test_every_gold_span_reads_back_as_text():
  context = 'abc de. fgh $ij klm nop'
  answers = [('de', 4), ('fgh $ij', 8), ('nop', 20)]
  for text, start in answers:
    w = windows.cut(windows.example(context=context, answers=[(text, start)]),
                    max_length=30)
    begin, end = w.char_spans(
        np.zeros(1, int), w.start_positions[:1], w.end_positions[:1])
    assert context[begin[0]:end[0]] == text
    assert w.audit['exact'] == 1


@pytest.mark.parametrize('place', ['cls', 'question', 'separator', 'padding'])
def test_a_span_outside_of_the_context_is_no_text(place):
  w = windows.cut(windows.example(context='abc de fgh', question='a b'),
                  max_length=30)
  first = 4  # after [CLS] a b [SEP]
  position = {'cls': 0, 'question': 2, 'separator': first + w.length[0],
              'padding': 29}[place]
  for span in ((position, first), (first, position)):
    if span[0] < first or span[1] >= first + w.length[0]:
      with pytest.raises(errors.UserError, match=rf'span \({span[0]}, {span[1]}'
                         r'\) of window 0 is not within .* 4 … ') as e:
        w.char_spans(np.zeros(2, int), *np.array([[first, x] for x in span]))
      assert f' … {first + w.length[0] - 1};' in str(e.value)


def test_a_batch_shorter_than_its_windows_is_refused():
  w = windows.cut(windows.example(30), max_length=20)
  longest = int(w.total_lengths.max())
  assert w.gather(np.array([0]), longest)['token_ids'].shape == (1, longest)
  with pytest.raises(errors.UserError, match=f'length={longest - 1} of a batch '
                     f'is below {longest}'):
    w.gather(np.array([-1, 0]), longest - 1)


def test_every_window_with_the_whole_span_has_a_label():
  w = windows.cut(windows.example(30, answers=[('g h', 12)]))
  positions = np.stack([w.start_positions, w.end_positions], 1)
  for i, (start, end) in enumerate(positions):
    inside = w.begin[i] <= 6 and w.begin[i] + w.length[i] > 7
    assert (start > 0) == inside
    if inside:
      batch = w.gather(np.array([i]), 12)
      ids = batch['token_ids'][0, start:end + 1]
      assert [windows.VOCAB.vocab[t] for t in ids] == ['g', 'h']


@pytest.mark.parametrize(('answer', 'fate'), [
    (('de', 4), 'exact'), (('e', 5), 'exact'), (('d', 0), 'repaired'),
    (('de', 19), 'repaired'), (('zz', 4), 'unrecoverable'),
    (('', 4), 'unrecoverable'), ((' ', 3), 'unrecoverable'),
    (('de', 10**9), 'repaired'), ((' de ', 3), 'exact'),
    (('j', -1), 'located'), (('abc  de', -1), 'located'),
])
def test_audit_names_the_fate_of_a_gold_span(answer, fate):
  # The vocabulary has single letters only, so any letter is a token.
  w = windows.cut(windows.example(context='abc de fgh ij', answers=[answer]),
                  max_length=40)
  assert w.audit == {**dict.fromkeys(alignment.AUDIT, 0), fate: 1}


@pytest.mark.parametrize(('start', 'place'), [
    (0, 2), (3, 2), (5, 2), (6, 2), (7, 10), (11, 10), (13, 10), (14, 17),
    (18, 17), (10**9, 17)])
def test_a_wrong_start_is_repaired_to_the_nearest_occurrence(start, place):
  """'de' is at 2, 10 and 17. A tie of distances goes to the earlier one."""
  context = 'a de b c  de f g de h'
  assert [n for n in range(len(context)) if context.startswith('de', n)] == [
      2, 10, 17]
  w = windows.cut(windows.example(context=context, answers=[('de', start)]),
                  max_length=40)
  begin, _ = w.char_spans(np.zeros(1, int), w.start_positions[:1],
                          w.end_positions[:1])
  assert begin[0] == place and w.audit['repaired'] == 1


def test_the_nearest_of_occurrences_that_overlap_is_found():
  answer = GoldAnswer('de de', 5)  # it is at 0, 4 and 8
  assert alignment.character_span('de  de  de  de', answer) == (
      4, 10, 'repaired')


def test_a_span_beside_an_ideograph_is_exact():
  w = windows.cut(windows.example(context='abc 東x de', answers=[('x', 5)]),
                  max_length=30)
  assert w.audit['exact'] == 1  # an ideograph is a token, and so is x


@pytest.mark.parametrize(('text', 'start', 'token'), [
    ('y', 5, 'xyz'), ('bc', 1, 'abc'), ('ab', 0, 'abc'),
    ('c xy', 2, 'abc xyz'), ('abc xyz', 0, 'abc xyz')])
def test_an_answer_that_begins_or_ends_inside_a_token_is_widened(
    text, start, token):
  """The tokens are 'abc', 'xyz' (unknown) and 'd'."""
  tokens = tokenizer.Tokenizer((*tokenizer.SPECIAL, 'abc', 'd'), True)
  context = 'abc xyz d'
  w = windows_lib.make_windows(
      [windows.example(context=context, answers=[(text, start)])], tokens,
      max_length=30, window_overlap=3, max_question_length=4)
  begin, end = (x[0] for x in w.char_spans(
      np.zeros(1, int), w.start_positions[:1], w.end_positions[:1]))
  assert context[begin:end] == token
  fate = 'exact' if token == text else 'widened'
  assert w.audit == {**dict.fromkeys(alignment.AUDIT, 0), fate: 1}


def test_an_answer_between_two_tokens_is_unrecoverable():
  tokens = tokenizer.Tokenizer((*tokenizer.SPECIAL, 'a', 'b'), True)
  w = windows_lib.make_windows(
      [windows.example(context='a \u200b b', answers=[('\u200b', 2)])], tokens,
      max_length=30, window_overlap=3, max_question_length=4)
  assert w.audit == {**dict.fromkeys(alignment.AUDIT, 0), 'unrecoverable': 1}


def test_span_longer_than_every_window_is_counted_and_not_trained_on():
  text = windows.example(30).context
  w = windows.cut(windows.example(30, answers=[(text, 0)]))
  assert w.audit['no_window'] == 1
  assert len(w.train_indices('cls')) == 0


def test_gold_spans_are_all_answers_that_a_window_holds_whole():
  rng = np.random.default_rng(0)
  examples = []
  for n in rng.integers(1, 60, 40):  # every token is a letter and a space
    starts = rng.integers(0, n, rng.integers(1, 6))
    spans = [(int(a), int(rng.integers(a, min(a + 5, n)))) for a in starts]
    text = windows.example(n).context
    examples.append(windows.example(n, answers=[
        (text[2 * a:2 * b + 1], 2 * a) for a, b in spans]))
  w = windows.cut(*examples)
  sizes = []
  for i, golds in enumerate(w.gather(np.arange(len(w)), 12)['gold_spans']):
    e = w.examples[w.example_of[i]]
    spans = dict.fromkeys((a.start // 2, (a.start + len(a.text)) // 2)
                          for a in e.answers)
    shift = w.context_offset[i] - w.begin[i]
    expected = [[a + shift, b + shift] for a, b in spans if (
        w.begin[i] <= a and b < w.begin[i] + w.length[i])]
    assert golds.tolist() == (
        expected + [[-1, -1]] * (len(golds) - len(expected)))
    label = [w.start_positions[i], w.end_positions[i]]
    assert label == (expected or [[0, 0]])[0]
    sizes.append(len(expected))
  assert 0 in sizes and w.gold_spans.shape[1] == max(sizes) > 2


def test_gold_spans_beyond_the_limit_of_a_window_are_counted():
  most = alignment.MAX_GOLD_SPANS
  text = windows.example(30).context
  answers = [(text[2 * i], 2 * i) for i in range(most + 3)] + [(text[0], 0)] * 4
  w = windows.cut(windows.example(30, answers=answers), max_length=60)
  assert w.gold_spans.shape == (1, most, 2)
  assert w.gold_spans[0, :, 0].tolist() == list(range(4, 4 + most))
  assert w.audit['surplus'] == 3 and w.audit['exact'] == most + 4
  assert w.faults['surplus'] == ['q30']
  # In windows of 6 tokens there is room for all of them.
  assert windows.cut(windows.example(30, answers=answers)).audit['surplus'] == 0


def test_answers_of_one_question_have_separate_fates():
  text = windows.example(30).context
  w = windows.cut(windows.example(30, answers=[('zz', 0), (text, 0), ('a', 0)]))
  fates = {k for k, n in w.audit.items() if n}
  assert fates == {'unrecoverable', 'no_window', 'exact'}
  assert len(w.train_indices('cls')) == len(w)


def test_unrecoverable_answer_never_becomes_a_no_answer_label():
  w = windows.cut(windows.example(5, answers=[('zz', 0)]),
                  windows.example(6, impossible=True))
  assert w.train_indices('cls').tolist() == [1]


def test_drop_leaves_out_answer_free_windows_of_answerable_questions_only():
  w = windows.cut(windows.example(30, answers=[('a', 0)]),
                  windows.example(31, impossible=True))
  indices = w.train_indices('drop')
  assert (w.example_of[indices] == 0).sum() == 1
  assert (w.example_of[indices] == 1).sum() == (w.example_of == 1).sum()
  assert len(w.train_indices('cls')) == len(w)


def test_a_generator_gives_the_windows_of_a_list():
  examples = [windows.example(n) for n in (3, 30)]
  given, expected = (windows_lib.make_windows(
      e, windows.VOCAB, max_length=12, window_overlap=2, max_question_length=4)
                     for e in (iter(examples), examples))
  assert given.examples == expected.examples == examples
  np.testing.assert_array_equal(given.begin, expected.begin)


def test_question_is_cut_and_empty_texts_have_one_window():
  w = windows.cut(windows.example(5, question='a ' * 400), windows.example(0),
                  windows.example(3, question=''))
  assert w.questions.lengths.tolist() == [4, 2, 0]
  assert (w.audit['cut'], w.faults['cut']) == (1, ['q5'])
  assert len(w) == 3
  batch = w.gather(np.arange(3), 12)
  assert [[windows.VOCAB.vocab[t] for t in row[1:6]]
          for row in batch['token_ids'][:2]] == [
              [*'aaaa', '[SEP]'], [*'ab', '[SEP]', '[SEP]', '[PAD]']]
  assert batch['context_mask'].sum(1).tolist() == [5, 0, 3]


def test_a_question_that_just_fits_is_not_cut():
  assert windows.cut(windows.example(question='abcd')).audit['cut'] == 0


def test_layout_of_a_row():
  w = windows.cut(windows.example(3))
  row = {k: v[0].tolist() for k, v in w.gather(np.array([0]), 10).items()}
  names = [windows.VOCAB.vocab[t] for t in row['token_ids']]
  assert names == ['[CLS]', 'a', 'b', '[SEP]', 'a', 'b', 'c', '[SEP]',
                   '[PAD]', '[PAD]']
  assert row['token_type_ids'] == [0] * 4 + [1] * 4 + [0] * 2
  assert row['attention_mask'] == [1] * 8 + [0] * 2
  assert row['context_mask'] == [False] * 4 + [True] * 3 + [False] * 3


def test_padding_row_has_weight_zero_and_no_context():
  batch = windows.cut(windows.example(3)).gather(np.array([0, -1]), 10)
  assert batch['weight'].tolist() == [1, 0]
  assert not batch['context_mask'][1].any()
  assert batch['attention_mask'][1].sum() == 1


def test_padding_row_has_no_gold_span():
  w = windows.cut(windows.example(3, answers=[('a', 0)]))
  golds = w.gather(np.array([0, -1]), 10)['gold_spans']
  assert golds.tolist() == [[[4, 4]], [[-1, -1]]]
  assert golds.dtype == np.int32


def test_the_text_of_a_window_changes_no_other_window():
  a = windows.cut(windows.example(30), windows.example(7, context='x y'))
  b = windows.cut(windows.example(30), windows.example(8, context='z . $ q'))
  n = len(a) - 1
  one, two = (w.gather(np.arange(n), 12) for w in (a, b))
  assert all((one[k] == two[k]).all() for k in one)


def test_context_is_tokenised_once_for_all_its_questions():
  w = windows.cut(*[windows.example(30, question=q) for q in 'abcdef'])
  assert len(w.contexts.lengths) == 1


@pytest.mark.parametrize('sizes', [(12, 5, 4), (12, 99, 4), (4, 0, 4),
                                   (12, -1, 4), (12, 0, 0)])
def test_lengths_without_a_step_are_refused(sizes):
  with pytest.raises(errors.UserError):
    windows.cut(windows.example(5),
                max_length=sizes[0],
                window_overlap=sizes[1],
                max_question_length=sizes[2])
