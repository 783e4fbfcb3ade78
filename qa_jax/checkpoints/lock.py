"""A run directory has one writer at a time, who is known by name.

The lock is flock's: the kernel gives it back when its owner dies, however that
happens. (The library `filelock` empties the file that it waits for, and with it
the owner's name.)
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
  """Holds a directory's lock; gives who died with it, 'pid … on …', or ''.

  Raises:
    UserError: another process holds it.
  """
  with _take(directory / NAME) as file:
    before = _owner(file)
    file.seek(0)
    file.truncate()
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    try:
      yield before
    finally:
      (directory / NAME).unlink(missing_ok=True)


def check_unlocked(directory: pathlib.Path) -> None:
  """Raises a UserError if a process holds the lock; before long work."""
  path = directory / NAME
  if path.is_file():
    with path.open(encoding='utf-8') as file:
      _lock(file, path)


def _take(path: pathlib.Path) -> TextIO:
  """The open file, locked, and still the one of that name."""
  while True:
    try:
      file = path.open('a+', encoding='utf-8')
    except OSError as e:
      raise errors.UserError(
          f'{path}: cannot be written: {e.strerror}') from None
    try:
      _lock(file, path)
      # Its owner may have removed it while we waited for it.
      if path.exists() and os.path.samestat(os.fstat(file.fileno()),
                                            path.stat()):
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
  except (ValueError, TypeError, KeyError):  # it has not got to that, or died
    return ''
