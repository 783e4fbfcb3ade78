"""The commands: their output, and one line for every mistake."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

from absl import app
import jax
import pytest

from experiments import cli
from qa_jax import config as config_lib
from qa_jax import config_comments
from qa_jax import errors
from qa_jax.data import sources
from qa_jax.export import hugging_face
from qa_jax.metrics import error_analysis
from qa_jax.runtime import console
from qa_jax.serving import service
from qa_jax.training import trainer
from tests.common import commands
from tests.common import examples
from tests.common import random_model
from tests.common import tiny

COMMANDS = sorted(p.stem
                  for p in (commands.ROOT / 'experiments').glob('[a-z]*.py')
                  if p.stem != 'cli')
TINY_BERT = commands.ROOT / 'tests' / 'golden' / 'tiny_bert'

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

app.define_help_flags()  # once: its flags are no command's


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> pathlib.Path:
  """Writes a config file of four steps."""
  path = tmp_path_factory.mktemp('configs') / 'tiny_config.py'
  fields = tiny.config(train={'num_steps': 4},
                       data={
                           'max_length': 96,
                           'buckets': (48,)
                       })
  path.write_text(commands.CONFIG.format(fields=dataclasses.asdict(fields)))
  return path


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory) -> tuple[pathlib.Path, commands.Result]:
  """Trains a run and returns it with the output of the command."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  return workdir, commands.command('train', f'--config={config}',
                                   f'--workdir={workdir}')


@pytest.fixture(scope='module')
def run(trained) -> pathlib.Path:
  return trained[0]


@pytest.fixture
def data(tmp_path) -> str:
  """Writes a file of three questions, one of them unanswerable."""
  return examples.write(tmp_path / 'dev.json', examples.SQUAD)


# Commands that succeed.


REQUIRED = {  # command → its required flags
    'analyze': 'data evaluation', 'benchmark': 'suite',
    'calibrate': 'data workdir', 'convert_weights': 'output workdir',
    'demo': 'workdir', 'ensemble': 'data output workdir', 'evaluate': 'data',
    'export': 'output workdir', 'inspect_spans': 'context output workdir',
    'predict': 'workdir', 'report': 'workdir', 'serve': 'workdir',
    'suite': 'suite workdir', 'sweep': 'config workdir', 'train': 'config'}


def help_entries(text: str) -> dict[str, str]:
  """Returns flag or field → its text, of a text of --help."""
  entries: dict[str, str] = {}
  for line in text.splitlines():
    start = re.match(r'  (--)?([a-z][\w.]*)(=\S+)?(  .*|$)', line)
    if start:
      name = start[2]
      entries[name] = start[4].strip()
    elif line.startswith(' ' * cli.TEXT_COLUMN):
      entries[name] = f'{entries[name]} {line.strip()}'.strip()
  return entries


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_short_and_marks_required_flags(name):
  result = commands.command(name, '--help')
  assert result.code == 0 and not result.err
  lines = result.out.splitlines()
  assert len(lines) < (175 if 'Config fields' in result.out else 70)
  assert max(map(len, lines)) <= 80
  assert f'python -m experiments.{name}' in result.out
  marked = [flag for flag, text in help_entries(result.out).items()
            if text.endswith('(required)')]
  assert marked == sorted(REQUIRED[name].split() + (
      ['question'] if name == 'inspect_spans' else []))


@pytest.mark.parametrize('name', sorted(REQUIRED))
def test_a_required_flag_that_is_missing_is_one_line(name):
  flag = REQUIRED[name].split()
  assert re.search(rf'--({"|".join(flag)}) is needed \(\w.*\w\); see --help',
                   commands.refusal(name))


def test_help_of_predict_has_every_decode_field_with_its_meaning():
  entries = help_entries(commands.command('predict', '--help').out)
  assert entries['n_best'].endswith('[5]')
  for field in dataclasses.fields(config_lib.Decode):
    text = entries[f'decode.{field.name}']
    assert text == config_comments.phrase(f'decode.{field.name}')
  assert 'two_stage' in entries['decode.search']


def test_help_of_train_has_every_field_with_the_values_of_the_config(config):
  plain = help_entries(commands.command('train', '--help').out)
  given = help_entries(commands.command(
      'train', f'--config={config}', '--config.model.head=mlp', '--help').out)
  fields = [
      f'{group.name}.{field.name}' if dataclasses.is_dataclass(group.type)
      else group.name
      for group in dataclasses.fields(config_lib.Config) for field in (
          dataclasses.fields(group.type)
          if dataclasses.is_dataclass(group.type) else [group])]
  assert {*fields} <= {*plain}
  assert plain['train.num_steps'].endswith(' [0]')
  assert given['train.num_steps'].endswith(' [4]')
  assert plain['model.head'].endswith(" ['independent']")
  assert given['model.head'].endswith(" ['mlp']")
  assert given['optim.clip_norm'] == (
      'Norm to which a longer gradient is scaled down. 0 turns clipping off '
      '[1.0]')
  for name, end in (
      ('parallel.num_devices', 'together. 0 takes all of them [0]'),
      ('model.hidden_size', '0 takes it from preset or init_from [0]'),
      ('model.init_from', "'' trains from scratch ['']"),
      ('model.position_base', 'Vaswani et al. (2017) have 10000. 0 draws them '
       'as the other weights; else at least 1 [0.0]'),
      ('data.buckets', "() is the platform's default, max_length alone on "
       'a CPU, else four lengths [()]'),
      ('data.packing', "packed rows, else rows ['auto']")):
    assert plain[name].endswith(end)


@pytest.mark.parametrize(('argv', 'code', 'message'), [
    (['--config=nowhere.py', '--help'], 1, 'No such file'),
    (['--config={config}', '--config.optim.learning_rat=1', '--help'], 1,
     'did you mean')])
def test_help_of_a_bad_config_is_one_line(config, argv, code, message):
  assert message in commands.refusal(
      'train', *(a.format(config=config) for a in argv), code=code)


def test_help_and_the_list_of_commands_load_nothing_slow():
  """An import of jax, optuna or matplotlib takes longer than the answer."""
  code = """
import contextlib, io, runpy, sys
from absl import app, flags
for name in sys.argv[1:]:
  sys.argv = [name, '--help', '--config=configs/sweep_rates.py:tiny']
  known = set(flags.FLAGS)
  with contextlib.redirect_stdout(io.StringIO()):
    try:
      runpy.run_module(f'experiments.{name}', run_name='__main__',
                       alter_sys=True)
    except SystemExit as e:
      assert not e.code, (name, e.code)
  flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
sys.argv = ['experiments', '--help']
runpy.run_module('experiments', run_name='__main__')
print('loaded', *{m.partition('.')[0] for m in sys.modules})
"""
  done = subprocess.run([sys.executable, '-c', code, *COMMANDS],
                        cwd=commands.ROOT, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr
  *listed, loaded = done.stdout.splitlines()
  assert not {'jax', 'flax', 'optuna', 'matplotlib', 'rich', 'scipy',
              'tokenizers', 'starlette'} & {*loaded.split()}
  assert [line.split()[0] for line in listed[1:]] == COMMANDS
  assert all(line.endswith('.') for line in listed[1:])


@pytest.mark.parametrize(('argv', 'message'), [
    (['train', '--config=a b'],
     "use python -m experiments.train '--config=a b'"),
    (['trian'], "unknown command 'trian'; did you mean 'train'?"),
    (['--config=a'], "unknown command '--config=a'; known: analyze, ")])
def test_a_space_in_place_of_the_dot_is_a_mistake(argv, message, capsys,
                                                  monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['experiments', *argv])
  with pytest.raises(SystemExit) as e:
    runpy.run_module('experiments', run_name='__main__')
  out, err = capsys.readouterr()
  assert (e.value.code, out) == (2, '') and err.count('\n') == 1
  assert err.startswith(f'error: {message}')


@pytest.mark.parametrize('argv', [
    ['experiments'], ['experiments.train', '--help'],
    ['experiments.train', '--config=configs/quickstart.py', '--print_config']])
def test_a_closed_pipe_ends_a_command_quietly(argv):
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run([sys.executable, '-m', *argv], cwd=commands.ROOT,
                        stdout=writer, stderr=subprocess.PIPE, text=True,
                        check=False)
  os.close(writer)
  assert (done.returncode, done.stderr) == (141, '')


def test_a_stream_that_is_closed_takes_no_line_of_the_other(
    monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stderr', None)  # as with `2>&-`
  cli.prepare_streams()
  console.say('a note')
  print('result')
  assert capsys.readouterr().out == 'result\n'
  sys.stderr.close()


@pytest.mark.parametrize(('flags', 'kept', 'dropped'), [
    (['--config.train.num_epochs=2'], 'num_epochs', 'num_steps'),
    (['--config.train.num_epochs=2.0', '--config.train.num_steps=0'],
     'num_epochs', None)])
def test_the_length_on_the_command_line_replaces_that_of_the_config(
    config, flags, kept, dropped):
  result = commands.command('train', f'--config={config}', '--print_config',
                            *flags)
  assert result.code == 0, result.err
  assert "'num_epochs': 2.0" in result.out and "'num_steps': 0" in result.out
  said = re.findall(
      r'--config\.train\.(\w+)=\S+ replaces config\.train\.(\w+)=4 of',
      result.err)
  assert said == ([(kept, dropped)] if dropped else [])


def test_both_lengths_on_the_command_line_are_refused(config):
  assert 'set one of' in commands.refusal(
      'train', f'--config={config}', '--config.train.num_epochs=2',
      '--config.train.num_steps=3', '--print_config')


def test_print_config_is_the_resolved_config(config, tmp_path):
  result = commands.command('train', f'--config={config}', '--print_config',
                            '--config.optim.learning_rate=0.5',
                            '--coordinator=no.such.host.invalid:1',
                            '--num_processes=2', '--process_index=1',
                            f'--workdir={tmp_path}/run')
  # It waits for no other process.
  assert result.code == 0 and not result.err
  assert "'learning_rate': 0.5" in result.out
  assert "'warmup_fraction': 0.1" in result.out
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('flag', 'message'), [
    ('model.head=mlp(foo=3)', "head 'mlp' has no argument 'foo'"),
    ('model.head=biaffine', "it does not fit config.model.head='biaffine'"),
    ('model.encoder=bart', "unknown encoder 'bart'"),
    ('objective=span_softmax(max=3)', "no argument 'max'"),
    ('decode.search=top_k(kk=3)', "no argument 'kk'; did you mean 'k'"),
    ('decode.null_rule=classifier', 'needs a null logit'),
    ('data.train=synthetic(sise=3)', "did you mean 'size'"),
    ('data.eval=nowhere.json+sythetic', "did you mean 'synthetic'")])
def test_print_config_refuses_wrong_spec_strings(config, flag, message):
  assert message in commands.refusal(
      'train', f'--config={config}', '--print_config', f'--config.{flag}')


def test_print_config_reads_no_files(config):
  result = commands.command(
      'train', f'--config={config}', '--print_config',
      '--config.model.init_from=no/hub-id', '--config.data.train=nowhere.json')
  assert result.code == 0 and "'train': 'nowhere.json'" in result.out


@pytest.mark.parametrize(('spec', 'message'), [
    ('nowhere.json', 'nowhere.json: No such file'),
    ('synthetic(siz=3)', "data source 'synthetic' has no argument 'siz'"),
    ('synthetic+sythetic', "did you mean 'synthetic'")])
def test_a_wrong_evaluation_source_is_refused_before_data_are_read(
    config, tmp_path, monkeypatch, spec, message):
  monkeypatch.setitem(sources.SOURCES, 'synthetic', lambda *, size=3: 1 / 0)
  assert message in commands.refusal(
      'train', f'--config={config}', f'--workdir={tmp_path}/run',
      '--config.data.train=synthetic(size=3)', f'--config.data.eval={spec}')


def test_dry_run_prints_sizes_and_trains_nothing(config, tmp_path):
  result = commands.command('train', f'--config={config}', '--dry_run',
                            f'--workdir={tmp_path}/run')
  assert result.code == 0 and result.err.startswith('dry run: ')
  lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
  assert lines['batch_shapes'] == '[[8, 48], [8, 96]]'
  assert lines['steps'] == '4' and lines['examples'] == '36'
  assert int(lines['parameters']) > 5000
  assert float(lines['state_megabytes']) > 0
  memory, _, shape = lines['activation_megabytes'].partition(' a device, for ')
  assert float(memory) > 0 and shape == '[8, 96]'
  assert re.match(r'\d.* for \[8, 96\]$', lines['seconds_per_step'])
  assert 'an estimate from 3 timed steps' in lines['eta']
  assert not (tmp_path / 'run').exists()


def test_training_ends_with_metrics_on_stdout(trained):
  workdir, result = trained
  assert result.code == 0
  folder = next(workdir.glob('eval/*'))
  stored = json.loads((folder / 'metrics.json').read_text())
  scores, results, *following = result.out.splitlines()
  assert scores == (f'EM {stored["exact_match"]:.2f}  F1 {stored["f1"]:.2f}'
                    '  on 12 questions')
  assert results == f'results: {folder}'
  assert following[0].startswith('next: python -m experiments.predict ')
  assert all(f'--workdir={workdir}' in line for line in following)


def test_the_page_on_training_has_every_value_of_a_row(run):
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'training.md'
  table = page.read_text().split('| value | meaning |')[1].split('\n\n')[0]
  values = {name for row in table.splitlines()[2:]
            for name in re.findall(r'`(\w+)`', row.split(' | ')[0])}
  rows = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  row = next(row for row in rows if row['split'] == 'train')
  assert values == row.keys() - {'step', 'split'}


def test_finished_run_says_so_and_is_left_alone(config, trained):
  workdir, first = trained
  before = commands.files_of(workdir)
  again = commands.command('train', f'--config={config}',
                           f'--workdir={workdir}')
  assert (again.code, again.out) == (0, first.out)
  assert 'complete at step 4' in again.err
  assert commands.files_of(workdir) == before


def test_evaluate_writes_predictions_that_score_the_same(run, data, tmp_path):
  by_model = commands.command('evaluate', f'--workdir={run}', f'--data={data}',
                              f'--output={tmp_path}/out')
  assert by_model.code == 0
  assert re.search(r'\d windows of 3 questions (made|from the cache) in \d',
                   by_model.err)
  stored = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
  assert stored['total'] == 3
  by_file = commands.command('evaluate', f'--data={data}',
                             f'--predictions={tmp_path}/out/predictions.json')
  assert (by_file.code, by_file.err) == (0, '')
  of_model, of_file = (dict(line.split() for line in out.splitlines())
                       for out in (by_model.out.replace(': ', ' '),
                                   by_file.out))
  assert of_model.pop('results') == f'{tmp_path}/out'
  assert of_model.items() <= of_file.items()
  assert {'exact_match', 'f1', 'total'} <= of_model.keys()


def test_evaluate_goes_to_a_folder_of_the_run_named_after_the_data(run, data):
  assert commands.command('evaluate', f'--workdir={run}',
                          f'--data={data}').code == 0
  assert (run / 'eval' / 'dev' / 'metrics.json').is_file()


def test_evaluate_leaves_the_evaluations_of_a_run_to_the_run(
    run, data, tmp_path):
  commands.command('evaluate', f'--workdir={run}', f'--data={data}')
  folder = run / 'eval' / 'dev'
  before = commands.files_of(folder)
  for more in f'--workdir={run}', f'--predictions={folder}/predictions.json':
    assert f'--output={folder} is the evaluation of' in commands.refusal(
        'evaluate', more, f'--data={data}', f'--output={folder}')
  assert commands.files_of(folder) == before
  assert '--output is empty' in commands.refusal(
      'evaluate', f'--workdir={run}', f'--data={data}', '--output=')


def test_scores_of_other_questions_are_said(tmp_path):
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps({
      'id': name, 'question': 'Who?', 'context': 'Mira',
      'answers': [], 'is_impossible': True}) + '\n' for name in 'ab'))
  (tmp_path / 'answers').write_text('{"a": "", "b": ""}')
  (tmp_path / 'scores').write_text('{"a": 0.5, "b": 1, "c": 7}')
  said = commands.command(
      'evaluate', f'--data={data}', f'--predictions={tmp_path}/answers',
      f'--na_probs={tmp_path}/scores')
  assert said.code == 0 and 'no probabilities' not in said.err
  assert 'scores has 1 scores of questions that the data does' in said.err


def test_evaluate_says_that_it_keeps_no_file_of_a_model_that_is_no_run(
    run, data, tmp_path):
  exported, kept = tmp_path / 'hf', tmp_path / 'kept'
  assert commands.command('convert_weights', f'--workdir={run}',
                          f'--output={exported}').code == 0
  before = commands.files_of(tmp_path)
  argv = 'evaluate', f'--workdir={exported}', f'--data={data}'
  said = commands.command(*argv)
  assert said.code == 0 and commands.files_of(tmp_path) == before
  assert f'{exported} is no run, so no file is written; --output' in said.err
  silent = commands.command(*argv, f'--output={kept}')
  assert 'no file' not in silent.err and (kept / 'predictions.json').is_file()


@pytest.mark.parametrize(('module', 'function', 'argv', 'given'), [
    (hugging_face, 'read_source',
     ['convert_weights', '--workdir=w', '--output=o'],
     ('w', 'best', {'calibrated': True})),
    (hugging_face, 'read_source',
     ['convert_weights', '--workdir=w', '--output=o', '--nocalibrated',
      '--checkpoint=7'], ('w', '7', {'calibrated': False})),
    (error_analysis, 'compare_predictions',
     ['analyze', '--data=dev.json', '--evaluation=a.json', '--against=b.json',
      '--output=o', '--seed=7'], ({'seed': 7},)),
    (error_analysis, 'analyse_errors',
     ['analyze', '--data=dev.json', '--evaluation=a.json', '--output=o',
      '--seed=7'], ({'seed': 7, 'na_scores': None, 'held_out': None},))])
def test_flags_reach_the_function_of_the_command(
    tmp_path, monkeypatch, module, function, argv, given):
  monkeypatch.chdir(tmp_path)
  examples.write(pathlib.Path('dev.json'), examples.SQUAD)
  for name in 'ab':
    pathlib.Path(f'{name}.json').write_text(json.dumps(
        {e.id: 'x' for e in sources.load_answered('dev.json')}))
  got = []

  def spy(*args, **kwargs):
    got.extend([*args, kwargs])
    raise errors.UserError('enough')

  monkeypatch.setattr(module, function, spy)
  assert commands.refusal(*argv) == 'error: enough\n'
  assert tuple(got[-len(given):]) == given


DECODED = {  # flag of decoding → what every span of the answer fulfils
    '--decode.max_answer_length=1': lambda rows: all(
        len(row['text'].split()) <= 1 for a in rows for row in a['n_best']),
    '--decode.n_best=2': lambda rows: all(len(a['n_best']) == 2 for a in rows),
    '--n_best=3': lambda rows: all(len(a['n_best']) == 3 for a in rows),
    '--decode.null_threshold=-1e9': lambda rows: all(
        a['text'] == '' for a in rows),
    '--decode.null_rule=never': lambda rows: all(a['text'] for a in rows)}


@pytest.mark.parametrize('flag', DECODED)
def test_predict_decodes_as_the_flags_say(run, tmp_path, flag):
  inputs, output = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  inputs.write_text(''.join(json.dumps(
      {'question': question, 'context': examples.CONTEXT}) + '\n'
      for question in ('Who built it?', 'What did Mira build?')))
  result = commands.command('predict', f'--workdir={run}', f'--input={inputs}',
                            f'--output={output}', flag)
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert len(rows) == 2 and DECODED[flag](rows)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--decode.n_best=2', '--n_best=3'], '--n_best=3 and --decode.n_best=2'),
    (['--decode.max_answer_length=0'], 'max_answer_length=0 must be in 1'),
    (['--decode.search=two_stag'], "did you mean 'two_stage'"),
    (['--decode.null_rule=nevr'], "did you mean 'never'"),
    (['--max_length=10000'], 'max_length=10000 must be in'),
    (['--max_length=1000'], "max_length=1000 exceeds the encoder's"),
    (['--window_overlap=96'], 'window_overlap 96 leaves no step'),
    (['--max_length=16'], 'raise max_length above ')])
def test_decoding_that_does_not_fit_is_one_line(run, flags, message):
  assert message in commands.refusal(
      'predict', f'--workdir={run}', '--question=Who?', '--context=Mira',
      *flags)


def test_a_run_that_is_decoded_otherwise_keeps_its_evaluation(run, data):
  argv = ('evaluate', f'--workdir={run}', f'--data={data}')
  plain = commands.command(*argv)
  assert plain.code == 0, plain.err
  base = pathlib.Path(plain.out.splitlines()[-1].removeprefix('results: '))
  before = commands.files_of(base)
  result = commands.command(*argv, '--decode.null_rule=never',
                            '--decode.search=top_k(k=2)')
  assert result.code == 0, result.err
  folder = base.with_name(f'{base.name}.search-top_k_k_2_.null_rule-never')
  assert result.out.splitlines()[-1] == f'results: {folder}'
  answers = json.loads((folder / 'predictions.json').read_text())
  assert all(answers.values())
  assert commands.files_of(base) == before


@pytest.mark.parametrize('argv', [
    ['--predictions=x', '--decode.n_best=2'], ['--audit', '--decode.n_best=2'],
    ['--predictions=x', '--max_length=64'], ['--predictions=x',
                                             '--checkpoint=last'],
    ['--predictions=x', '--nocalibrated'], ['--audit', '--checkpoint=3'],
    ['--audit', '--num_processes=2'], ['--audit', '--process_index=1'],
    ['--predictions=x', '--coordinator=h:1']])
def test_flags_of_a_model_without_one_are_refused(data, argv):
  name = argv[1].partition('=')[0].removeprefix('--no')
  message = commands.refusal('evaluate', f'--data={data}', *argv)
  assert name in message and 'leave' in message


def test_log_odds_have_the_threshold_of_their_predictions(tmp_path):
  """At the threshold of the run, its own files score as the run did."""
  data = examples.write(tmp_path / 'dev.json', [
      {'id': key, 'question': 'Who?', 'context': 'Ada met Bob.',
       'answers': [{'text': 'Ada', 'answer_start': 0}] if key == 'a' else [],
       'is_impossible': key != 'a'} for key in 'abc'])
  predictions = examples.write(  # at threshold 3
      tmp_path / 'predictions.json', {'a': 'Ada', 'b': 'Bob', 'c': ''})
  odds = examples.write(
      tmp_path / 'na_probs.json', {'a': 2.0, 'b': 0.5, 'c': 3.5})
  argv = [f'--data={data}', f'--predictions={predictions}']
  exact = {}
  for flags in ([], ['--na_threshold=3']):
    result = commands.command('evaluate', *argv, f'--na_probs={odds}', *flags)
    assert result.code == 0, result.err
    exact[bool(flags)] = result.out.splitlines()[0].split()[1]
    assert ('holds no probabilities' in result.err) == (not flags)
  assert exact == {True: '66.6667', False: '33.3333'}
  assert 'is not used' not in result.err
  answerable = examples.write(tmp_path / 'answerable.json', [
      {'id': 'a', 'question': 'Who?', 'context': 'Ada met Bob.',
       'answers': [{'text': 'Ada', 'answer_start': 0}]}])
  result = commands.command(
      'evaluate', f'--data={answerable}', f'--predictions={predictions}',
      f'--na_probs={odds}', '--na_threshold=0')
  assert result.out.split()[1] == '100.0000'
  assert '--na_probs is not used: all questions have answers' in result.err
  assert '--na_threshold goes with --na_probs' in commands.refusal(
      'evaluate', *argv, '--na_threshold=3')
  assert '--na_threshold=nan' in commands.refusal(
      'evaluate', *argv, f'--na_probs={odds}', '--na_threshold=nan')


@pytest.mark.parametrize(('command', 'flags'), [
    ('train', ['--config=configs/quickstart.py', '--workdir=LONG']),
    ('predict', ['--question=a', '--context=b', '--workdir=LONG']),
    ('predict', ['--input=QUESTIONS', '--output=LONG', '--workdir=x']),
    ('report', ['--workdir=LONG']), ('calibrate', ['--workdir=LONG',
                                                  '--data=x']),
    ('analyze', ['--evaluation=LONG', '--data=x'])])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, command, flags):
  questions = examples.write(
      tmp_path / 'in.jsonl', {'question': 'Who?', 'context': 'Ada.'})
  name = f'{tmp_path}/{"x" * 300}'
  assert 'File name too long' in commands.refusal(command, *(
      flag.replace('LONG', name).replace('QUESTIONS', str(questions))
      for flag in flags))


def test_an_audit_takes_the_length_of_windows_and_no_threshold(data):
  assert '--na_threshold goes with --na_probs' in commands.refusal(
      'evaluate', f'--data={data}', '--audit', '--na_threshold=0.5')
  assert 'max_length=3 must be in' in commands.refusal(
      'evaluate', f'--data={data}', '--audit', '--max_length=3')


def test_an_old_name_of_a_flag_sets_the_new_one(tmp_path):
  assert f'{tmp_path}/none is not a directory with' in commands.refusal(
      'convert_weights', f'--source={tmp_path}/none', f'--target={tmp_path}/t')


def test_defaults_of_serve_are_the_limits_of_the_service():
  entries = help_entries(commands.command('serve', '--help').out)
  limits = service.Limits()
  for flag, value in (
      ('max_batch', limits.batch), ('max_waiting', limits.waiting),
      ('max_seconds', limits.seconds), ('max_bytes', limits.body_bytes),
      ('max_windows', limits.windows)):
    assert entries[flag].endswith(f'[{value}]')


def test_an_audit_shows_where_an_answer_was_located(tmp_path):
  (tmp_path / 'data.jsonl').write_text(json.dumps({
      'question': 'Who?', 'context': f'{"x" * 99} Bob {"y" * 99}',
      'answers': ['Bob']}))
  result = commands.command(
      'evaluate', '--audit',
      f'--data=squad_json(path="{tmp_path}/data.jsonl", locate_answers=True)')
  assert f"'context': '{'x' * 19} Bob {'y' * 19}'" in result.out


def test_an_audit_counts_gold_spans_by_fate_and_shows_some(tmp_path):
  answers = [('Ada', 0), ('Ada', 3), ('da', 1), ('Eve', 0)]
  (tmp_path / 'data.json').write_text(
      json.dumps({
          'version':
              '1.1',
          'data': [{
              'title':
                  'T',
              'paragraphs': [{
                  'context':
                      'Ada met Bob.',
                  'qas': [{
                      'id': f'q{n}',
                      'question': 'Who?',
                      'answers': [{
                          'text': text,
                          'answer_start': start
                      }]
                  } for n, (text, start) in enumerate(answers)]
              }]
          }]
      }))
  result = commands.command('evaluate', '--audit',
                            f'--data={tmp_path}/data.json',
                            f'--output={tmp_path}')
  assert result.code == 0, result.err
  for fate, share in (('exact', 25), ('repaired', 25), ('widened', 25),
                      ('unrecoverable', 25), ('no_window', 0)):
    assert re.search(rf'^{fate} +\d +{share}\.00 %', result.out, re.M), fate
  saved = json.loads((tmp_path / 'alignment.json').read_text())
  assert saved['counts']['exact'] == 1
  assert [row['id'] for row in saved['examples']['repaired']] == ['q1']
  assert "q3: [{'text': 'Eve', 'answer_start': 0, 'context': 'Ada met" in (
      result.out)


def test_scoring_a_file_needs_no_jax(data, tmp_path):
  predictions = tmp_path / 'predictions.json'
  predictions.write_text('{"who": "mira", "what": "ship", "when": ""}')
  result = subprocess.run([
      sys.executable, '-c', 'import runpy, sys; sys.modules["jax"] = None; '
      'runpy.run_module("experiments.evaluate", run_name="__main__")',
      f'--data={data}', f'--predictions={predictions}',
      f'--output={tmp_path}/new/out'
  ],
                          cwd=commands.ROOT,
                          capture_output=True,
                          text=True,
                          check=False)
  assert (result.returncode, result.stderr) == (0, '')
  assert f'{"exact_match":28} 66.6667' in result.stdout.splitlines()
  stored = json.loads((tmp_path / 'new/out/metrics.json').read_text())
  assert stored['exact_match'] == pytest.approx(200 / 3)


def test_demo_prints_scores_answers_and_a_command_that_answers_again(run):
  result = commands.command('demo', f'--workdir={run}')
  assert result.code == 0
  assert 'held-out: EM ' in result.out
  answer = re.search('  →  (.*)', result.out)[1]
  command = next(line for line in result.out.splitlines()
                 if 'experiments.predict' in line)
  again = commands.command('predict', *shlex.split(command)[3:])
  assert (again.code, again.out.splitlines()[0]) == (0, answer)
  for name in ('learning_curve', 'two_questions'):
    assert (run / 'plots' / f'{name}.png').is_file()


def test_demo_asks_a_question_that_has_an_answer(run, tmp_path):
  copy = shutil.copytree(run, tmp_path / 'run')
  rows = [{'question': 'When?', 'context': 'Never.', 'is_impossible': True},
          {'question': 'Who?', 'context': 'Mira built it.', 'answers': [
              {'text': 'Mira', 'answer_start': 0}]},
          {'question': 'Where?', 'context': 'In Oslo.', 'answers': [
              {'text': 'Oslo', 'answer_start': 3}]}]
  config = json.loads((copy / 'config.json').read_text())
  for some, passage in (rows, 'Mira built it.'), (rows[:1], None):
    data = examples.write(tmp_path / f'{len(some)}.json', some)
    config['data']['eval'] = str(data)
    (copy / 'config.json').write_text(json.dumps(config))
    argv = [f'--workdir={copy}']
    assert commands.command('evaluate', *argv, f'--data={data}').code == 0
    if passage:
      result = commands.command('demo', *argv)
      assert result.code == 0 and f'passage:  {passage}\n' in result.out
      assert re.findall('(.*)  →  .', result.out) == ['Who?']
    else:
      assert 'has an answer to show' in commands.refusal('demo', *argv)


def test_demo_of_a_run_without_held_out_data_is_one_line(tmp_path):
  qa = random_model.random_qa('independent')
  random_model.write_run(dataclasses.replace(qa, config=config_lib.check_config(
      config_lib.override(qa.config.to_dict(), {'data.eval': ''}))), tmp_path)
  assert f'{tmp_path}: config.data.eval is empty' in commands.refusal(
      'demo', f'--workdir={tmp_path}')


@pytest.mark.parametrize('steps', ['3', '3:3', 'a:5', '3:b'])
def test_profile_steps_that_are_no_range_are_one_line(config, tmp_path, steps):
  assert f'--profile_steps={steps}: expected FIRST:END' in commands.refusal(
      'train', f'--config={config}', f'--workdir={tmp_path}/run',
      f'--profile_steps={steps}')


def test_predict_answers_one_question(run):
  result = commands.command('predict', f'--workdir={run}',
                            '--question=Who built it?',
                            f'--context={examples.CONTEXT}', '--n_best=3',
                            '--decode.null_rule=never')
  assert (result.code, result.err) == (0, '')
  answer, *candidates, null = result.out.splitlines()
  assert len(candidates) == 3 and null.endswith('(null)')
  assert answer == re.search('"(.*)"', candidates[0])[1] in examples.CONTEXT


def test_predict_shows_candidates_as_they_are_written(run):
  context = 'Où? À Müñchén, à l’été.'
  result = commands.command('predict', f'--workdir={run}', '--question=Où?',
                            f'--context={context}', '--n_best=9',
                            '--decode.null_threshold=-1e9')
  assert result.out.startswith('(no answer)\n')
  shown = [text for line in result.out.splitlines()
           for text in re.findall(r'"(.*)"', line)]
  assert len(shown) == 9 and all(text in context for text in shown)
  assert any(not text.isascii() for text in shown)


ODD_QUESTIONS = [{
    'id': 'plain',
    'question': 'Who?',
    'context': 'Mira built it.'
}, {
    'question': 'No id?',
    'context': 'Mira built it.'
}, {
    'id': 7,
    'question': '',
    'context': 'Mira built it.'
}, {
    'id': 'no context',
    'question': 'Who?',
    'context': ''
}, {
    'id': 'blank',
    'question': ' \n',
    'context': ' \t\n'
}, {
    'id': '400 tokens',
    'question': 'who ' * 400,
    'context': 'Mira built it.'
}, {
    'id': 'controls',
    'question': 'Wh\0o?',
    'context': '\0Mi\0ra \x7f\x01'
}, {
    'id': 'emoji',
    'question': '👩\u200d🚀?',
    'context': '東京で👩\u200d🚀が'
}, {
    'id': 'special',
    'question': '[SEP]',
    'context': '[CLS] [PAD] Mira'
}, {
    'id': 'long word',
    'question': 'Who?',
    'context': 'x' * 5000
}, {
    'id': '1 MB',
    'question': 'Who?',
    'context': 'Mira built the Osprey. ' * 45_000
}]


def test_predict_answers_every_line_in_order(run, tmp_path):
  inputs, output = tmp_path / 'in.jsonl', tmp_path / 'new' / 'out.jsonl'
  inputs.write_text('\n\n'.join(map(json.dumps, ODD_QUESTIONS)) + '\n')
  result = commands.command('predict', f'--workdir={run}', f'--input={inputs}',
                            f'--output={output}')
  assert result.code == 0, result
  assert result.out == f'{len(ODD_QUESTIONS)} answers in {output}\n'
  assert f'windows of {len(ODD_QUESTIONS)} questions made in ' in result.err
  answers = [json.loads(line) for line in output.read_text().splitlines()]
  assert [a.get('id') for a in answers] == [q.get('id') for q in ODD_QUESTIONS]
  for question, answer in zip(ODD_QUESTIONS, answers, strict=True):
    for span in (answer, *answer['n_best']):
      assert question['context'][span['start']:span['end']] == span['text']
    assert bool(answer['n_best']) == bool(question['context'].strip())


@pytest.mark.parametrize(('question', 'context'), [('', 'Mira built it.'),
                                                   ('Who?', ''), ('', '')])
def test_empty_question_or_context_is_answered(run, question, context):
  result = commands.command('predict', f'--workdir={run}',
                            f'--question={question}', f'--context={context}')
  assert (result.code, result.err) == (0, '')
  assert context or result.out.startswith('(no answer)\n')


def test_odd_questions_are_evaluated_too(run, tmp_path):
  odd = examples.write(
      tmp_path / 'odd.json', {
          'data': [{
              'paragraphs': [{
                  'context':
                      context,
                  'qas': [{
                      'id': f'{i}',
                      'question': question,
                      'is_impossible': True
                  }]
              }]
          } for i, (question, context) in enumerate([(
              'who ' * 400, 'Mira'), ('', 'Mira'), ('Who?', ''), ('', '')])]
      })
  result = commands.command('evaluate', f'--workdir={run}', f'--data={odd}')
  assert result.code == 0
  assert f'{"no_answer_total":28} 4' in result.out.splitlines()


def test_output_is_escaped_where_the_terminal_lacks_its_characters():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.train', '--print_config',
       '--config=configs/quickstart.py', '--config.data.train=東京.json'],
      cwd=commands.ROOT, env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
      capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  assert r"'train': '\u6771\u4eac.json'" in done.stdout.decode('ascii')


# Refusals: flags.


@pytest.mark.parametrize(('name', 'argv', 'message'), [
    ('train', ['--wrkdir=x'], "unknown flag --wrkdir; did you mean 'workdir'?"),
    ('train', ['--cofig.optim.learning_rate=1'],
     "did you mean 'config.optim.learning_rate'"),
    ('train', ['--cofig.x.y.z=1'], "did you mean 'config'"),
    ('evaluate', ['--decode.n_bst=1'], "did you mean 'decode.n_best' or"),
    ('train', ['--dry_run=maybe'], 'dry_run=maybe: expected true or false'),
    *(('train', ['--config=configs/quickstart.py', f'--config.{flag}'],
       f'{flag}: expected {kind}') for flag, kind in (
           ('train.num_steps=a', 'an integer'), ('optim.eps=a', 'a number'),
           ('optim.freeze_encoder=a', 'true or false'))),
    ('train', ['--workdir'], 'Missing value for flag --workdir'),
    ('train', ['stray'], "unexpected argument 'stray'"),
    ('train', ['workdir=x'], "did you mean 'workdir'"),
    ('evaluate', ['--dta=x'], "did you mean 'data'?"),
    ('evaluate', ['--data=x', 'y'], "unexpected argument 'y'"),
    ('predict', ['--n_best=many'], '--n_best=many'),
    ('predict', ['--config=x'], 'unknown flag --config'),
    ('predict', ['--config.decode.n_best=4'],
     "did you mean 'decode.n_best'?"),
    ('train', ['--decode.null_rule=never'], "'config.decode.null_rule'?"),
    ('sweep', ['--batch_size=3'], "did you mean 'config.train.batch_size'?"),
    ('train', ['--seed=3'], "did you mean 'config.seed'?"),
    ('demo', ['--wordkir=x'], "did you mean 'workdir'?")
])
def test_bad_flag_is_one_line(name, argv, message):
  assert message in commands.refusal(name, *argv, code=2)


@pytest.mark.parametrize(('name', 'argv', 'message'), [
    ('train', [], '--config is needed'),
    ('train', ['--config={config}'], '--workdir is needed'),
    ('train', ['--config={config}', '--workdir='], '--workdir is needed'),
    ('evaluate', ['--workdir=x'], '--data is needed'),
    ('evaluate', ['--data=x'], 'give one of --workdir and --predictions'),
    ('evaluate', ['--data=x', '--workdir=y', '--predictions=z'], 'give one of'),
    ('evaluate', ['--data=x', '--workdir=y', '--na_probs=z'
                 ], '--na_probs goes with --predictions'),
    ('predict', ['--question=q', '--context=c'], '--workdir is needed'),
    ('predict', ['--workdir={run}'], 'give --question and --context, or'),
    ('predict', ['--workdir={run}', '--question=q'], 'give --question and'),
    ('predict', ['--workdir={run}', '--input=x'], 'give --question and'),
    ('predict', ['--workdir={run}', '--input=x', '--output=y', '--context=c'
                ], 'give --question and'),
    ('predict', [
        '--workdir={run}', '--question=q', '--context=c', '--n_best=0'
    ], 'n_best=0 must be in 1 … 1000000'),
    ('predict', [
        '--workdir={run}', '--question=q', '--context=c', '--checkpoint=3'
    ], "checkpoint '3' is not best, last or one"),
    ('demo', [], '--workdir is needed')
])
def test_missing_or_clashing_flags_are_one_line(config, run, name, argv,
                                                message):
  argv = [a.format(config=config, run=run) for a in argv]
  assert message in commands.refusal(name, *argv)


@pytest.mark.parametrize(
    ('flag', 'message'),
    [('optim.learning_rat=3', "no field 'optim.learning_rat'; did you mean"),
     ('opim.learning_rate=3', "no field 'opim'; did you mean 'optim'?"),
     ('seed.x=3', 'seed'),
     ('train.batch_size=7', 'batch_size 7 is not divisible by'),
     ('train.batch_size=0', 'train.batch_size=0 must be in 1 … 1000000'),
     ('data.buckets=(0,)', 'data.buckets has 0'),
     ('data.window_overlap=80', 'window_overlap 80 leaves no step'),
     ('model.preset=tini', "did you mean 'tiny' or 'mini'?"),
     ('model.head=indepedent', "did you mean 'independent'?"),
     ('model.head=independent(bais=True)', "no argument 'bais'"),
     ('model.init_from=nowhere/at/all', 'is not a directory with a checkpoint'),
     ('objective=cross', "did you mean 'cross_entropy'?"),
     ('objective=cross_entropy(domain=3)', 'domain=3, expected str'),
     ('objective=cross_entropy(domain="contxt")', "did you mean 'context'?"),
     ('decode.search=two_stages', "did you mean 'two_stage'?"),
     ('decode.null_rule=min_nul', "did you mean 'min_null'?"),
     ('model.head.form=electra', 'config.model.head is a value and has no'),
     ('data.buckets.first=8', 'config.data.buckets is a value and has no'),
     ('model.num_layers.x=1', 'config.model.num_layers is a value and has no'),
     ('optim.schedule=liner', "did you mean 'linear'"),
     ('parallel.mode=pmpa', "did you mean 'pmap'"),
     ('parallel.num_devices=9', 'num_devices=9, but there are 8'),
     ('precision.compute_dtype=float16',
      'choose float32, tf32, bfloat16 or auto'),
     ('data.vocab=nowhere', "data.vocab='nowhere' is not a directory"),
     ('data.train=', 'config.data.train is empty'),
     ('data.train=synthetc(size=3)', "did you mean 'synthetic'?"),
     ('data.eval=nowhere.json', 'nowhere.json: No such file')])
def test_bad_config_field_is_one_line(config, tmp_path, flag, message):
  code = 2 if 'is a value' in message or flag.startswith(
      ('opim', 'seed')) else 1
  assert message in commands.refusal('train',
                                     f'--config={config}',
                                     f'--workdir={tmp_path}/run',
                                     f'--config.{flag}',
                                     code=code)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('content', 'message'),
    [('def get_config(:\n',
      'error: --config: SyntaxError: invalid syntax (bad.py, line 1)'),
     ('\nimport nonesuch\n', 'bad.py:2: ModuleNotFoundError: No module named'),
     ('def get_config():\n  return 1 / 0\n', 'bad.py:2: ZeroDivisionError'),
     ('def get_config():\n  raise OSError("no\\ndisk")\n', 'disk'),
     ('def get_config():\n  raise ValueError("two\\nlines")\n',
      'bad.py:2: ValueError: two lines'),
     ('x = 1\n', '--config: the file has no function get_config()'),
     ('from qa_jax import config\ndef get_config():\n  c = config.defaults()\n'
      "  c.train.num_steps = '5'\n  return c\n", 'bad.py:4: TypeError: 5 is'),
     ('def get_config(arg):\n  return None\n', 'missing 1 required positional'),
     ('def get_config():\n  return None\n', 'gives a NoneType, expected'),
     ('def get_config():\n  return {}\n', 'gives a dict, expected')])
def test_config_file_with_an_error_is_one_line(tmp_path, content, message):
  (tmp_path / 'bad.py').write_text(content)
  argv = (f'--config={tmp_path}/bad.py', f'--workdir={tmp_path}/run')
  code = commands.command('train', *argv).code
  assert code in (1, 2)
  assert message in commands.refusal('train', *argv, code=code)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('path', 'message', 'code'), [
    ('nowhere.py', "error: --config: [Errno 2] No such file or directory: "
     "'nowhere.py'", 1),
    ('', 'error: --config: Path to config file is an empty string', 1),
    (str(commands.ROOT / 'configs'),
     'error: --config: [Errno 21] Is a directory', 1),
    (f'{commands.ROOT}/configs/squad2.py:nope',
     "unknown variant 'nope'; known: ", 2),
    (f'{commands.ROOT}/configs/squad2.py:tny',
     "error: squad2.py: unknown variant 'tny'; did you mean 'tiny'", 2),
    (f'{commands.ROOT}/configs/quickstart.py:nope', 'the only variant is', 2),
    ('TMP/plain.py:nope',
     'error: --config: the file has no variants: leave out the colon', 2)
])
def test_config_that_is_not_there_is_one_line(tmp_path, path, message, code):
  (tmp_path / 'plain.py').write_text('def get_config():\n  return None\n')
  path = path.replace('TMP', str(tmp_path))
  assert message in commands.refusal('train',
                                     f'--config={path}',
                                     f'--workdir={tmp_path}/run',
                                     code=code)
  assert message in commands.refusal('train',
                                     f'--config={path}',
                                     '--config.seed=1',
                                     f'--workdir={tmp_path}/run',
                                     code=2)


# Refusals: data, checkpoints, workdirs.


@pytest.mark.parametrize(
    ('content', 'message'),
    [('words', 'not JSON'), ('[]', 'holds no question'),
     ('{"data": [{}]}', "has no 'paragraphs'"),
     (examples.changed(examples.SQUAD, examples.START,
                       999), 'answer_start is 999, outside'),
     (examples.changed(examples.SQUAD, examples.START,
                       '0'), 'answer_start is str'),
     (json.dumps(examples.SQUAD).replace(
         'Who built', 'Who \\ud800 built'), 'lone surrogate U+D800'),
     (json.dumps(examples.SQUAD).replace(
         'Who built', 'Who \0 built'), 'Invalid control character'),
     ({
         'data': []
     }, 'holds no question'), (None, 'Is a directory')])
def test_bad_data_is_one_line_from_every_command(config, run, tmp_path, content,
                                                 message):
  path = tmp_path / 'data.json'
  path.mkdir() if content is None else examples.write(path, content)
  for flag in ('train', 'eval'):
    assert message in commands.refusal('train', f'--config={config}',
                                       f'--config.data.{flag}={path}',
                                       f'--workdir={tmp_path}/new')
  before = commands.files_of(run)
  assert message in commands.refusal('evaluate', f'--workdir={run}',
                                     f'--data={path}')
  assert commands.files_of(run) == before and not (tmp_path / 'new').exists()


def test_answers_that_are_nowhere_leave_nothing_to_train_on(config, tmp_path):
  data = examples.changed(examples.SQUAD, (*examples.QA[:-1], 2),
                          examples.SQUAD['data'][0]['paragraphs'][0]['qas'][0]
                          | {'id': 'when'})
  bad = examples.write(tmp_path / 'a.json', json.dumps(data).replace(
      '"text": "', '"text": "no '))
  assert 'no window to train on' in commands.refusal(
      'train', f'--config={config}', f'--config.data.train={bad}',
      f'--workdir={tmp_path}/run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('line', 'message'),
    [('words', 'not JSON'), ('[]', 'list, expected a JSON object'),
     ('{"question": "Who?"}', ":2: there is no 'context'"),
     ('{"context": "Mira", "question": 3}', ':2: question is int'),
     ('{"context": "\\ud800", "question": "Who?"}',
      ':2: context holds a lone surrogate U+D800 at character 0'),
     ('{"context": "Mira\0", "question": "Who?"}', 'Invalid control character'),
     ('{"context": "M", "question": "W", "id": "\\udfff"}', 'U+DFFF'),
     ('{"context": "M", "question": "W", "id": NaN}', 'id is'),
     ('{"context": "M", "question": "W", "id": [1]}', 'id is')])
def test_bad_question_line_is_named_and_nothing_written(run, tmp_path, line,
                                                        message):
  path = tmp_path / 'in.jsonl'
  path.write_text('{"question": "Who?", "context": "Mira"}\n' + line + '\n')
  text = commands.refusal('predict', f'--workdir={run}', f'--input={path}',
                          f'--output={tmp_path}/new/out.jsonl')
  assert message in text and f'{path}:2: ' in text
  assert not (tmp_path / 'new').exists()


def test_predict_does_not_write_over_its_questions(run, tmp_path):
  path, text = tmp_path / 'in.jsonl', '{"question": "W", "context": "M"}'
  path.write_text(text)
  (tmp_path / 'link').symlink_to(path)
  for output in (path, tmp_path / 'link'):
    assert f'--output={output} is the file of --input' in commands.refusal(
        'predict', f'--workdir={run}', f'--input={path}', f'--output={output}')
  assert path.read_text() == text


@pytest.mark.parametrize(
    ('flag', 'message'),
    [('--input={tmp}', 'Is a directory'), ('--input={tmp}/x', 'No such file'),
     ('--input=', 'Is a directory'), ('--output=', 'a directory, expected a'),
     ('--output={tmp}', 'a directory, expected a file to write'),
     ('--output={tmp}/in.jsonl/out', 'is not a directory to write in'),
     ('--workdir={tmp}', 'has no config.json'),
     ('--workdir={tmp}/in.jsonl', 'is not a directory with a checkpoint')])
def test_bad_path_of_predict_is_one_line(run, tmp_path, flag, message):
  (tmp_path / 'in.jsonl').write_text('{"question": "Who?", "context": "M"}\n')
  argv = [
      f'--workdir={run}', f'--input={tmp_path}/in.jsonl',
      f'--output={tmp_path}/out.jsonl',
      flag.format(tmp=tmp_path)
  ]
  assert message in commands.refusal('predict', *argv)
  assert [p.name for p in tmp_path.iterdir()] == ['in.jsonl']


def test_surrogate_on_the_command_line_is_named(run):
  assert 'question' in commands.refusal('predict', f'--workdir={run}',
                                        '--question=Who\udcff',
                                        '--context=Mira')


@pytest.mark.parametrize(
    ('flag', 'content', 'message'),
    [('predictions', '[]', 'expected a JSON object'),
     ('predictions', '{"who": 3}', "'who' is 3, expected a string"),
     ('predictions', '{"who": "a", "who": "b"}', 'stands there twice'),
     ('na_probs', '{"who": NaN}', 'expected a finite number'),
     ('na_probs', '{"who": 0.5}', 'has a score for 1 of '),
     ('predictions', '{"nobody": "x"}', '1 of 1 predictions are of questions'),
     ('na_probs', None, 'Is a directory')])
def test_bad_predictions_are_one_line(data, tmp_path, flag, content, message):
  (tmp_path / 'good').write_text('{"who": "Mira"}')
  bad = tmp_path / 'bad'
  bad.mkdir() if content is None else bad.write_text(content)
  argv = [
      f'--data={data}', f'--predictions={tmp_path}/good', f'--{flag}={bad}',
      f'--output={tmp_path}/out'
  ]
  assert message in commands.refusal('evaluate', *argv)
  assert not (tmp_path / 'out').exists()


def test_output_that_is_a_file_is_one_line_before_the_work(run, data, tmp_path):
  (tmp_path / 'out').write_text('old')
  assert 'is not a directory to write in' in commands.refusal(
      'evaluate', f'--workdir={run}', f'--data={data}',
      f'--output={tmp_path}/out')


@pytest.fixture
def encoder(tmp_path):
  """Returns a Hugging Face directory with a vocabulary of the right size."""
  directory = tmp_path / 'encoder'
  shutil.copytree(TINY_BERT, directory)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  (directory /
   'vocab.txt').write_text('\n'.join([*words, *(f'##{i}' for i in range(95))]) +
                           '\n')
  return directory


def train_from(encoder, config, tmp_path):
  return ('train', f'--config={config}', f'--workdir={tmp_path}/run',
          f'--config.model.init_from={encoder}', '--config.data.max_length=40',
          '--config.data.buckets=()', '--config.model.hidden_size=0',
          '--config.model.num_layers=0', '--config.model.num_heads=0',
          '--config.model.mlp_size=0')


@pytest.mark.parametrize(
    ('name', 'keep', 'message'),
    [('model.safetensors', 60_000, 'not a whole safetensors file'),
     ('model.safetensors', 3, 'not a whole safetensors file'),
     ('model.safetensors', 0, 'not a whole safetensors file'),
     ('config.json', 50, 'not JSON'), ('vocab.txt', 20, 'lacks [SEP]')])
def test_truncated_checkpoint_is_one_line(encoder, config, tmp_path, name, keep,
                                          message):
  path = encoder / name
  path.write_bytes(path.read_bytes()[:keep])
  assert message in commands.refusal(*train_from(encoder, config, tmp_path))
  assert not (tmp_path / 'run').exists()


def test_whole_checkpoint_is_taken(encoder, config, tmp_path):
  result = commands.command(*train_from(encoder, config, tmp_path), '--dry_run')
  assert result.code == 0


def test_run_of_another_config_is_refused_with_the_differences(config, run):
  before = commands.files_of(run)
  result = commands.command('train', f'--config={config}', f'--workdir={run}',
                            '--config.optim.learning_rate=0.5',
                            '--config.seed=4')
  assert (result.code, result.out) == (1, '')
  first, *table = result.err.splitlines()
  assert first.startswith(f'error: {run} was trained with another config')
  assert [row.split() for row in table
         ] == [['seed', '3', '→', '4'],
               ['optim.learning_rate', '0.01', '→', '0.5']]
  assert commands.files_of(run) == before


@pytest.mark.parametrize(
    ('make', 'message'),
    [(lambda p: p.write_text('old'), 'is a file, not a directory'),
     (lambda p: (p.mkdir(), (p / 'notes').write_text('old')), 'not a run'),
     (lambda p: (p.mkdir(), (p / 'config.json').write_text('{')), 'not JSON'),
     (lambda p:
      (p.mkdir(),
       (p / 'config.json').write_text('{"sed": 1}')), "did you mean 'seed'?")])
def test_workdir_that_is_no_run_is_left_alone(config, tmp_path, make, message):
  make(tmp_path / 'run')
  before = commands.files_of(tmp_path)
  assert message in commands.refusal('train', f'--config={config}',
                                     f'--workdir={tmp_path}/run')
  assert commands.files_of(tmp_path) == before


def test_workdir_that_is_not_utf8_is_one_line(config, tmp_path):
  assert "/\\udcff' is not UTF-8" in commands.refusal(
      'train', f'--config={config}', f'--workdir={tmp_path}/\udcff')
  assert not list(tmp_path.glob('*\udcff*'))


def test_workdir_below_a_file_is_one_line(config, tmp_path):
  (tmp_path / 'file').write_text('old')
  assert f'{tmp_path}/file' in commands.refusal(
      'train', f'--config={config}', f'--workdir={tmp_path}/file/run')


@pytest.mark.parametrize(('name', 'content'), [('config.json', '{'),
                                               ('encoder.json', '[]'),
                                               ('encoder.json', '{"x": 1}'),
                                               ('tokenizer/vocab.txt', 'a\n')])
def test_damaged_run_is_one_line(run, tmp_path, name, content):
  copy = tmp_path / 'copy'
  shutil.copytree(run, copy)
  (copy / name).write_text(content)
  commands.refusal('predict', f'--workdir={copy}', '--question=q',
                   '--context=c')


@pytest.mark.parametrize(('argv', 'message'), [
    (['--wandb_group=x'], '--wandb_group goes with --wandb_project'),
    (['--wandb_project='], '--wandb_project is needed'),
    (['--dry_run', '--profile_steps=1:2'], 'no effect with --dry_run'),
    (['--dry_run', '--wandb_project=x'], 'no effect with --dry_run'),
    (['--print_config', '--wandb_group=x'], 'no effect with --print_config'),
    (['--print_config', '--dry_run'], 'not both'),
    (['--config.model.head='], "head '' is not of the form"),
    (['--config.model.head=mlp('], "head 'mlp(' is not of the form"),
    (['--config.model.encoder=bert('], "encoder 'bert(' is not of the form"),
    (['--config.objective='], "objective '' is not of the form")])
def test_a_mistake_in_the_flags_of_train_is_one_line(tmp_path, argv, message):
  said = commands.refusal(
      'train', f'--config={commands.ROOT}/configs/quickstart.py:tiny',
      f'--workdir={tmp_path}/run', *argv)
  assert message in said
  assert not (tmp_path / 'run').exists()


def test_interrupt_ends_with_130(monkeypatch):

  def interrupt(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(sources, 'load_examples', interrupt)
  assert 'interrupted' in commands.refusal('evaluate',
                                           '--data=x',
                                           '--predictions=y',
                                           code=130)


def test_an_interrupt_does_not_wait_for_threads_that_compile(tmp_path):
  """A second Ctrl-C in this time would abort Python."""
  (tmp_path / 'hangs.py').write_text("""
import time
from experiments import cli
from qa_jax.runtime import compilation

def main():
  with compilation.Compilation('a step', {1: lambda: time.sleep(1000)}):
    raise KeyboardInterrupt

cli.run(main)
""")
  result = subprocess.run(
      [sys.executable, tmp_path / 'hangs.py'], capture_output=True, text=True,
      check=False, timeout=100, env={**os.environ,
                                     'PYTHONPATH': str(commands.ROOT)})
  assert (result.returncode, result.stderr) == (130, 'error: interrupted\n')


@pytest.mark.parametrize(('name', 'value', 'reason'), [
    ('JAX_PLATFORMS', 'abacus', 'not in the list of known backends'),
    ('JAX_NUM_CPU_DEVICES', '0', "initialize backend 'cpu'"),
    ('JAX_NUM_CPU_DEVICES', 'two', 'Invalid value "two"'),
    ('JAX_ENABLE_COMPILATION_CACHE', 'nope', 'invalid truth value')])
def test_a_variable_that_jax_refuses_is_one_line(run, name, value, reason):
  result = subprocess.run(
      [sys.executable, '-m', 'experiments.predict', f'--workdir={run}',
       '--question=q', '--context=c'], cwd=commands.ROOT, capture_output=True,
      text=True, check=False, env={**os.environ, 'XLA_FLAGS': '', name: value})
  assert result.returncode == 1 and result.stderr.count('\n') == 1, result
  assert result.stderr.startswith(
      f'error: jax does not start with {name}={value}: ')
  assert reason in result.stderr


@pytest.mark.parametrize('error', [
    MemoryError('Unable to allocate 9 GiB'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of\n memory')])
def test_memory_that_is_too_small_is_one_line(config, tmp_path, monkeypatch,
                                              error):
  def build(*_):
    raise error

  monkeypatch.setattr(trainer, 'build_trainer', build)
  assert 'lower train.batch_size' in commands.refusal(
      'train', f'--config={config}', f'--workdir={tmp_path}/run')


def test_another_error_of_a_device_keeps_its_traceback(config, tmp_path,
                                                       monkeypatch):
  def build(*_):
    raise jax.errors.JaxRuntimeError('INTERNAL: no kernel')

  monkeypatch.setattr(trainer, 'build_trainer', build)
  with pytest.raises(jax.errors.JaxRuntimeError, match='no kernel'):
    commands.command('train', f'--config={config}', f'--workdir={tmp_path}/run')


def test_a_real_process_says_one_line(tmp_path):
  result = subprocess.run([
      sys.executable, '-m', 'experiments.evaluate', '--data=nowhere.json',
      '--predictions=x'
  ],
                          cwd=commands.ROOT,
                          capture_output=True,
                          text=True,
                          check=False)
  assert (result.returncode, result.stdout) == (1, '')
  assert result.stderr == 'error: nowhere.json: No such file or directory\n'


def test_metrics_are_one_name_and_value_a_line(capsys):
  cli.print_metrics({'exact_match': 66.66666, 'total': 3})
  assert capsys.readouterr().out.split() == [
      'exact_match', '66.6667', 'total', '3'
  ]
