"""Turns step metrics, read late, into log lines."""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from qa_jax import errors
from qa_jax.io import files
from qa_jax.runtime import console as console_lib
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.training import tracker as tracker_lib


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
    if not processes.is_first_process():
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


class StepMetrics:
  """Checks the metrics of every step, logs those of every k-th with speeds."""

  def __init__(self,
               log: MetricsLog,
               costs: Costs,
               progress: console_lib.Progress | None = None,
               *,
               every_steps: int,
               steps_per_epoch: int,
               devices: Sequence[jax.Device],
               max_skipped: int,
               skipped: tuple[int, int] = (0, 0)):
    self._log, self._costs, self._progress = log, costs, progress
    self._every_steps, self._steps_per_epoch = every_steps, steps_per_epoch
    self._devices = devices
    self._began = time.perf_counter()
    self._rows = self._tokens = 0
    self._norms: list[float] = []  # of gradients, finite, since the last line
    self._max_skipped = max_skipped
    self.skipped = skipped  # updates: all so far, and in a row until now
    # Of the steps in flight; of a run that failed in a population, the last.
    self._windows: collections.deque[np.ndarray] = collections.deque(maxlen=64)

  def batch(self, windows: np.ndarray, lengths: np.ndarray) -> None:
    """Counts a batch: its windows, -1 for none, and the tokens of each."""
    self._windows.append(windows[windows >= 0])
    self._rows += len(lengths)
    self._tokens += int(lengths.sum())

  def leave_out(self, seconds: float) -> None:
    """Time that was not training's."""
    self._began += seconds

  def add(self, done: list[tuple[int, Any]]) -> None:
    """Takes (step, metrics) of steps that are complete.

    Raises:
      UserError: more than `max_skipped` in a row were skipped.
    """
    for step, values in done:
      self._skip(step, values, self._windows.popleft())
      if math.isfinite(values['grad_norm']):
        self._norms.append(float(values['grad_norm']))
      if self._progress:
        self._progress.update(step)
      if step % self._every_steps == 0:
        seconds = time.perf_counter() - self._began
        line = {**{k: float(v) for k, v in values.items() if math.isfinite(v)},
                'skipped': self.skipped[0],
                'epoch': step / self._steps_per_epoch,
                'examples_per_second': self._rows / seconds,
                'tokens_per_second': self._tokens / seconds,
                'peak_megabytes': devices_lib.peak_megabytes(
                    devices_lib.local_device(self._devices)),
                **self._costs.spent(len(self._devices))}
        self._log.write(step, 'train', line)
        self._log.histogram(step, 'train/grad_norm_of_steps', self._norms)
        if self._progress:
          self._progress.note(f'loss {values["loss"]:.4f}  '
                              f'{line["examples_per_second"]:.1f} examples/s')
        self._began, self._rows, self._tokens = time.perf_counter(), 0, 0
        self._norms = []

  def _skip(self, step: int, values: dict[str, Any],
            windows: np.ndarray) -> None:
    """Counts a step, and tells of it if it was skipped."""
    total, in_a_row = self.skipped
    if not values['skipped']:
      self.skipped = total, 0
      return
    self.skipped = total + 1, in_a_row + 1
    finite = all(math.isfinite(v) for v in values.values())
    what = (f'loss {values["loss"]}, gradient norm {values["grad_norm"]} at '
            f'step {step}: '
            + ('above config.optim.skip_norm' if finite else 'not finite'))
    console_lib.say(
        f'{what}; update skipped, {in_a_row + 1} in a row. Its windows: '
        f'{" ".join(map(str, windows.tolist()))}')
    if in_a_row >= self._max_skipped:
      raise errors.UserError(
          f'{what}, after {in_a_row} skipped in a row of the '
          f'{self._max_skipped} that config.train.max_skipped allows; nothing '
          'after the last checkpoint is kept. '
          + ('Raise config.optim.skip_norm' if finite else
             'Lower config.optim.learning_rate or use float32'))
