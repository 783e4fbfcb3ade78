"""Tests of decode.whole_words against filtered lists of all candidates."""

import dataclasses
import string

import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.decoding import candidates
from qa_jax.inference import decode
from qa_jax.inference import predict
from qa_jax.models.encoders import bert
from tests.common import lookup
from tests.common import random_model

LETTERS = string.ascii_lowercase
TOKENIZER = tokenizer_lib.Tokenizer(
    (*tokenizer_lib.SPECIAL, *LETTERS, *('##' + c for c in LETTERS), *'.,-#',
     '##'), lowercase=True)
SIZES = bert.BertConfig(vocab_size=64, hidden_size=16, num_layers=1,
                        num_heads=2, mlp_size=32, max_position=64,
                        initializer_range=0.5)
# Words of one to six letters; windows of 40 tokens cut some of them.
WORDS = [LETTERS[i * 5 % 20:][:1 + i * 7 % 6] for i in range(60)]
CONTEXT = ' '.join(w + ',' * (i % 9 == 0) + '-##x.' * (i % 13 == 0)
                   for i, w in enumerate(WORDS))
QUESTIONS = [('x y', CONTEXT), ('z', 'Été-like É.'), ('', 'word'),
             ('a b', CONTEXT[40:])]


def make(head='independent', **fields) -> predict.QA:
  packing = fields.pop('packing', False)
  config = config_lib.check_config({
      'model': {'preset': '', 'head': head}, 'train': {'num_steps': 1},
      'data': {'max_length': 40, 'window_overlap': 9, 'packing': packing,
               'max_question_length': 8},
      'decode': {'max_answer_length': 12, 'n_best': 7, 'null_rule': 'never',
                 **fields}})
  return random_model.draw_qa(config, SIZES, TOKENIZER)


def at_boundaries(context: str, begin: int, end: int) -> bool:
  """Tells by the characters alone whether context[begin:end] is whole words."""
  def joined(i):  # a word goes on from character i - 1 to character i
    return 0 < i < len(context) and (
        context[i - 1].isalpha() and context[i].isalpha())
  return not joined(begin) and not joined(end)


def spans_of(qa, questions=QUESTIONS):
  return [[(c['start'], c['end'], c['score']) for c in answer.n_best]
          for answer in qa.answer_batch([
              {'question': q, 'context': c} for q, c in questions])]


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {}, {'search': 'dense'}, {'search': 'banded'}, {'packing': True},
    {'head': 'length_prior(width=12)'}, {'head': 'biaffine(width=12)'}],
                         ids=str)
def test_candidates_are_the_best_of_all_that_begin_and_end_words(fields):
  every = spans_of(make(n_best=4000, **fields))
  for (_, context), whole, all_spans in zip(
      QUESTIONS, spans_of(make(whole_words=True, **fields)), every,
      strict=True):
    expected = [s for s in all_spans if at_boundaries(context, *s[:2])]
    assert len(all_spans) > len(expected) > 0
    assert [s[:2] for s in whole] == [s[:2] for s in expected[:7]]
    np.testing.assert_allclose([s[2] for s in whole],
                               [s[2] for s in expected[:7]], atol=1e-5)


def test_posteriors_are_among_whole_words():
  answer = make(whole_words=True, n_best=4000).answer(*QUESTIONS[0])
  assert sum(c['probability'] for c in answer.n_best) == pytest.approx(1)


def test_answers_end_at_last_letters_and_at_the_end_of_the_context():
  windows = input_pipeline.make_windows(
      make().config, [Example('0', 'a', 'bcd efg'), Example('1', 'a', 'h')],
      TOKENIZER)
  masks = windows.gather(np.arange(2), 40, whole_words=True)
  first = 3  # after [CLS] a [SEP]
  for name, places in (('start_mask', [(0, 0), (0, 3), (1, 0)]),
                       ('end_mask', [(0, 2), (0, 5), (1, 0)])):
    assert np.argwhere(masks[name]).tolist() == [
        [row, first + place] for row, place in places]


def test_a_gold_span_that_cuts_a_word_has_no_legal_score():
  """The words of the golds are 'fghijk', of a token for each letter."""
  at = CONTEXT.index('fghijk')
  golds = tuple(GoldAnswer(CONTEXT[at + i:at + j], at + i)
                for i, j in ((0, 6), (0, 3), (2, 6)))
  windows = input_pipeline.make_windows(
      make().config, [Example('0', 'a', CONTEXT, golds)], TOKENIZER)
  assert (windows.gold_spans[..., 0] > 0).any(axis=0).sum() == 3
  for whole_words, legal in ((False, 3), (True, 1)):
    qa = make(whole_words=whole_words)
    scores = decode.score_windows(
        qa.model, qa.params, windows, qa.config, golds=True).gold_scores
    assert (scores > candidates.NO_SPAN).sum() == legal


@pytest.mark.parametrize('fields', [
    {}, {'head': 'conditional(beam=2, width=12)'}], ids=str)
def test_a_span_view_has_the_spans_and_probabilities_of_the_answers(fields):
  qa = make(whole_words=True, n_best=4000, **fields)
  for question, context in QUESTIONS[1], QUESTIONS[0]:  # one window, several
    answer, view = qa.answer(question, context), qa.spans(question, context)
    inside = np.isfinite(view.band)
    expected = {}
    for c in answer.n_best:
      place = view.locate(c['start'], c['end'])
      if place and np.isfinite(view.band[place[0], place[1] - place[0]]):
        expected[place] = c['probability']
    assert inside.sum() == len(expected) > 0
    for (i, j), probability in expected.items():
      assert view.p_band[i, j - i] == pytest.approx(probability, rel=1e-3)
    assert (view.p_start.sum() <= 1.00001) and (
        view.windows > 1 or view.p_start.sum() == pytest.approx(1))


@pytest.mark.parametrize('fields', [
    {'search': 'beam(width=3)'}, {'search': 'argmax'}, {'search': 'top_k(k=9)'},
    {'head': 'conditional(beam=2, width=12)'}], ids=str)
def test_no_search_or_beam_returns_a_part_of_a_word(fields):
  found = spans_of(make(whole_words=True, **fields))
  for (_, context), spans in zip(QUESTIONS, found, strict=True):
    assert all(at_boundaries(context, *s[:2]) for s in spans)
  assert any(found)


def test_the_beam_of_a_conditional_head_has_legal_starts_only():
  """All starts of the beam lie inside the long words without whole_words."""
  qa = make('conditional(beam=1, width=12)', whole_words=True)
  context = ' '.join(LETTERS[i:i + 9] for i in range(8))
  questions = [(q, context) for q in LETTERS]
  assert all(spans_of(qa, questions))
  plain = dataclasses.replace(qa, config=config_lib.check_config({
      **qa.config.to_dict(), 'decode': {
          **qa.config.to_dict()['decode'], 'whole_words': False}}))
  assert not all(at_boundaries(context, *spans[0][:2])
                 for spans in spans_of(plain, questions))


@dataclasses.dataclass(frozen=True)
class Starts(lookup.Lookup):
  """A model whose null score says whether a head gets legal starts."""

  def apply(self, variables, token_ids, *args, start_mask=None, **inputs):
    scores = super().apply(variables, token_ids, *args, **inputs)
    given = jnp.zeros(len(token_ids)) + (start_mask is not None)
    return dataclasses.replace(scores, null=given)


def test_a_head_gets_legal_starts_for_whole_words_alone():
  for whole_words in (False, True):
    config = lookup.make_config(whole_words=whole_words)
    windows = input_pipeline.make_windows(
        config, lookup.make_examples(), lookup.TOKENIZER)
    null = decode.score_windows(
        Starts(), lookup.PARAMS, windows, config).null
    assert set(null.tolist()) == {float(whole_words)}


def test_regret_of_an_inexact_search_is_to_the_best_whole_words():
  rows = [Example(str(n), q, CONTEXT[n:]) for n, q in enumerate('abcdef')]
  exact, beam = (make(whole_words=True, search=s)
                 for s in ('two_stage', 'beam(width=1)'))
  windows = input_pipeline.make_windows(exact.config, rows, TOKENIZER)
  best, found = (decode.answer_questions(
      qa.model, qa.params, windows, qa.config) for qa in (exact, beam))
  np.testing.assert_allclose(
      found.regret, best.score[best.ptr[:-1]] - found.score[found.ptr[:-1]],
      atol=1e-5)


def test_warm_up_compiles_all_programs_of_an_answer():
  qa = make(whole_words=True)
  qa.warm_up()
  run = decode.build_program(qa.model, qa.config.decode)
  compiled = run._cache_size()
  qa.answer(*QUESTIONS[2])
  assert run._cache_size() == compiled > 0


@pytest.mark.parametrize('value', [1, 'yes', None])
def test_other_values_are_refused(value):
  with pytest.raises(errors.UserError, match=r'whole_words=.*expected bool'):
    make(whole_words=value)
