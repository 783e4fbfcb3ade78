"""Training processes that can be killed.

They are forked from a process that has imported everything, so that a process
starts within 20 ms. A kill is a signal to a real process.
"""

from collections.abc import Callable
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import jax

from qa_jax import errors
from qa_jax.training import train
from tests.common import dispatch
from tests.common import tiny

SECONDS = 600  # timeout of any wait on a busy machine
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload([__name__])


class Child:
  """A process that runs one function; its output goes to `log`."""

  def __init__(self, log: pathlib.Path, function: Callable[..., None],
               *arguments: Any, devices: int = 1):
    self._log = log
    self._process = _FORKS.Process(
        target=_main, args=(log, devices, function, arguments), daemon=True)
    self._process.start()
    self.pid = self._process.pid

  @property
  def said(self) -> str:
    return self._log.read_text(encoding='utf-8') if self._log.exists() else ''

  @property
  def alive(self) -> bool:
    return self._process.is_alive()

  def send(self, number: int) -> None:
    os.kill(self.pid, number)

  def wait(self) -> int:
    """Returns the exit code; a signal counts as its negative number."""
    self._process.join(SECONDS)
    if self._process.is_alive():
      self._process.kill()
      raise AssertionError(f'no end in {SECONDS} s; it said: {self.said}')
    return self._process.exitcode

  def kill(self) -> None:
    self._process.kill()
    self._process.join()

  def __enter__(self) -> 'Child':
    return self

  def __exit__(self, *_: object) -> None:
    self.kill()


def _main(log: pathlib.Path, devices: int, function: Callable[..., None],
          arguments: tuple[Any, ...]) -> None:
  """Runs as experiments.cli.run does: a UserError is one line and code 1."""
  descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for stream in (1, 2):
    os.dup2(descriptor, stream)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  try:
    function(*arguments)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)


def train_run(workdir: pathlib.Path, fields: dict[str, Any],
              compiled: pathlib.Path | None = None,
              fault: tuple[int, float, int] | None = None) -> None:
  """Trains the tiny config with `fields` changed, or resumes the run.

  `fault` is (step, seconds, signal): the process gets the signal so many
  seconds after the dispatch of that step.
  """
  if compiled:
    use_cache(compiled)
  step, seconds, number = fault or (None, 0.0, 0)
  arm = lambda: threading.Timer(
      seconds, os.kill, (os.getpid(), number)).start()
  with dispatch.fault_at(step, arm):
    train.train(tiny.config(**fields), workdir)


def use_cache(compiled: pathlib.Path) -> None:
  """Reads and writes all compiled programs in a directory."""
  jax.config.update('jax_compilation_cache_dir', str(compiled))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def wait_for(condition: Callable[[], bool], child: Child) -> None:
  """Waits until the condition holds; fails if the child ends before."""
  deadline = time.monotonic() + SECONDS
  while not condition():
    assert child.alive, child.said
    assert time.monotonic() < deadline, child.said
    time.sleep(0.02)


KILL = signal.SIGKILL
