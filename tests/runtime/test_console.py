"""What a run leaves to read: metrics after a resume, progress, run.json."""

import errno
import io
import json
import re
import subprocess
import types

import jax
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from qa_jax import errors
from qa_jax.checkpoints import run_record
from qa_jax.runtime import console as console_lib
from qa_jax.training import metrics_log
from tests.common import refusals


@pytest.fixture
def open_log(tmp_path):
  """Opens the MetricsLog of tmp_path at a step; closes it after the test."""
  opened = []

  def open_at(step):
    opened.append(metrics_log.MetricsLog(tmp_path, step))
    return opened[-1]
  yield open_at
  for log in opened:
    log.close()


def lines(tmp_path):
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert text.endswith('\n') or not text
  return [json.loads(line) for line in text.splitlines()]


def test_every_line_has_step_split_and_values(tmp_path, open_log):
  log = open_log(0)
  log.write(1, 'train', {'loss': 2.5, 'grad_norm': 1.0})
  log.write(2, 'eval', {'f1': 50.0})
  assert lines(tmp_path) == [  # before it is closed: a killed run has them
      {'step': 1, 'split': 'train', 'loss': 2.5, 'grad_norm': 1.0},
      {'step': 2, 'split': 'eval', 'f1': 50.0}]


def test_costs_count_time_and_compilation_once(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(console_lib.time, 'perf_counter', lambda: now[0])
  with metrics_log.Costs() as costs:
    now[0] = 103.0
    jax.monitoring.record_event_duration_secs(metrics_log.Costs.EVENT, 0.5)
    jax.monitoring.record_event_duration_secs('/jax/another', 9.0)
    assert costs.spent(4) == {'device_seconds': 12.0, 'compile_seconds': 0.5}
    assert costs.spent(4) == {'device_seconds': 0.0, 'compile_seconds': 0.0}
    jax.jit(lambda x: x * 2.5 + 17)(1.0)
    assert costs.spent(1)['compile_seconds'] > 0
  jax.monitoring.record_event_duration_secs(metrics_log.Costs.EVENT, 0.5)
  assert costs.spent(1)['compile_seconds'] == 0
  with metrics_log.Costs(share=0.25) as costs:  # of a member of a population
    now[0] = 105.0
    jax.monitoring.record_event_duration_secs(metrics_log.Costs.EVENT, 0.5)
    assert costs.spent(4) == {'device_seconds': 2.0, 'compile_seconds': 0.125}


@pytest.mark.parametrize(('step', 'kept'), [
    (0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])])
def test_lines_after_the_resumed_step_are_dropped(
    tmp_path, open_log, step, kept):
  log = open_log(0)
  for number, split in ((1, 'train'), (2, 'train'), (2, 'eval'), (3, 'train')):
    log.write(number, split, {'x': 0.0})
  log.close()
  open_log(step).write(4, 'train', {'x': 1.0})
  assert [row['step'] for row in lines(tmp_path)] == [*kept, 4]


@pytest.mark.parametrize('torn', [
    '{"step": 2, "spl', '{', '\0\0\0', '{}\n', '3\n', '{"step": "x"}\n'])
def test_torn_last_line_is_dropped(tmp_path, open_log, torn):
  whole = '{"step": 1, "split": "train"}\n'
  (tmp_path / 'metrics.jsonl').write_text(whole + torn)
  open_log(5).write(6, 'train', {})
  assert [row['step'] for row in lines(tmp_path)] == [1, 6]


def test_a_row_that_is_not_utf8_is_dropped(tmp_path, open_log):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n\xff\xfe\n')
  open_log(5).write(6, 'train', {})
  assert [row['step'] for row in lines(tmp_path)] == [1, 6]


def test_a_file_in_place_of_the_tensorboard_folder_is_named(tmp_path, open_log):
  (tmp_path / 'tensorboard').write_text('')
  with pytest.raises(errors.UserError, match='tensorboard: cannot be written'):
    open_log(0)


def test_a_full_disk_is_one_line_and_closes(tmp_path, open_log):
  log = open_log(0)
  log.write(1, 'train', {'loss': 2.5})
  class Full:
    closed = False
    def write(self, data):
      raise OSError(errno.ENOSPC, 'No space left on device')
    def close(self):
      self.closed = True
  log._file.close()
  log._file = Full()
  assert refusals.refusal(log.write, 2, 'train', {}) == (
      f'{tmp_path}/metrics.jsonl: cannot be written: No space left on device; '
      'the same command goes on from the last checkpoint')
  log.close()
  assert [row['step'] for row in lines(tmp_path)] == [1]


def test_a_line_that_nobody_can_be_told_ends_no_run(monkeypatch):
  class Full(io.StringIO):
    def write(self, text):
      raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr('sys.stderr', Full())
  console_lib.say('a line')


@pytest.mark.parametrize('user', ['me:secret', 'me:se/cr:et', ':se/cret', 'me'])
def test_a_password_in_a_url_is_not_kept(user):
  record = run_record.run_record(
      seed=1, devices=jax.devices(), hashes={},
      argv=['sweep', f'--storage=postgresql://{user}@host/db', 'a@b'])
  assert record['argv'] == [
      'sweep', '--storage=postgresql://…@host/db', 'a@b']


def test_a_line_is_whole_though_the_system_takes_a_part_of_it(
    tmp_path, open_log):
  log = open_log(0)
  whole = log._file
  log._file = types.SimpleNamespace(
      write=lambda data: whole.write(data[:7]), closed=False, close=whole.close)
  log.write(1, 'train', {'loss': 2.5})
  assert lines(tmp_path) == [{'step': 1, 'split': 'train', 'loss': 2.5}]


def test_tensorboard_gets_values_at_once_and_hides_those_of_lost_steps(
    tmp_path, open_log):
  open_log(3).write(4, 'train', {'loss': 2.5})
  path, = (tmp_path / 'tensorboard').iterdir()
  content, events = path.read_bytes(), []  # before it is closed
  while content:  # a record is its length, a checksum, an event and another
    end = 12 + int.from_bytes(content[:8], 'little')
    events.append(event_pb2.Event.FromString(content[12:end]))
    content = content[end + 4:]
  start, loss = (e for e in events if not e.file_version)
  assert start.session_log.status == event_pb2.SessionLog.START
  assert (start.step, loss.step) == (4, 4)
  value, = loss.summary.value
  assert (value.tag, value.simple_value) == ('train/loss', 2.5)


def test_histograms_go_to_tensorboard_alone(tmp_path, open_log):
  log = open_log(0)
  log.histogram(1, 'train/norms', [])  # nothing was finite
  log.histogram(2, 'train/norms', [1.0, 2.0, 7.5])
  events, = (tmp_path / 'tensorboard').iterdir()
  log.close()
  content = events.read_bytes()
  assert content.count(b'train/norms') == 1
  assert np.float64(7.5).tobytes() in content  # the largest value
  assert not lines(tmp_path)


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
  progress = console_lib.Progress('train', total=10, done=4)
  progress.update(5)
  progress.update(6)
  progress.note('loss 1.5')
  progress.close()
  out, err = capsys.readouterr()
  assert not out
  assert re.fullmatch(r'train 6/10  loss 1\.5  ETA 0:00\n', err)


def test_a_first_unit_that_takes_long_is_announced(capsys, monkeypatch):
  monkeypatch.setattr(console_lib, 'FIRST_SECONDS', 0.01)
  progress = console_lib.Progress('evaluate', total=39)
  progress._timer.join()
  assert capsys.readouterr().err == 'evaluate 0/39  ETA –\n'
  progress.close()
  quick = console_lib.Progress('evaluate', total=39)
  monkeypatch.setattr(console_lib, 'FIRST_SECONDS', 60.0)
  for end in (lambda: quick.update(1), quick.close):
    end()
    assert quick._timer.finished.is_set()


def test_eta_is_of_this_session_alone(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(console_lib.time, 'monotonic', lambda: now[0])
  progress = console_lib.Progress('train', total=100, done=50)
  progress.update(51)
  now[0] = 118.0
  progress.update(60)  # 9 steps in 18 s, 40 to go
  progress.note('')
  assert 'ETA 1:20' in capsys.readouterr().err


def test_eta_leaves_out_the_compilation_in_the_first_unit(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(console_lib.time, 'monotonic', lambda: now[0])
  progress = console_lib.Progress('evaluate', total=20)
  for seconds, done, eta in ((60, 1, '–'), (2, 2, '0:36'), (2, 3, '0:34')):
    now[0] += seconds
    progress.update(done)
    progress.note('')
    assert f'ETA {eta}' in capsys.readouterr().err, done


def test_lines_come_after_5_seconds_and_then_every_30(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(console_lib.time, 'monotonic', lambda: now[0])
  progress, printed = console_lib.Progress('train', total=100), []
  for second in range(70):
    now[0] = 100.0 + second
    progress.update(second)
    if capsys.readouterr().err:
      printed.append(second)
  assert printed == [6, 37, 68]


def test_only_the_first_process_talks(capsys, monkeypatch):
  console = rich.console.Console
  monkeypatch.setattr(rich.console, 'Console', lambda **options: console(
      **options, force_terminal=True, width=100))
  monkeypatch.setattr(console_lib.processes, 'is_first_process', lambda: False)
  console_lib.say('a line')
  progress = console_lib.Progress('train', total=10)
  progress.update(5)
  progress.note('loss 1.5')
  progress.close()
  assert capsys.readouterr().err == ''


def test_a_slow_block_is_named_until_it_is_over_or_cancels(
    capsys, monkeypatch):
  class Timer:
    def __init__(self, seconds, function, args):
      self.seconds, self.fire = seconds, lambda: function(*args)
    def start(self):
      self.runs = True
    def cancel(self):
      self.runs = False
  timers = []
  monkeypatch.setattr(console_lib.threading, 'Timer', lambda *args: (
      timers.append(Timer(*args)) or timers[-1]))
  with console_lib.say_if_slow('reading') as cancel:
    assert timers[0].runs and timers[0].seconds == 5
    timers[0].fire()
    assert capsys.readouterr().err == 'reading\n'
    cancel()
    assert not timers[0].runs
  with console_lib.say_if_slow('reading'):
    assert timers[1].runs
  assert not timers[1].runs


def test_progress_before_the_first_step_has_an_eta(capsys):
  progress = console_lib.Progress('train', total=10)
  progress.note('starting')
  assert 'train 0/10' in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
  console = rich.console.Console
  monkeypatch.setattr(rich.console, 'Console', lambda **options: console(
      **options, force_terminal=True, width=100))
  progress = console_lib.Progress('train', total=10, done=4)
  assert '4/10' in capsys.readouterr().err  # of a resumed run
  progress.update(5)
  progress.note('loss 1.5')
  progress.close()
  err = capsys.readouterr().err
  assert '5/10' in err and 'loss 1.5' in err and 'ETA' not in err


def test_run_record_keeps_no_secret(monkeypatch):
  monkeypatch.setenv('SECRET_TOKEN', 'hunter2')
  monkeypatch.setenv('HF_TOKEN', 'hunter2')
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=')
  record = run_record.run_record(seed=1, argv=['train', '--config=x'],
                                 devices=jax.devices(), hashes={'train': 'abc'})
  assert 'hunter2' not in json.dumps(record)
  assert record['environment']['XLA_FLAGS'] == '--xla_dump_to='
  assert all(
      k.startswith(run_record.ENVIRONMENT) for k in record['environment'])


def test_run_record_has_new_files_that_git_does_not_know_yet(
    tmp_path, monkeypatch):
  git = lambda *words: subprocess.run(
      ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e',
       *words], check=True, capture_output=True)
  for path in ('qa_jax/__init__.py', 'qa_jax/checkpoints/old.py',
               'qa_jax/heads/mine ü.py', 'qa_jax/heads/ignored.py',
               'configs/mine.py', 'notes.py'):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(f'# {path}\n')
  (tmp_path / '.gitignore').write_text('ignored.py\n')
  git('init')
  # As the lock of an editor.
  (tmp_path / 'qa_jax/heads/.#mine.py').symlink_to('user@host')
  git('add', '.gitignore', 'qa_jax/__init__.py', 'qa_jax/checkpoints')
  git('commit', '-m', 'first')
  (tmp_path / 'qa_jax/checkpoints/old.py').write_bytes(b'changed \xff\n')
  monkeypatch.setattr(run_record, '__file__',
                      str(tmp_path / 'qa_jax/checkpoints/old.py'))
  record = run_record.run_record(seed=1, argv=[], devices=jax.devices(),
                                 hashes={})['git']
  assert '+changed \udcff' in record['diff']  # not UTF-8
  assert record['untracked'] == {path: f'# {path}\n' for path in (
      'qa_jax/heads/mine ü.py', 'configs/mine.py')}
  monkeypatch.setattr(run_record, 'MAX_CHARACTERS', 9)
  short = run_record.run_record(seed=1, argv=[], devices=jax.devices(),
                                hashes={})['git']
  assert short['diff'] == record['diff'][:9]
  assert short['untracked']['configs/mine.py'] == '# configs'
  # The same files in an installation that this repository does not track.
  git('rm', '--cached', 'qa_jax/__init__.py')
  assert run_record.run_record(
      seed=1, argv=[], devices=jax.devices(), hashes={})['git'] == {
          'commit': '', 'diff': '', 'untracked': {}}
  monkeypatch.setenv('PATH', '')  # git is not installed
  assert run_record.run_record(
      seed=1, argv=[], devices=jax.devices(), hashes={})['git'] == {
          'commit': '', 'diff': '', 'untracked': {}}


def test_run_record_says_what_made_the_numbers():
  record = run_record.run_record(seed=1, argv=['train'], devices=jax.devices(),
                                 hashes={'train': 'abc'})
  assert record['seed'] == 1 and record['argv'] == ['train']
  assert record['packages']['jax'] == jax.__version__
  assert record['devices']['count'] == 8
  assert record['sha256'] == {'train': 'abc'}
  assert json.loads(json.dumps(record)) == record
