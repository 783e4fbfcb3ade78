"""Predictions against scores of their texts, and the files of an evaluation."""

import math

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import selective
from qa_jax.metrics import squad
from qa_jax.metrics.predictions import Predictions

EXAMPLES = [Example(key, 'q', 'c', tuple(GoldAnswer(t, 0) for t in texts),
                    impossible=not texts) for key, texts in {
    'a': ['x'], 'b': [], 'c': ['y z'], 'd': [], 'e': ['the']}.items()]
ANSWERS = {'a': 'x', 'b': '', 'c': 'y', 'd': 'w', 'e': 'v'}
NA_SCORES = {'d': 0.3, 'c': 0.2, 'b': 0.4, 'a': 0.1, 'e': 0.2}
PREDICTIONS = Predictions(EXAMPLES, ANSWERS, NA_SCORES)


def test_a_score_at_the_threshold_still_gets_an_answer():
  assert selective.declines(0.5, 0.5) is False
  assert selective.declines(np.array([0.4, 0.5, 0.6]), 0.5).tolist() == [
      False, False, True]


@pytest.mark.parametrize('version', ['auto', '2.0'])
@pytest.mark.parametrize('threshold', [-1.0, 0.1, 0.2, 0.35, math.inf])
def test_metrics_are_those_of_the_thresholded_texts(threshold, version):
  """The normalised gold answer 'the' is '', so '' is right for question e."""
  predictions = Predictions(EXAMPLES, ANSWERS, NA_SCORES, version)
  texts = predictions.texts(threshold)
  assert texts == {k: '' if NA_SCORES[k] > threshold else text
                   for k, text in ANSWERS.items()}
  np.testing.assert_array_equal(
      predictions.scores(threshold), squad.per_question(EXAMPLES, texts))
  metrics = predictions.metrics(threshold)
  official = squad.squad_metrics(EXAMPLES, texts)
  assert {k: v for k, v in metrics.items() if 'best' not in k} == official
  best = squad.squad_metrics(EXAMPLES, ANSWERS, na_scores=NA_SCORES)
  assert {k: v for k, v in metrics.items() if 'best' in k} == {
      k: v for k, v in best.items() if 'best' in k}


def test_each_text_is_scored_once(monkeypatch):
  texts, score = [], squad.score_answer
  monkeypatch.setattr(squad, 'score_answer', lambda text, *args, **options: (
      texts.append(text), score(text, *args, **options))[1])
  predictions = Predictions(EXAMPLES, ANSWERS, NA_SCORES)
  predictions.metrics(0.1)
  predictions.held_out_metrics(0.3)
  predictions.scores(0.2)
  assert sorted(texts) == sorted([*ANSWERS.values(), *[''] * len(EXAMPLES)])


def test_answerable_data_has_thresholds_and_no_best_one():
  predictions = Predictions(EXAMPLES[:1], {'a': 'x'}, {'a': 0.5})
  assert predictions.metrics(0.5) == {
      'exact_match': 100.0, 'f1': 100.0, 'total': 1}
  assert predictions.metrics(0.4)['exact_match'] == 0.0


def test_without_no_answer_scores_all_are_answered():
  predictions = Predictions(EXAMPLES, ANSWERS, None)
  assert predictions.texts(-math.inf) == ANSWERS
  assert not any('best' in key for key in predictions.metrics(0.0))


# --- files


def write(tmp_path, text):
  path = tmp_path / 'file.json'
  path.write_text(text, 'utf-8')
  return path


def test_the_files_of_an_evaluation_are_read_as_they_were_written(tmp_path):
  rows = [{'id': 'a', 'windows': 1, 'answers': [
      {'text': 'x', 'start': 0, 'end': 1, 'score': 2.0}]}]
  predictions_lib.write_evaluation(
      tmp_path, PREDICTIONS, threshold=0.25, n_best=rows, metrics={'f1': 3.0})
  read = lambda reader, name: reader(tmp_path / name)
  assert read(predictions_lib.read_predictions,
              'predictions.json') == PREDICTIONS.texts(0.25)
  assert read(predictions_lib.read_na_probs, 'na_probs.json') == NA_SCORES
  assert read(predictions_lib.read_n_best, 'nbest.jsonl') == {'a': rows[0]}
  assert read(files.read_object, 'metrics.json') == {'f1': 3.0}


def test_predictions_are_read_as_they_stand(tmp_path):
  path = write(tmp_path, '{"b": "", "a": " Zürich "}')
  assert list(predictions_lib.read_predictions(path).items()) == [
      ('b', ''), ('a', ' Zürich ')]


def test_na_probs_are_floats_in_the_order_of_the_file(tmp_path):
  scores = predictions_lib.read_na_probs(
      write(tmp_path, '{"b": 1, "a": -2.5e-1}'))
  assert list(scores.items()) == [('b', 1.0), ('a', -0.25)]


@pytest.mark.parametrize('read', [predictions_lib.read_predictions,
                                  predictions_lib.read_na_probs])
@pytest.mark.parametrize('text, message', [
    ('', 'not JSON'), ('{"a": ', 'not JSON'), ('[]', 'expected a JSON object'),
    ('{"a": "x", "a": "x"}', "'a' stands there twice"),
    ('{"q7": null}', "'q7' is null, expected"),
    ('{"q7": true}', "'q7' is true, expected"),
    ('{"q7": {"text": "x"}}', r"'q7' is {\"text\": \"x\"}, expected"),
])
def test_malformed_file_is_refused(read, text, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    read(write(tmp_path, text))


@pytest.mark.parametrize('text, message', [
    ('', 'not JSON'), ('[]', 'expected a JSON object'),
    ('{"f1": 60.0}', 'exact_match is None, expected a number'),
    ('{"exact_match": 50.0, "f1": "x"}', "f1 is 'x', expected a number"),
])
def test_damaged_metrics_are_refused_with_the_way_to_new_ones(
    text, message, tmp_path):
  with pytest.raises(errors.UserError, match=f'{message}.*; delete the file '
                     'and evaluate the run again$'):
    predictions_lib.read_metrics(write(tmp_path, text))


@pytest.mark.parametrize('text, message', [
    ('{"q7": 0.5}', "'q7' is 0.5, expected a string"),
    ('{"q7": ["x"]}', r"'q7' is \[\"x\"\], expected a string"),
])
def test_prediction_that_is_no_string_is_refused(text, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    predictions_lib.read_predictions(write(tmp_path, text))


@pytest.mark.parametrize('value, message', [
    ('NaN', "'q7' is nan, expected a finite"),
    ('-Infinity', "'q7' is -inf, expected a finite"),
    ('1e999', "'q7' is inf, expected a finite"),
    ('1' + '0' * 400, "'q7' is inf, expected a finite"),
    ('1' + '0' * 9000, "'q7' is inf, expected a finite"),
    ('"0.5"', "'q7' is \"0.5\", expected a number"),
])
def test_na_prob_that_is_no_finite_number_is_refused(value, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    predictions_lib.read_na_probs(
        write(tmp_path, f'{{"a": 0.5, "q7": {value}}}'))


@pytest.mark.parametrize('read', [predictions_lib.read_predictions,
                                  predictions_lib.read_na_probs])
@pytest.mark.parametrize('make', [
    lambda path: None, lambda path: path.mkdir(),
    lambda path: path.write_bytes(b'{"a": "\xff"}'),
    lambda path: path.write_text('{"a": 1, "a": ["\n'),
    lambda path: path.write_text('[' * 100_000)],
    ids=['missing', 'directory', 'not UTF-8', 'cut off', 'deep'])
def test_unreadable_file_is_named_in_one_line(read, make, tmp_path):
  path = tmp_path / 'answers.json'
  make(path)
  with pytest.raises(errors.UserError, match=r'^[^\n]*answers\.json: [^\n]+$'):
    read(path)
