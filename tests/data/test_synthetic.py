"""The generated corpus: gold spans, disjoint splits, same seed same bytes."""

import hashlib
import re

import pytest

from qa_jax import errors
from qa_jax.data import synthetic
from qa_jax.data import synthetic_templates


def distinct_words(examples):
  """Returns every capitalised word of contexts and questions."""
  return {w for e in examples
          for w in re.findall(r'[A-Z]\w+', e.context + ' ' + e.question)}


def template_words():
  texts = [t for ts in synthetic_templates.ASIDES.values() for t in ts]
  for kind in synthetic_templates.KINDS.values():
    texts += [kind.name, *kind.pronouns]
    for relation in kind.relations:
      texts += [*relation.statements, *relation.questions]
  return {w.capitalize() for t in texts for w in re.findall(r'\w+', t)}


@pytest.mark.parametrize('arguments', [
    {}, {'subjects': 3, 'facts': 3, 'sentences': 20, 'impossible': 0.5},
    {'facts': 1, 'repeats': 1.0, 'split': 'eval'}])
def test_gold_answers_are_slices_of_the_context(arguments):
  for e in synthetic.synthetic(size=400, **arguments):
    assert e.impossible == (not e.answers)
    for gold in e.answers:
      assert e.context[gold.start:gold.start + len(gold.text)] == gold.text


def test_train_and_eval_share_no_invented_word():
  train = distinct_words(synthetic.synthetic(size=20000)) - template_words()
  held_out = distinct_words(synthetic.synthetic(size=4000, seed=1, split='eval')
                   ) - template_words()
  assert len(train) > 10000 and len(held_out) > 2000
  assert not train & held_out


def test_same_seed_gives_the_same_bytes_everywhere():
  text = repr([
      (e.id, e.question, e.context, e.answers, e.impossible, e.title)
      for e in synthetic.synthetic(
          seed=3, size=200, subjects=2, facts=3, sentences=2, impossible=0.3)])
  assert hashlib.sha256(text.encode()).hexdigest() == (
      '3bd4635c64a16b7995e71b4b71882af926746bc000425d51389d1b9f188a6fed')


def test_another_seed_gives_other_passages():
  first, second = (synthetic.synthetic(size=50, seed=s) for s in (0, 1))
  assert not {e.context for e in first} & {e.context for e in second}


def test_ids_are_unique_and_a_passage_has_several_questions():
  examples = synthetic.synthetic(size=103)
  assert len({e.id for e in examples}) == len(examples) == 103
  assert len({e.context for e in examples}) == 26
  assert len({(e.context, e.question) for e in examples}) == 103


@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_impossible_is_the_share_of_unanswerable_questions(share):
  examples = synthetic.synthetic(size=2000, impossible=share)
  measured = sum(e.impossible for e in examples) / len(examples)
  assert abs(measured - share) < 0.04


def test_repeats_mention_the_answer_of_a_fact_twice():
  examples = synthetic.synthetic(size=400, repeats=1.0, facts=1)
  assert all(e.context.count(e.answers[0].text) >= 2 for e in examples)


def test_kinds_are_those_asked_for():
  examples = synthetic.synthetic(size=200, kinds='ship,river')
  subjects = {e.title.split()[-1] == 'river' for e in examples}
  assert subjects == {True, False}
  assert all(e.title.startswith('the ') for e in examples)


def test_one_paraphrase_says_and_asks_each_relation_in_one_way():
  for e in synthetic.synthetic(size=400, paraphrases=1, kinds='book'):
    pattern = e.question.replace(e.title, '{N}')
    assert pattern in {
        r.questions[0] for r in synthetic_templates.BOOK.relations
    }


def test_sentences_make_passages_of_several_windows():
  example = synthetic.synthetic(size=1, sentences=200)[0]
  assert len(example.context.split()) > 800


@pytest.mark.parametrize('seed', range(5))
def test_the_longest_passage_has_enough_years(seed):
  example = synthetic.synthetic(
      size=1, seed=seed, sentences=synthetic.MAX_SENTENCES, subjects=8,
      facts=8, repeats=0)[0]
  years = re.findall(r'\b1[1-9]\d\d\b', example.context)
  assert len(years) > 400 and len({*years}) == len(years)


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'size': 0}, r'size=0 must be an integer in 1'),
    ({'facts': 9}, r'facts=9 must be an integer in 1 … 8'),
    ({'size': 1.5}, r'size=1.5 must be an integer'),
    ({'impossible': 2}, r'impossible=2 must be a number in 0 … 1'),
    ({'sentences': 2001}, r'sentences=2001 must be an integer in 0 … 2000'),
    ({'seed': 'a'}, r"seed='a' must be an integer"),
    ({'kinds': 'person,boat'}, r"unknown kind 'boat'"),
    ({'paraphrases': 0}, r'paraphrases=0 must be an integer in 1'),
    ({'split': 'evil'}, r"unknown split 'evil'.*eval")])
def test_bad_parameters_are_named(arguments, message):
  with pytest.raises(errors.UserError, match=message):
    synthetic.synthetic(**arguments)
