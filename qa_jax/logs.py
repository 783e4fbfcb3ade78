"""What a run leaves to read: metrics.jsonl, TensorBoard, progress, run.json."""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from qa_jax import errors
from qa_jax import files
from qa_jax import processes
from qa_jax import tracker as tracker_lib

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy',
            'tokenizers', 'safetensors', 'ml_collections')
ENVIRONMENT = ('XLA_', 'JAX_', 'CUDA_VISIBLE_DEVICES', 'TPU_')


def say(message: str) -> None:
  """One line for the user, on stderr: stdout is for results.

  A run does not end because nobody listens any more, or a log's disk is full.
  """
  if not processes.first():
    return
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)


class MetricsLog:
  """Appends to metrics.jsonl and TensorBoard, and to a tracker if given.

  Opened at step k, it drops the lines after k: they belong to steps that were
  lost with the interrupted process and will be written again. Of several
  processes the first writes.
  """

  def __init__(self, workdir: pathlib.Path, step: int,
               tracker: tracker_lib.Tracker | None = None):
    self._path, self._file = workdir / 'metrics.jsonl', None
    self._tracker = tracker
    if not processes.first():
      return
    if self._path.is_file():
      kept = []
      for line in self._path.read_text(encoding='utf-8').split('\n'):
        try:
          row = json.loads(line)
        except ValueError:
          continue  # the torn last line of a killed process
        if row['step'] <= step:
          kept.append(row)
      files.write_jsonl(self._path, kept)
    with self._failing():
      # Nothing waits in a buffer, to fail again when it is closed.
      self._file = self._path.open('ab', buffering=0)
      board = workdir / 'tensorboard'
      board.mkdir(exist_ok=True)
      # Its SummaryWriter writes in a thread, which a full disk ends unheard:
      # once its queue is full, whoever adds to it waits for ever.
      self._board = event_file_writer.EventsWriter(str(board / 'events'))
      # TensorBoard then hides what a lost process wrote from here on.
      self._board.write_event(event_pb2.Event(
          step=step + 1, session_log=event_pb2.SessionLog(
              status=event_pb2.SessionLog.START)))

  def write(self, step: int, split: str, values: dict[str, float]) -> None:
    """One line: {"step": …, "split": "train" or an evaluation's, values}.

    Raises:
      UserError: no space, …
    """
    if not self._file:
      return
    line = json.dumps({'step': step, 'split': split, **values}) + '\n'
    rest = memoryview(line.encode())
    with self._failing():
      while rest:
        rest = rest[self._file.write(rest):]
      self._show(step, *(summary.scalar(f'{split}/{name}', value)
                         for name, value in values.items()))
    if self._tracker:
      self._tracker.write(step, split, values)

  def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
    """How values spread, in TensorBoard alone."""
    if not self._file or not len(values):
      return
    with self._failing():
      # Of values nearly all equal, numpy's 'auto' may want millions of bins.
      self._show(step, summary.histogram(name, np.asarray(values), bins=64))

  def _show(self, step: int, *shown: summary_pb2.Summary) -> None:
    for one in shown:
      self._board.write_event(event_pb2.Event(
          wall_time=time.time(), step=step, summary=one))
    self._board.flush()

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise errors.UserError(
          f'{self._path}: cannot be written: {e.strerror}; the same command '
          'goes on from the last checkpoint') from None

  def close(self) -> None:
    if not self._file or self._file.closed:
      return
    self._file.close()
    with contextlib.suppress(OSError):  # what did not fit has been told
      self._board.close()


class Costs:
  """Seconds of a process since it began, for devices it holds, and of them
  those in which XLA compiled or a compiled program was fetched.

  `share` is the run's part of them, where one program trains several.
  """

  EVENT = '/jax/core/compile/backend_compile_duration'

  def __init__(self, share: float = 1.0) -> None:
    self._began, self._compiling = time.perf_counter(), 0.0
    self._share = share
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **_: str | int) -> None:
    if event == self.EVENT:
      self._compiling += seconds

  def spent(self, devices: int) -> dict[str, float]:
    """Since the last call: a run's rows add up, those of resumed ones too."""
    now = time.perf_counter()
    spent = {'device_seconds': self._share * devices * (now - self._began),
             'compile_seconds': self._share * self._compiling}
    self._began, self._compiling = now, 0.0
    return spent

  def close(self) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)


def check_trace(steps: range, start: int, end: int) -> None:
  """Raises a UserError unless some of the steps to trace will be made."""
  if steps and (steps.start >= end or steps.stop <= start):
    raise errors.UserError(
        f'--profile_steps={steps.start}:{steps.stop}: this run makes steps '
        f'{start} … {end - 1}; choose some of them')


class Trace:
  """A profile of some steps, for TensorBoard or Perfetto."""

  def __init__(self, directory: pathlib.Path, steps: range):
    self._directory, self._steps, self._on = directory, steps, False

  def before(self, step: int | None, state: Any) -> None:
    """To be called before each step, and with None after the last; `state` is
    what all steps before made."""
    if self._on != (step in self._steps):
      jax.block_until_ready(state)
      if self._on:
        jax.profiler.stop_trace()
        say(f'profile of {len(self._steps)} steps in {self._directory}')
      else:
        jax.profiler.start_trace(self._directory)
      self._on = not self._on


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl; the torn last one of a killed run is left out.
  """
  path = workdir / 'metrics.jsonl'
  if not path.is_file():
    return []
  *lines, _ = files.read_text(path).split('\n')
  return [files.parse_object(line, path) for line in lines]


class Progress:
  """A progress bar with ETA on a terminal, plain lines otherwise."""

  def __init__(self, what: str, total: int, done: int = 0):
    self._what, self._total, self._begin, self._done = what, total, done, done
    self._started = time.monotonic()
    console = rich.console.Console(stderr=True)
    self._bar = None
    if console.is_terminal and processes.first():
      columns = rich.progress
      self._bar = columns.Progress(
          columns.TextColumn('{task.description}'), columns.BarColumn(),
          columns.MofNCompleteColumn(), columns.TimeRemainingColumn(),
          columns.TextColumn('{task.fields[note]}'), console=console)
      self._task = self._bar.add_task(what, total=total, completed=done,
                                      note='')
      self._bar.start()

  def update(self, done: int) -> None:
    self._done = done
    if self._bar:
      self._bar.update(self._task, completed=done)

  def note(self, note: str) -> None:
    """A line with values; `update` moves the bar without one."""
    if self._bar:
      self._bar.update(self._task, note=note)
      return
    seconds = time.monotonic() - self._started
    per_unit = seconds / max(self._done - self._begin, 1)
    eta = per_unit * (self._total - self._done)
    say(f'{self._what} {self._done}/{self._total}  {note}  '
        f'ETA {int(eta // 60)}:{int(eta % 60):02d}')

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def run_record(*, seed: int, argv: list[str], devices: list[jax.Device],
               hashes: dict[str, str]) -> dict[str, Any]:
  """What run.json holds: enough to say which code made these numbers.

  Of the environment only an allow-list is kept: it may hold secrets. So may
  the URL of a database, which then stands there without them.
  """
  return {
      'seed': seed,
      'argv': [re.sub(r'(?<=://)[^/@\s]+@', '…@', word) for word in argv],
      'git': _git(),
      'python': platform.python_version(),
      'packages': {name: importlib.metadata.version(name)
                   for name in PACKAGES},
      'devices': {'kind': devices[0].device_kind, 'count': len(devices),
                  'processes': len({d.process_index for d in devices}),
                  'platform': devices[0].platform, 'cores': os.cpu_count()},
      'environment': {k: v for k, v in sorted(os.environ.items())
                      if k.startswith(ENVIRONMENT)},
      'sha256': hashes,
  }


def _git() -> dict[str, str]:
  root = pathlib.Path(__file__).resolve().parent.parent

  def ask(*command: str) -> str:
    try:
      return subprocess.run(
          ['git', '-C', str(root), *command], capture_output=True, text=True,
          timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
      return ''
  return {'commit': ask('rev-parse', 'HEAD').strip(),
          'diff': ask('diff', 'HEAD')[:1_000_000]}
