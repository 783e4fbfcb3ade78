"""Stages of the GPU check: an update against a CPU's, and updates a second."""

from concurrent import futures
import os
import time

import jax
import numpy as np
import optax

from benchmarks.gpu import cases
from benchmarks.gpu import results as results_lib
from qa_jax.models import attention
from qa_jax.training import trainer as trainer_lib

TINY = results_lib.TINY
PEAK = 989e12  # FLOP/s of bfloat16 of an H100 or H200, by the data sheet
# Attention, dtype, packing, parallel.mode → largest error of the gradients.
UPDATES = {('xla', 'float32', False, 'jit'): 1e-4,
           ('xla', 'float32', True, 'pmap'): 1e-4,
           ('xla', 'float32', False, 'mesh'): 1e-4,
           ('pallas', 'float32', True, 'jit'): 1e-4,
           ('xla', 'bfloat16', False, 'jit'): 3e-2,
           ('pallas', 'bfloat16', True, 'jit'): 3e-2,
           ('cudnn', 'bfloat16', False, 'jit'): 3e-2}
# Preset, attention, packing, windows, length, dtype.
SPEED = (('base', 'xla', False, 32, 384, 'bfloat16'),
         ('base', 'pallas', False, 32, 384, 'bfloat16'),
         ('base', 'pallas', True, 32, 384, 'bfloat16'),
         ('base', 'cudnn', False, 32, 384, 'bfloat16'),
         ('minilm_l6', 'xla', False, 128, 192, 'bfloat16'),
         ('minilm_l6', 'pallas', False, 128, 192, 'bfloat16'),
         ('minilm_l6', 'pallas', True, 64, 384, 'bfloat16'),
         ('base', 'pallas', True, 128, 384, 'bfloat16'),
         ('base', 'xla', False, 32, 384, 'tf32'),
         ('base', 'xla', False, 32, 384, 'float32'))
TINY_SPEED = (('tiny', 'xla', False, 4, 64, 'bfloat16'),
              ('tiny', 'xla', True, 4, 64, 'float32'))


def update(results: results_lib.Results) -> None:
  """Compares updates here with those of a CPU, and with a second run here."""
  if jax.default_backend() != 'gpu':
    attention.LIMITS['pallas'] = ()  # a rehearsal: the kernels are interpreted
  for case, bound in UPDATES.items():
    name, _, packing, _ = case
    if name == 'cudnn' and TINY:
      continue
    results.attempt(f'{" ".join(map(str, case[:2]))} '
                    f'{"packed" if packing else "padded"} {case[3]}', _update,
                    results, case, bound)


def _update(results, case, bound: float):
  """Compares the first moments, which are a tenth of the clipped gradients."""
  def trainer(name, dtype, packing, mode):
    return trainer_lib.build_trainer(cases.config(
        results.directory, preset='tiny', batch=8, length=96, questions=60,
        vocab_size=2500, attention=name, dtype=dtype, packing=packing,
        attention_dropout=0.0 if case[0] == 'cudnn' else 0.1,
        parallel__mode=mode))

  def moments(state):
    return np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(
        optax.tree_utils.tree_get(state.opt_state, 'mu'))])

  here, cpu = trainer(*case), trainer('xla', *case[1:3], 'jit')
  initial = jax.device_get(cpu.state)  # a step donates its state
  rows = cpu.batches.shapes(1)[0]
  expected, values = jax.jit(cpu.step)(*jax.device_put(
      (initial, cpu.batches.gather(*rows)), jax.devices('cpu')[0]))
  twice = []
  for _ in range(2):
    state, found = here.parallel.step(jax.device_put(
        initial, here.parallel.state_sharding(initial)), here.place(*rows))
    twice.append(moments(state))
  expected = moments(expected)
  error = float(np.linalg.norm(twice[0] - expected) / np.linalg.norm(expected))
  return dict(gradient_error=error,
              loss_error=abs(float(found['loss']) / float(values['loss']) - 1),
              repeats_bitwise=np.array_equal(*twice), ok=error <= bound)


def speed(results: results_lib.Results) -> None:
  """Measures updates: all programs are compiled in a pool, then run alone."""
  pool, started = futures.ThreadPoolExecutor(4), {}
  for case in TINY_SPEED if TINY else SPEED:
    preset, name, packing, batch, length, dtype = case
    trainer = trainer_lib.build_trainer(cases.config(
        results.directory, questions=200 if TINY else 2000, preset=preset,
        attention=name, packing=packing, batch=batch, length=length,
        dtype=dtype, attention_dropout=0.0 if name == 'cudnn' else 0.1))
    shape = trainer.batches.shapes(1)[0]
    lowered = trainer.parallel.lower(trainer.state, trainer.place(*shape))
    started[case] = trainer, shape, pool.submit(_compile, lowered)
  for (preset, name, packing, batch, length, dtype), run in started.items():
    results.attempt(
        f'{preset} {name} {dtype} B{batch} L{length}{" packed" * packing}',
        _measure, preset, *run)
  os._exit(0)  # Programs that still compile would keep this process alive.


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
  began = time.perf_counter()
  return lowered.compile(), time.perf_counter() - began


def _measure(preset, trainer, shape, future) -> dict[str, float]:
  """Returns the median time of an update and what follows from it."""
  program, compile_seconds = future.result(timeout=300)
  batch, count = trainer.place(*shape), 2 if TINY else 10
  state = jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state))
  took = []
  for _ in range(4):
    began = time.perf_counter()
    for _ in range(count):
      state, _ = program(state, batch)
    jax.block_until_ready(state)
    took.append((time.perf_counter() - began) / count)
  seconds = sorted(took[1:])[1]
  lengths = trainer.batches.lengths_of(shape[1]['window'])
  return {'ms': 1e3 * seconds, 'windows_per_s': len(lengths) / seconds,
          'tokens_per_s': float(lengths.sum()) / seconds,
          'mfu': cases.flops(preset, lengths) / seconds / PEAK,
          'padding': 1 - float(lengths.sum() / batch['token_ids'].size),
          'compile_s': compile_seconds}
