"""The dry run of training: sizes, memory and time of a run, before it runs."""

import math
import time
from typing import Any

import jax
import numpy as np

from qa_jax.runtime import devices
from qa_jax.training import trainer as trainer_lib

STEPS = 3  # steps that are timed at most, after a first one
SECONDS = 20.0  # after this time no further step is started
MEMORY_SHARE = 0.8  # of the free memory that a timed step may need
MEBIBYTE = 2**20


def summarize(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Computes the lines of a dry run, by name.

  Compiles the step for the largest batch, and times a few steps if they fit in
  the free memory. Writes no file.
  """
  count = count_parameters(trainer)
  return {
      'parameters': count,
      'state_megabytes': round(3 * 4 * count / MEBIBYTE, 1),
      'devices': f'{len(trainer.devices)} x {trainer.devices[0].device_kind}',
      'examples': len(trainer.windows.examples),
      'windows': len(trainer.windows),
      'windows_trained_on': len(trainer.batches.indices),
      'alignment': trainer.windows.audit,
      'batch_shapes': _shapes(trainer),
      'steps_per_epoch': trainer.batches.steps_per_epoch,
      'steps': trainer.num_steps,
      'vocabulary': len(trainer.tokenizer.vocab),
      **_costs(trainer)}


def count_parameters(trainer: trainer_lib.Trainer) -> int:
  """Returns the number of parameters of encoder and head."""
  return sum(x.size for x in jax.tree.leaves(trainer.state.params))


def _shapes(trainer: trainer_lib.Trainer) -> list[list[int]] | str:
  if trainer.config.data.packing:
    return f'packed in rows of {trainer.buckets[-1]}'
  return [[trainer.config.train.batch_size, b] for b in trainer.buckets]


def _costs(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Returns the memory of the compiled step and the time of a few steps."""
  shapes = [(_positions(length, rows), length, rows)
            for length, rows in trainer.batches.shapes(trainer.num_steps)]
  _, length, rows = max(shapes, key=lambda shape: shape[0])
  state = devices.put_tree(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  batch = trainer.place(length, rows)
  memory = trainer.parallel.compile(state, batch).memory_analysis()
  costs: dict[str, Any] = {}
  if memory is not None:  # not every backend reports it
    costs['activation_megabytes'] = (
        f'{memory.temp_size_in_bytes / MEBIBYTE:.1f} a device, for '
        f'{_shape(length, rows)}')
    needed, free = _memory(trainer, memory.temp_size_in_bytes)
    if needed > MEMORY_SHARE * free:
      return {**costs, 'eta': (
          f'not timed: beside the state a step needs {needed / MEBIBYTE:,.0f} '
          f'MiB, and {free / MEBIBYTE:,.0f} MiB are free')}
  seconds, count = _time(trainer, state, length, rows)
  share = 1.0 if trainer.config.data.packing else (
      trainer.batches.mean_length / length)
  total = seconds * share * trainer.num_steps
  return {
      **costs, 'seconds_per_step': f'{seconds:.3g} for {_shape(length, rows)}',
      'eta': (f'{_clock(total)}: an estimate from {count} of '
              f'{trainer.num_steps} steps, by tokens and padding, without '
              'compiling and evaluation')}


def _time(trainer: trainer_lib.Trainer, state: Any, length: int,
          rows: dict[str, np.ndarray]) -> tuple[float, int]:
  """Returns the median seconds of a step, and the number of steps timed.

  The first step is left out if there are others. It compiles nothing.
  """
  seconds: list[float] = []
  began = time.perf_counter()
  while len(seconds) <= STEPS and (
      not seconds or time.perf_counter() - began < SECONDS):
    start = time.perf_counter()
    state, values = trainer.parallel.step(state, trainer.place(length, rows))
    jax.block_until_ready(values)
    seconds.append(time.perf_counter() - start)
  timed = seconds[1:] or seconds
  return float(np.median(timed)), len(timed)


def _memory(trainer: trainer_lib.Trainer, size: int) -> tuple[int, float]:
  """Returns the bytes that a step needs, and the bytes that are free.

  `size` are the bytes it needs on each device. Devices of a CPU share one
  memory, so that their needs add up.
  """
  local = [d for d in trainer.devices
           if d.process_index == jax.process_index()]
  return (size * len(local) if local[0].platform == 'cpu' else size,
          devices.free_bytes(local[0]))


def _positions(length: int, rows: dict[str, np.ndarray]) -> int:
  """Returns the number of positions in a batch: tokens and padding."""
  return length * rows.get('packed_row', rows['window']).size


def _shape(length: int, rows: dict[str, np.ndarray]) -> str:
  return f'[{_positions(length, rows) // length}, {length}]'


def _clock(seconds: float) -> str:
  minutes = math.ceil(seconds / 60)
  return (f'{seconds:.0f} s' if seconds < 120 else f'{minutes} min'
          if minutes < 120 else f'{minutes // 60} h {minutes % 60} min')
