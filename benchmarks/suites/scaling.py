"""Suite scaling: growth of cost with size, in two figures under --figures.

One figure shows step time against window length, batch size and devices, the
other search time against window length and longest span. The devices are
virtual and share the cores: their curve shows overhead and is flat at best.
"""

import pathlib
import time
from typing import Any

import jax
from matplotlib import figure
import numpy as np

from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search as search_lib
from benchmarks.suites import train
from qa_jax import config as config_lib
from qa_jax.io import plots
from qa_jax.span_scores import SpanScores
from qa_jax.training import trainer as trainer_lib

LENGTH, BATCH, CAP = 128, 8, 30  # fixed while another size grows
SEARCHES = ('two_stage', 'banded', 'dense')
SEARCH_LENGTH, SEARCH_BATCH = 384, 32
COLOURS = (plots.START, plots.END, '#009E73')


class Ours:
  """The calls of the worker of qa_jax."""

  def calls(self) -> dict[str, Any]:
    return {'step': self.step, 'search': self.search}

  def step(self, config: dict[str, Any], rounds: int) -> float:
    """Returns the least seconds of an update on full windows."""
    trainer = trainer_lib.build_trainer(config_lib.check_config(config))
    length = trainer.config.data.max_length
    longest = np.argsort(-trainer.windows.total_lengths, kind='stable')
    batch = trainer.windows.gather(
        np.resize(longest, trainer.config.train.batch_size), length)
    batch['row'] = np.arange(len(batch['token_ids']), dtype=np.int32)
    state = train.placed(trainer)
    seconds = []
    for _ in range(rounds + 1):
      began = time.perf_counter()
      state, metrics = trainer.parallel.step(
          state, trainer.parallel.place_batch(batch))
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - began)
    return min(seconds[1:])  # the first run compiles

  def search(self, name: str, length: int, cap: int, rounds: int) -> float:
    """Returns the least seconds per window of a search of random scores."""
    shape = SEARCH_BATCH, length
    rng = np.random.default_rng(0)
    mask = np.broadcast_to(np.arange(length) >= min(20, length // 2), shape)
    scores = SpanScores(*rng.normal(size=(2, *shape)).astype(np.float32))
    arguments = jax.device_put((scores, mask, mask))
    find, seconds = search_lib.program(name, cap), []
    for _ in range(10 * rounds + 1):
      began = time.perf_counter()
      jax.block_until_ready(find(*arguments))
      seconds.append(time.perf_counter() - began)
    return min(seconds[1:]) / SEARCH_BATCH


def run(session: Session) -> Outcome:
  """Measures the curves and draws their figures."""
  out, sizes = Outcome(), session.sizes
  with session.worker('ours', 'scaling') as ours:
    step = lambda **fields: ours.call(
        'step', rounds=session.rounds, config=_config(session, **fields))
    out.curves['step'] = {
        'window length': [(n, step(length=n)) for n in sizes.scaling_lengths],
        'batch': [(n, step(batch=n)) for n in sizes.scaling_batches]}
    find = lambda name, length, cap: ours.call(
        'search', name=name, length=length, cap=cap, rounds=session.rounds)
    out.curves['search'] = {
        'window length': {name: [(n, find(name, n, CAP))
                                 for n in sizes.scaling_lengths]
                          for name in SEARCHES},
        'longest span': {name: [(n, find(name, SEARCH_LENGTH, n))
                                for n in sizes.scaling_caps]
                         for name in SEARCHES}}
  out.curves['step']['devices'] = [
      (n, _on_devices(session, n)) for n in sizes.scaling_devices]
  return out


def _config(session: Session, length: int = LENGTH, batch: int = BATCH,
            devices: int = 1) -> dict[str, Any]:
  return session.config(
      model__preset='mini', data__max_length=length, data__buckets=[],
      data__train='synthetic(size=32, sentences=80)',
      data__window_overlap=8, data__max_question_length=24,
      data__vocab='', train__batch_size=batch, parallel__num_devices=devices)


def _on_devices(session: Session, devices: int) -> float:
  """Times one batch over virtual devices, in a process of its own."""
  with session.worker('ours', 'scaling', extra={
      'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}) as ours:
    return ours.call('step', rounds=session.rounds,
                     config=_config(session, devices=devices))


def draw(curves: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
  """Draws scaling_step.svg and scaling_search.svg and returns their paths."""
  labels = {'window length': 'window length (tokens)',
            'batch': 'batch (windows)', 'longest span': 'longest span (tokens)',
            'devices': 'virtual devices on the same cores'}
  held = {'window length': f'batch {BATCH}', 'batch': f'{LENGTH} tokens',
          'devices': f'batch {BATCH}, {LENGTH} tokens'}
  fig = figure.Figure(figsize=(9, 3), layout='constrained')
  panels = zip(fig.subplots(1, 3), curves['step'].items(), strict=True)
  for axes, (name, points) in panels:
    _plot(axes, points, COLOURS[0], scale=1e3)
    axes.set(xlabel=labels[name], ylabel='step (ms)', title=held[name])
    axes.set_ylim(bottom=0)
  fig2 = figure.Figure(figsize=(7, 3), layout='constrained')
  panels = zip(fig2.subplots(1, 2, sharey=True), curves['search'].items(),
               strict=True)
  for axes, (name, by_search) in panels:
    for (search_name, points), colour in zip(
        by_search.items(), COLOURS, strict=True):
      _plot(axes, points, colour, scale=1e6, label=search_name)
    axes.set(xlabel=labels[name], yscale='log', ylabel='search (µs a window)',
             title={'window length': f'spans of at most {CAP}',
                    'longest span': f'{SEARCH_LENGTH} tokens'}[name])
    axes.legend()
  paths = [folder / 'scaling_step.svg', folder / 'scaling_search.svg']
  for one, path in zip((fig, fig2), paths, strict=True):
    plots.save_figure(one, path)
  return paths


def _plot(axes: Any, points: list[tuple[int, float]], colour: str,
          scale: float, label: str = '') -> None:
  axes.plot([x for x, _ in points], [scale * y for _, y in points], colour,
            marker='o', label=label or None)
