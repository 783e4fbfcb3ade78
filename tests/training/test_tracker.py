"""The tracker, with a replacement for wandb: no account, no network."""

import pathlib
import shlex
import sys
import types

import pytest

from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.training import metrics_log
from qa_jax.training import tracker
from qa_jax.training import train
from tests.common import commands
from tests.common import tiny
from tests.common.refusals import refusal

# ml_collections reads a config file with load_module.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


class Runs:
  """A replacement for wandb that records its calls."""

  def __init__(self):
    self.started, self.rows, self.finished = [], [], 0

  def init(self, **arguments):
    self.started.append(arguments)
    return self

  def log(self, values, *, step):
    self.rows.append((step, values))

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
  runs = Runs()
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
      init=runs.init, Error=RuntimeError))
  return runs


def test_the_tracker_gets_every_row_of_metrics_jsonl(tmp_path, wandb):
  shown = tracker.Tracker('squad', tmp_path / 'run', {'seed': 3})
  config = tiny.config(train={'num_steps': 2})
  train.train(config, tmp_path / 'run', tracker=shown)
  shown.close()
  assert wandb.started[0]['project'] == 'squad'
  assert wandb.started[0]['config'] == {'seed': 3}
  rows = RunDirectory(tmp_path / 'run').read_metrics()
  assert len(rows) >= 3 and wandb.finished == 1
  assert wandb.rows == [
      (row.pop('step'), {f'{split}/{name}': value
                         for name, value in row.items()})
      for row in rows for split in [row.pop('split')]]


def test_each_run_directory_is_one_wandb_run(tmp_path, wandb, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in (tmp_path / 'a', pathlib.Path('a'), tmp_path / 'b'):
    tracker.Tracker('squad', path, {})
  first, again, other = (s['id'] for s in wandb.started)
  assert first == again != other
  assert all(s['resume'] == 'allow' for s in wandb.started)


def test_trials_of_a_sweep_are_a_group_with_names_of_their_own(
    tmp_path, wandb):
  result = commands.command(
      'sweep', '--config=configs/sweep_heads.py:tiny', '--print', '--seeds=2',
      f'--workdir={tmp_path}/heads', '--wandb_project=squad',
      '--config.data.eval=synthetic(size=9)')
  assert result.code == 0, result.err
  lines = [shlex.split(line) for line in result.out.splitlines()]
  assert len(lines) > 10
  for line in lines:
    assert {'--wandb_project=squad', '--wandb_group=heads'} <= {*line}
  for name in ('a', 'b'):
    tracker.Tracker('squad', tmp_path / 'heads' / name, {}, 'heads')
  tracker.Tracker('squad', tmp_path / 'alone', {})
  assert [(s['group'], s['name']) for s in wandb.started] == [
      ('heads', 'heads/a'), ('heads', 'heads/b'), (None, 'alone')]


@pytest.mark.parametrize(('installed', 'flags', 'message'), [
    (False, [], '.[wandb]'),
    (True, ['--engine=population'], 'cannot log its members')])
def test_a_sweep_that_cannot_be_shown_is_refused_before_it_starts(
    tmp_path, monkeypatch, wandb, installed, flags, message):
  if not installed:
    monkeypatch.setitem(sys.modules, 'wandb', None)
  assert message in commands.refusal(
      'sweep', '--config=configs/sweep_heads.py:tiny', '--wandb_project=squad',
      f'--workdir={tmp_path}/heads', *flags)
  assert not (tmp_path / 'heads').exists()


def test_an_error_of_wandb_is_one_line(tmp_path, wandb, monkeypatch):
  def refuse(**_):
    raise RuntimeError('api_key not configured\n(no-tty)')
  monkeypatch.setattr(sys.modules['wandb'], 'init', refuse)
  assert 'api_key not configured (no-tty)' in refusal(
      tracker.Tracker, 'squad', tmp_path, {})


def test_without_the_library_one_line_names_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  assert '.[wandb]' in refusal(tracker.Tracker, 'squad', tmp_path, {})


def test_wandb_is_not_imported_without_a_tracker(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it would fail
  log = metrics_log.MetricsLog(tmp_path, 0)
  log.write(1, 'train', {'loss': 1.0})
  log.close()
