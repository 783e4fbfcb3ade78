"""Metrics against recorded values of the official scripts, and by hand.

tests/golden/record_metrics.py recorded the official values, which ours equal to
the bit. record_torchmetrics.py recorded those of torchmetrics, which ours equal
to float32.
"""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from experiments import cli
from qa_jax import errors
from qa_jax.data import examples as examples_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from tests.common.refusals import refusal

RECORDED = pathlib.Path(__file__).parents[1] / 'golden'
GOLDEN = json.loads((RECORDED / 'metrics_official.json').read_text('utf-8'))
TORCHMETRICS = json.loads(
    (RECORDED / 'metrics_torchmetrics.json').read_text('utf-8'))
SETS = GOLDEN['sets']

# Our name → the official name. The official NoAns_f1 equals NoAns_exact.
OFFICIAL = {
    'has_answer_exact_match': 'HasAns_exact', 'has_answer_f1': 'HasAns_f1',
    'has_answer_total': 'HasAns_total', 'no_answer_total': 'NoAns_total',
    'no_answer_exact_match': 'NoAns_exact', 'best_exact_match': 'best_exact',
    'best_exact_match_threshold': 'best_exact_thresh', 'best_f1': 'best_f1',
    'best_f1_threshold': 'best_f1_thresh', 'total': 'total', 'f1': 'f1'}


def make_examples(golds):
  return [Example(key, 'q', 'c', tuple(GoldAnswer(t, 0) for t in texts),
                  impossible=not texts) for key, texts in golds.items()]


# b and d have no answer.
EXAMPLES = make_examples({'a': ['x'], 'b': [], 'c': ['y z'], 'd': []})
ANSWERS = {'a': 'x', 'b': '', 'c': 'y', 'd': 'w'}


def official_names(values):
  return {OFFICIAL.get(k, 'exact'): v for k, v in values.items()}


def official(set_name, threshold):
  [run] = [r for r in GOLDEN['runs'] if r['version'] == '2.0'
           and r['set'] == set_name and r['threshold'] == threshold]
  return {k: v for k, v in run['expected'].items() if k != 'NoAns_f1'}


# --- one answer


@pytest.mark.parametrize('text', GOLDEN['normalized'])
def test_normalisation_is_the_official_one(text):
  assert examples_lib.normalize_answer(text) == GOLDEN['normalized'][text]


@pytest.mark.parametrize(
    'row', [r for r in GOLDEN['answers'] if r['1.1'] is not None],
    ids=lambda r: ascii((r['prediction'], r['golds'])))
def test_answer_scores_as_evaluate_v1_1(row):
  scores = squad.score_answer(row['prediction'], row['golds'], version='1.1')
  assert scores == tuple(row['1.1'])


@pytest.mark.parametrize('row', GOLDEN['answers'],
                         ids=lambda r: ascii((r['prediction'], r['golds'])))
def test_answer_scores_as_evaluate_v2_0(row):
  scores = squad.score_answer(row['prediction'], row['golds'], version='2.0')
  assert scores == tuple(row['2.0'])


@pytest.mark.parametrize('index', TORCHMETRICS['each'])
def test_answer_scores_as_torchmetrics(index):
  row = GOLDEN['answers'][int(index)]
  em, f1 = squad.score_answer(
      row['prediction'], row['golds'], version='1.1')
  if not examples_lib.normalize_answer(row['prediction']):
    f1 = em  # torchmetrics gives two empty bags the F1 of a match
  np.testing.assert_allclose(
      TORCHMETRICS['each'][index], [100 * em, 100 * f1], rtol=1e-6)


def test_article_alone_is_exact_without_f1_in_1_1():
  assert squad.score_answer('the', ['The'], version='1.1') == (1.0, 0.0)


def test_article_alone_is_no_answer_in_2_0():
  assert squad.score_answer('the', ['The'], version='2.0') == (1.0, 1.0)


def test_gold_of_articles_alone_is_dropped_in_2_0():
  assert squad.score_answer('', ['the', 'x'], version='2.0') == (0.0, 0.0)


def test_punctuation_outside_ascii_stays():
  assert examples_lib.normalize_answer('“The” city – U.S.') == '“ ” city – us'


def test_punctuation_goes_before_articles():
  assert examples_lib.normalize_answer('t.he a-b') == 'ab'


def test_f1_counts_repeated_tokens():
  # 2 tokens in common of 3 predicted and 4 expected: 2·(2/3)(1/2)/(7/6).
  _, f1 = squad.score_answer('b b c', ['b b d d'], version='1.1')
  assert f1 == pytest.approx(4 / 7, abs=1e-15)


def test_exact_match_and_f1_are_best_over_different_golds():
  # 'x' is exact for no gold; F1 2/3 with the second, 0 with the first.
  assert squad.score_answer('x y', ['z', 'x'], version='1.1') == (0.0, 2 / 3)


# --- a data set


@pytest.mark.parametrize(
    'run', [r for r in GOLDEN['runs'] if r['version'] == '1.1'],
    ids=lambda r: r['set'])
def test_data_set_scores_as_evaluate_v1_1(run):
  case = SETS[run['set']]
  values = squad.squad_metrics(
      make_examples(case['golds']), case['predictions'])
  assert {k: values[k] for k in ('exact_match', 'f1')} == run['expected']


@pytest.mark.parametrize(
    'run', [r for r in GOLDEN['runs'] if r['version'] == '2.0'],
    ids=lambda r: f'{r["set"]} {r["threshold"]}')
def test_data_set_scores_as_evaluate_v2_0(run):
  case, threshold = SETS[run['set']], run['threshold']
  values = squad.squad_metrics(
      make_examples(case['golds']), case['predictions'], version='2.0',
      na_scores=None if threshold is None else case['na_probs'],
      na_threshold=threshold)
  values.pop('unknown', None)
  assert official_names(values) == official(run['set'], threshold)


def test_two_files_are_thresholded_at_1_as_officially():
  case = SETS['logits']
  values = squad.squad_metrics(make_examples(case['golds']),
                              case['predictions'],
                              na_scores=case['na_probs'])
  assert official_names(values) == official('logits', 1.0)


def test_thresholded_predictions_score_as_evaluate_v2_0():
  """Best thresholds are those of the answers before any threshold."""
  salad = SETS['salad']
  values = predictions_lib.Predictions(
      make_examples(salad['golds']), salad['predictions'], salad['na_probs'],
      version='2.0').metrics(0.1)
  assert official_names(values) == official('thresholded', None) | {
      k: v for k, v in official('salad', 1.0).items() if 'best' in k}


def test_answer_at_the_threshold_stays():
  values = squad.squad_metrics(
      EXAMPLES, ANSWERS, na_scores=dict.fromkeys(ANSWERS, 0.5),
      na_threshold=0.5)
  assert values['has_answer_exact_match'] == 50.0


def test_values_by_hand():
  # EM and F1: a is exact, b is exactly '', c has F1 2/3, d is wrong. The sweep
  # starts at 2; by rising na_score, a adds 1, c adds 0 (EM) or 2/3 (F1), d
  # takes 1 and b adds 0.
  values = squad.squad_metrics(
      EXAMPLES, ANSWERS, na_scores={'d': 0.3, 'c': 0.2, 'b': 0.4, 'a': 0.1})
  assert values == pytest.approx({
      'exact_match': 50.0, 'f1': 100 * (2 + 2 / 3) / 4, 'total': 4,
      'has_answer_exact_match': 50.0, 'has_answer_f1': 100 * (5 / 3) / 2,
      'has_answer_total': 2, 'no_answer_exact_match': 50.0,
      'no_answer_total': 2, 'best_exact_match': 75.0,
      'best_exact_match_threshold': 0.1, 'best_f1': 100 * (3 + 2 / 3) / 4,
      'best_f1_threshold': 0.2}, abs=1e-12)


@pytest.mark.parametrize(('na_scores', 'nothing'), [
    ({'a': 9.0, 'b': 1.0, 'c': 8.0, 'd': 0.0}, True),  # d is wrong first
    ({'a': 0.0, 'b': 1.0, 'c': 8.0, 'd': 9.0}, False),  # a is right at 0.0
    ({'a': 0.1, 'b': 0.4, 'c': 0.2, 'd': 0.3}, False)])
def test_a_best_threshold_may_be_to_answer_nothing(
    na_scores, nothing, capsys):
  values = squad.squad_metrics(
      EXAMPLES, {**ANSWERS, 'c': 'w', 'b': 'x'}, na_scores=na_scores)
  assert values['best_exact_match_threshold'] == (
      0.0 if nothing else na_scores['a'])
  for score in ('exact_match', 'f1'):
    assert squad.answers_nothing(values, score) == nothing
  cli.print_metrics(values)
  shown = dict(line.split(maxsplit=1)
               for line in capsys.readouterr().out.splitlines())
  assert (shown['best_f1_threshold'] == 'never answer') == nothing
  assert shown['best_f1'] == f'{values["best_f1"]:.4f}'


def test_ties_are_taken_in_the_order_of_the_na_scores():
  best = [squad.squad_metrics(EXAMPLES, ANSWERS, na_scores=dict.fromkeys(
      order, 0.5))['best_exact_match'] for order in ('abcd', 'dbca')]
  assert best == [75.0, 50.0]


def test_answerable_data_has_no_keys_of_unanswerable_data():
  values = squad.squad_metrics(make_examples({'a': ['x']}), {'a': 'x'},
                              na_scores={'a': 7.0})
  assert values == {'exact_match': 100.0, 'f1': 100.0, 'total': 1}


@pytest.mark.parametrize('extra, version', [({}, '1.1'), ({'b': []}, '2.0')])
def test_version_is_2_0_if_any_question_is_impossible(extra, version):
  examples = make_examples({'a': ['the']} | extra)
  _, f1 = squad.per_question(examples, {'a': 'the', 'b': ''})
  assert f1[0] == {'1.1': 0.0, '2.0': 1.0}[version]


def test_question_without_prediction_scores_0_and_stays_in_the_total():
  values = squad.squad_metrics(EXAMPLES, {'a': 'x'})
  assert {k: values[k] for k in ('exact_match', 'f1', 'total', 'missing')} == {
      'exact_match': 25.0, 'f1': 25.0, 'total': 4, 'missing': 3}


def test_question_without_prediction_gains_nothing_from_a_threshold():
  values = squad.squad_metrics(
      EXAMPLES, {'a': 'x'}, na_scores=dict.fromkeys('abcd', 2.0))
  assert values['no_answer_exact_match'] == 0.0


def test_question_without_prediction_gains_nothing_in_the_best_score():
  values = squad.squad_metrics(
      EXAMPLES, {'a': 'x'}, na_scores=dict.fromkeys('abcd', 0.0))
  assert values['best_exact_match'] == 25.0


@pytest.mark.parametrize(('predictions', 'na_scores', 'message'), [
    ({**ANSWERS, 'c': None}, None, "predictions['c'] is None, expected a text"),
    ({'z': 3}, None, "predictions['z'] is 3, expected a text"),
    (ANSWERS, {**dict.fromkeys('abd', 0.5), 'c': '0.5'},
     "na_scores['c'] is '0.5', expected a number"),
    (ANSWERS, dict.fromkeys('abcd', float('nan')), 'is nan, expected')])
def test_a_value_of_another_type_is_named(predictions, na_scores, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    squad.squad_metrics(EXAMPLES, predictions, na_scores=na_scores)


def test_rows_of_evaluate_that_are_given_as_examples_are_named():
  row = {'id': 'a', 'answers': {'text': ['x'], 'answer_start': [0]}}
  with pytest.raises(errors.UserError, match=r"\{'id': 'a'.* as references="):
    squad.squad_metrics([row], {'a': 'x'})
  assert squad.squad_metrics(references=[row], predictions={'a': 'x'})[
      'f1'] == 100


def test_na_scores_may_be_numbers_of_numpy():
  scores = dict(zip('abcd', np.array([0.1, 2, 0.1, 2], np.float32),
                    strict=True))
  assert squad.squad_metrics(EXAMPLES, ANSWERS, na_scores=scores)[
      'no_answer_exact_match'] == 100


def test_a_generator_of_examples_scores_as_a_list():
  assert squad.squad_metrics(iter(EXAMPLES), ANSWERS) == squad.squad_metrics(
      EXAMPLES, ANSWERS)
  np.testing.assert_array_equal(squad.per_question(iter(EXAMPLES), ANSWERS),
                                squad.per_question(EXAMPLES, ANSWERS))


def test_predictions_for_no_question_are_counted_and_ignored():
  values = squad.squad_metrics(EXAMPLES, ANSWERS | {'z': 'x', 'y': ''})
  assert values == squad.squad_metrics(EXAMPLES, ANSWERS) | {'unknown': 2}


def test_per_question_scores_follow_the_order_of_the_examples():
  em, f1 = squad.per_question(EXAMPLES, ANSWERS)
  np.testing.assert_array_equal([em, f1], [[1, 1, 0, 0], [1, 1, 2 / 3, 0]])


@pytest.mark.parametrize('examples, options, message', [
    ([], {}, 'there is no question to score'),
    (EXAMPLES, {'version': '1.2'}, "'1.2' is none of auto, 1.1, 2.0"),
    (EXAMPLES, {'version': '1.1'}, "'b' has no gold answer"),
    (EXAMPLES, {'na_scores': {'a': 0.0, 'b': 0.0}},
     "2 of 4 questions have no na_score, the first is 'c'"),
])
def test_data_that_cannot_be_scored_is_refused(examples, options, message):
  with pytest.raises(errors.UserError, match=message):
    squad.squad_metrics(examples, ANSWERS, **options)


@pytest.mark.parametrize('threshold', [math.nan, None, '0.5'])
def test_a_threshold_that_is_no_number_is_refused(threshold):
  assert f'na_threshold is {threshold!r}, expected a number' in refusal(
      lambda: squad.squad_metrics(
          EXAMPLES, ANSWERS, na_scores=dict.fromkeys(ANSWERS, 0.5),
          na_threshold=threshold))


@pytest.mark.parametrize(('golds', 'version', 'message'), [
    (['ab'], '2', "score_answer: version='2'"),
    (['ab'], 'auto', "score_answer: version='auto'"),
    ('ab', '1.1', "golds='ab' is a text"),
    ([], '1.1', "version '1.1' needs a gold text")])
def test_an_answer_that_cannot_be_scored_is_refused(golds, version, message):
  assert message in refusal(
      lambda: squad.score_answer('ab', golds, version=version))


# --- rows of Hugging Face's `evaluate`


def rows(probabilities=False):
  golds = {'a': ['Paris'], 'b': ['the red fox', 'fox'], 'c': []}
  texts = {'a': 'paris', 'b': 'a fox ran', 'c': 'Rome'}
  nulls = {'a': 0.1, 'b': 0.2, 'c': 0.9}
  return ([{'id': k, 'prediction_text': v, **(
      {'no_answer_probability': nulls[k]} if probabilities else {})}
           for k, v in texts.items()],
          [{'id': k, 'answers': {'text': v, 'answer_start': [0] * len(v)}}
           for k, v in golds.items()])


def test_rows_of_evaluate_are_scored_by_hand_computed_values():
  predictions, references = rows()
  values = squad.squad_metrics(predictions=predictions[:2],
                               references=references[:2])
  # "fox ran" and "fox" share one of two and one tokens: F1 is 2/3.
  assert values['exact_match'] == 50 and values['total'] == 2
  assert values['f1'] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_rows_with_probabilities_are_those_of_version_2():
  predictions, references = rows(probabilities=True)
  values = squad.squad_metrics(predictions=predictions, references=references,
                               na_threshold=0.5)
  assert values['no_answer_exact_match'] == 100  # 0.9 > 0.5: no answer
  assert values['has_answer_f1'] == pytest.approx(100 * (1 + 2 / 3) / 2)
  assert values['best_f1'] == pytest.approx(100 * (2 + 2 / 3) / 3)


def test_the_version_of_rows_is_that_of_their_metric_in_evaluate():
  """Probabilities, or a reference without answers, make it 2.0."""
  predictions, references = rows(probabilities=True)
  values = squad.squad_metrics(predictions=predictions[:2],
                               references=references[:2])
  assert values['best_f1'] == pytest.approx(100 * (1 + 2 / 3) / 2)
  assert values['has_answer_total'] == 2
  predictions, references = rows()
  assert squad.squad_metrics(predictions=predictions, references=references)[
      'no_answer_total'] == 1


def test_rows_that_contradict_other_arguments_are_refused():
  predictions, references = rows(probabilities=True)
  for message, arguments in (
      ('give one of examples and references', {'examples': EXAMPLES}),
      ('contradict each other', {'na_scores': dict.fromkeys('abc', 0.5)})):
    assert message in refusal(lambda arguments=arguments: squad.squad_metrics(
        predictions=predictions, references=references, **arguments))
  assert 'give one of examples and references' in refusal(
      lambda: squad.squad_metrics(predictions=predictions))


def test_probabilities_of_numpy_are_those_of_python():
  predictions, references = rows(probabilities=True)
  for row in predictions:
    row['no_answer_probability'] = np.float32(row['no_answer_probability'])
  values = squad.squad_metrics(predictions=predictions, references=references,
                               na_threshold=0.5)
  assert values['no_answer_exact_match'] == 100


@pytest.mark.parametrize(('change', 'message'), [
    (lambda p, r: [row.update(no_answer_probability=math.nan) for row in p],
     r"na_scores\['a'\] is nan, expected a number"),
    (lambda p, r: p.append(p[0]), "id 'a' stands there twice"),
    (lambda p, r: p[0].pop('prediction_text'), "no 'prediction_text'"),
    (lambda p, r: p[0].update(no_answer_probability=1), 'others have it'),
    (lambda p, r: r[0].update(answers=['x']), r'answers is list'),
    (lambda p, r: r[0]['answers'].update(text='x'), r'answers.text is str'),
    (lambda p, r: p[0].update(id=3.5), r'predictions\[0\].id is float')])
def test_a_wrong_row_is_named(change, message):
  predictions, references = rows()
  change(predictions, references)
  with pytest.raises(errors.UserError, match=message):
    squad.squad_metrics(predictions=predictions, references=references)
