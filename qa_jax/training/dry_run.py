"""What a run would be and take, without a run: --dry_run of training."""

import math
import time
from typing import Any

import jax
import numpy as np

from qa_jax.runtime import devices
from qa_jax.training import trainer as trainer_lib

STEPS = 3  # that are timed, beside a first one, or fewer:
SECONDS = 20.0  # no other is begun after this long
SHARE = 0.8  # of the memory there is that a step is tried with
MEBIBYTE = 2**20


def summarize(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Name → what to print. Compiles the step for the largest batch, and makes a
  few if its memory is there; writes nothing."""
  count = parameters(trainer)
  known = {
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
      'vocabulary': len(trainer.tokenizer.vocab)}
  return known | _costs(trainer)


def parameters(trainer: trainer_lib.Trainer) -> int:
  return sum(x.size for x in jax.tree.leaves(trainer.state.params))


def _shapes(trainer: trainer_lib.Trainer) -> list[list[int]] | str:
  if trainer.config.data.packing:
    return f'packed in rows of {trainer.buckets[-1]}'
  return [[trainer.config.train.batch_size, b] for b in trainer.buckets]


def _costs(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Memory of the compiled step, and times of steps that were made."""
  shapes = [(_positions(length, rows), length, rows)
            for length, rows in trainer.batches.shapes(trainer.num_steps)]
  _, length, rows = max(shapes, key=lambda shape: shape[0])
  state = devices.put_tree(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  batch = trainer.place(length, rows)
  memory = trainer.parallel.compile(state, batch).memory_analysis()
  found: dict[str, Any] = {}
  if memory is not None:  # a backend need not say
    found['activation_megabytes'] = (
        f'{memory.temp_size_in_bytes / MEBIBYTE:.1f} a device, for '
        f'{_shape(length, rows)}')
    needed, free = _memory(trainer, memory.temp_size_in_bytes)
    if needed > SHARE * free:
      return {**found, 'eta': (
          f'not timed: beside the state a step needs {needed / MEBIBYTE:,.0f} '
          f'MiB, and {free / MEBIBYTE:,.0f} MiB are free')}
  seconds, count = _time(trainer, state, length, rows)
  share = 1.0 if trainer.config.data.packing else (
      trainer.batches.mean_length / length)
  total = seconds * share * trainer.num_steps
  return {
      **found, 'seconds_per_step': f'{seconds:.3g} for {_shape(length, rows)}',
      'eta': (f'{_clock(total)}: an estimate from {count} of '
              f'{trainer.num_steps} steps, by tokens and padding, without '
              'compiling and evaluation')}


def _time(trainer: trainer_lib.Trainer, state: Any, length: int,
          rows: dict[str, np.ndarray]) -> tuple[float, int]:
  """Seconds of a step, and of how many that is the median. The first counts if
  there is no other: it was compiled before."""
  took: list[float] = []
  began = time.perf_counter()
  while len(took) <= STEPS and (
      not took or time.perf_counter() - began < SECONDS):
    start = time.perf_counter()
    state, values = trainer.parallel.step(state, trainer.place(length, rows))
    jax.block_until_ready(values)
    took.append(time.perf_counter() - start)
  timed = took[1:] or took
  return float(np.median(timed)), len(timed)


def _memory(trainer: trainer_lib.Trainer, size: int) -> tuple[int, float]:
  """Bytes that a step takes where it takes `size` on every device, and how
  many are free there: devices that are a CPU's share its memory."""
  here = [d for d in trainer.devices
          if d.process_index == jax.process_index()]
  return (size * len(here) if here[0].platform == 'cpu' else size,
          devices.free_bytes(here[0]))


def _positions(length: int, rows: dict[str, np.ndarray]) -> int:
  """Tokens and padding of a batch: what it takes grows with them."""
  return length * rows.get('packed_row', rows['window']).size


def _shape(length: int, rows: dict[str, np.ndarray]) -> str:
  return f'[{_positions(length, rows) // length}, {length}]'


def _clock(seconds: float) -> str:
  minutes = math.ceil(seconds / 60)
  return (f'{seconds:.0f} s' if seconds < 120 else f'{minutes} min'
          if minutes < 120 else f'{minutes // 60} h {minutes % 60} min')
