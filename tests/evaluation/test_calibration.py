"""Thresholds against all there are, temperatures against enumeration, bins
against sklearn; and what uses them."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from scipy import optimize
import sklearn.calibration

from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.evaluation import calibrate
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from qa_jax.training import train
from tests.common import commands
from tests.common import tiny
from tests.common.refusals import refusal

ALL = 'synthetic(size=60, impossible=0.4)'
TRAINED = f"articles(of='{ALL}', high=0.6)"
HELD_OUT = f"articles(of='{ALL}', low=0.6)"


# --- the choice


def at(threshold, na_score, answered, silent):
  return float(np.where(na_score > threshold, silent, answered).mean())


@pytest.mark.parametrize('seed', range(20))
def test_threshold_is_the_best_of_all_and_keeps_its_promise(seed):
  rng = np.random.default_rng(seed)
  na_score = rng.integers(-3, 4, 12) / 2  # with ties
  silent = rng.integers(0, 2, 12).astype(float)
  answered = np.where(silent, 0.0, rng.integers(0, 4, 12) / 3)
  found, promised = calibration.choose_threshold(na_score, answered, silent)
  every = [at(t, na_score, answered, silent)
           for t in [-9.0, *np.unique(na_score)]]
  assert promised == pytest.approx(max(every))
  assert at(found, na_score, answered, silent) == pytest.approx(promised)


def test_threshold_lies_between_two_scores_unless_they_are_neighbours():
  choose = lambda *na_score: calibration.choose_threshold(
      np.array(na_score), np.array([1.0, 0.0]), np.array([0.0, 1.0]))[0]
  assert choose(-1.0, 2.0) == 0.5
  assert choose(1.0, np.nextafter(1.0, 2)) == 1.0
  assert choose(2.0, 1.0) < 1.0  # the wrong way round: answer nothing


def test_all_are_answered_if_all_have_an_answer():
  na_score = np.array([5.0, -2.0])
  found, score = calibration.choose_threshold(
      na_score, np.array([0.5, 1.0]), np.zeros(2))
  assert found == 5.0 and score == 0.75


# --- temperature


def fitting(seed, truth, *, with_null):
  """Questions whose right span, or null, was drawn at temperature `truth`.

  And the exact loss at any temperature, by enumeration.
  """
  rng = np.random.default_rng(seed)
  scores = [rng.normal(0, 4, rng.integers(2, 40)) for _ in range(400)]
  null = rng.normal(0, 4, len(scores)) if with_null else None
  golds, outcomes = [], []
  for q, s in enumerate(scores):
    outcomes.append(np.append(s, null[q]) if with_null else s)
    p = np.exp(outcomes[q] / truth)
    right = rng.choice(len(p), p=p / p.sum())
    if right < len(s):
      golds += [(q, right)]
      if q % 3 == 0 and len(s) > right + 1:  # a second place is right as well
        golds += [(q, right + 1)]

  def loss(t):
    out = []
    for q, all_of in enumerate(outcomes):
      right = [g for e, g in golds if e == q] or [-1]
      out.append(np.logaddexp.reduce(all_of / t)
                 - np.logaddexp.reduce(all_of[right] / t))
    return np.mean(out)
  return calibration.TemperatureData(
      log_partition=np.array([[np.logaddexp.reduce(s / t)
                      for t in calibration.TEMPERATURES] for s in scores]),
      best=np.array([s.max() for s in scores]), null=null,
      gold=np.array([scores[q][g] for q, g in golds]),
      gold_of=np.array([q for q, _ in golds])), loss


@pytest.mark.parametrize(('with_null', 'truth'), [
    (True, 2.5), (True, 0.4), (False, 1.0), (False, 6.0)])
def test_temperature_is_the_minimum_of_the_enumerated_loss(with_null, truth):
  data, loss = fitting(0, truth, with_null=with_null)
  found, before, after = calibration.fit_temperature(data)
  exact = optimize.minimize_scalar(
      lambda x: loss(np.exp(x)), bounds=(-3, 3), method='bounded',
      options={'xatol': 1e-7})
  assert found == pytest.approx(np.exp(exact.x), rel=1e-3)  # the spline's error
  assert before == pytest.approx(loss(1.0), abs=1e-5)
  assert after == pytest.approx(exact.fun, abs=1e-5)
  # Two places that are right make the drawn one surer than it was.
  assert found == pytest.approx(truth, rel=0.35)


def test_scores_that_cannot_be_improved_keep_their_temperature():
  found, before, after = calibration.fit_temperature(
      fitting(3, 1.0, with_null=True)[0])
  assert found == pytest.approx(1, abs=0.2) and after <= before


def test_nothing_to_fit_is_temperature_1():
  empty = np.zeros(0)
  found, before, _ = calibration.fit_temperature(calibration.TemperatureData(
      empty.reshape(0, 41), empty, None, empty, empty.astype(int)))
  assert found == 1.0 and np.isnan(before)


def test_bins_are_those_of_sklearn():
  rng = np.random.default_rng(0)
  confidence = np.append(rng.random(500) ** 3, [0, 1, 1 / 3, 0.2, 14 / 15])
  right = rng.integers(0, 2, len(confidence))
  found = calibration.reliability_bins(confidence, right)
  true, said = sklearn.calibration.calibration_curve(
      right, confidence, n_bins=calibration.BINS)
  np.testing.assert_allclose([b['accuracy'] for b in found], true)
  np.testing.assert_allclose([b['confidence'] for b in found], said)
  assert sum(b['count'] for b in found) == len(right)
  assert all(b['low'] <= b['confidence'] <= b['high'] for b in found)


def test_calibration_error_by_hand():
  """Two of 0.9, one right: a gap of 0.4; two of 0.2, none right: of 0.2."""
  diagram = calibration.reliability_bins(
      np.array([0.9, 0.9, 0.2, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
  assert calibration.expected_calibration_error(diagram) == pytest.approx(
      (0.4 + 0.2) / 2)


# --- a run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  train.train(tiny.config(
      data={'train': TRAINED, 'eval': '', 'buckets': []},
      train={'num_steps': 3, 'checkpoint_every_steps': 2},
      parallel={'mode': 'jit', 'num_devices': 1}), workdir)
  return workdir


@pytest.fixture(scope='module')
def calibrated(trained):
  workdir = trained.with_name('calibrated')
  shutil.copytree(trained, workdir)
  result = commands.command(
      'calibrate', f'--workdir={workdir}', f'--data={HELD_OUT}')
  assert result.code == 0, result.err
  return workdir


def test_what_is_stored_is_what_evaluation_finds_best(calibrated, tmp_path):
  """Evaluated on the same questions, it is said so, and the scores agree."""
  result = commands.command(
      'evaluate', f'--workdir={calibrated}', f'--data={HELD_OUT}',
      f'--output={tmp_path}')
  assert result.code == 0 and 'these very questions' in result.err
  values = files.read_object(tmp_path / 'metrics.json')
  stored = files.read_object(calibrated / 'calibration.json')
  assert values['held_out_threshold'] == stored['threshold'] != 0
  for name in ('at_held_out_f1', 'at_zero_f1', 'at_held_out_exact_match'):
    assert values[name] == pytest.approx(stored['held_out'][name])
  assert values['f1'] == values['at_held_out_f1'] >= values['at_zero_f1']
  # Scores of this model differ, so that the official script's best is ours.
  assert values['f1'] == pytest.approx(values['best_f1'])
  assert (tmp_path / 'reliability.png').stat().st_size > 10_000
  assert values['temperature'] == stored['temperature'] != 1
  na_probs = predictions_lib.read_na_probs(tmp_path / 'na_probs.json')
  told = predictions_lib.read_predictions(tmp_path / 'predictions.json')
  assert {k for k, v in na_probs.items() if v > stored['threshold']} == {
      k for k, v in told.items() if not v}


def test_reported_calibration_errors_are_those_of_what_was_said(
    calibrated, tmp_path):
  """Of nbest.jsonl and predictions.json, by the definition."""
  found = {}
  for name, flag in (('before', '--nocalibrated'), ('after', '--calibrated')):
    output = tmp_path / name
    commands.command('evaluate', f'--workdir={calibrated}', flag,
                     f'--data={HELD_OUT}', f'--output={output}')
    found[name] = predictions_lib.read_n_best(output / 'nbest.jsonl')
  predictions = predictions_lib.read_predictions(output / 'predictions.json')
  examples = sources.load_examples(HELD_OUT)
  right, _ = squad.per_question(examples, predictions)
  values = files.read_object(tmp_path / 'after' / 'metrics.json')
  for name, key in (('before', 'calibration_error_before'),
                    ('after', 'calibration_error')):
    confidence = np.array([
        found[name][e.id]['answers'][0]['probability'] if predictions[e.id]
        else found[name][e.id]['null_probability'] for e in examples])
    bin_of = np.ceil(confidence * calibration.BINS)
    gaps = [abs((confidence - right)[bin_of == b].sum())
            for b in np.unique(bin_of)]
    assert values[key] == pytest.approx(
        100 * sum(gaps) / len(examples), abs=1e-3)


def test_without_calibration_the_threshold_is_the_configs(
    trained, calibrated, tmp_path):
  for workdir, flag in ((trained, ()), (calibrated, ('--nocalibrated',))):
    output = tmp_path / workdir.name
    assert commands.command(
        'evaluate', f'--workdir={workdir}', f'--data={HELD_OUT}',
        f'--output={output}', *flag).code == 0
  one, other = (files.read_object(tmp_path / w.name / 'metrics.json')
                for w in (trained, calibrated))
  assert one == other and 'held_out_threshold' not in one
  stored = files.read_object(calibrated / 'calibration.json')['held_out']
  assert one['f1'] == pytest.approx(stored['at_zero_f1'])


def test_predict_answers_by_the_stored_threshold(trained, calibrated):
  threshold = calibration.read_calibration(calibrated).threshold
  qa = predict.load(calibrated)
  assert qa.config.decode.null_threshold == threshold
  assert predict.load(trained).config.decode.null_threshold == 0
  assert qa.calibration.temperature != 1
  asked = {'question': 'Who?', 'context': 'Ada met Bob in Rome.'}
  answer, plain = (predict.load(w).answer(**asked) for w in (
      calibrated, trained))
  at = lambda t: [np.exp(c['score'] / t) for c in plain.n_best]
  # Ratios within an n-best list are those of the scores at the temperature.
  for one, t in ((answer, qa.calibration.temperature), (plain, 1)):
    p = np.array([c['probability'] for c in one.n_best])
    np.testing.assert_allclose(p / p[0], np.array(at(t)) / at(t)[0], rtol=1e-5)
  given = predict.load(calibrated, null_threshold=1.5)
  assert given.config.decode.null_threshold == 1.5


@pytest.mark.parametrize(('options', 'words'), [
    ({'checkpoint': '2'}, 'is of step 3, not 2'),
    ({'null_rule': 'margin'}, "decode.null_rule='min_null', not 'margin'"),
    ({'max_answer_length': 3}, 'decode.max_answer_length=8, not 3')])
def test_what_was_chosen_for_something_else_is_not_used(
    calibrated, capsys, options, words):
  qa = predict.load(calibrated, **options)
  assert qa.calibration is None and qa.config.decode.null_threshold == 0
  assert words in capsys.readouterr().err


# --- held-out means not trained on


def refused(workdir, data) -> str:
  before = commands.files_of(workdir)
  message = commands.command(
      'calibrate', f'--workdir={workdir}', f'--data={data}')
  *_, last = message.err.splitlines()
  assert message.code == 1 and last.startswith('error: ')
  assert commands.files_of(workdir) == before
  return last


@pytest.mark.parametrize('data', [TRAINED, ALL])
def test_questions_that_were_trained_on_are_refused(trained, data):
  assert 'contexts that' in refused(trained, data)


def a_run(workdir, spec, init_from='') -> pathlib.Path:
  """What a run says of the data it was trained on, without the training."""
  config = tiny.config(data={'train': spec}, model={'init_from': init_from})
  (workdir / 'checkpoints').mkdir(parents=True)
  files.write_json(workdir / 'config.json', config.to_dict())
  files.write_json(workdir / 'run.json', {
      'sha256': {'train': store.fingerprint(sources.load_examples(spec))}})
  return workdir


def check(workdir, spec):
  calibrate.check_untrained(workdir, spec, sources.load_examples(spec))


def test_a_run_that_began_from_another_has_seen_its_data(tmp_path):
  first = a_run(tmp_path / 'first', TRAINED)
  second = a_run(tmp_path / 'second', HELD_OUT, str(first))
  check(first, HELD_OUT)
  assert f'{second} was trained on' in refusal(check, second, HELD_OUT)
  assert f'{first} was trained on' in refusal(check, second, TRAINED)


def test_articles_trained_on_in_part_are_told(tmp_path, capsys):
  one, other = (str(tmp_path / name) for name in ('a.json', 'b.json'))
  for path, numbers in ((one, range(3)), (other, [9])):
    paragraphs = [{'context': f'Ada met Bob {n} times.', 'qas': [
        {'id': f'q{n}', 'question': 'Who?', 'answers': []}]} for n in numbers]
    files.write_json(pathlib.Path(path), {
        'data': [{'title': 'T', 'paragraphs': paragraphs}]})
  run = a_run(tmp_path / 'run', one)
  check(run, other)
  assert "1 of 1 articles" in (said := capsys.readouterr().err)
  assert said.startswith('warning: ') and said.count('\n') == 1
  files.write_text(pathlib.Path(one), pathlib.Path(one).read_text().replace(
      'Who?', 'Who now?'))
  assert 'has changed since' in refusal(check, run, other)
  pathlib.Path(one).unlink()
  assert 'cannot be told: ' in refusal(check, run, other)


def test_mistakes_are_one_line(trained, tmp_path):
  assert 'is not a run' in refused(tmp_path, HELD_OUT)
  assert 'did you mean' in refused(trained, 'artcles(of="synthetic")')
  assert 'No such file' in refused(trained, 'nowhere.json')


@pytest.mark.parametrize('change', [
    {'threshold': 'high'}, {'threshold': float('inf')}, {'decode': 3},
    {'temperature': 0}, {'temperature': None}, {'temperature': float('nan')},
    {'checkpoint': '7'}, {'more': 1}])
def test_a_damaged_file_is_one_line(calibrated, tmp_path, change):
  value = files.read_object(calibrated / 'calibration.json')
  (tmp_path / 'calibration.json').write_text(json.dumps({**value, **change}))
  with pytest.raises(ValueError, match='run it again') as caught:
    calibration.read_calibration(tmp_path)
  assert '\n' not in str(caught.value)


def test_what_is_written_is_read(tmp_path):
  found = calibration.Calibration(
      threshold=-1.5, temperature=0.5, data='x', sha256='y', questions=3,
      checkpoint=4, decode={'null_rule': 'margin'})
  calibration.write_calibration(tmp_path, found, {'f1': 3.0})
  assert calibration.read_calibration(tmp_path) == found
  assert calibration.read_calibration(tmp_path / 'nowhere') is None
  assert dataclasses.replace(found).misfit(4, {'null_rule': 'margin'}) == ''
