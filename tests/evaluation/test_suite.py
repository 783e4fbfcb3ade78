"""Suites: the rows, the averages, and sets that cannot be read."""

import importlib
import json
import pathlib

import numpy as np
import pytest

from qa_jax import errors
from qa_jax.data import sources
from qa_jax.evaluation import evaluator
from qa_jax.evaluation import suite
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from tests.common import commands
from tests.common import lookup
from tests.common.refusals import refusal

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def qa() -> predict.QA:
  return predict.QA(lookup.Lookup(), lookup.PARAMS,
                    lookup.TOKENIZER, lookup.make_config())


@pytest.fixture(scope='module')
def groups(tmp_path_factory) -> dict[str, dict[str, str]]:
  """Returns a suite of two sets that exist and one that does not."""
  folder = tmp_path_factory.mktemp('data')
  for seed, name in enumerate(('one', 'two')):
    examples = lookup.make_examples(seed)
    files.write_json(folder / f'{name}.json', {'data': [{
        'title': e.id, 'paragraphs': [{'context': e.context, 'qas': [
            {'id': e.id, 'question': e.question, 'is_impossible': e.impossible,
             'answers': [{'text': a.text, 'answer_start': a.start}
                         for a in e.answers]}]}]} for e in examples]})
  return {'here': {name: f'{folder}/{name}.json' for name in ('one', 'two')},
          'gone': {'three': f'{folder}/three.json'}}


def test_rows_are_evaluations_and_averages_weigh_sets_alike(
    qa, groups, tmp_path, capsys):
  rows = suite.run_suite(qa, groups, tmp_path)
  err = capsys.readouterr().err
  assert 'SKIPPED gone/three: ' in err and 'No such file' in err
  assert [(r.group, r.name) for r in rows] == [
      ('here', 'one'), ('here', 'two'), ('gone', 'three')]
  alone = [evaluator.evaluate_data(qa, spec, output=None)
           for spec in groups['here'].values()]
  assert [r.metrics for r in rows] == [*alone, None]
  averages = suite.averages(rows)
  assert list(averages) == ['here', 'all']
  for values in averages.values():
    assert values['sets'] == 2
    assert values['f1'] == pytest.approx(np.mean([v['f1'] for v in alone]))
  for row in rows[:2]:
    examples = sources.load_examples(row.data)
    em, f1 = 100 * squad.per_question(examples, files.read_object(
        tmp_path / 'here' / row.name / 'predictions.json'))
    assert em.mean() != f1.mean()
    assert (row.low, row.high) == significance.hierarchical_interval(
        f1[None], [e.id for e in examples], seed=0)
  assert (tmp_path / 'here' / 'one' / 'nbest.jsonl').is_file()


def test_no_set_at_all_is_one_line(qa, groups, tmp_path):
  message = refusal(
      lambda: suite.run_suite(qa, {'gone': groups['gone']}, tmp_path))
  assert 'none of the 1 sets' in message and 'three.json' in message


def test_scores_that_are_not_finite_do_not_skip_a_set(
    qa, groups, tmp_path, monkeypatch):
  def fail(*args, **options):
    raise errors.UserError('the null score is not finite')
  monkeypatch.setattr(evaluator, 'evaluate_windows', fail)
  assert 'not finite' in refusal(suite.run_suite, qa, groups, tmp_path)


def test_a_calibrated_model_is_shown_at_0_and_at_the_best_threshold():
  scores = {'total': 6, 'exact_match': 50.0, 'f1': 60.0}
  calibrated = {**scores, 'at_held_out_f1': 60.0, 'at_zero_f1': 40.0,
                'best_f1': 70.0}
  rows = [suite.Row('a', 'one', 'x', calibrated, 1.0, 2.0),
          suite.Row('b', 'two', 'y', scores, 1.0, 2.0)]
  (header, table), (plain, _) = (
      (table.head, table.rows) for some in (rows, rows[1:])
      for table in [suite._blocks(some, suite.averages(some), 'title')[1]])
  assert header == [*plain, 'F1 at 0', 'F1, oracle']
  assert [row[0] for row in table] == [  # a set alone is no average
      'a/one', 'b/two', 'macro average of all']
  assert [row[-2:] for row in table] == [['40.00', '70.00'], *[['–', '–']] * 2]


def command(tmp_path, monkeypatch, qa, groups, *more):
  (tmp_path / 'mine.py').write_text(
      'import ml_collections\ndef get_config(variant="all"):\n'
      f'  return ml_collections.ConfigDict({groups!r})\n')
  monkeypatch.setattr(predict, 'load', lambda *a, **k: qa)
  return commands.command(
      'suite', '--workdir=hub/id', f'--suite={tmp_path}/mine.py',
      f'--output={tmp_path}/out', *more)


@pytest.mark.filterwarnings('ignore:the load_module')
def test_the_command_reports_rows_averages_and_what_was_skipped(
    tmp_path, monkeypatch, qa, groups):
  result = command(tmp_path, monkeypatch, qa, groups)
  assert result.code == 0, result.err
  for text in ('| here/one | 6 |', '| gone/three | SKIPPED |',
               '| macro average of here | 2 of 2 sets |',
               '| macro average of all | 2 of 3 sets |',
               '1 of 3 sets could not be read'):
    assert text in result.out, text
  report = json.loads((tmp_path / 'out' / 'suite.json').read_text())
  skipped = {s['name']: s['skipped'] for s in report['sets']
             if s['metrics'] is None}
  assert list(skipped) == ['three'] and 'No such file' in skipped['three']
  # A flag replaces the SPEC of a set. One that is answered has fewer metrics.
  articles = json.loads(pathlib.Path(groups['here']['one']).read_text())
  files.write_json(tmp_path / 'answered.json', {'data': [
      article for article in articles['data']
      if article['paragraphs'][0]['qas'][0]['answers']]})
  result = command(tmp_path, monkeypatch, qa, groups,
                   f'--suite.gone.three={tmp_path}/answered.json')
  assert 'SKIPPED' not in result.out and '3 of 3 sets' in result.out
  assert '| HasAns F1 | NoAns |' in result.out


@pytest.mark.filterwarnings('ignore:the load_module')
def test_the_flags_of_decoding_and_checkpoint_name_the_folder(
    tmp_path, monkeypatch, qa, groups):
  run = tmp_path / 'run'
  (run / 'checkpoints').mkdir(parents=True)
  files.write_json(run / 'config.json', {})
  one = {'here': {'one': groups['here']['one']}}
  for flags, name in (([], 'mine'), (
      ['--decode.n_best=2', '--checkpoint=3'], 'mine.n_best-2.checkpoint-3')):
    result = command(tmp_path, monkeypatch, qa, one, f'--workdir={run}',
                     '--output=', *flags)
    assert result.code == 0, result.err
    title, *_ = (run / 'suites' / name / 'suite.md').read_text().splitlines()
    assert title == f'# {run} on the suite {name}'


@pytest.mark.filterwarnings('ignore:the load_module')
@pytest.mark.parametrize(('sets', 'more', 'message'), [
    ({'a': 'x.json'}, (), 'a suite is {group: {name: data SPEC}}'),
    ({'a': {}}, (), 'none of them empty'), ({}, (), 'none of them empty'),
    ({'a': {'b': ''}}, (), 'none of them empty'),
    ({'a': {'b': 3}}, (), 'a suite is'),
    ({'all': {'b': 'x'}}, (), "a suite has a group 'all'"),
    ({'a': {'b': 'x'}}, ('--suite.c.d=y',),
     "--suite has no group 'c'; add it to the suite file"),
    ({'a': {'b': 'x'}}, ('--suite=nowhere.py',), 'nowhere.py'),
    ({'a': {'b': 'x'}}, ('--output=',), '--output is needed')])
def test_mistakes_are_one_line(tmp_path, monkeypatch, qa, sets, more, message):
  result = command(tmp_path, monkeypatch, qa, sets, *more)
  assert result.code in (1, 2) and message in result.err
  assert result.err.count('\n') == 1 and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', sorted(
    (ROOT / 'configs' / 'suites').glob('*.py')), ids=lambda p: p.stem)
def test_shipped_suites_are_whole(path):
  module = importlib.import_module(f'configs.suites.{path.stem}')
  for variant in ('all', 'tiny'):
    assert suite.check_suite(module.get_config(variant).to_dict())
