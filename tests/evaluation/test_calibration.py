"""Calibration: thresholds against a search over all of them, temperatures
against enumeration, bins against sklearn; then the commands that use them."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil

import numpy as np
import pytest
from scipy import optimize
import sklearn.calibration

from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import examples as examples_lib
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import candidates
from qa_jax.evaluation import calibrate
from qa_jax.evaluation import evaluator
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import pipeline
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from qa_jax.serving import server
from qa_jax.training import train
from tests.common import commands
from tests.common import lookup
from tests.common import tiny
from tests.common.refusals import refusal

ALL = 'synthetic(size=60, impossible=0.4)'
TRAINED = f"articles(of='{ALL}', high=0.6)"
HELD_OUT = f"articles(of='{ALL}', low=0.6)"


# --- threshold


def score_at(threshold, na_score, answered, unanswered):
  return float(np.where(na_score > threshold, unanswered, answered).mean())


@pytest.mark.parametrize('seed', range(20))
def test_threshold_is_the_best_of_all_and_reaches_its_score(seed):
  rng = np.random.default_rng(seed)
  na_score = rng.integers(-3, 4, 12) / 2  # with ties
  unanswered = rng.integers(0, 2, 12).astype(float)
  answered = np.where(unanswered, 0.0, rng.integers(0, 4, 12) / 3)
  threshold, score = calibration.choose_threshold(
      na_score, answered, unanswered)
  every = [score_at(t, na_score, answered, unanswered)
           for t in [-9.0, *np.unique(na_score)]]
  assert score == pytest.approx(max(every))
  assert score_at(
      threshold, na_score, answered, unanswered) == pytest.approx(score)


def test_threshold_lies_between_two_scores_unless_they_are_neighbours():
  choose = lambda *na_score: calibration.choose_threshold(
      np.array(na_score), np.array([1.0, 0.0]), np.array([0.0, 1.0]))[0]
  assert choose(-1.0, 2.0) == 0.5
  assert choose(1.0, np.nextafter(1.0, 2)) == 1.0
  assert choose(2.0, 1.0) < 1.0  # the wrong order: answer no question


def test_all_are_answered_if_all_have_an_answer():
  threshold, score = calibration.choose_threshold(
      np.array([5.0, -2.0]), np.array([0.5, 1.0]), np.zeros(2))
  assert threshold == 5.0 and score == 0.75


# --- temperature


def temperature_data(seed, truth, *, with_null):
  """Returns random questions and their exact loss as a function of temperature.

  The gold span of a question, or null, is drawn at the temperature `truth`. The
  loss is computed by enumeration.
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
      if q % 3 == 0 and len(s) > right + 1:  # a second gold span
        golds += [(q, right + 1)]

  def loss(t):
    return np.mean([
        np.logaddexp.reduce(x / t) - np.logaddexp.reduce(
            x[[g for e, g in golds if e == q] or [-1]] / t)
        for q, x in enumerate(outcomes)])
  return calibration.TemperatureData(
      log_partition=np.array([[np.logaddexp.reduce(s / t)
                      for t in calibration.TEMPERATURES] for s in scores]),
      best=np.array([s.max() for s in scores]), null=null,
      gold=np.array([scores[q][g] for q, g in golds]),
      gold_of=np.array([q for q, _ in golds])), loss


@pytest.mark.parametrize(('with_null', 'truth'), [
    (True, 2.5), (True, 0.4), (False, 1.0), (False, 6.0)])
def test_temperature_is_the_minimum_of_the_enumerated_loss(with_null, truth):
  data, loss = temperature_data(0, truth, with_null=with_null)
  temperature, before, after = calibration.fit_temperature(data)
  exact = optimize.minimize_scalar(
      lambda x: loss(np.exp(x)), bounds=(-3, 3), method='bounded',
      options={'xatol': 1e-7})
  # The tolerance is the error of the spline.
  assert temperature == pytest.approx(np.exp(exact.x), rel=1e-3)
  assert before == pytest.approx(loss(1.0), abs=1e-5)
  assert after == pytest.approx(exact.fun, abs=1e-5)
  # Some questions have a second gold span, which lowers the temperature.
  assert temperature == pytest.approx(truth, rel=0.35)


@pytest.mark.parametrize('with_null', [False, True])
def test_joined_blocks_are_the_data_of_all_questions(with_null):
  data, _ = temperature_data(0, 1.0, with_null=with_null)
  parts = []
  for a, b in ((0, 150), (150, 151), (151, 400)):
    golds = (data.gold_of >= a) & (data.gold_of < b)
    parts.append(calibration.TemperatureData(
        data.log_partition[a:b], data.best[a:b],
        data.null[a:b] if with_null else None, data.gold[golds],
        data.gold_of[golds] - a))
  joined = calibration.join_temperature_data(parts)
  for name, value in vars(data).items():
    np.testing.assert_array_equal(getattr(joined, name), value)


def test_scores_that_cannot_be_improved_keep_their_temperature():
  temperature, before, after = calibration.fit_temperature(
      temperature_data(3, 1.0, with_null=True)[0])
  assert temperature == pytest.approx(1, abs=0.2) and after <= before


def test_without_questions_the_temperature_is_1():
  empty = np.zeros(0)
  temperature, before, _ = calibration.fit_temperature(
      calibration.TemperatureData(
          empty.reshape(0, 41), empty, None, empty, empty.astype(int)))
  assert temperature == 1.0 and np.isnan(before)


def test_bins_are_those_of_sklearn():
  rng = np.random.default_rng(0)
  confidence = np.append(rng.random(500) ** 3, [0, 1, 1 / 3, 0.2, 14 / 15])
  right = rng.integers(0, 2, len(confidence))
  bins = calibration.reliability_bins(confidence, right)
  true, predicted = sklearn.calibration.calibration_curve(
      right, confidence, n_bins=calibration.BINS)
  np.testing.assert_allclose([b['accuracy'] for b in bins], true)
  np.testing.assert_allclose([b['confidence'] for b in bins], predicted)
  assert sum(b['count'] for b in bins) == len(right)
  assert all(b['low'] <= b['confidence'] <= b['high'] for b in bins)


def test_calibration_error_by_hand():
  """One of two at 0.9 is right: a gap of 0.4. None of two at 0.2: of 0.2."""
  diagram = calibration.reliability_bins(
      np.array([0.9, 0.9, 0.2, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
  assert calibration.expected_calibration_error(diagram) == pytest.approx(
      (0.4 + 0.2) / 2)


def cut(examples) -> windows_lib.WindowSet:
  return windows_lib.make_windows(
      examples, lookup.TOKENIZER, max_length=20, window_overlap=6,
      max_question_length=4)


TEMPERATURES = (0.5, 1.0, 3.0)


def spans_of(windows, config) -> candidates.WindowSpans:
  return decode_lib.score_windows(
      lookup.Lookup(), lookup.PARAMS, windows, config, golds=True,
      temperatures=TEMPERATURES)


def loop_questions(windows, longest):
  """Returns (spans {(first, last word): score}, null) of each question."""
  score = lambda kind, letter: float(
      lookup.PARAMS[kind][lookup.TOKENIZER.index[letter]])
  out = []
  for e, example in enumerate(windows.examples):
    context, spans, nulls = example.context.split(), {}, []
    for n in np.flatnonzero(windows.example_of == e):
      a, b = windows.begin[n], windows.begin[n] + windows.length[n]
      row = ['[CLS]', *example.question.split(), '[SEP]', *context[a:b],
             '[SEP]']
      nulls.append(sum(lookup.TOKENIZER.index[t] for t in row) % 7)
      spans |= {(i, j): score('start', context[i]) + score('end', context[j])
                for i in range(windows.best_begin[n], windows.best_end[n])
                for j in range(i, min(i + longest, b))}
    out.append((spans, min(nulls)))
  return out


def test_temperature_data_are_those_of_loops_over_windows():
  """The third question has no score of its gold span, as beyond a beam."""
  examples = lookup.make_examples(lengths=(9, 0, 30, 7, 61, 25, 40))
  windows, config = cut(examples), lookup.make_config()
  spans = spans_of(windows, config)
  hidden = (windows.example_of == 2)[:, None] & (
      spans.gold_scores > candidates.NO_SPAN)
  assert hidden.any()
  spans.gold_scores[hidden] = -1e30 + spans.gold_scores[hidden]
  data = calibrate._temperature_data(windows, spans, config.decode)
  rows, golds = [], []
  for e, (found, null) in enumerate(loop_questions(windows, longest=4)):
    gold = [(a.start // 2, (a.start + len(a.text.strip())) // 2)
            for a in examples[e].answers]
    if found and (examples[e].impossible or e != 2):
      golds += [(len(rows), found[span]) for span in gold]
      rows.append((found, null))
  # Question 1 has an empty context: no span to compare null with.
  assert len(rows) == len(examples) - 2
  np.testing.assert_allclose(data.log_partition, [
      [np.logaddexp.reduce(np.array([*found.values()]) / t)
       for t in TEMPERATURES] for found, _ in rows], rtol=1e-5)
  assert data.best.tolist() == [max(found.values()) for found, _ in rows]
  assert data.null.tolist() == [null for _, null in rows]
  assert list(zip(data.gold_of, data.gold, strict=True)) == golds
  # The best span is that of all, though another search misses it.
  inexact = lookup.make_config(search='argmax')
  missed = dataclasses.replace(
      spans_of(windows, inexact), gold_scores=spans.gold_scores)
  other = calibrate._temperature_data(windows, missed, inexact.decode)
  assert (missed.score[:, 0] < missed.exact).any()
  assert other.best.tolist() == data.best.tolist()
  # Without null, no answer is never right.
  never = calibrate._temperature_data(windows, spans, dataclasses.replace(
      config.decode, null_rule='never'))
  with_gold = sorted({row for row, _ in golds})
  assert never.null is None
  assert never.best.tolist() == data.best[with_gold].tolist()


def test_the_threshold_is_that_of_the_merged_answers(
    trained, tmp_path, monkeypatch):
  """Most answers of this model differ if equal texts are merged."""
  rng = np.random.default_rng(0)
  examples = [examples_lib.Example(
      f'q{n}', 'a', ' '.join(rng.choice(list('abc'), 12)), impossible=True)
              for n in range(24)]
  params = {k: rng.normal(0, 0.2, len(x)).astype(np.float32)
            for k, x in lookup.PARAMS.items()}
  for x in params.values():
    x[lookup.TOKENIZER.index['a']] += 0.3
  config = lookup.make_config(n_best=60, merge='surface_form')
  answer = lambda config, examples: decode_lib.answer_questions(
      lookup.Lookup(), params, cut(examples), config)
  texts, unmerged = (calibrate.answers_lib.answer_texts(
      examples, answer(c, examples)) for c in (
          config, lookup.make_config(n_best=60)))
  assert sum(texts[k] != unmerged[k] for k in texts) > 12
  examples = [e if n % 3 == 0 else examples_lib.Example(
      e.id, e.question, e.context, (examples_lib.GoldAnswer(
          texts[e.id], e.context.index(texts[e.id])),))
              for n, e in enumerate(examples)]
  qa = predict.QA(lookup.Lookup(), params, lookup.TOKENIZER, config, step=0)
  monkeypatch.setattr(calibrate.predict, 'load', lambda *_, **__: qa)
  monkeypatch.setattr(calibrate.input_pipeline, 'load_windows',
                      lambda *_: (cut(examples), ''))
  monkeypatch.setattr(calibrate, 'check_untrained', lambda *_: None)
  workdir = shutil.copytree(trained, tmp_path / 'run')
  metrics = calibrate.calibrate_run(workdir, 'these', checkpoint='last')
  stored = calibration.read_calibration(workdir)
  assert stored.decode['merge'] == 'surface_form'
  assert stored.decode['n_best'] == 60
  evaluated = evaluator.Evaluator(
      lookup.Lookup(), cut(examples), lookup.make_config(
          n_best=60, merge='surface_form', null_threshold=stored.threshold))
  values = evaluated.evaluate(params)
  assert metrics['at_held_out_f1'] == pytest.approx(values['f1'])
  # The official script goes through questions of equal scores one by one.
  assert values['f1'] >= values['best_f1']


@pytest.mark.parametrize(('stored', 'message'), [
    ({'merge': 'surface_form'}, "decode.merge='surface_form', not 'none'"),
    ({}, ''), ({'merge': 'none', 'n_best': 20}, '')])
def test_another_merge_is_another_way_of_decoding(stored, message):
  made = calibration.Calibration(
      threshold=1.0, temperature=1.0, data='', sha256='', questions=1,
      checkpoint=4, decode=stored)
  assert message in made.misfit(4, {'merge': 'none', 'n_best': 20})
  assert bool(message) == bool(made.misfit(4, {'merge': 'none', 'n_best': 20}))
  # A file of older code lacks these fields, and has their defaults.
  if 'merge' not in stored:
    assert "merge='none'" in made.misfit(4, {
        'merge': 'surface_form', **stored})
    assert 'whole_words=False' in made.misfit(4, {
        'whole_words': True, **stored})


@pytest.mark.parametrize(('merge', 'message'), [
    ('none', ''), ('surface_form', 'is of decode.n_best=5, not 20')])
def test_n_best_counts_only_if_candidates_are_merged(merge, message):
  made = calibration.Calibration(
      threshold=1.0, temperature=1.0, data='', sha256='', questions=1,
      checkpoint=4, decode={'merge': merge, 'n_best': 5})
  assert made.misfit(4, {'merge': merge, 'n_best': 20}) == message


@pytest.mark.parametrize(('golds', 'bound'), [
    ([0.1, 0.1], True), ([0.0, 0.0], True), ([0.1, 0.1, 0.0], False)])
def test_a_temperature_at_its_bound_gives_a_warning(golds, bound, capsys):
  """Each question has two spans, of the scores 0 and 0.1."""
  count = len(golds)
  log_partition = np.logaddexp(np.divide(0.1, calibration.TEMPERATURES), 0)
  temperature, _ = calibrate._fit_temperature([calibration.TemperatureData(
      np.tile(log_partition, (count, 1)), np.full(count, 0.1), None,
      np.array(golds), np.arange(count))])
  assert ('warning: the temperature is at its bound' in capsys.readouterr().err
          ) == bound
  if not bound:  # the odds of the two are those of the golds, 2 to 1
    assert temperature == pytest.approx(0.1 / math.log(2), rel=1e-3)


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


@pytest.fixture(scope='module')
def evaluations(calibrated):
  """Returns a function: flag → directory and stderr of an evaluation.

  The evaluation is on the questions of the calibration.
  """
  @functools.cache
  def evaluate(flag):
    output = calibrated / flag.strip('-')
    result = commands.command(
        'evaluate', f'--workdir={calibrated}', flag, f'--data={HELD_OUT}',
        f'--output={output}')
    assert result.code == 0, result.err
    return output, result.err
  return evaluate


def test_the_stored_threshold_is_the_best_of_the_evaluation(
    calibrated, evaluations):
  """A warning says that the questions are those of the calibration."""
  output, err = evaluations('--calibrated')
  assert 'these very questions' in err
  values = files.read_object(output / 'metrics.json')
  stored = files.read_object(calibrated / 'calibration.json')
  assert values['held_out_threshold'] == stored['threshold'] != 0
  for name in ('at_held_out_f1', 'at_zero_f1', 'at_held_out_exact_match'):
    assert values[name] == pytest.approx(stored['held_out'][name])
  assert values['f1'] == values['at_held_out_f1'] >= values['at_zero_f1']
  # Scores of this model differ, so that the official script's best is ours.
  assert values['f1'] == pytest.approx(values['best_f1'])
  assert (output / 'reliability.png').stat().st_size > 10_000
  assert values['temperature'] == stored['temperature'] != 1
  assert values['threshold_chosen_on_these_questions'] is True
  na_probs = predictions_lib.read_na_probs(output / 'na_probs.json')
  predictions = predictions_lib.read_predictions(output / 'predictions.json')
  assert {k for k, v in na_probs.items() if v > stored['threshold']} == {
      k for k, v in predictions.items() if not v}


def test_calibration_errors_are_those_of_the_predictions(evaluations):
  """The definition is applied to nbest.jsonl and predictions.json."""
  output, _ = evaluations('--calibrated')
  predictions = predictions_lib.read_predictions(output / 'predictions.json')
  examples = sources.load_examples(HELD_OUT)
  right, _ = squad.per_question(examples, predictions)
  values = files.read_object(output / 'metrics.json')
  for flag, key in (('--nocalibrated', 'calibration_error_before'),
                    ('--calibrated', 'calibration_error')):
    n_best = predictions_lib.read_n_best(
        evaluations(flag)[0] / 'nbest.jsonl')
    confidence = np.array([
        n_best[e.id]['answers'][0]['probability'] if predictions[e.id]
        else n_best[e.id]['null_probability'] for e in examples])
    bin_of = np.ceil(confidence * calibration.BINS)
    gaps = [abs((confidence - right)[bin_of == b].sum())
            for b in np.unique(bin_of)]
    assert values[key] == pytest.approx(
        100 * sum(gaps) / len(examples), abs=1e-3)


def test_without_calibration_the_threshold_is_the_configs(
    trained, calibrated, evaluations, tmp_path):
  assert commands.command(
      'evaluate', f'--workdir={trained}', f'--data={HELD_OUT}',
      f'--output={tmp_path}').code == 0
  values, uncalibrated = (files.read_object(folder / 'metrics.json') for folder
                          in (tmp_path, evaluations('--nocalibrated')[0]))
  assert values == uncalibrated and 'held_out_threshold' not in values
  stored = files.read_object(calibrated / 'calibration.json')['held_out']
  assert values['f1'] == pytest.approx(stored['at_zero_f1'])
  # The figures of before the calibration stay beside those of after it.
  after = files.read_object(evaluations('--calibrated')[0] / 'metrics.json')
  kept = {k.removeprefix('uncalibrated_'): v for k, v in after.items()
          if k.startswith('uncalibrated_')}
  assert {'exact_match', 'f1', 'has_answer_f1', 'no_answer_exact_match'
          } < kept.keys()
  assert kept == {k: values[k] for k in kept}


def test_the_uncalibrated_threshold_is_the_configs_also_if_it_is_not_0(
    calibrated, tmp_path):
  workdir = shutil.copytree(calibrated, tmp_path / 'run')
  fields = files.read_object(workdir / 'config.json')
  fields['decode']['null_threshold'] = 1000.0  # every question is answered
  files.write_json(workdir / 'config.json', fields)
  values = [evaluator.evaluate_data(
      predict.load(workdir, **options), HELD_OUT, output=None)
      for options in ({}, {'calibrated': False}, {'null_threshold': -1000.0})]
  assert values[0]['uncalibrated_f1'] == values[1]['f1']
  assert values[2]['uncalibrated_f1'] == values[1]['f1'] != values[2]['f1']
  assert values[0]['f1'] != values[1]['f1']


def test_a_calibration_that_calibrates_nothing_replaces_none(
    calibrated, capsys, monkeypatch):
  """All questions have an answer, and no candidate is that long."""
  before = (calibrated / 'calibration.json').read_bytes()
  monkeypatch.setattr(calibrate, '_temperature_data', lambda *_: (
      calibration.TemperatureData(np.zeros((0, 41)), np.zeros(0), None,
                                  np.zeros(0), np.zeros(0, int))))
  message = refusal(calibrate.calibrate_run, calibrated,
                    'synthetic(seed=9, size=12, split="eval")')
  assert 'none of its 12 questions' in message
  assert (calibrated / 'calibration.json').read_bytes() == before
  assert 'warning: ' in capsys.readouterr().err


def test_a_step_chooses_the_checkpoint_of_a_calibration(trained, tmp_path):
  workdir = shutil.copytree(trained, tmp_path / 'run')
  for step in RunDirectory(workdir).resolve_step('last'), np.int64(
      RunDirectory(workdir).resolve_step('best')):
    calibrate.calibrate_run(workdir, HELD_OUT, checkpoint=step)
    assert calibration.read_calibration(workdir).checkpoint == step


def test_few_questions_give_a_warning_with_its_reason(
    trained, tmp_path, capsys, monkeypatch):
  workdir = shutil.copytree(trained, tmp_path / 'run')
  size = len(sources.load_examples(HELD_OUT))
  calibrate.calibrate_run(workdir, HELD_OUT)
  line, = [x for x in capsys.readouterr().err.splitlines() if 'warning' in x]
  assert f'has {size} questions. Below 200' in line
  assert f'{100 / math.sqrt(size):.0f} points' in line
  monkeypatch.setattr(calibrate, 'ENOUGH_QUESTIONS', size)
  calibrate.calibrate_run(workdir, HELD_OUT)
  assert 'warning' not in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--n_best=2', '--n_best=30', None])
def test_listing_more_or_fewer_candidates_keeps_the_calibration(
    calibrated, flag):
  """The calibration is of the run's decode.n_best, 20."""
  result = commands.command(
      'predict', f'--workdir={calibrated}', '--question=Who?',
      '--context=Mira built it in Oslo.', *([flag] if flag else []))
  assert result.code == 0, result.err
  assert 'calibration.json: null threshold' in result.err
  assert 'not used' not in result.err
  candidates_listed = len(result.out.splitlines()) - 2
  assert candidates_listed == {'--n_best=2': 2, None: 5}.get(flag, max(
      candidates_listed, 6))


@pytest.fixture(scope='module')
def calibrated_on(calibrated):
  """Returns a function: fields of decoding → a run calibrated with them."""
  def run(**decoding):
    workdir = shutil.copytree(
        calibrated, calibrated.parent / str(sorted(decoding)),
        dirs_exist_ok=True)
    calibrate.calibrate_run(workdir, HELD_OUT, **decoding)
    return workdir
  return run


@pytest.mark.parametrize('whole_words', [False, True])
def test_serve_uses_the_calibration_of_its_own_decoding(
    calibrated, calibrated_on, monkeypatch, whole_words):
  workdir = calibrated_on(whole_words=True) if whole_words else calibrated
  served = []
  monkeypatch.setattr(predict.QA, 'warm_up', lambda self: 0)
  monkeypatch.setattr(server, 'serve', lambda s, _: served.append(s.qa))
  threshold = calibration.read_calibration(workdir).threshold
  for flags, words in ([], True), (['--decode.whole_words=false'], False):
    result = commands.command('serve', f'--workdir={workdir}', '--port=0',
                              *flags)
    assert result.code == 0, result.err
    qa, fits = served.pop(), words == whole_words
    assert qa.config.decode.whole_words == words
    assert bool(qa.calibration) == fits
    assert qa.config.decode.null_threshold == (threshold if fits else 0)
    assert ('not used' not in result.err) == fits


def test_a_pipeline_uses_the_calibration_of_its_own_decoding(
    calibrated, calibrated_on, capsys):
  question = {'question': 'Who?', 'context': 'Ada met Bob in Rome.'}
  capsys.readouterr()
  other = pipeline.pipeline(model=calibrated)
  said = capsys.readouterr().err
  assert other.qa.calibration is None and said.count('\n') == 1
  for part in ("null_rule='min_null', not 'never'",
               'max_answer_length=8, not 15', 'whole_words=False, not True',
               'not used'):
    assert part in said
  workdir = calibrated_on(
      whole_words=True, null_rule='never', max_answer_length=15)
  capsys.readouterr()
  uncalibrated = pipeline.pipeline(
      model=predict.load(workdir, calibrated=False))
  assert not capsys.readouterr().err
  pipe = pipeline.pipeline(model=workdir)
  assert 'in use' in capsys.readouterr().err
  assert pipe(**question)['score'] != uncalibrated(**question)['score']
  assert not capsys.readouterr().err
  # An option of a call that the calibration is not of.
  short = {'max_answer_len': 3}
  assert pipe(**question, **short) == uncalibrated(**question, **short)
  assert 'max_answer_length=15, not 3: not used' in capsys.readouterr().err


def test_predict_answers_by_the_stored_threshold(
    trained, calibrated, capsys):
  threshold = calibration.read_calibration(calibrated).threshold
  capsys.readouterr()
  qa = predict.load(calibrated)
  said = capsys.readouterr().err
  assert said.startswith(f'{calibrated}/calibration.json: null threshold '
                         f'{threshold:.4g} replaces 0 of the config, temp')
  assert said.count('\n') == 1
  assert predict.load(calibrated, null_threshold=3.0
                      ).config.decode.null_threshold == 3
  said = capsys.readouterr().err
  assert (f'null threshold {threshold:.4g} is replaced by the given '
          'null_threshold=3, temperature') in said and said.count('\n') == 1
  assert not predict.load(calibrated, calibrated=False).calibration
  assert not capsys.readouterr().err
  assert qa.config.decode.null_threshold == threshold
  assert predict.load(trained).config.decode.null_threshold == 0
  assert qa.calibration.temperature != 1
  question = {'question': 'Who?', 'context': 'Ada met Bob in Rome.'}
  answer, uncalibrated = (predict.load(w).answer(**question) for w in (
      calibrated, trained))
  scores = np.array([c['score'] for c in uncalibrated.n_best])
  # Ratios within an n-best list are those of the scores at the temperature.
  for n_best, t in ((answer.n_best, qa.calibration.temperature),
                    (uncalibrated.n_best, 1)):
    p = np.array([c['probability'] for c in n_best])
    np.testing.assert_allclose(
        p / p[0], np.exp((scores - scores[0]) / t), rtol=1e-5)
  overridden = predict.load(calibrated, null_threshold=1.5)
  assert overridden.config.decode.null_threshold == 1.5


@pytest.mark.parametrize(('options', 'message'), [
    ({'checkpoint': '2'}, 'is of step 3, not 2: not used; calibrate anew'),
    ({'null_rule': 'margin'}, "decode.null_rule='min_null', not 'margin'"),
    ({'whole_words': True}, 'decode.whole_words=False, not True: not used; '
     'calibrate with --decode.whole_words=True\n'),
    ({'max_answer_length': 3}, 'decode.max_answer_length=8, not 3: not used; '
     'calibrate with --decode.max_answer_length=3\n')])
def test_a_calibration_of_something_else_is_not_used(
    calibrated, capsys, options, message):
  qa = predict.load(calibrated, **options)
  assert qa.calibration is None and qa.config.decode.null_threshold == 0
  assert message in capsys.readouterr().err


# --- held-out questions


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


def write_run(workdir, spec, init_from='', hashes=()) -> pathlib.Path:
  """Writes the files of a run that name its training data, without a model.

  `hashes` are entries of run.json on files of `init_from`.
  """
  config = tiny.config(data={'train': spec}, model={'init_from': init_from})
  (workdir / 'checkpoints').mkdir(parents=True)
  files.write_json(workdir / 'config.json', config.to_dict())
  files.write_json(workdir / 'run.json', {
      'sha256': {**dict(hashes), **({
          'train': store.fingerprint(sources.load_examples(spec))}
                                    if spec else {})}})
  return workdir


def check_untrained(workdir, spec):
  calibrate.check_untrained(workdir, spec, sources.load_examples(spec))


def test_a_run_that_began_from_another_has_seen_its_data(tmp_path):
  first = write_run(tmp_path / 'first', TRAINED)
  second = write_run(tmp_path / 'second', HELD_OUT, str(first))
  check_untrained(first, HELD_OUT)
  for run, spec in ((second, HELD_OUT), (first, TRAINED)):
    assert f'{run} was trained on' in refusal(check_untrained, second, spec)


def test_a_run_that_began_from_a_missing_or_another_run_is_refused(
    tmp_path, monkeypatch):
  """`init_from` is relative to the directory that the run was trained in."""
  monkeypatch.chdir(tmp_path)
  first = write_run(pathlib.Path('first'), TRAINED)
  second = write_run(tmp_path / 'second', HELD_OUT, str(first), hashes={
      'init_from: config.json': files.sha256(first / 'config.json'),
      'init_from: checkpoints/7/manifest.json': 'x'})
  other = 'synthetic(size=4, seed=77)'
  check_untrained(second, other)
  monkeypatch.chdir(write_run(tmp_path / 'elsewhere', TRAINED))
  message = refusal(check_untrained, second, other)
  assert f'whether {second} was trained on these questions cannot be' in message
  assert 'the run first, from which it began, is not there' in message
  write_run(pathlib.Path('first'), HELD_OUT)
  assert 'first is not the run that it began from' in refusal(
      check_untrained, second, other)
  # A checkpoint that is no run may be gone, such as one of a hub id.
  check_untrained(write_run(tmp_path / 'third', HELD_OUT, 'a/hub-id', hashes={
      'init_from: model.safetensors': 'x'}), other)


def test_a_run_that_was_converted_has_no_training_data_to_check(tmp_path):
  converted = write_run(tmp_path / 'converted', '')
  check_untrained(converted, TRAINED)
  tuned = write_run(tmp_path / 'tuned', TRAINED, str(converted))
  check_untrained(tuned, HELD_OUT)
  assert 'was trained on' in refusal(check_untrained, tuned, TRAINED)


def write_parts(folder, title) -> list[str]:
  """Writes two files with paragraphs of one article; returns their paths."""
  folder.mkdir(exist_ok=True)
  one, other = (str(folder / name) for name in ('a.json', 'b.json'))
  for path, numbers in ((one, range(3)), (other, [9])):
    paragraphs = [{'context': f'Ada met Bob {n} times.', 'qas': [
        {'id': f'q{n}', 'question': 'Who?', 'answers': []}]} for n in numbers]
    files.write_json(pathlib.Path(path), {
        'data': [{'title': title, 'paragraphs': paragraphs}]})
  return [one, other]


def test_articles_trained_on_in_part_give_a_warning(tmp_path, capsys):
  one, other = write_parts(tmp_path / 'untitled', '')
  check_untrained(write_run(tmp_path / 'untitled' / 'run', one), other)
  assert capsys.readouterr().err == ''  # they share no title
  one, other = write_parts(tmp_path, 'T')
  run = write_run(tmp_path / 'run', one)
  check_untrained(run, other)
  warning = capsys.readouterr().err
  assert '1 of 1 articles' in warning
  assert warning.startswith('warning: ') and warning.count('\n') == 1
  files.write_text(pathlib.Path(one), pathlib.Path(one).read_text().replace(
      'Who?', 'Who now?'))
  assert 'has changed since' in refusal(check_untrained, run, other)
  pathlib.Path(one).unlink()
  assert 'cannot be told: ' in refusal(check_untrained, run, other)


def test_a_threshold_contradicts_the_choice_of_one(tmp_path):
  run = write_run(tmp_path / 'run', TRAINED)
  message = refusal(lambda: calibrate.calibrate_run(
      run, HELD_OUT, null_threshold=5.0))
  assert message.startswith('null_threshold=5.0: a calibration chooses')


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


def test_a_calibration_is_read_as_it_was_written(tmp_path):
  written = calibration.Calibration(
      threshold=-1.5, temperature=0.5, data='x', sha256='y', questions=3,
      checkpoint=4, decode={'null_rule': 'margin'})
  calibration.write_calibration(tmp_path, written, {'f1': 3.0})
  assert calibration.read_calibration(tmp_path) == written
  assert calibration.read_calibration(tmp_path / 'nowhere') is None
  assert written.misfit(4, {'null_rule': 'margin'}) == ''
