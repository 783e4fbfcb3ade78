"""Turns step metrics, read late, into log lines."""

import collections
from collections.abc import Sequence
import math
import time
from typing import Any

import jax
import numpy as np

from qa_jax import errors
from qa_jax import logs
from qa_jax import parallel


class Meter:
  """Checks the metrics of every step, logs those of every k-th with speeds."""

  def __init__(self, log: logs.MetricsLog, costs: logs.Costs,
               progress: logs.Progress | None = None, *, every_steps: int,
               steps_per_epoch: int, devices: Sequence[jax.Device],
               max_skipped: int, skipped: tuple[int, int] = (0, 0)):
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
                'peak_megabytes': parallel.peak_megabytes(
                    parallel.here(self._devices)),
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
    logs.say(f'{what}; update skipped, {in_a_row + 1} in a row. Its windows: '
             f'{" ".join(map(str, windows.tolist()))}')
    if in_a_row >= self._max_skipped:
      raise errors.UserError(
          f'{what}, after {in_a_row} skipped in a row of the '
          f'{self._max_skipped} that config.train.max_skipped allows; nothing '
          'after the last checkpoint is kept. '
          + ('Raise config.optim.skip_norm' if finite else
             'Lower config.optim.learning_rate or use float32'))
