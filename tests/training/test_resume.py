"""A run that is stopped resumes exactly; a complete run is left as it is."""

import dataclasses
import json
import pathlib
import shutil
from unittest import mock

import numpy as np
import pytest

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.io import files
from qa_jax.runtime import signals
from qa_jax.training import checkpointing
from qa_jax.training import metrics_log
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import commands
from tests.common import runs
from tests.common import tiny
from tests.common.refusals import refusal


@pytest.mark.slow
@pytest.mark.parametrize(('parallel_fields', 'train_fields', 'kills'), [
    ({'mode': 'pmap', 'num_devices': 1}, {}, (2, 6)),
    ({'mode': 'pmap', 'num_devices': 4}, {'grad_accumulation': 2}, (6,)),
    ({'mode': 'mesh', 'num_devices': 4, 'mesh': {'data': 2, 'fsdp': 2}},
     {'eval_every_steps': 3}, (6,)),
    ({'mode': 'jit', 'num_devices': 1}, {}, (2,))])
@pytest.mark.parametrize('freeze', [False, True])
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path, parallel_fields, train_fields, kills, freeze):
  config = tiny.config(parallel=parallel_fields, train=train_fields,
                       optim={'freeze_encoder': freeze})
  metrics = train.train(config, tmp_path / 'whole')
  for step in kills:
    runs.train_until_killed(config, tmp_path / 'killed', step)
  assert train.train(config, tmp_path / 'killed') == metrics
  assert runs.rows_of(tmp_path / 'killed') == runs.rows_of(tmp_path / 'whole')
  whole, killed = (runs.state_of(tmp_path / w, 7) for w in ('whole', 'killed'))
  assert whole.keys() == killed.keys() and len(whole) > 20
  for name, value in whole.items():
    np.testing.assert_array_equal(value, killed[name], err_msg=name)


def test_a_resumed_run_sees_each_window_once_an_epoch_in_a_new_order(
    tmp_path, monkeypatch):
  config = tiny.config(data={'eval': ''}, train={'num_steps': 14},
                       parallel={'num_devices': 1})
  windows: list[list[int]] = []  # of each batch of one process
  count = metrics_log.StepMetrics.add_batch

  def counting(self, batch, lengths):
    windows.append(batch[batch >= 0].tolist())
    count(self, batch, lengths)
  monkeypatch.setattr(metrics_log.StepMetrics, 'add_batch', counting)
  runs.train_until_killed(config, tmp_path / 'run', 9)
  before = windows[:8]
  windows.clear()
  train.train(config, tmp_path / 'run')
  assert len(windows) == 6  # resumed from step 8
  trained = trainer_lib.build_trainer(config).batches.indices.tolist()
  order = [window for batch in before + windows for window in batch]
  first, second = (order[i * len(trained):(i + 1) * len(trained)]
                   for i in range(2))
  assert len(trained) > 32 and len(second) == len(trained)
  assert sorted(first) == sorted(second) == sorted(trained)
  assert first != second


def test_a_run_that_dies_in_its_last_save_does_not_look_complete(
    finished, tmp_path, monkeypatch):
  config, killed = tiny.config(), tmp_path / 'killed'
  save = manager.Checkpoints.save

  def dying(self, step, **items):
    if step == config.train.num_steps:
      raise runs.Killed
    save(self, step, **items)
  with monkeypatch.context() as patch:
    patch.setattr(manager.Checkpoints, 'save', dying)
    with pytest.raises(runs.Killed):
      train.train(config, killed)
  assert not [*killed.glob('eval/*/metrics.json')]
  train.train(config, killed)
  assert runs.rows_of(killed) == runs.rows_of(finished)
  outputs = [*finished.glob('eval/*/*')]
  assert any(path.name == 'metrics.json' for path in outputs)
  for path in outputs:
    assert (killed / path.relative_to(finished)
            ).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(4, 1), (1, 8)])
def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path, capsys, before, after):
  on_before, on_after = (
      tiny.config(parallel={'num_devices': count}) for count in (before, after))
  train.train(on_before, tmp_path / 'whole')
  runs.train_until_killed(on_before, tmp_path / 'moved', 5)
  train.train(on_after, tmp_path / 'moved')
  counted = {1: '1 device', 4: '4 devices'}[before]
  assert f'{counted} before, {after} now' in capsys.readouterr().err
  for a, b in zip(runs.rows_of(tmp_path / 'whole'),
                  runs.rows_of(tmp_path / 'moved'),
                  strict=True):
    assert a['split'] == b['split'] and a['step'] == b['step']
    if a['split'] == 'train':
      assert a['loss'] == pytest.approx(b['loss'], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(('fields', 'why'), [
    ({'data': {**tiny.FIELDS['data'], 'packing': 'rows'}}, 'data.packing=rows'),
    ({'objective': 'shared_norm'}, 'the objective keeps questions together')])
def test_a_plan_of_the_devices_does_not_go_on_with_another_number(
    tmp_path, capsys, fields, why):
  one, two = (tiny.config(
      parallel={'num_devices': count},
      train={**tiny.FIELDS['train'], 'num_steps': 3}, **fields)
              for count in (1, 2))
  runs.train_until_killed(two, tmp_path, 3)
  with pytest.raises(errors.UserError, match=(
      rf'2 devices before, 1 now, .*\({why}\); resume it on as many, such as '
      'by --config.parallel.num_devices=2, or')):
    train.train(one, tmp_path)
  metrics = train.train(two, tmp_path)
  assert train.train(one, tmp_path) == metrics  # It reads no batch.
  assert 'is complete at step 3' in capsys.readouterr().err


QUESTIONS = [
    {'id': str(i), 'question': 'Who came?', 'context': f'{name} came home.',
     'answers': [{'text': name, 'answer_start': 0}]}
    for i, name in enumerate(['Ada', 'Eve', 'Bob', 'Kim', 'Leo', 'Mia'] * 2)]


def write_questions(path: pathlib.Path, rows=None) -> None:
  path.write_text(''.join(
      json.dumps(row) + '\n' for row in rows or QUESTIONS))


@pytest.fixture
def interrupted(tmp_path):
  """Returns the config, data and directory of a run killed after step 2."""
  data = tmp_path / 'train.jsonl', tmp_path / 'eval.jsonl'
  for path in data:
    write_questions(path)
  config = tiny.config(
      data={**tiny.FIELDS['data'], 'train': str(data[0]), 'eval': str(data[1])},
      train={**tiny.FIELDS['train'], 'num_steps': 3})
  runs.train_until_killed(config, tmp_path / 'run', 3)
  return config, data, tmp_path / 'run'


def test_a_run_does_not_go_on_with_other_training_data(interrupted):
  config, (train_data, _), workdir = interrupted
  write_questions(train_data, [
      {**QUESTIONS[0], 'context': 'Ada saw a zebra.'}, *QUESTIONS[1:9]])
  with pytest.raises(errors.UserError, match=(
      'began with other inputs: the vocabulary and the training data changed; '
      r'put back .* or choose a new --workdir')) as e:
    train.train(config, workdir)
  assert '\n' not in str(e.value)
  record = files.read_object(workdir / 'run.json')
  write_questions(train_data)
  train.train(config, workdir)
  assert files.read_object(workdir / 'run.json') == record


def test_other_evaluation_data_are_named(interrupted, capsys):
  config, (_, eval_data), workdir = interrupted
  write_questions(eval_data, QUESTIONS[:5])
  train.train(config, workdir)
  assert 'the evaluation data changed since the run' in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'num_steps', 'message'), [
    ('3', 5, '/3 holds step 2; rename it'),
    ('9', 5, '/9 holds step 2; rename it'),
    ('2', 1, '/2 is later than the 1 updates of the config')])
def test_a_checkpoint_of_another_step_is_refused(
    interrupted, name, num_steps, message):
  """Training would leave out updates, or never end."""
  config, _, workdir = interrupted
  config = dataclasses.replace(config, train=dataclasses.replace(
      config.train, num_steps=num_steps))
  (workdir / 'config.json').write_text(json.dumps(config.to_dict()))
  store = workdir / 'checkpoints'
  (store / '2').rename(store / name)
  before = commands.files_of(store)
  assert message in refusal(train.train, config, workdir)
  assert commands.files_of(store) == before


@pytest.mark.parametrize(('field', 'value', 'message'), [
    ('sha256', [], 'sha256=[] must be a JSON object'),
    ('platform_choices', [1], 'platform_choices=[1] must be a JSON object'),
    ('platform_choices', {'data.packing': 'x'}, "config.data.packing='x'")])
def test_a_damaged_record_is_named(interrupted, field, value, message):
  config, _, workdir = interrupted
  record = json.loads((workdir / 'run.json').read_text())
  (workdir / 'run.json').write_text(json.dumps({**record, field: value}))
  said = refusal(train.train, config, workdir)
  assert said.startswith(f'{workdir}/run.json: ') and message in said


def test_a_row_of_metrics_without_a_step_is_named(interrupted):
  run = RunDirectory(interrupted[2])
  rows = len(run.read_metrics())
  with run.metrics_file.open('a') as f:
    f.write('{"split": "train"}\n')
  assert f'metrics.jsonl:{rows + 1}: step=None' in refusal(run.read_metrics)


def test_a_run_whose_record_has_no_hashes_goes_on(interrupted):
  config, (train_data, _), workdir = interrupted
  record = files.read_object(workdir / 'run.json')
  files.write_json(workdir / 'run.json', {
      k: v for k, v in record.items() if k != 'sha256'})
  # The vocabulary is learned from the set of words, which stays.
  write_questions(train_data, QUESTIONS[::-1])
  assert train.train(config, workdir)


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(workdir)): p.read_bytes()
          for p in sorted(workdir.rglob('*')) if p.is_file()}


def test_a_complete_run_is_left_as_it_is(finished, capsys):
  before = contents(finished)
  metrics = train.train(tiny.config(), finished)
  assert 'is complete at step 7' in capsys.readouterr().err
  assert contents(finished) == before
  assert metrics == files.read_object(
      finished / 'eval' / run_directory.evaluation_name(tiny.config().data.eval)
      / 'metrics.json')


@pytest.mark.parametrize('train_fields', [
    {'num_steps': 5}, {'num_steps': 0, 'num_epochs': 0.7}])
@pytest.mark.parametrize('evaluation', ['', tiny.FIELDS['data']['eval']])
def test_a_complete_run_needs_no_data(
    tmp_path, capsys, train_fields, evaluation):
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps({
      'id': e.id, 'question': e.question, 'context': e.context,
      'answers': {'text': [a.text for a in e.answers],
                  'answer_start': [a.start for a in e.answers]}}) + '\n'
      for e in sources.load_examples(tiny.FIELDS['data']['train'])))
  config = tiny.config(data={'train': str(data), 'eval': evaluation},
                       train={**tiny.FIELDS['train'], **train_fields})
  runs.train_until_killed(config, tmp_path / 'killed', 4)
  metrics = train.train(config, tmp_path / 'run')
  assert bool(metrics) == bool(evaluation)
  data.unlink()
  before = contents(tmp_path / 'run')
  capsys.readouterr()
  assert train.train(config, tmp_path / 'run') == metrics
  [line] = capsys.readouterr().err.splitlines()
  assert f'{data}: No such file' in line and 'run is complete; not' in line
  assert contents(tmp_path / 'run') == before
  assert 'data.jsonl: No such file' in refusal(
      train.train, config, tmp_path / 'killed')


@pytest.mark.parametrize(('every', 'evaluated', 'saved'), [
    (4, [4, 8, 10], [3, 4, 6, 8, 9, 10]), (0, [10], [3, 6, 9, 10])])
def test_a_run_is_evaluated_and_saved_at_the_steps_of_its_config(
    every, evaluated, saved):
  def due(start, metrics, has_evaluation=True, signal=None):
    store = mock.Mock(metrics=lambda step: metrics)
    schedule = checkpointing.Schedule(10, every, 3, has_evaluation)
    due = checkpointing.Checkpointer(
        store, schedule, None, None, mock.Mock(signal=signal), None,
        workdir=None, data='', num_devices=1, histograms=False,
        start=start).is_due
    steps = range(start, 11)
    return ([s for s in steps if schedule.evaluates(s) and s],
            [s for s in steps if due(s)])
  assert due(0, {}) == (evaluated, saved)
  assert due(0, {}, has_evaluation=False) == ([], [3, 6, 9, 10])
  # A process that goes on at step 8 evaluates there if a signal prevented it.
  assert due(8, {'f1': 1.0})[1] == [9, 10]
  assert due(8, {})[1] == ([8, 9, 10] if every else [9, 10])
  assert due(6, {}, signal=2)[1] == [7, 8, 9, 10]


def test_a_checkpoint_has_what_the_next_row_of_metrics_needs():
  store = mock.Mock()
  meter = mock.Mock(skipped=(2, 1), losses=(0.5, 0.25))
  assert checkpointing.Checkpointer(
      store, checkpointing.Schedule(10, 0, 3, True),
      mock.Mock(position={'epoch': 1}), None, mock.Mock(signal=None), meter,
      workdir=None, data='', num_devices=4, histograms=False,
      start=0).evaluate_and_save(3, mock.Mock()) == ''
  assert store.save.call_args.args == (3,)
  assert store.save.call_args.kwargs['meta'] == {
      'position': {'epoch': 1}, 'devices': 4, 'skipped': [2, 1],
      'losses': [0.5, 0.25]}


@pytest.mark.parametrize('error', [
    errors.NotFiniteError('NaN'), ZeroDivisionError('in a search')])
def test_a_failed_evaluation_loses_a_run_only_if_its_scores_are_not_finite(
    tmp_path, error):
  store, meter = mock.Mock(), mock.Mock(skipped=(0, 0), losses=(0.5, 1.0))
  checkpointer = checkpointing.Checkpointer(
      store, checkpointing.Schedule(9, 3, 3, True), mock.Mock(),
      mock.Mock(evaluate=mock.Mock(side_effect=error)),
      signals.StopRequests(), meter, workdir=tmp_path, data='', num_devices=1,
      histograms=False, start=0)
  with pytest.raises(type(error)) as raised:
    checkpointer.evaluate_and_save(3, mock.Mock())
  assert raised.value is error and checkpointer.metrics == {}
  calls = [name for name, *_ in store.mock_calls]
  assert calls == ([] if isinstance(error, errors.NotFiniteError)
                   else ['save', 'finish'])
  assert not meter.log.write.called


@pytest.mark.parametrize(('train_fields', 'epoch', 'metrics', 'complete'), [
    ({'num_steps': 7}, 0.1, {'f1': 5.0}, True),
    ({'num_steps': 8}, 9.0, {'f1': 5.0}, False),
    ({'num_steps': 7}, 0.1, {}, False),  # an evaluation is missing
    ({'num_steps': 0, 'num_epochs': 2.0}, 2.0, {'f1': 5.0}, True),
    # The rows of a later step are not those of the checkpoint.
    ({'num_steps': 0, 'num_epochs': 2.0}, 1.9, {'f1': 5.0}, False)])
def test_a_run_without_data_is_complete_at_its_last_step(
    monkeypatch, train_fields, epoch, metrics, complete):
  monkeypatch.setattr(checkpointing.manager, 'Checkpoints', mock.Mock(
      return_value=mock.Mock(latest=7, metrics=lambda step: metrics)))
  run = mock.Mock(read_metrics=lambda: [
      {'step': 7, 'split': 'eval'}, {'step': 7, 'split': 'train',
                                     'epoch': epoch},
      {'step': 8, 'split': 'train', 'epoch': 9.0}])
  read = lambda evaluation: checkpointing.metrics_without_data(run, tiny.config(
      data={'eval': evaluation}, train=train_fields))
  assert read('dev.json') == (metrics if complete else None)
  if not metrics:
    assert read('') == {}


def test_a_complete_run_has_no_metrics_of_another_checkpoint(
    finished, tmp_path):
  """`evaluate` replaces the evaluation of the last step by that of the best."""
  run = RunDirectory(shutil.copytree(finished, tmp_path / 'run'))
  folder = run.evaluation(tiny.config().data.eval)
  assert run_directory.read_step(folder) == 7
  last = files.read_object(folder / 'metrics.json')
  files.write_json(folder / 'metrics.json', {'f1': -1.0})
  run_directory.record_step(folder, 4)
  assert train.train(tiny.config(), run.path) == pytest.approx(last)
  assert run_directory.read_step(folder) == 7
  assert files.read_object(folder / 'metrics.json') == pytest.approx(last)


def test_another_config_is_refused_with_a_table_of_the_differences(finished):
  before = contents(finished)
  with pytest.raises(errors.UserError) as caught:
    train.train(tiny.config(seed=4, optim={'learning_rate': 1e-3}), finished)
  message = str(caught.value)
  assert 'optim.learning_rate  0.01 → 0.001' in message
  assert 'seed                 3 → 4' in message
  assert contents(finished) == before


def test_every_checkpoint_has_the_state_before_its_step(finished):
  store = manager.Checkpoints(finished / 'checkpoints')
  steps = store.steps
  store.close()
  # An epoch has six steps. The position moves when a batch is read.
  positions = {6: {'epoch': 0, 'index': 6}, 7: {'epoch': 1, 'index': 1}}
  assert steps == list(positions)
  for step, position in positions.items():
    state = runs.state_of(finished, step)
    assert state["[1]['step']"] == step
    assert state['position'] == position


def eleven_updates(packing: bool | str = 'rows') -> config_lib.Config:
  return tiny.config(
      data={'eval': '', 'packing': packing},
      train={'num_steps': 11, 'checkpoint_every_steps': 7})


def on_an_accelerator(monkeypatch):
  """Makes 'auto' resolve as on a GPU, while a CPU computes."""
  resolve, lengths = config_lib.packing, config_lib.buckets
  monkeypatch.setattr(
      config_lib, 'packing', lambda config, _: resolve(config, 'gpu'))
  monkeypatch.setattr(
      config_lib, 'buckets', lambda config, _: lengths(config, 'gpu'))


@pytest.mark.parametrize('packing', ['auto', False])
def test_a_run_keeps_the_choices_of_the_platform_it_began_on(
    tmp_path, monkeypatch, capsys, packing):
  config = eleven_updates(packing)
  run = tmp_path / 'run'
  with monkeypatch.context() as patch:
    on_an_accelerator(patch)
    train.train(config, tmp_path / 'whole')
    runs.train_until_killed(config, run, 9)
  record = RunDirectory(run).read_record()['platform_choices']
  assert record == {'data.packing': 'rows' if packing else False,
                    'data.buckets': [64],
                    'precision.compute_dtype': 'float32'}
  stored = RunDirectory(run).read_config().data
  assert stored.packing == packing and stored.buckets == ()
  assert RunDirectory(run).settle(config, 'gpu').data.packing == (
      record['data.packing'])
  capsys.readouterr()
  train.train(config, run)
  said = capsys.readouterr().err
  assert ('data.packing stays rows, with which the run began; on a cpu it '
          'would be False' in said) == (packing == 'auto')
  assert runs.rows_of(run) == runs.rows_of(tmp_path / 'whole')


def test_a_run_that_began_in_bfloat16_stays_in_bfloat16(tmp_path, capsys):
  config = eleven_updates()
  run = RunDirectory(tmp_path / 'run')
  train.train(config, run.path)
  record = run.read_record()
  record['platform_choices'] |= {'precision.compute_dtype': 'bfloat16'}
  run.record_file.write_text(json.dumps(record))
  assert run.settle(config, 'cpu').precision.compute_dtype == 'bfloat16'
  assert 'compute_dtype stays bfloat16' in capsys.readouterr().err


def test_a_run_of_earlier_versions_stays_unpacked(tmp_path, capsys):
  """Its config says False, and its run.json has no choices."""
  run = RunDirectory(tmp_path / 'run')
  train.train(eleven_updates(False), run.path)
  record = run.read_record()
  del record['platform_choices']
  run.record_file.write_text(json.dumps(record))
  given = eleven_updates('auto')
  run.check_config(given)
  settled = run.settle(given, 'gpu').data
  assert (settled.packing, settled.buckets) == (False, (64,))
  assert 'data.packing stays False' in capsys.readouterr().err
  config_file = json.loads(run.config_file.read_text())
  config_file['precision']['compute_dtype'] = 'float32'
  run.config_file.write_text(json.dumps(config_file))
  run.check_config(given)
  assert run.settle(given, 'gpu').precision.compute_dtype == 'float32'
  with pytest.raises(errors.UserError, match=r'data\.packing .* → True'):
    run.check_config(eleven_updates(True))
