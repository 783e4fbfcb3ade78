"""Turns step metrics, read late, into log lines."""

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
               steps_per_epoch: int, devices: Sequence[jax.Device]):
    self._log, self._costs, self._progress = log, costs, progress
    self._every_steps, self._steps_per_epoch = every_steps, steps_per_epoch
    self._devices = devices
    self._began = time.perf_counter()
    self._rows = self._tokens = 0

  def batch(self, lengths: np.ndarray) -> None:
    """Counts a batch: `lengths` are the tokens of its windows."""
    self._rows += len(lengths)
    self._tokens += int(lengths.sum())

  def leave_out(self, seconds: float) -> None:
    """Time that was not training's."""
    self._began += seconds

  def add(self, done: list[tuple[int, Any]]) -> None:
    """Takes (step, metrics) of steps that are complete.

    Raises:
      UserError: a metric is not finite.
    """
    for step, values in done:
      if not all(math.isfinite(v) for v in values.values()):
        raise errors.UserError(
            f'loss {values["loss"]}, gradient norm {values["grad_norm"]} at '
            f'step {step}: not finite; nothing after the last checkpoint is '
            'kept. Lower config.optim.learning_rate or use float32')
      if self._progress:
        self._progress.update(step)
      if step % self._every_steps == 0:
        seconds = time.perf_counter() - self._began
        line = {**{k: float(v) for k, v in values.items()},
                'epoch': step / self._steps_per_epoch,
                'examples_per_second': self._rows / seconds,
                'tokens_per_second': self._tokens / seconds,
                'peak_megabytes': parallel.peak_megabytes(self._devices[0]),
                **self._costs.spent(len(self._devices))}
        self._log.write(step, 'train', line)
        if self._progress:
          self._progress.note(f'loss {line["loss"]:.4f}  '
                              f'{line["examples_per_second"]:.1f} examples/s')
        self._began, self._rows, self._tokens = time.perf_counter(), 0, 0
