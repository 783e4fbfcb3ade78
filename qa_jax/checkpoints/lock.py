"""The lock of a run directory: one process writes it at a time.

flock(2) takes the lock, so the kernel releases it when its owner ends, even if
the owner is killed. The lock file names the owner. (The library `filelock`
empties the file that it waits for, and so erases that name.)
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import TextIO

from qa_jax import errors

NAME = 'lock'


@contextlib.contextmanager
def hold_lock(directory: pathlib.Path) -> Iterator[str]:
  """Holds a directory's lock; yields who died with it, 'pid … on …', or ''.

  Raises:
    UserError: another process holds the lock, or it cannot be written.
  """
  with _take(directory / NAME) as file:
    previous_owner = _owner(file)
    text = json.dumps({'pid': os.getpid(), 'host': socket.gethostname()})
    try:
      file.truncate(0)
      os.write(file.fileno(), text.encode())  # no buffer that closing writes
    except OSError as e:
      raise errors.UserError(
          f'{directory / NAME}: cannot be written: {e.strerror}') from None
    try:
      yield previous_owner
    finally:
      (directory / NAME).unlink(missing_ok=True)


def check_unlocked(directory: pathlib.Path) -> None:
  """Raises a UserError if a process holds the lock, before long work starts."""
  path = directory / NAME
  if path.is_file():
    _take(path).close()


def read_lock(directory: pathlib.Path) -> str:
  """Returns the text of the lock, which names its owner, or '' without one."""
  path = directory / NAME
  return path.read_text(encoding='utf-8') if path.is_file() else ''


def _take(path: pathlib.Path) -> TextIO:
  while True:
    try:
      # NFS locks only files that are open for writing, see flock(2).
      file = path.open('a+', encoding='utf-8')
    except OSError as e:
      raise errors.UserError(
          f'{path}: cannot be written: {e.strerror}') from None
    try:
      _lock(file, path)
      # The previous owner may have removed the file after we opened it. Then
      # the lock on it is worth nothing, and we open the file of that name anew.
      if path.exists() and os.path.samestat(
          os.fstat(file.fileno()), path.stat()):
        return file
    except BaseException:
      file.close()
      raise
    file.close()


def _lock(file: TextIO, path: pathlib.Path) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise errors.UserError(
        f'{path.parent}: {_owner(file) or "another process"} is writing this '
        'run; wait for it or choose another directory') from None
  except OSError as e:
    raise errors.UserError(
        f'{path}: cannot be locked: {e.strerror}; choose a file system that '
        'has locks') from None


def _owner(file: TextIO) -> str:
  file.seek(0)
  try:
    owner = json.load(file)
    return f'pid {owner["pid"]} on {owner["host"]}'
  except (ValueError, TypeError, KeyError):  # The owner has not written it yet.
    return ''
