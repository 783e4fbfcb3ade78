"""Ensembles against products of posteriors and exhaustive selection."""

import itertools
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from qa_jax.checkpoints import run_directory
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.evaluation import calibrate
from qa_jax.evaluation import ensemble
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from tests.common import commands
from tests.common import random_model
from tests.common import tiny
from tests.common.refusals import refusal

CONTEXT = 'Ada met Bob in Rome and Eve in Bonn.'
SPANS = [(0, 3), (8, 11), (15, 19), (24, 27), (31, 35), (8, 19)]


def example(n: int, answer: str = '') -> Example:
  golds = (GoldAnswer(answer, CONTEXT.index(answer)),) if answer else ()
  return Example(f'q{n}', 'Who?', CONTEXT, golds, impossible=not golds)


def random_posteriors(
    rng, count: int) -> list[dict[tuple[int, int] | None, float]]:
  """Returns posteriors of `count` questions over SPANS and None (no answer)."""
  return [dict(zip([*SPANS, None], rng.dirichlet(np.ones(7) / 2), strict=True))
          for _ in range(count)]


def best_first(posterior):
  return sorted((s for s in posterior if s), key=lambda s: -posterior[s])


def as_member(posteriors, examples, n_best=99, windows=2):
  """Returns the n-best candidates of a member, by question id."""
  return {e.id: ensemble.MemberCandidates(
      math.log(p[None]),
      {s: math.log(p[s]) for s in best_first(p)[:n_best]}, windows=windows)
          for e, p in zip(examples, posteriors, strict=True)}


def write_n_best(path, posteriors, examples):
  files.write_jsonl(path, (
      {'id': e.id, 'windows': 2, 'null_score': 0.0, 'null_probability': p[None],
       'answers': [
           {'text': CONTEXT[s[0]:s[1]], 'start': s[0], 'end': s[1],
            'score': math.log(p[s]), 'probability': p[s]}
           for s in best_first(p)]}
      for e, p in zip(examples, posteriors, strict=True)))


EXAMPLES = [example(n, answer) for n, answer in enumerate(
    ['Ada', 'Bob', '', 'Rome', 'Bonn', '', 'Eve', 'Ada'])]


def test_an_ensemble_is_the_normalised_product_of_posteriors():
  rng = np.random.default_rng(0)
  posteriors = [random_posteriors(rng, len(EXAMPLES)) for _ in range(3)]
  pool = ensemble.pool_members(
      EXAMPLES, [as_member(p, EXAMPLES, windows=n) for p, n in zip(
          posteriors, (2, 4, 3), strict=True)])
  combination = pool.combine([0, 2])
  for e in range(len(EXAMPLES)):
    product = {s: math.sqrt(posteriors[0][e][s] * posteriors[2][e][s])
               for s in posteriors[0][e]}
    total = sum(product.values())
    best = best_first(product)[0]
    assert best_span(combination, e) == best
    assert combination.na_score[e] == pytest.approx(
        math.log(product[None] / product[best]))
    row = combination.n_best_row(e, 3)
    assert row['windows'] == 4  # a tokenizer of many tokens has the most
    assert row['null_probability'] == pytest.approx(product[None] / total)
    assert [a['probability'] for a in row['answers']] == pytest.approx(
        [product[s] / total for s in best_first(product)[:3]])
    assert all(CONTEXT[a['start']:a['end']] == a['text']
               for a in row['answers'])


def best_span(combination, e) -> tuple[int, int]:
  c = combination.best[e]
  return combination.pool.begin[c], combination.pool.end[c]


def test_one_member_answers_as_it_does_alone():
  posteriors = random_posteriors(np.random.default_rng(1), len(EXAMPLES))
  combination = ensemble.pool_members(
      EXAMPLES, [as_member(posteriors, EXAMPLES, n_best=2)]).combine([0])
  for e, p in enumerate(posteriors):
    best = best_first(p)[0]
    assert best_span(combination, e) == best
    assert (combination.na_score[e] > 0) == (p[None] > p[best])


def test_the_floor_bounds_the_posterior_of_any_span_that_is_not_listed():
  one = lambda null, **p: ensemble.MemberCandidates(
      math.log(null), {(0, n): math.log(x) for n, x in enumerate(
          p.values())}, 1)
  # The worst listed span has 0.2, and 0.1 is left for all other spans.
  assert one(0.3, a=0.4, b=0.2).floor == pytest.approx(math.log(0.1))
  assert one(0.1, a=0.2, b=0.1).floor == pytest.approx(math.log(0.1))
  assert one(0.5, a=0.5).floor == pytest.approx(math.log(ensemble.MIN_REST))


def test_members_of_other_tokenizers_meet_in_characters():
  """One cannot find 'Bob', the other not 'Bob in'; both have 'Ada'."""
  lists = [{(0, 3): 0.3, (8, 14): 0.6}, {(0, 3): 0.4, (8, 11): 0.5}]
  pool = ensemble.pool_members(EXAMPLES[:1], [
      {'q0': ensemble.MemberCandidates(
          math.log(0.05), {s: math.log(p) for s, p in spans.items()}, 1)}
      for spans in lists])
  assert best_span(pool.combine([0, 1]), 0) == (0, 3)


def best_f1(pool, members) -> float:
  """Returns the F1 in percent at the best of all thresholds."""
  combination = pool.combine(members)
  return max(100 * combination.scores(t)[1].mean()
             for t in [-99.0, *combination.na_score])


@pytest.mark.parametrize('seed', range(6))
def test_selection_takes_the_best_and_then_what_gains_most(seed):
  rng = np.random.default_rng(seed)
  pool = ensemble.pool_members(EXAMPLES, [
      as_member(random_posteriors(rng, len(EXAMPLES)), EXAMPLES)
      for _ in range(4)])
  steps = ensemble.select_members(pool)
  chosen = []
  for member, f1 in steps:
    options = [best_f1(pool, [*chosen, m]) for m in range(4) if m not in chosen]
    chosen.append(member)
    assert f1 == pytest.approx(max(options)) == pytest.approx(
        best_f1(pool, chosen))
  scores = [f1 for _, f1 in steps]
  assert scores == sorted(set(scores))
  assert all(best_f1(pool, [*chosen, m]) <= scores[-1] + 1e-9
             for m in range(4) if m not in chosen)


def test_members_that_err_in_different_places_help_each_other():
  """Each member is sure where it is right, and unsure where it is wrong."""
  right = [dict.fromkeys([*SPANS, None], 0.0) for _ in EXAMPLES]
  members = []
  for k in range(2):
    posteriors = []
    for n, e in enumerate(EXAMPLES):
      gold = next(((a.start, a.start + len(a.text)) for a in e.answers), None)
      wrong = next(s for s in SPANS if s != gold)
      sure = n % 2 == k
      p = {**right[n], gold: 0.9 if sure else 0.3, wrong: 0.05 if sure else 0.6}
      left = (1 - sum(p.values())) / sum(v == 0 for v in p.values())
      posteriors.append({s: v or left for s, v in p.items()})
    members.append(as_member(posteriors, EXAMPLES))
  pool = ensemble.pool_members(EXAMPLES, members)
  scores = [pool.combine(m).scores(0.0)[0].mean()
            for m in ([0], [1], [0, 1])]
  assert scores[2] == 1 and max(scores[:2]) < 0.8


def test_the_best_member_is_that_of_held_out_questions_if_there_are_any():
  rng = np.random.default_rng(3)
  pool = ensemble.pool_members(EXAMPLES, [
      as_member(random_posteriors(rng, len(EXAMPLES)), EXAMPLES)
      for _ in range(3)])
  f1 = [pool.combine([m]).scores(0.0)[1].mean() for m in range(3)]
  assert len({*f1}) == 3
  made = lambda alone: ensemble.Ensemble(
      'abc', pool, [0], 0.0, [0.0] * 3, alone)
  assert made(None).best_member == f1.index(max(f1))
  assert made([-x for x in f1]).best_member == f1.index(min(f1))


def test_without_unanswerable_questions_all_are_answered():
  examples = [example(0, 'Ada'), example(1, 'Bob')]
  sure = [{**dict.fromkeys(SPANS, 0.01), (0, 3): 0.04, None: 0.9}] * 2
  combination = ensemble.pool_members(
      examples, [as_member(sure, examples)] * 2).combine([0, 1])
  assert combination.best_threshold() == 0
  assert combination.scores(0.0)[0].tolist() == [1, 0]


def test_a_question_at_the_threshold_is_answered():
  posteriors = random_posteriors(np.random.default_rng(2), len(EXAMPLES))
  combination = ensemble.pool_members(
      EXAMPLES, [as_member(posteriors, EXAMPLES)]).combine([0])
  every = combination.scores(np.inf)
  assert (every != combination.pool.empty_scores).any()
  for e, threshold in enumerate(combination.na_score):
    np.testing.assert_array_equal(
        combination.scores(threshold)[:, e], every[:, e])


@pytest.mark.parametrize('threshold', [-np.inf, 0.0, np.inf])
def test_scores_are_those_of_the_written_predictions(threshold):
  """No answer is right for a gold answer that normalises to ''."""
  context = 'Ada took vitamin A.'
  examples = [Example(str(n), 'What?', context, golds, impossible=not golds)
              for n, golds in enumerate([
                  (GoldAnswer('A', 17),), (), (GoldAnswer('vitamin A', 9),)])]
  member = {e.id: ensemble.MemberCandidates(
      math.log(0.3), {(17, 18): math.log(0.2), (9, 18): math.log(0.5)}, 1)
            for e in examples}
  combination = ensemble.pool_members(examples, [member]).combine([0])
  written = predictions_lib.Predictions(
      examples, dict.fromkeys(member, 'vitamin A'),
      dict(zip(member, combination.na_score, strict=True)))
  np.testing.assert_array_equal(
      combination.scores(threshold), written.scores(threshold))


# --- the command


@pytest.fixture
def folder(tmp_path):
  """Two data sets, dev and held, and the n-best files of three members."""
  rng = np.random.default_rng(5)
  for name, count in (('dev', 40), ('held', 60)):
    answers = ['Ada', 'Bob', '', 'Rome', 'Bonn', '', 'Eve']
    examples = [example(n, answers[n % 7]) for n in range(count)]
    files.write_json(tmp_path / f'{name}.json', {'data': [{'paragraphs': [{
        'context': CONTEXT, 'qas': [
            {'id': e.id, 'question': e.question, 'is_impossible': e.impossible,
             'answers': [{'text': a.text, 'answer_start': a.start}
                         for a in e.answers]} for e in examples]}]}]})
    for m in range(3):
      posteriors = random_posteriors(rng, count)
      for e, p in zip(examples, posteriors, strict=True):
        gold = next(((a.start, a.start + len(a.text)) for a in e.answers), None)
        p[gold] += 0.3 * (m < 2)  # two members are better than chance
        total = sum(p.values())
        p.update({s: v / total for s, v in p.items()})
      write_n_best(tmp_path / f'{name}{m}.jsonl', posteriors, examples)
  return tmp_path


def run(folder, *more, members=('dev0.jsonl', 'dev1.jsonl', 'dev2.jsonl')):
  return commands.command(
      'ensemble', f'--data={folder}/dev.json', f'--output={folder}/out',
      f'--members={",".join(str(folder / m) for m in members)}', *more)


def held_out_flags(folder):
  held = ','.join(f'{folder}/held{m}.jsonl' for m in range(3))
  return f'--held_out={folder}/held.json', f'--held_out_members={held}'


def test_files_are_those_of_an_evaluation_and_their_scores(folder):
  result = run(folder, *held_out_flags(folder))
  assert result.code == 0, result.err
  assert 'scored on, 1 of them' in result.err  # one context in both files
  out = folder / 'out'
  examples = sources.load_examples(f'{folder}/dev.json')
  predictions = predictions_lib.read_predictions(out / 'predictions.json')
  values = files.read_object(out / 'metrics.json')
  summary = files.read_object(out / 'ensemble.json')
  official = squad.squad_metrics(examples, predictions)
  assert {k: values[k] for k in official} == official
  assert values['at_held_out_f1'] == pytest.approx(values['f1'])
  assert sorted(summary['members']) == [
      f'{folder}/dev{m}.jsonl' for m in (0, 1)]
  assert summary['threshold'] == values['held_out_threshold'] != 0
  best = summary['alone'][summary['best_member']]
  assert summary['f1_gain']['mean'] == pytest.approx(values['f1'] - best['f1'])
  assert summary['f1_gain']['mean'] > 0
  assert '| ensemble | 2 |' in result.out
  for order, name in enumerate(summary['members'], 1):
    assert f'| {name} | {order} |' in result.out
  # The threshold is the best of the selected members on held-out questions.
  held = sources.load_examples(f'{folder}/held.json')
  pool = ensemble.pool_members(held, [ensemble.read_member(
      folder / pathlib.Path(name).name.replace('dev', 'held'), held)
                                      for name in summary['members']])
  selected = pool.combine([0, 1])
  assert summary['threshold'] == selected.best_threshold()
  assert summary['held_out_f1'][-1] == pytest.approx(
      100 * selected.scores(summary['threshold'])[1].mean())
  # The threshold of a member alone is its best on held-out questions.
  alone = ensemble.pool_members(held, [ensemble.read_member(
      folder / f'held{m}.jsonl', held) for m in range(3)])
  for m in range(3):
    assert summary['alone'][f'{folder}/dev{m}.jsonl']['held_out_f1'] == (
        pytest.approx(best_f1(alone, [m])))
  # An ensemble is a member like any other.
  again = run(folder, members=('out/nbest.jsonl', 'dev2.jsonl'))
  assert again.code == 0, again.err


def test_without_held_out_questions_all_are_members(folder):
  result = run(folder)
  assert result.code == 0 and 'these very questions' in result.out
  summary = files.read_object(folder / 'out' / 'ensemble.json')
  assert len(summary['members']) == 3 and summary['threshold'] == 0
  assert 'at_held_out_f1' not in files.read_object(
      folder / 'out' / 'metrics.json')
  # A threshold that is given is that of each member alone, too.
  made = ensemble.build_ensemble(
      [f'{folder}/dev{m}.jsonl' for m in range(3)], f'{folder}/dev.json',
      null_threshold=1.5)
  assert (made.threshold, *made.thresholds) == (1.5,) * 4


SCORES = {'exact_match': 0.0, 'f1': 0.0}


def write_run(folder, trained_on: str):
  """Writes a run directory without a model, evaluated on dev.json."""
  workdir = folder / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  files.write_json(workdir / 'config.json', tiny.config(
      data={'train': trained_on}).to_dict())
  files.write_json(workdir / 'run.json', {'sha256': {
      'train': store.fingerprint(sources.load_examples(trained_on))}})
  output = workdir / 'eval' / 'dev'
  output.mkdir(parents=True)
  (output / 'nbest.jsonl').write_bytes((folder / 'dev0.jsonl').read_bytes())
  files.write_json(output / 'metrics.json', SCORES)
  return workdir


@pytest.mark.parametrize(('why', 'times'), [
    ('missing', 2), ('calibrated since', 1), ('calibrated otherwise', 0)])
def test_a_run_is_evaluated_if_its_evaluation_is_missing_or_old(
    folder, monkeypatch, why, times):
  workdir = write_run(folder, 'synthetic(size=4)')
  assert run(folder, members=('run', 'dev1.jsonl')).code == 0
  if why == 'missing':
    (workdir / 'eval' / 'dev' / 'nbest.jsonl').unlink()
  else:
    calibration.write_calibration(workdir, calibration.Calibration(
        None, 2.0, 'x', 'y', 1, 1, {'search': (
            'dense' if why == 'calibrated otherwise'
            else tiny.config().decode.search)}), {})
  calls = []

  def evaluate_data(qa, data, *, run, label, progress):
    del progress
    assert label == ''
    calls.append((qa, data))
    output = run.record_evaluation(data)
    (output / 'nbest.jsonl').write_bytes((folder / 'dev0.jsonl').read_bytes())
    files.write_json(output / 'metrics.json', {**SCORES, 'temperature': 2.0})

  monkeypatch.setattr(predict, 'load', str)
  monkeypatch.setattr(run_directory.RunDirectory, 'resolve_step',
                      lambda self, which: 1)
  monkeypatch.setattr(evaluator, 'evaluate_data', evaluate_data)
  for _ in range(2):
    result = run(folder, members=('run', 'dev1.jsonl'))
    assert result.code == 0, result.err
  # The evaluation at temperature 2 is good for no run without calibration.
  assert calls == [(str(workdir), f'{folder}/dev.json')] * times


def test_a_run_that_has_seen_the_held_out_questions_is_refused(folder):
  write_run(folder, f'{folder}/held.json')
  result = run(folder, *held_out_flags(folder),
               members=('run', 'dev1.jsonl', 'dev2.jsonl'))
  assert result.code == 1
  assert 'was trained on; hold out articles' in result.err.splitlines()[-1]
  # Also a run that answers the held-out questions alone.
  result = run(folder, f'--held_out={folder}/held.json',
               f'--held_out_members={folder}/run,{folder}/held1.jsonl',
               members=('dev0.jsonl', 'dev1.jsonl'))
  assert result.code == 1
  assert 'was trained on; hold out articles' in result.err.splitlines()[-1]


def write_models(folder) -> list[pathlib.Path]:
  """Writes the runs of two untrained models, which find other answers."""
  one = random_model.random_qa('independent', null_rule='min_null')
  return [random_model.write_run(random_model.draw_qa(
      one.config, one.model.config, one.tokenizer, seed=seed, scale=0.3),
                                 folder / f'model{seed}') for seed in range(2)]


def members_flag(paths) -> str:
  return f'--workdir={",".join(map(str, paths))}'


@pytest.mark.parametrize('flags', [
    ['--decode.max_answer_length=2', '--decode.n_best=3'],
    ['--max_length=32', '--window_overlap=4', '--decode.whole_words'],
    ['--decode.merge=surface_form', '--decode.null_threshold=-5']])
def test_members_are_decoded_as_evaluate_decodes_them(folder, flags):
  """The runs with flags equal their evaluations with the flags."""
  runs, data = write_models(folder), f'--data={folder}/dev.json'
  for number, path in enumerate(runs):
    evaluated = commands.command(
        'evaluate', data, f'--workdir={path}', *flags,
        f'--output={folder}/evaluation{number}')
    assert evaluated.code == 0, evaluated.err
  for name, members, more in (
      ('flags', runs, flags), ('plain', runs, []),
      ('files', [folder / f'evaluation{n}' for n in range(2)],
       [f for f in flags if 'null_threshold' in f])):
    result = commands.command('ensemble', members_flag(members), data,
                              f'--output={folder}/{name}', *more)
    assert result.code == 0, result.err
  by_flags, plain, by_files = (
      [files.read_object(folder / name / file) for file in (
          'predictions.json', 'metrics.json')] + [
              {key: row['answers'][:3] for key, row in
               predictions_lib.read_n_best(folder / name / 'nbest.jsonl'
                                           ).items()}]
      for name in ('flags', 'plain', 'files'))
  assert by_flags == by_files
  assert by_flags[0] != plain[0] or by_flags[2] != plain[2]
  if '--decode.n_best=3' in flags:
    rows = predictions_lib.read_n_best(folder / 'flags' / 'nbest.jsonl')
    assert {len(row['answers']) for row in rows.values()} == {3}


def test_a_decoding_of_members_has_its_folder_and_is_computed_once(folder):
  runs = write_models(folder)
  argv = [members_flag(runs), f'--data={folder}/dev.json',
          f'--output={folder}/out']
  flags = ['--decode.max_answer_length=2', '--decode.null_threshold=1']
  for path in runs:  # a calibration of the run's decoding, not of the flags'
    run = run_directory.RunDirectory(path)
    calibration.write_calibration(path, calibration.Calibration(
        None, 2.0, 'x', 'y', 1, run.resolve_step('best'), {
            'max_answer_length': run.read_config().decode.max_answer_length
        }), {})
  first, second = (commands.command('ensemble', *argv, *flags)
                   for _ in range(2))
  assert (first.code, second.code) == (0, 0), first.err + second.err
  assert 'evaluated on' in first.err and 'evaluated on' not in second.err
  # The null threshold is that of the ensemble, not that of its members.
  assert {p.name for run in runs for p in (run / 'eval').iterdir()} == {
      'dev.max_answer_length-2'}
  assert files.read_object(folder / 'out' / 'ensemble.json')['threshold'] == 1


def test_the_evaluation_of_another_checkpoint_is_no_member(folder):
  """Training evaluates its last checkpoint; a member is the best one."""
  one = random_model.random_qa('independent', null_rule='min_null')
  run = run_directory.RunDirectory(random_model.write_run(
      one, folder / 'two', last=random_model.draw_qa(
          one.config, one.model.config, one.tokenizer, seed=1)))
  data = f'{folder}/dev.json'
  lists = {}
  for checkpoint in ('best', 'last'):
    evaluator.evaluate_data(predict.load(run.path, checkpoint=checkpoint), data,
                            run=run)
    where = run.evaluation(data)
    lists[checkpoint] = (where / 'nbest.jsonl').read_text()
  assert run_directory.read_step(where) == 1 and len({*lists.values()}) == 2
  assert ensemble._n_best_file(run.path, data, {}).read_text() == lists['best']
  assert run_directory.read_step(where) == 0
  chosen = ensemble._n_best_file(run.path, data, {'checkpoint': 'last'})
  assert chosen.parent.name == 'dev.checkpoint-last'
  assert chosen.read_text() == lists['last']
  # An evaluation of an earlier version has no step and is accepted.
  (where / 'nbest.jsonl').write_text(lists['last'])
  (where / 'data.json').unlink()
  assert ensemble._n_best_file(run.path, data, {}).read_text() == lists['last']


def test_members_without_their_calibration_are_as_before_it(folder):
  runs, lists = write_models(folder), []
  argv = [members_flag(runs), f'--data={folder}/dev.json',
          f'--output={folder}/out']
  for flags in ([], ['--nocalibrated'], []):
    result = commands.command('ensemble', *argv, *flags)
    assert result.code == 0, result.err
    lists.append((folder / 'out' / 'nbest.jsonl').read_text())
    for run in runs:
      calibration.write_calibration(run, calibration.Calibration(
          None, 2.0, 'x', 'y', 1, run_directory.RunDirectory(
              run).resolve_step('best'), {}), {})
  assert lists[0] == lists[1] != lists[2]


@pytest.mark.parametrize(('flags', 'message'), [
    (['--decode.n_best=2', '--max_length=40'],
     'dev1.jsonl is no run, so it has no model to decode; leave out n_best, '
     'max_length'),
    (['--nocalibrated', '--checkpoint=last'],
     'leave out checkpoint, calibrated'),
    (['--decode.null_threshold=nan'], 'decode.null_threshold'),
    (['--decode.null_threshold=1', '--held_out=HELD'],
     'null_threshold=1.0 and --held_out contradict each other')])
def test_decoding_that_no_ensemble_can_follow_is_one_line(
    folder, flags, message):
  write_run(folder, 'synthetic(size=4)')
  flags = [f.replace('HELD', f'{folder}/held.json') for f in flags]
  result = run(folder, *flags, members=('run', 'dev1.jsonl'))
  assert result.code == 1 and message in result.err, result.err
  assert result.err.count('\n') == 1 and not (folder / 'out').exists()


@pytest.mark.parametrize(('flag', 'message'), [
    ('--decode.max_answer_length=0', 'max_answer_length=0 must be in 1'),
    ('--decode.search=two_stag', "did you mean 'two_stage'"),
    ('--window_overlap=96', 'window_overlap 96 leaves no step')])
def test_decoding_that_does_not_fit_is_the_line_of_evaluate(
    folder, flag, message):
  runs, data = write_models(folder), f'--data={folder}/dev.json'
  lines = [commands.command(*argv, data, flag, f'--output={folder}/out'
                            ).err.splitlines()[-1] for argv in (
      ('evaluate', f'--workdir={runs[0]}'), ('ensemble', members_flag(runs)))]
  assert message in lines[0] and lines[0] == lines[1]


@pytest.mark.parametrize(('change', 'message'), [
    (lambda rows: rows[:-1], "1 of 40 questions are missing, the first is"),
    (lambda rows: [*rows, {**rows[0], 'id': 'x'}], "'x' is not in the data"),
    (lambda rows: [*rows, rows[0]], "'q0' stands there twice"),
    (lambda rows: [{**rows[0], 'null_probability': float('nan')}, *rows[1:]],
     'a probability is nan, expected a number in 0 … 1'),
    (lambda rows: [{**rows[0], 'null_probability': None}, *rows[1:]],
     'evaluate anew'),
    (lambda rows: [{**rows[0], 'answers': [
        {**rows[0]['answers'][0], 'start': 1}]}, *rows[1:]],
     'does not stand at its place'),
    (lambda rows: [{**rows[0], 'answers': 'Ada'}, *rows[1:]],
     "expected 'id', 'windows' and 'answers'"),
    (lambda rows: [{**r, 'null_probability': 0} for r in rows],
     'null_rule never')])
def test_a_damaged_n_best_file_is_one_line(folder, change, message):
  rows = [json.loads(r) for r in (folder / 'dev0.jsonl').read_text(
      ).splitlines()]
  (folder / 'bad.jsonl').write_text(''.join(
      json.dumps(r) + '\n' for r in change(rows)))
  error = refusal(ensemble.read_member, folder / 'bad.jsonl',
                  sources.load_examples(f'{folder}/dev.json'))
  assert message in error and str(folder) in error


@pytest.mark.parametrize(('members', 'more', 'message'), [
    (['dev0.jsonl'], (), 'needs two members'),
    (['dev0.jsonl', 'dev0.jsonl'], (), '/dev0.jsonl twice'),
    (['dev0.jsonl', 'x/../dev0.jsonl'], (), 'x/../dev0.jsonl twice'),
    (['one', 'one/nbest.jsonl'], (), '/one/nbest.jsonl twice'),
    (['dev0.jsonl', 'nowhere'], (), 'no such run'),
    (['dev0.jsonl', 'held1.jsonl'], (), 'is not in the data'),
    (['dev0.jsonl', 'dev1.jsonl'], ('--held_out_members=x',), 'goes with'),
    (['dev0.jsonl', 'dev1.jsonl'],
     ('--held_out=synthetic(size=4)', '--held_out_members=dev0.jsonl'),
     'one for each of the 2 members')])
def test_mistakes_of_the_command_are_one_line(folder, members, more, message):
  result = run(folder, *more, members=members)
  assert result.code == 1 and message in result.err
  assert result.err.count('\n') == 1 and not (folder / 'out').exists()


@pytest.mark.parametrize(('members', 'more', 'message'), [
    (['run', 'dev1.jsonl'], ['--held_out=HELD'],
     'dev1.jsonl is no run, so it cannot answer --held_out; give '
     '--held_out_members'),
    (['run', 'model'], [], 'model is neither a run nor an evaluation: it has '
     'no nbest.jsonl; evaluate it (python -m experiments.evaluate --workdir='),
    (['run', 'held0.jsonl'], [], "held0.jsonl: question 'q40' is not in the"),
    (['run', 'no_null'], [], 'no_null has the null rule never, but some')])
def test_a_member_that_cannot_answer_is_refused_before_any_model_runs(
    folder, monkeypatch, members, more, message):
  """The run of the first member has no evaluation."""
  (write_run(folder, 'synthetic(size=4)') / 'eval/dev/nbest.jsonl').unlink()
  (folder / 'model').mkdir()
  files.write_json(folder / 'model' / 'config.json', {})
  random_model.write_run(
      random_model.random_qa('independent'), folder / 'no_null')
  monkeypatch.setattr(predict, 'load', None)
  result = run(folder, *(f.replace('HELD', f'{folder}/held.json')
                         for f in more), members=members)
  assert result.code == 1 and message in result.err, result.err
  assert result.err.count('\n') == 1 and not (folder / 'out').exists()


@pytest.mark.parametrize('held_out', [False, True])
def test_without_a_null_rule_every_question_is_answered(
    folder, monkeypatch, held_out):
  """A model twice is scored as its own evaluation."""
  monkeypatch.setattr(calibrate, 'check_untrained', lambda *_: None)
  runs = write_models(folder)
  more = [f'--held_out={folder}/held.json'] if held_out else []
  (folder / 'both').mkdir()
  files.write_json(folder / 'both' / 'na_probs.json', {})  # of another rule
  for name, paths in (('both', runs), ('twice', [runs[0], folder / 'again'])):
    if name == 'twice':
      shutil.copytree(runs[0], folder / 'again')
    result = commands.command(
        'ensemble', members_flag(paths), f'--data={folder}/dev.json',
        '--decode.null_rule=never', f'--output={folder}/{name}', *more)
    assert result.code == 0, result.err
    predictions = predictions_lib.read_predictions(
        folder / name / 'predictions.json')
    assert all(predictions.values()) and len(predictions) == 40
    assert not (folder / name / 'na_probs.json').exists()
  evaluation = runs[0] / 'eval' / 'dev.null_rule-never'
  alone = files.read_object(evaluation / 'metrics.json')
  assert files.read_object(folder / 'twice' / 'metrics.json') == alone
  assert alone['no_answer_total'] > 0 and predictions == (
      predictions_lib.read_predictions(evaluation / 'predictions.json'))


def test_an_empty_context_has_no_candidates():
  empty = Example('q9', '?', '', (), True)
  combination = ensemble.pool_members(
      [empty], [{'q9': ensemble.MemberCandidates(0.0, {}, 1)}] * 2
      ).combine([0, 1])
  assert combination.best.tolist() == [-1]
  assert combination.scores(0.0).tolist() == [[1], [1]]


def test_ties_go_to_the_first_in_the_text():
  pool = ensemble.pool_members(EXAMPLES[:1], [
      {'q0': ensemble.MemberCandidates(-9.0, dict.fromkeys(order, -2.0), 1)}
      for order in itertools.islice(itertools.permutations(SPANS), 2)])
  assert pool.combine([0, 1]).best.tolist() == [0]
