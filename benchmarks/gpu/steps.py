"""Stages of the GPU check: an update against a CPU's, and updates a second."""

from collections.abc import Iterable
from concurrent import futures
import functools
import math
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.gpu import cases
from benchmarks.gpu import results as results_lib
from qa_jax.models import attention
from qa_jax.training import trainer as trainer_lib

TINY = results_lib.TINY
# FLOP/s of dense bfloat16 products by the data sheets, by a part of JAX's name.
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12}
# Goals for BERT-base with its defaults on an H100, see docs/gpu.md.
WINDOWS_PER_SECOND, MFU = 3000.0, 0.3
# Attention, dtype, packing, parallel.mode → largest error of the gradients. The
# first row is the default of a GPU.
UPDATES = {('pallas', 'bfloat16', 'rows', 'pmap'): 3e-2,
           ('pallas', 'float32', 'rows', 'jit'): 1e-4,
           ('xla', 'float32', False, 'jit'): 1e-4,
           ('xla', 'float32', 'rows', 'pmap'): 1e-4,
           ('xla', 'float32', False, 'mesh'): 1e-4,
           ('xla', 'bfloat16', False, 'jit'): 3e-2,
           ('cudnn', 'bfloat16', False, 'jit'): 3e-2}


class Case(NamedTuple):
  """A train step to measure."""

  preset: str
  attention: str
  packing: bool | str
  batch: int  # windows
  length: int  # tokens
  dtype: str
  updates: int = 1  # of a dispatch

  def __str__(self) -> str:
    return (f'{self.preset} {self.attention} {self.dtype} B{self.batch} '
            f'L{self.length}' + ' packed' * bool(self.packing)
            + f', {self.updates} updates' * (self.updates > 1))


# The most important first. The first case has the defaults of a GPU.
SPEED = (Case('base', 'auto', 'rows', 32, 384, 'bfloat16', 4),
         Case('base', 'auto', 'rows', 128, 384, 'bfloat16'),
         Case('minilm_l6', 'auto', 'rows', 16, 384, 'bfloat16', 4),
         Case('minilm_l6', 'auto', 'rows', 16, 384, 'bfloat16'),
         Case('base', 'pallas', False, 32, 384, 'bfloat16'),
         Case('base', 'cudnn', False, 32, 384, 'bfloat16'),
         Case('base', 'xla', False, 32, 384, 'bfloat16'),
         Case('minilm_l6', 'auto', 'rows', 128, 384, 'bfloat16'),
         Case('base', 'auto', 'rows', 32, 384, 'tf32'),
         Case('base', 'auto', 'rows', 32, 384, 'float32'))
TINY_SPEED = (Case('tiny', 'auto', 'rows', 4, 64, 'bfloat16', 2),
              Case('tiny', 'xla', False, 4, 64, 'float32'))
AT_ONCE = 4  # programs that are compiled side by side


def update(results: results_lib.Results) -> None:
  """Compares updates here with those of a CPU, and with a second run here."""
  on_gpu = jax.default_backend() == 'gpu'
  if not on_gpu:
    attention.LIMITS['pallas'] = ()  # a rehearsal: the kernels are interpreted
  expected_of = functools.cache(functools.partial(_update_of_cpu, results))
  for case, bound in UPDATES.items():
    name = (f'{case[0]} {case[1]} {"packed" if case[2] else "padded"} '
            f'{case[3]}')
    if case[0] == 'cudnn' and not on_gpu:
      results.record(name, left_out='it runs on a GPU')
    else:
      results.attempt(name, _update, results, case, bound, expected_of)
  results.attempt('four updates a dispatch', _dispatch, results)


def _trainer(results: results_lib.Results, name: str, dtype: str,
             packing: bool | str, mode: str = 'jit', *, dropout: float = 0.1,
             updates: int = 1) -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(cases.config(
      results.scratch, preset='tiny', batch=8, length=96, questions=60,
      vocab_size=2500, attention=name, dtype=dtype, packing=packing,
      attention_dropout=dropout, parallel__mode=mode, model__num_layers=1,
      train__updates_per_dispatch=updates))


def _moments(state: Any) -> np.ndarray:
  """Returns the first moments: after an update, a tenth of the gradients."""
  return np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(
      optax.tree_utils.tree_get(state.opt_state, 'mu'))])


def _placed(trainer: trainer_lib.Trainer, state: Any) -> Any:
  return jax.device_put(state, trainer.parallel.state_sharding(state))


def _update_of_cpu(results: results_lib.Results, dtype: str,
                   packing: bool | str, dropout: float
                   ) -> tuple[Any, np.ndarray, float]:
  """Returns the initial state, and moments and loss of an update of a CPU."""
  cpu = _trainer(results, 'xla', dtype, packing, dropout=dropout)
  initial = jax.device_get(cpu.state)  # a step donates its state
  state, values = jax.jit(cpu.step)(*jax.device_put(
      (initial, cpu.batches.gather(*cpu.batches.shapes(1)[0])),
      jax.devices('cpu')[0]))
  return initial, _moments(state), float(values['loss'])


def _update(results, case, bound: float, expected_of):
  """Compares the clipped gradients of an update."""
  dropout = 0.0 if case[0] == 'cudnn' else 0.1
  initial, expected, loss = expected_of(*case[1:3], dropout)
  here, twice = _trainer(results, *case, dropout=dropout), []
  for _ in range(2):
    state, found = here.parallel.step(
        _placed(here, initial), here.place(*here.batches.shapes(1)[0]))
    twice.append(_moments(state))
  error = float(np.linalg.norm(twice[0] - expected) / np.linalg.norm(expected))
  return dict(gradient_error=error,
              loss_error=abs(float(found['loss']) / loss - 1),
              repeats_bitwise=np.array_equal(*twice), ok=error <= bound)


def _dispatch(results) -> dict[str, Any]:
  """Compares the moments of four updates, in one dispatch and one by one."""
  one, four = (_trainer(results, 'xla', 'float32', 'rows', updates=count)
               for count in (1, 4))
  initial = jax.device_get(one.state)
  length, rows = one.batches.next_alike(4)
  expected = _placed(one, initial)
  for batch in rows:
    expected, _ = one.parallel.step(expected, one.place(length, batch))
  found, _ = four.parallel.step(
      _placed(four, initial), four.place(length, *rows))
  found, expected = _moments(found), _moments(expected)
  error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
  return dict(updates=len(rows), error=error, ok=error <= 1e-4)


def speed(results: results_lib.Results) -> None:
  """Measures updates, one program after another.

  A few programs are compiled side by side. They are measured only when all of
  them are compiled, because XLA times kernels on the device meanwhile.
  """
  every = TINY_SPEED if TINY else SPEED
  for first in range(0, len(every), AT_ONCE):
    _speed_of(results, every[first:first + AT_ONCE])
  os._exit(0)  # A program that still compiles would keep this process alive.


def _speed_of(results: results_lib.Results, some: Iterable[Case]) -> None:
  pool, started = futures.ThreadPoolExecutor(AT_ONCE), {}
  for case in some:
    try:
      started[case] = _start(results, pool, case)
    except Exception as e:  # the other cases go on
      results.fail(str(case), e)
  futures.wait([run[-1] for run in started.values()],
               timeout=max(results.seconds_left, 0))
  for case in [*started]:  # `pop` frees the memory of the state
    results.attempt(str(case), _measure, case, *started.pop(case))


def _start(results, pool, case: Case):
  """Starts to compile a case; returns trainer, batch shape and program."""
  trainer = trainer_lib.build_trainer(cases.config(
      results.scratch, questions=200 if TINY else 2000, preset=case.preset,
      attention=case.attention, packing=case.packing, batch=case.batch,
      length=case.length, dtype=case.dtype,
      train__updates_per_dispatch=case.updates,
      data__cache=str(results.scratch / 'windows'),
      attention_dropout=0.0 if case.attention == 'cudnn' else 0.1))
  length, rows = trainer.batches.next_alike(case.updates)
  lowered = trainer.parallel.lower(trainer.state, trainer.place(length, *rows))
  return trainer, length, rows, pool.submit(_compile, lowered)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
  began = time.perf_counter()
  return lowered.compile(), time.perf_counter() - began


def peak_of(kind: str) -> float:
  """Returns the FLOP/s of a card by its name; infinity if it is no known one.

  A model FLOP utilisation of 0 then fails the goal, which is for an H100.
  """
  return next((peak for name, peak in PEAKS.items() if name in kind), math.inf)


def _measure(case: Case, trainer, length, rows, future) -> dict[str, Any]:
  """Returns the median time of an update and what follows from it."""
  program, compile_seconds = future.result(timeout=0)
  batch, count = trainer.place(length, *rows), 2 if TINY else 10
  state = _placed(trainer, trainer.state)
  took = []
  for _ in range(4):
    began = time.perf_counter()
    for _ in range(count):
      state, _ = program(state, batch)
    jax.block_until_ready(state)
    took.append((time.perf_counter() - began) / count / len(rows))
  seconds = sorted(took[1:])[1]
  lengths = np.concatenate([
      trainer.batches.lengths_of(some['window']) for some in rows])
  windows = len(lengths) / len(rows)  # of an update
  peak = peak_of(jax.devices()[0].device_kind)
  mfu = cases.flops(case.preset, lengths) / len(rows) / seconds / peak
  goals = {} if case != SPEED[0] else {
      'goals': f'{WINDOWS_PER_SECOND:.0f} windows/s, mfu {MFU}',
      'ok': bool(windows / seconds >= WINDOWS_PER_SECOND and mfu >= MFU)}
  return {'ms': 1e3 * seconds, 'windows_per_s': windows / seconds,
          'tokens_per_s': float(lengths.sum()) / len(rows) / seconds,
          **({'mfu': mfu} if peak < math.inf else {}),
          'padding': 1 - float(lengths.sum() / batch['token_ids'].size),
          'compile_s': compile_seconds, **goals}
