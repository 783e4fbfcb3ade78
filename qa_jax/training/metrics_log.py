"""Metrics of a run: its log files, its costs, and the metrics of its steps."""

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
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.runtime import console as console_lib
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.training import tracker as tracker_lib


class MetricsLog:
  """The log of a run: metrics.jsonl, TensorBoard and, if given, a tracker.

  A log that is opened at step k drops the rows after k. They belong to steps
  that were lost with the interrupted process and will be written again. With
  several processes, only the first writes.
  """

  def __init__(self, workdir: pathlib.Path, step: int,
               tracker: tracker_lib.Tracker | None = None):
    self._path, self._file = RunDirectory(workdir).metrics_file, None
    self._tracker = tracker
    if not processes.is_first_process():
      return
    if self._path.is_file():
      files.write_jsonl(self._path, [
          row for row in _rows(self._path) if row['step'] <= step])
    with self._reporting_disk_errors():
      board = workdir / 'tensorboard'
      board.mkdir(exist_ok=True)
      # SummaryWriter of tensorboardX writes in a thread, which ends silently
      # when the disk is full; adding to its full queue never returns.
      self._board = event_file_writer.EventsWriter(str(board / 'events'))
      # Without a buffer, closing the file cannot fail again on a full disk.
      self._file = self._path.open('ab', buffering=0)
      # TensorBoard then hides the later events of a process that was lost.
      self._board.write_event(event_pb2.Event(
          step=step + 1, session_log=event_pb2.SessionLog(
              status=event_pb2.SessionLog.START)))

  def write(self, step: int, split: str, values: dict[str, float]) -> None:
    """Writes a row; `split` is 'train' or 'eval'.

    Raises:
      UserError: the file cannot be written, for example on a full disk.
    """
    if not self._file:
      return
    line = json.dumps({'step': step, 'split': split, **values}) + '\n'
    rest = memoryview(line.encode())
    with self._reporting_disk_errors():
      while rest:
        rest = rest[self._file.write(rest):]
      self._write_events(step, *(summary.scalar(f'{split}/{name}', value)
                                 for name, value in values.items()))
    if self._tracker:
      self._tracker.write(step, split, values)

  def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
    """Writes a histogram of the values, only for TensorBoard."""
    if self._file and len(values):
      with self._reporting_disk_errors():
        # numpy's 'auto' may choose millions of bins if most values are equal.
        self._write_events(
            step, summary.histogram(name, np.asarray(values), bins=64))

  def _write_events(self, step: int, *events: summary_pb2.Summary) -> None:
    for event in events:
      self._board.write_event(event_pb2.Event(
          wall_time=time.time(), step=step, summary=event))
    self._board.flush()

  @contextlib.contextmanager
  def _reporting_disk_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise errors.UserError(
          f'{e.filename or self._path}: cannot be written: {e.strerror}; the '
          'same command goes on from the last checkpoint') from None

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._file and not self._file.closed:
      self._file.close()
      with contextlib.suppress(OSError):  # the failed write was reported
        self._board.close()


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows with a step, without the torn row of a killed process."""
  for line in path.read_text('utf-8', errors='replace').split('\n'):
    with contextlib.suppress(errors.UserError):
      yield run_directory.parse_row(line, str(path))


class Costs:
  """The device seconds of a run, and the seconds of compiling among them.

  Counts while it is entered as a context manager. Compiling includes reading a
  compiled program from the cache. If one program trains several runs, `share`
  is the fraction of the seconds that this run is charged.
  """

  EVENT = '/jax/core/compile/backend_compile_duration'

  def __init__(self, share: float = 1.0) -> None:
    self._began, self._compiling = time.perf_counter(), 0.0
    self._share = share

  def __enter__(self) -> 'Costs':
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, seconds: float, **_: str | int) -> None:
    if event == self.EVENT:
      self._compiling += seconds

  def spent(self, devices: int) -> dict[str, float]:
    """Returns the costs since the last call, for this number of devices.

    Their sum over metrics.jsonl is the cost of a run, without what a process
    that was stopped spent after its last row.
    """
    now = time.perf_counter()
    spent = {'device_seconds': self._share * devices * (now - self._began),
             'compile_seconds': self._share * self._compiling}
    self._began, self._compiling = now, 0.0
    return spent


class StepMetrics:
  """Counts the skipped updates, and logs every `every_steps`-th train step.

  The last step of a run, `num_steps`, is logged too. The loss of a row is the
  mean over the steps since the row before, without losses that are not finite.
  The speeds count the windows of steps that are complete.
  """

  def __init__(self, log: MetricsLog, costs: Costs,
               progress: console_lib.Progress | None = None, *,
               every_steps: int, steps_per_epoch: int,
               devices: Sequence[jax.Device], max_skipped: int,
               num_steps: int = 0, skipped: tuple[int, int] = (0, 0),
               losses: tuple[float, int] = (0.0, 0)):
    self.log, self.costs, self._progress = log, costs, progress
    self._every_steps, self._steps_per_epoch = every_steps, steps_per_epoch
    self._devices, self._max_skipped = devices, max_skipped
    self._num_steps = num_steps
    self._read = time.perf_counter()  # when steps were read the last time
    self._seconds, self._rows, self._tokens = 0.0, 0, 0
    self._norms: list[float] = []  # finite gradient norms since the last row
    self.skipped = skipped  # skipped updates: all, and the last in a row
    self.losses = losses  # sum and number of the losses since the last row
    self.mean_loss = math.nan  # of the last row
    self.step = 0  # the last one that was counted
    # Window numbers, rows and tokens of the steps in flight.
    self._in_flight: collections.deque[tuple[np.ndarray, int, int]] = (
        collections.deque())

  def add_batch(self, windows: np.ndarray, lengths: np.ndarray) -> None:
    """Counts windows (-1 is padding) and their tokens, before a step."""
    self._in_flight.append(
        (windows[windows >= 0], len(lengths), int(lengths.sum())))

  def leave_out(self, seconds: float) -> None:
    """Leaves out seconds that were not spent on training from the speeds."""
    self._read += seconds

  def add_steps(self, done: list[tuple[int, Any]]) -> None:
    """Checks and logs the (step, metrics) of steps that are complete.

    Steps that are read together have taken equally long.

    Raises:
      UserError: more than `max_skipped` updates in a row were skipped.
    """
    if not done:
      return
    now = time.perf_counter()
    each, self._read = (now - self._read) / len(done), now
    for step, values in done:
      self.step = step
      self._seconds += each
      windows, rows, tokens = self._in_flight.popleft()
      self._rows, self._tokens = self._rows + rows, self._tokens + tokens
      self._count_skipped(step, values, windows)
      if math.isfinite(values['loss']):
        total, count = self.losses
        self.losses = total + float(values['loss']), count + 1
      if math.isfinite(values['grad_norm']):
        self._norms.append(float(values['grad_norm']))
      if self._progress:
        self._progress.update(step)
      if self.is_due(step):
        total, count = self.losses
        self.mean_loss = total / count if count else math.nan
        values = {**values, 'loss': self.mean_loss}
        line = {**{k: float(v) for k, v in values.items() if math.isfinite(v)},
                'skipped': self.skipped[0],
                'epoch': step / self._steps_per_epoch,
                'examples_per_second': self._rows / self._seconds,
                'tokens_per_second': self._tokens / self._seconds,
                'peak_megabytes': devices_lib.peak_megabytes(
                    devices_lib.local_device(self._devices)),
                **self.costs.spent(len(self._devices))}
        self.log.write(step, 'train', line)
        self.log.histogram(step, 'train/grad_norm_of_steps', self._norms)
        if self._progress:
          self._progress.note(f'loss {self.mean_loss:.4f}  '
                              f'{line["examples_per_second"]:.1f} windows/s')
        self._seconds, self._rows, self._tokens = 0.0, 0, 0
        self._norms, self.losses = [], (0.0, 0)

  def is_due(self, step: int) -> bool:
    """Returns whether there is a row of this step."""
    return step % self._every_steps == 0 or step == self._num_steps

  def _count_skipped(self, step: int, values: dict[str, Any],
                     windows: np.ndarray) -> None:
    """Counts skipped updates, and reports the step of a skipped update."""
    total, in_a_row = self.skipped
    if not values['skipped']:
      self.skipped = total, 0
      return
    self.skipped = total + 1, in_a_row + 1
    finite = all(math.isfinite(v) for v in values.values())
    problem = (
        f'loss {values["loss"]}, gradient norm {values["grad_norm"]} at step '
        f'{step}: {"above config.optim.skip_norm" if finite else "not finite"}')
    console_lib.say(
        f'{problem}; update skipped, {in_a_row + 1} in a row. Its windows: '
        f'{" ".join(map(str, windows.tolist()))}')
    if in_a_row >= self._max_skipped:
      raise errors.UserError(
          f'{problem}, after {in_a_row} skipped in a row of the '
          f'{self._max_skipped} that config.train.max_skipped allows; nothing '
          'after the last checkpoint is kept. '
          + ('Raise config.optim.skip_norm' if finite else
             'Lower config.optim.learning_rate or use float32'))
