"""Ensembles against products of whole posteriors, and exhaustive selection."""

import itertools
import json
import math

import numpy as np
import pytest

from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.evaluation import ensemble
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from tests.common import commands
from tests.common import tiny
from tests.common.refusals import refusal

CONTEXT = 'Ada met Bob in Rome and Eve in Bonn.'
SPANS = [(0, 3), (8, 11), (15, 19), (24, 27), (31, 35), (8, 19)]


def example(n: int, answer: str = '') -> Example:
  golds = (GoldAnswer(answer, CONTEXT.index(answer)),) if answer else ()
  return Example(f'q{n}', 'Who?', CONTEXT, golds, impossible=not golds)


def whole(rng, count: int) -> list[dict[tuple[int, int] | None, float]]:
  """Posteriors over all SPANS and None, no answer, of `count` questions."""
  return [dict(zip([*SPANS, None], rng.dirichlet(np.ones(7) / 2), strict=True))
          for _ in range(count)]


def listed(posteriors, examples, keep=99):
  """What a member says that lists its `keep` best."""
  out = {}
  for e, p in zip(examples, posteriors, strict=True):
    best = sorted((s for s in p if s), key=lambda s: -p[s])[:keep]
    out[e.id] = ensemble.MemberCandidates(
        math.log(p[None]), {s: math.log(p[s]) for s in best}, windows=2)
  return out


def write(path, posteriors, examples, keep=99):
  files.write_jsonl(path, (
      {'id': e.id, 'windows': 2, 'null_score': 0.0, 'null_probability': p[None],
       'answers': [
           {'text': CONTEXT[s[0]:s[1]], 'start': s[0], 'end': s[1],
            'score': math.log(p[s]), 'probability': p[s]} for s in sorted(
                (s for s in p if s), key=lambda s: -p[s])[:keep]]}
      for e, p in zip(examples, posteriors, strict=True)))
  return path


EXAMPLES = [example(n, answer) for n, answer in enumerate(
    ['Ada', 'Bob', '', 'Rome', 'Bonn', '', 'Eve', 'Ada'])]


def test_an_ensemble_is_the_normalised_product_of_posteriors():
  rng = np.random.default_rng(0)
  members = [whole(rng, len(EXAMPLES)) for _ in range(3)]
  pool = ensemble.pool_members(EXAMPLES, [listed(m, EXAMPLES) for m in members])
  found = pool.combine([0, 2])
  for e in range(len(EXAMPLES)):
    product = {s: math.sqrt(members[0][e][s] * members[2][e][s])
               for s in members[0][e]}
    total = sum(product.values())
    best = max((s for s in product if s), key=product.__getitem__)
    assert (pool.begin[found.best[e]], pool.end[found.best[e]]) == best
    assert found.na_score[e] == pytest.approx(
        math.log(product[None] / product[best]))
    row = found.n_best_row(e, 3)
    assert row['null_probability'] == pytest.approx(product[None] / total)
    assert [a['probability'] for a in row['answers']] == pytest.approx(
        sorted((p / total for s, p in product.items() if s), reverse=True)[:3])
    assert all(CONTEXT[a['start']:a['end']] == a['text']
               for a in row['answers'])


def test_one_member_answers_as_it_does_alone():
  posteriors = whole(np.random.default_rng(1), len(EXAMPLES))
  pool = ensemble.pool_members(EXAMPLES, [listed(posteriors, EXAMPLES, keep=2)])
  found = pool.combine([0])
  for e, p in enumerate(posteriors):
    best = max((s for s in p if s), key=p.__getitem__)
    assert (pool.begin[found.best[e]], pool.end[found.best[e]]) == best
    assert (found.na_score[e] > 0) == (p[None] > p[best])


def test_a_span_that_is_not_listed_is_no_better_than_it_may_be():
  one = lambda null, **p: ensemble.MemberCandidates(
      math.log(null), {(0, n): math.log(x) for n, x in enumerate(
          p.values())}, 1)
  # The worst that is listed has 0.2, and 0.1 is left for all others.
  assert one(0.3, a=0.4, b=0.2).floor == pytest.approx(math.log(0.1))
  assert one(0.1, a=0.2, b=0.1).floor == pytest.approx(math.log(0.1))
  assert one(0.5, a=0.5).floor == pytest.approx(math.log(ensemble.MIN_REST))


def test_members_of_other_tokenizers_meet_in_characters():
  """One cannot find 'Bob', the other not 'Bob in'; both have 'Ada'."""
  lists = [{(0, 3): 0.3, (8, 14): 0.6}, {(0, 3): 0.4, (8, 11): 0.5}]
  pool = ensemble.pool_members(EXAMPLES[:1], [{'q0': ensemble.MemberCandidates(
      math.log(0.05), {s: math.log(p) for s, p in spans.items()}, 1)}
                                      for spans in lists])
  found = pool.combine([0, 1])
  assert (pool.begin[found.best[0]], pool.end[found.best[0]]) == (0, 3)


def f1_of(pool, members) -> float:
  """At the best threshold, by trying all."""
  found = pool.combine(members)
  return max(100 * found.scores(t)[1].mean()
             for t in [-99.0, *found.na_score])


@pytest.mark.parametrize('seed', range(6))
def test_selection_takes_the_best_and_then_what_gains_most(seed):
  rng = np.random.default_rng(seed)
  pool = ensemble.pool_members(EXAMPLES, [
      listed(whole(rng, len(EXAMPLES)), EXAMPLES) for _ in range(4)])
  steps = ensemble.select_members(pool)
  chosen = []
  for member, f1 in steps:
    options = [f1_of(pool, [*chosen, m]) for m in range(4) if m not in chosen]
    chosen.append(member)
    assert f1 == pytest.approx(max(options)) == pytest.approx(
        f1_of(pool, chosen))
  scores = [f1 for _, f1 in steps]
  assert scores == sorted(set(scores))
  assert all(f1_of(pool, [*chosen, m]) <= scores[-1] + 1e-9
             for m in range(4) if m not in chosen)


def test_members_that_err_in_different_places_help_each_other():
  """Each is sure where it is right, and unsure where it is wrong."""
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
    members.append(listed(posteriors, EXAMPLES))
  pool = ensemble.pool_members(EXAMPLES, members)
  scores = [pool.combine(m).scores(0.0)[0].mean()
            for m in ([0], [1], [0, 1])]
  assert scores[2] == 1 and max(scores[:2]) < 0.8


def test_without_unanswerable_questions_all_are_answered():
  asked = [example(0, 'Ada'), example(1, 'Bob')]
  sure = [{**dict.fromkeys(SPANS, 0.01), (0, 3): 0.04, None: 0.9}] * 2
  pool = ensemble.pool_members(asked, [listed(sure, asked)] * 2)
  found = pool.combine([0, 1])
  assert found.best_threshold() == 0
  assert found.scores(0.0)[0].tolist() == [1, 0]


# --- the command


@pytest.fixture
def folder(tmp_path):
  """Data of two halves, and three members' lists of each."""
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
      posteriors = whole(rng, count)
      for e, p in zip(examples, posteriors, strict=True):
        gold = next(((a.start, a.start + len(a.text)) for a in e.answers), None)
        p[gold] += 0.3 * (m < 2)  # two know something, the third does not
        total = sum(p.values())
        p.update({s: v / total for s, v in p.items()})
      write(tmp_path / f'{name}{m}.jsonl', posteriors, examples)
  return tmp_path


def run(folder, *more, members=('dev0.jsonl', 'dev1.jsonl', 'dev2.jsonl')):
  return commands.command(
      'ensemble', f'--data={folder}/dev.json', f'--output={folder}/out',
      f'--members={",".join(str(folder / m) for m in members)}', *more)


def with_held_out(folder):
  held = ','.join(f'{folder}/held{m}.jsonl' for m in range(3))
  return f'--held_out={folder}/held.json', f'--held_out_members={held}'


def test_files_are_those_of_an_evaluation_and_their_scores(folder):
  result = run(folder, *with_held_out(folder))
  assert result.code == 0, result.err
  assert 'scored on, 1 of them' in result.err  # one context in both files
  out = folder / 'out'
  examples = sources.load_examples(f'{folder}/dev.json')
  told = predictions_lib.read_predictions(out / 'predictions.json')
  values = files.read_object(out / 'metrics.json')
  found = files.read_object(out / 'ensemble.json')
  official = squad.squad_metrics(examples, told)
  assert {k: values[k] for k in official} == official
  assert values['at_held_out_f1'] == pytest.approx(values['f1'])
  assert sorted(found['members']) == [f'{folder}/dev{m}.jsonl' for m in (0, 1)]
  assert found['threshold'] == values['held_out_threshold'] != 0
  best = found['alone'][found['best_member']]
  assert found['f1_gain']['mean'] == pytest.approx(values['f1'] - best['f1'])
  assert found['f1_gain']['mean'] > 0  # two that know help each other
  assert '| ensemble | 2 |' in result.out
  # An ensemble is a member like any other.
  again = run(folder, members=('out/nbest.jsonl', 'dev2.jsonl'))
  assert again.code == 0, again.err


def test_without_held_out_questions_all_are_members(folder):
  result = run(folder)
  assert result.code == 0 and 'these very questions' in result.out
  found = files.read_object(folder / 'out' / 'ensemble.json')
  assert len(found['members']) == 3 and found['threshold'] == 0


def a_run(folder, trained_on: str):
  """A run directory without a model, evaluated on dev.json."""
  workdir = folder / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  files.write_json(workdir / 'config.json', tiny.config(
      data={'train': trained_on}).to_dict())
  files.write_json(workdir / 'run.json', {'sha256': {
      'train': store.fingerprint(sources.load_examples(trained_on))}})
  output = workdir / 'eval' / 'dev'
  output.mkdir(parents=True)
  (output / 'nbest.jsonl').write_bytes((folder / 'dev0.jsonl').read_bytes())
  files.write_json(output / 'metrics.json', {})
  return workdir


@pytest.mark.parametrize('why', ['lacks it', 'was calibrated since'])
def test_a_run_is_evaluated_if_it_lacks_it(folder, monkeypatch, why):
  workdir = a_run(folder, 'synthetic(size=4)')
  assert run(folder, members=('run', 'dev1.jsonl')).code == 0
  if why == 'lacks it':
    (workdir / 'eval' / 'dev' / 'nbest.jsonl').unlink()
  else:
    calibration.write_calibration(workdir, calibration.Calibration(
        None, 2.0, 'x', 'y', 1, 1, {}), {})
  asked = []

  def on(qa, data, *, output, progress):
    del progress
    asked.append((qa, data))
    (output / 'nbest.jsonl').write_bytes((folder / 'dev0.jsonl').read_bytes())
    files.write_json(output / 'metrics.json', {'temperature': 2.0})

  monkeypatch.setattr(predict, 'load', str)
  monkeypatch.setattr(evaluator, 'evaluate_data', on)
  for _ in range(2):
    result = run(folder, members=('run', 'dev1.jsonl'))
    assert result.code == 0, result.err
  expected = [(str(workdir), f'{folder}/dev.json')]
  assert asked == expected * (2 if why == 'lacks it' else 1)


def test_a_run_that_has_seen_the_held_out_questions_is_refused(folder):
  a_run(folder, f'{folder}/held.json')
  result = run(folder, *with_held_out(folder),
               members=('run', 'dev1.jsonl', 'dev2.jsonl'))
  assert result.code == 1
  assert 'was trained on; hold out articles' in result.err.splitlines()[-1]


@pytest.mark.parametrize(('change', 'words'), [
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
def test_a_bad_list_is_one_line(folder, change, words):
  rows = [json.loads(r) for r in (folder / 'dev0.jsonl').read_text(
      ).splitlines()]
  (folder / 'bad.jsonl').write_text(''.join(
      json.dumps(r) + '\n' for r in change(rows)))
  message = refusal(ensemble.read_member, folder / 'bad.jsonl',
                    sources.load_examples(f'{folder}/dev.json'))
  assert words in message and str(folder) in message


@pytest.mark.parametrize(('members', 'more', 'words'), [
    (['dev0.jsonl'], (), 'needs two members'),
    (['dev0.jsonl', 'dev0.jsonl'], (), 'named twice'),
    (['dev0.jsonl', 'nowhere'], (), 'no such run'),
    (['dev0.jsonl', 'held1.jsonl'], (), 'is not in the data'),
    (['dev0.jsonl', 'dev1.jsonl'], ('--held_out_members=x',), 'goes with')])
def test_mistakes_of_the_command_are_one_line(folder, members, more, words):
  result = run(folder, *more, members=members)
  assert result.code == 1 and words in result.err
  assert result.err.count('\n') == 1 and not (folder / 'out').exists()


def test_an_empty_context_has_no_candidates():
  empty = Example('q9', '?', '', (), True)
  pool = ensemble.pool_members([empty], [{
      'q9': ensemble.MemberCandidates(0.0, {}, 1)
  }] * 2)
  found = pool.combine([0, 1])
  assert found.best.tolist() == [-1]
  assert found.scores(0.0).tolist() == [[1], [1]]


def test_ties_go_to_the_first_in_the_text():
  pool = ensemble.pool_members(EXAMPLES[:1], [{'q0': ensemble.MemberCandidates(
      -9.0, dict.fromkeys(order, -2.0), 1)} for order in itertools.islice(
          itertools.permutations(SPANS), 2)])
  assert pool.combine([0, 1]).best.tolist() == [0]
