"""Test sets without answers, and the folders of a run's evaluations."""

import json
import os

import pytest

from qa_jax import errors
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.evaluation import evaluator
from qa_jax.inference import decode
from qa_jax.inference import predict
from qa_jax.metrics import calibration
from qa_jax.training import train
from tests.common import commands
from tests.common import examples
from tests.common import random_model
from tests.common import tiny

ROWS = [{'id': n, 'question': f'Who, {n}?', 'context': 'Mira met Bob in Tarn.'}
        for n in range(3)]
ANSWER = {'answers': [{'text': 'Mira', 'answer_start': 0}]}
BLIND = {  # forms of a test set without answers
    'no key': ROWS,
    'empty': [{**row, 'answers': []} for row in ROWS],
    'null': [{**row, 'answers': None} for row in ROWS],
    'marked false': [{**row, 'answers': [], 'is_impossible': False}
                     for row in ROWS],
    'SQuAD': {'data': [{'title': None, 'paragraphs': [{
        'context': ROWS[0]['context'], 'qas': [
            {k: row[k] for k in ('id', 'question')} for row in ROWS]}]}]}}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'run'
  train.train(tiny.config(data={'eval': ''}, train={'num_steps': 1}), path)
  return path


@pytest.fixture
def no_model(monkeypatch):
  """Makes it an error to compute the scores of a window."""
  def refuse(*_, **__):
    raise AssertionError('the model runs')
  monkeypatch.setattr(decode, 'score_windows', refuse)


@pytest.mark.parametrize('form', BLIND)
def test_a_set_without_answers_gives_predictions_and_no_scores(
    workdir, tmp_path, form):
  data = examples.write(tmp_path / 'test.json', BLIND[form])
  examples.write(tmp_path / 'out.json', '')
  (tmp_path / 'out').mkdir()
  examples.write(tmp_path / 'out' / 'metrics.json', {'of': 'another set'})
  result = commands.command('evaluate', f'--workdir={workdir}',
                            f'--data={data}', f'--output={tmp_path}/out')
  assert (result.code, result.out) == (0, ''), result.err
  assert 'nothing was scored' in result.err.splitlines()[-1]
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
      'predictions.json', 'na_probs.json', 'nbest.jsonl'}
  predictions = json.loads((tmp_path / 'out/predictions.json').read_text())
  assert [*predictions] == ['0', '1', '2']
  assert predictions.keys() == json.loads(
      (tmp_path / 'out/na_probs.json').read_text()).keys()
  n_best = (tmp_path / 'out/nbest.jsonl').read_text().splitlines()
  assert [json.loads(line)['id'] for line in n_best] == [*predictions]


def test_a_calibrated_run_predicts_without_scores_too(
    workdir, tmp_path, monkeypatch):
  stored = calibration.Calibration(0.5, 2.0, 'x', 'y', 1, 1, {})
  monkeypatch.setattr(calibration, 'read_calibration', lambda _: stored)
  monkeypatch.setattr(predict, '_misfit', lambda *_: '')
  data = examples.write(tmp_path / 'blind.json', ROWS)
  result = commands.command('evaluate', f'--workdir={workdir}',
                            f'--data={data}')
  assert (result.code, result.out) == (0, ''), result.err
  assert 'temperature 2 in use' in result.err
  assert {p.name for p in (workdir / 'eval/blind').iterdir()} == {
      'predictions.json', 'na_probs.json', 'nbest.jsonl', 'data.json'}


def test_results_that_would_be_lost_are_refused_before_the_model_runs(
    tmp_path, workdir, no_model):
  data = examples.write(tmp_path / 'test.json', ROWS)
  with pytest.raises(errors.UserError, match='give --output=DIR for the pred'):
    evaluator.evaluate_data(predict.load(workdir), data)


def last_line(name, *argv) -> str:
  result = commands.command(name, *argv)
  assert result.code == 1 and not result.out, result
  return result.err.splitlines()[-1]


PARTLY = [{**ROWS[0], **ANSWER}, {**ROWS[1], **ANSWER}, ROWS[2]]


@pytest.mark.filterwarnings('ignore:the load_module')
@pytest.mark.parametrize(('rows', 'message'), [
    (ROWS, 'none of the 3 questions has answers'),
    (BLIND['empty'], 'none of the 3 questions has answers'),
    (PARTLY, '1 of 3 questions have neither answers nor a mark'),
    ([{**row, 'answer': 'Mira'} for row in ROWS], 'locate_answers=True of '),
    ([{**row, 'answr': 'Mira'} for row in ROWS], "'answr' and no 'answers'")])
def test_a_set_that_cannot_be_scored_is_refused_before_the_model_runs(
    workdir, tmp_path, no_model, rows, message):
  data = examples.write(tmp_path / 'test.json', rows)
  good = examples.write(tmp_path / 'good.json', [
      {**row, **ANSWER} for row in ROWS])
  config = tmp_path / 'tiny.py'
  config.write_text(commands.CONFIG.format(fields=tiny.FIELDS))
  suite = tmp_path / 'suite.py'
  suite.write_text(commands.CONFIG.format(fields={'g': {'a': data}}))
  predictions = examples.write(tmp_path / 'p.json', {'0': 'Mira'})
  before = commands.files_of(workdir)
  for command in (
      ('evaluate', f'--predictions={predictions}', f'--data={data}'),
      ('calibrate', f'--workdir={workdir}', f'--data={data}'),
      ('ensemble', f'--members={workdir},{tmp_path}', f'--data={data}',
       f'--output={tmp_path}/e'),
      ('ensemble', f'--members={workdir},{tmp_path}', f'--data={good}',
       f'--held_out={data}', f'--output={tmp_path}/e'),
      ('analyze', f'--evaluation={predictions}', f'--data={data}',
       f'--output={tmp_path}/a'),
      ('suite', f'--workdir={workdir}', f'--suite={suite}',
       f'--output={tmp_path}/s'),
      *(('train', f'--config={config}', f'--workdir={tmp_path}/new',
         f'--config.data.{name}={data}') for name in ('train', 'eval'))):
    assert message in last_line(*command), command
  if rows is PARTLY:
    assert message in last_line(
        'evaluate', f'--workdir={workdir}', f'--data={data}')
  assert commands.files_of(workdir) == before
  assert not (tmp_path / 'new').exists()


# --- folders


def evaluate(workdir, data):
  """Evaluates a run, and returns the lines on stderr."""
  result = commands.command('evaluate', f'--workdir={workdir}',
                            f'--data={data}')
  assert result.code == 0, result.err
  return result.err


def questions_of(folder):
  return [*json.loads((folder / 'predictions.json').read_text())]


def test_files_of_one_name_have_folders_of_their_own(
    workdir, tmp_path, monkeypatch):
  run = RunDirectory(workdir)
  paths = {}
  for count, place in enumerate(('one', 'two', 'three'), 1):
    (tmp_path / place).mkdir()
    paths[place] = examples.write(tmp_path / place / 'dev.json', [
        {**row, **ANSWER} for row in ROWS[:count]])
  assert 'go to' not in evaluate(workdir, paths['one'])
  first = workdir / 'eval' / 'dev'
  assert questions_of(first) == ['0']
  for place, count in (('two', 2), ('three', 3)):
    folder = run.evaluation(paths[place])
    assert folder.parent == first.parent and folder != first
    assert folder.name.startswith('dev-') and len(folder.name) == 10
    assert (f'{first} has the results of another data SPEC of this name; '
            f'the results of {paths[place]} go to {folder}') in evaluate(
                workdir, paths[place])
    assert len(questions_of(folder)) == count
  assert questions_of(first) == ['0']
  # Other spellings of a path are the path.
  monkeypatch.chdir(tmp_path / 'two')
  for spelling in ('dev.json', './dev.json', '../two/dev.json'):
    assert run.evaluation(spelling) == run.evaluation(paths['two'])
  assert run.evaluation('../one/dev.json') == first
  record = json.loads((first / 'data.json').read_text())
  assert record['data'] == record['absolute'] == paths['one']


@pytest.mark.parametrize('plain_first', [True, False])
def test_data_of_one_name_do_not_share_the_folder_of_a_decoding(
    tmp_path, plain_first):
  run = RunDirectory(tmp_path / 'run')
  stranger = run.path / 'eval' / 'dev-000000'  # of no evaluation
  stranger.mkdir(parents=True)
  if plain_first:
    run.record_evaluation('two/dev.json')
  folders = {data: run.record_evaluation(data, '.n_best-2')
             for data in ('one/dev.json', 'two/dev.json')}
  assert len({stranger, *folders.values()}) == 3
  assert run.evaluation('one/dev.json') != stranger
  assert run.evaluation('two/dev.json') != stranger
  assert all(run.evaluation(data, '.n_best-2') == folder
             for data, folder in folders.items())


def test_the_flags_that_choose_a_checkpoint_name_the_folder(tmp_path):
  run = RunDirectory(random_model.write_run(
      random_model.random_qa('shared'), tmp_path / 'run'))
  data = examples.write(tmp_path / 'dev.json', [{**ROWS[0], **ANSWER}])
  for flags, name in (
      (['--checkpoint=best'], 'dev'),
      (['--checkpoint=0', '--nocalibrated', '--decode.n_best=2'],
       'dev.n_best-2.checkpoint-0.calibrated-False')):
    result = commands.command('evaluate', f'--workdir={run.path}',
                              f'--data={data}', *flags)
    assert result.code == 0, result.err
    assert result.out.endswith(f'results: {run.path}/eval/{name}\n')
    assert json.loads((run.path / 'eval' / name / 'data.json').read_text()
                      )['step'] == 0


def test_an_evaluation_has_the_step_of_its_files(tmp_path):
  """One that is stopped leaves the files and the step of the one before."""
  run = RunDirectory(tmp_path / 'run')
  folder = run.record_evaluation('dev.json')
  assert run_directory.read_step(folder) is None
  run_directory.record_step(folder, 3)
  assert run.record_evaluation('./dev.json') == folder
  assert json.loads((folder / 'data.json').read_text()) == {
      'data': './dev.json', 'absolute': os.path.abspath('dev.json'),
      'relative_to_run': os.path.relpath('dev.json', run.path), 'step': 3}


def test_a_project_that_moved_as_a_whole_keeps_its_folders(
    tmp_path, monkeypatch):
  for place in ('one', 'two'):
    (tmp_path / 'a' / place).mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'a')
  folders = [RunDirectory(tmp_path / 'a/run').record_evaluation(
      f'{place}/dev.json').name for place in ('one', 'two')]
  (tmp_path / 'a').rename(tmp_path / 'b')
  monkeypatch.chdir(tmp_path / 'b')
  run = RunDirectory(tmp_path / 'b/run')
  assert [run.evaluation(f'{place}/dev.json').name
          for place in ('one', 'two')] == folders
  assert len({*folders, run.evaluation('three/dev.json').name}) == 3


def test_a_run_that_moved_alone_keeps_the_folders_of_its_data(tmp_path):
  data = [f'{tmp_path}/{place}/dev.json' for place in ('one', 'two')]
  run = RunDirectory(tmp_path / 'a/run')
  folders = [run.record_evaluation(path).name for path in data]
  (tmp_path / 'b/c').mkdir(parents=True)
  run.path.rename(tmp_path / 'b/c/run')
  moved = RunDirectory(tmp_path / 'b/c/run')
  assert [moved.evaluation(path).name for path in data] == folders
  assert len({*folders}) == 2


def test_an_evaluation_of_an_earlier_version_belongs_to_the_config(tmp_path):
  data = f'{tmp_path}/one/dev.json'
  run = RunDirectory(tmp_path / 'run')
  folder = run.path / 'eval' / 'dev'
  folder.mkdir(parents=True)
  assert run.evaluation(data) == folder  # no config: of any data
  examples.write(run.config_file, tiny.config(data={'eval': data}).to_dict())
  assert run.evaluation(data) == folder
  assert run.evaluation(f'{tmp_path}/two/dev.json') != folder
  examples.write(run.config_file, tiny.config(data={'eval': ''}).to_dict())
  assert run.evaluation(f'{tmp_path}/two/dev.json') == folder


def test_a_finished_run_records_what_it_was_evaluated_on(tmp_path):
  config = tiny.config(train={'num_steps': 1})
  train.train(config, tmp_path / 'run')
  folder = RunDirectory(tmp_path / 'run').evaluation(config.data.eval)
  record = json.loads((folder / 'data.json').read_text())
  assert (record['data'], record['step']) == (config.data.eval, 1)
  assert folder.name == run_directory.evaluation_name(config.data.eval)


@pytest.mark.parametrize(('spec', 'name'), [
    ('x/開発.json', '開発'), ('Prüfung 2.tsv', 'Prüfung_2'),
    ('परीक्षा.csv', 'परीक्षा'),
    ('x/dev (1).json', 'dev_1'), ('x/a(1).json+y/b (2).json', 'a_1_b_2'),
    ('a.json + synthetic(size=3)', 'a.json_synthetic_size_3'),
    ('文' * 90 + '.json', '文' * 66), ('😀.json', 'data'),
    ('a\ud800b.json', 'a_b')])
def test_names_of_every_script_are_names_of_folders(spec, name):
  assert run_directory.evaluation_name(spec) == name
