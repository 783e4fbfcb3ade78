"""Suite variants: a train step of every head and objective, and every search.

Each variant of configs/sweep_heads.py, sweep_objectives.py and
sweep_decoders.py runs in turn with the default, on the same windows. Memory is
what the compiler plans for the temporaries of a program.
"""

from collections.abc import Callable
import functools
import runpy
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.session import ROOT
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search as suites_search
from benchmarks.suites import train
from qa_jax import config as config_lib
from qa_jax import registry
from qa_jax.decoding import search as search_lib
from qa_jax.span_scores import SpanScores
from qa_jax.training import dry_run
from qa_jax.training import trainer as trainer_lib

LENGTH = 192  # tokens of every window of a step
SEARCH_SHAPE = 32, 384  # windows, tokens
SEARCH_REPEATS = 20
FIELDS = 'model.head', 'objective'  # fields that a train step depends on


class Ours:
  """The calls of the worker of qa_jax: the default and one other program."""

  def __init__(self):
    self._programs: dict[str, Callable[[], float]] = {}

  def calls(self) -> dict[str, Any]:
    return {'step': self.step, 'search': self.search, 'run': self.run,
            'drop': self.drop}

  def run(self, name: str) -> float:
    return self._programs[name]()

  def drop(self, name: str) -> None:
    del self._programs[name]

  def step(self, name: str, config: dict[str, Any]) -> dict[str, float]:
    """Compiles an update and returns its memory."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    state = train.placed(trainer)
    batch = trainer.place(*trainer.batches.next_rows())
    update = trainer.parallel.compile(state, batch)

    def run() -> float:
      nonlocal state
      began = time.perf_counter()
      state, metrics = update(state, batch)
      jax.block_until_ready((state, metrics))
      return time.perf_counter() - began

    run()
    self._programs[name] = run
    return {'megabytes': temporary_megabytes(update),
            'parameters': dry_run.count_parameters(trainer)}

  def search(self, name: str, spec: str) -> dict[str, float]:
    """Compiles a search of random scores and returns its memory."""
    rng = np.random.default_rng(0)
    mask = np.broadcast_to(np.arange(SEARCH_SHAPE[1]) >= 20, SEARCH_SHAPE)
    scores = SpanScores(*rng.normal(size=(2, *SEARCH_SHAPE)).astype(np.float32))
    arguments = jax.device_put((scores, mask, mask))
    find = jax.jit(functools.partial(
        registry.build(search_lib.SEARCHES, spec, what='search'),
        max_answer_length=suites_search.CAP,
        n_best=suites_search.N_BEST)).lower(*arguments).compile()

    def run() -> float:
      began = time.perf_counter()
      for _ in range(SEARCH_REPEATS):
        jax.block_until_ready(find(*arguments))
      return time.perf_counter() - began

    run()
    self._programs[name] = run
    return {'megabytes': temporary_megabytes(find)}


def temporary_megabytes(program: jax.stages.Compiled) -> float:
  """Returns the MiB of temporaries on a device, as the compiler plans them."""
  return program.memory_analysis().temp_size_in_bytes / 2**20


def run(session: Session) -> Outcome:
  """Returns one row per variant beside the default."""
  out = Outcome()
  rows = session.sizes.train_batch[session.encoders[0]]
  fields = train.encoder_fields(session, session.encoders[0])
  variant = lambda name, **varied: {'name': name, 'config': session.config(
      **fields, data__buckets=[], data__max_length=LENGTH,
      data__window_overlap=LENGTH // 3, train__batch_size=rows, **varied)}
  with session.worker('ours', 'variants') as ours:
    steps = {**_varied('heads', FIELDS), **_varied('objectives', FIELDS)}
    _compare(session, ours, 'step', out, {
        name: variant(name, **{field.replace('.', '__'): value
                            for field, value in varied.items()})
        for name, varied in steps.items()}, rows)
    _compare(session, ours, 'search', out, {
        name: {'name': name, 'spec': varied['decode.search']}
        for name, varied in _varied('decoders', ('decode.search',)).items()},
        SEARCH_SHAPE[0] * SEARCH_REPEATS)
  return out


def _varied(sweep: str, fields: tuple[str, ...]) -> dict[str, dict[str, Any]]:
  """Returns variants of a sweep file that differ in `fields`, default first."""
  default = config_lib.Config().to_dict()
  named = {}
  sweep_variants = runpy.run_path(str(ROOT / 'configs' /
                                      f'sweep_{sweep}.py'))['sweep']
  for overrides in sweep_variants():
    config = config_lib.override(default, overrides)
    varied = {field: functools.reduce(
        lambda found, key: found[key], field.split('.'), config)
        for field in fields}
    named[', '.join(varied.values())] = varied
  return named


def _compare(session: Session, ours: harness.Worker, kind: str, out: Outcome,
             variants: dict[str, dict[str, Any]], windows: float) -> None:
  default, *others = variants
  took = ours.call(kind, **variants[default])
  _note(out, kind, default, took)
  for name in others:
    timing = ours.call(kind, **variants[name])
    pair = [harness.Contender('ours', which, lambda which=which: ours.call(
        'run', name=which), windows)
            for which in (default, name)]
    harness.interleave(pair, session.rounds)
    ours.call('drop', name=name)
    out.timings.append(pair[1].timing)
    out.rows.append(harness.Row(
        'variants', f'{kind} of {name}', pair[1].timing, pair[0].timing))
    _note(out, kind, name, timing, took['megabytes'])


def _note(out: Outcome, kind: str, name: str, took: dict[str, float],
          default: float = 0.0) -> None:
  ratio = f', {took["megabytes"] / default:.2f}-fold' if default else ''
  parameters = (f', {took["parameters"]:,} parameters'
                if 'parameters' in took else '')
  out.notes.append(f'variants: {kind} of {name}: {took["megabytes"]:,.1f} MiB '
                   f'of temporaries{ratio}{parameters}')
