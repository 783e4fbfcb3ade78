"""The dry run of training: sizes, memory and time of a run, before it runs."""

import math
import time
from typing import Any

import jax
import numpy as np

from qa_jax.runtime import devices
from qa_jax.runtime import processes
from qa_jax.training import trainer as trainer_lib

STEPS = 3  # steps that are timed at most, after a first one
SECONDS = 20.0  # after this time no further step is started
MEMORY_SHARE = 0.8  # of the free memory that a timed step may need
MEBIBYTE = 2**20


def summarize(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Computes the lines of a dry run, by name.

  Compiles the step for the largest batch, and times a few steps if they fit in
  the free memory. Writes no run.
  """
  config = trainer.config
  return {
      'parameters': count_parameters(trainer),
      'state_megabytes': round(sum(
          x.nbytes for x in jax.tree.leaves(trainer.state)) / MEBIBYTE, 1),
      'devices': device_text(trainer),
      'examples': len(trainer.windows.examples),
      'windows': len(trainer.windows),
      'windows_trained_on': len(trainer.batches.indices),
      'alignment': trainer_lib.describe_alignment(trainer.windows.audit),
      'batch_shapes': (trainer.batches.describe() if trainer.batches.packing
                       else [[config.train.batch_size, b]
                             for b in trainer.buckets]),
      'updates_per_dispatch': trainer.dispatch,
      'steps_per_epoch': trainer.batches.steps_per_epoch,
      'steps': trainer.num_steps,
      'vocabulary': len(trainer.windows.tokenizer.vocab),
      **_costs(trainer)}


def count_parameters(trainer: trainer_lib.Trainer) -> int:
  """Returns the number of parameters of encoder and head."""
  return sum(x.size for x in jax.tree.leaves(trainer.state.params))


def describe_parameters(trainer: trainer_lib.Trainer) -> str:
  """Returns the number of parameters, and that of the head if it learns alone.
  """
  text = f'{count_parameters(trainer):,} parameters'
  if not trainer.config.optim.freeze_encoder:
    return text
  head = sum(x.size for x in jax.tree.leaves(trainer.state.params['head']))
  return f'{text} ({head:,} of the head are trained)'


def device_text(trainer: trainer_lib.Trainer) -> str:
  """Returns the number and kind of the devices: '2 x cpu'."""
  return f'{len(trainer.devices)} x {trainer.devices[0].device_kind}'


def _costs(trainer: trainer_lib.Trainer) -> dict[str, Any]:
  """Returns the memory of the compiled step and the time of a few steps."""
  length, rows = max(trainer.batches.shapes(trainer.num_steps),
                     key=lambda batch: math.prod(
                         trainer_lib.batch_shape(*batch)))
  shape = str([*trainer_lib.batch_shape(length, rows)])
  state = devices.put_tree(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  batch = trainer.place(length, rows)
  memory = trainer.parallel.compile(state, batch).memory_analysis()
  costs: dict[str, Any] = {}
  if memory is not None:  # not every backend reports it
    needed = memory.temp_size_in_bytes
    costs['activation_megabytes'] = (
        f'{needed / MEBIBYTE:.1f} a device, for {shape}')
    local = [d for d in trainer.devices
             if d.process_index == jax.process_index()]
    if local[0].platform == 'cpu':  # all its devices share one memory
      needed *= len(local)
    free = devices.free_bytes(local[0])
    fits, = processes.broadcast_from_first([needed <= MEMORY_SHARE * free])
    if not fits:
      return {**costs, 'eta': (
          f'not timed: beside the state a step needs {needed / MEBIBYTE:,.0f} '
          f'MiB, and {free / MEBIBYTE:,.0f} MiB are free')}
  seconds, count = _time(trainer, state, length, rows)
  share = 1.0 if trainer.batches.packing else (
      trainer.batches.mean_length / length)
  total = _clock(seconds * share * trainer.num_steps)
  return {**costs, 'seconds_per_step': f'{seconds:.3g} for {shape}', 'eta': (
      f'{total}: an estimate from {count} timed steps, by tokens and padding, '
      'without compiling and evaluation')}


def _time(trainer: trainer_lib.Trainer, state: Any, length: int,
          rows: dict[str, np.ndarray]) -> tuple[float, int]:
  """Returns the median seconds of a step, and the number of steps timed.

  The first step is left out if there are others. It compiles nothing. The first
  process decides how many steps all make: one more would wait for ever.
  """
  seconds: list[float] = []
  processes.wait_for_all('compiled')  # Some may have longer to compile.
  began, goes_on = time.perf_counter(), True
  while goes_on:
    start = time.perf_counter()
    state, values = trainer.parallel.step(state, trainer.place(length, rows))
    jax.block_until_ready(values)
    seconds.append(time.perf_counter() - start)
    goes_on, = processes.broadcast_from_first([
        len(seconds) <= STEPS and time.perf_counter() - began < SECONDS])
  timed = seconds[1:] or seconds
  return float(np.median(timed)), len(timed)


def _clock(seconds: float) -> str:
  minutes = math.ceil(seconds / 60)
  return (f'{seconds:.0f} s' if seconds < 120 else f'{minutes} min'
          if minutes < 120 else f'{minutes // 60} h {minutes % 60} min')
