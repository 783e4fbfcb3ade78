"""One writer of a run directory: refused by name, recovered when dead."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import run_directory
from qa_jax.training import population
from qa_jax.training import train
from qa_jax.training import trainer
from tests.common import tiny

HOLDER = '''
import pathlib, sys, time
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import run_directory
with lock.hold_lock(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
'''


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of tmp_path."""
  process = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)],
                             stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_writer_is_told_who_is_the_first(tmp_path, holder):
  expected = f'pid {holder.pid} on {socket.gethostname()} is writing this run'
  for attempt in (lambda: lock.hold_lock(tmp_path).__enter__(),
                  lambda: lock.check_unlocked(tmp_path)):
    with pytest.raises(errors.UserError, match=expected) as caught:
      attempt()
    assert '\n' not in str(caught.value)


def test_a_lock_is_taken_over_on_nfs(tmp_path, monkeypatch):
  flock = fcntl.flock

  def flock_of_nfs(file, operation):  # flock(2), "NFS details"
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
      raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return flock(file, operation)

  (tmp_path / lock.NAME).write_text('{"pid": 7, "host": "gone"}')
  monkeypatch.setattr(fcntl, 'flock', flock_of_nfs)
  lock.check_unlocked(tmp_path)
  with lock.hold_lock(tmp_path) as before:
    assert before == 'pid 7 on gone'


def test_the_lock_of_the_dead_is_taken_over(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  lock.check_unlocked(tmp_path)
  with lock.hold_lock(tmp_path) as before:
    assert before == f'pid {holder.pid} on {socket.gethostname()}'
    assert f'"pid": {os.getpid()}' in (tmp_path / lock.NAME).read_text()
  assert not list(tmp_path.iterdir())
  with lock.hold_lock(tmp_path) as before:
    assert before == ''


@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": 1}', '\0'])
def test_a_torn_name_is_no_hindrance(tmp_path, text):
  (tmp_path / lock.NAME).write_text(text)
  with lock.hold_lock(tmp_path) as before:
    assert before == ''


def failing(code: int):
  """Returns a function of the system that fails with an error code."""
  def call(*_):
    raise OSError(code, os.strerror(code))
  return call


def test_a_lock_that_cannot_be_is_refused_by_its_path(tmp_path, monkeypatch):
  path = tmp_path / lock.NAME
  path.mkdir()
  with pytest.raises(errors.UserError) as caught:
    lock.hold_lock(tmp_path).__enter__()
  assert str(caught.value) == (
      f'{path}: cannot be written: {os.strerror(errno.EISDIR)}')
  path.rmdir()
  monkeypatch.setattr(fcntl, 'flock', failing(errno.ENOLCK))
  with pytest.raises(errors.UserError, match=(
      f'{path}: cannot be locked: {os.strerror(errno.ENOLCK)}; choose')):
    lock.hold_lock(tmp_path).__enter__()


def test_a_lock_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'write', failing(errno.ENOSPC))
  with pytest.raises(errors.UserError, match=(
      f'{tmp_path / lock.NAME}: cannot be written: No space left')):
    lock.hold_lock(tmp_path).__enter__()
  monkeypatch.undo()
  with lock.hold_lock(tmp_path):
    assert json.loads(lock.read_lock(tmp_path))['pid'] == os.getpid()


@pytest.mark.parametrize('taken', [False, True])  # by a third process
def test_a_lock_that_its_owner_removed_is_not_taken(
    tmp_path, monkeypatch, taken):
  """Else one process locks the removed file, and another the new file."""
  take, first = lock._lock, []

  def slow(file, path):
    if not first:  # its owner goes just before we have it
      first.append(file)
      path.unlink()
      if taken:
        path.touch()
    take(file, path)
  monkeypatch.setattr(lock, '_lock', slow)
  with lock.hold_lock(tmp_path):
    monkeypatch.undo()
    with pytest.raises(errors.UserError, match='is writing this run'):
      lock.check_unlocked(tmp_path)


def test_training_where_another_trains_is_refused_before_it_reads(
    tmp_path, monkeypatch):
  config = tiny.config()
  tmp_path = tmp_path / 'run'
  tmp_path.mkdir()
  def write_run(*_):  # the other was quicker
    raise AssertionError
  monkeypatch.setattr(trainer, 'build_trainer', write_run)
  monkeypatch.setattr(
      run_directory.RunDirectory, 'check_config', lambda *_: None)
  with lock.hold_lock(tmp_path):
    for attempt in (lambda: train.train(config, tmp_path),
                    lambda: population.train_members([config], [tmp_path])):
      with pytest.raises(errors.UserError, match=f'pid {os.getpid()} on'):
        attempt()
