"""Plots of a run and of span scores, drawn by matplotlib without a display.

Glossary of shapes: L window length, W longest span, N encoder layers.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure
import numpy as np

from qa_jax import errors

START, END = '#0072B2', '#D55E00'  # colour-blind safe (Wong, 2011)


def plot_learning_curve(rows: Sequence[Mapping[str, Any]],
                        path: pathlib.Path) -> None:
  """Draws training loss and held-out EM and F1 over train steps.

  `rows` are those of metrics.jsonl.
  """
  train = [r for r in rows if r['split'] == 'train']
  held_out = [r for r in rows if r['split'] != 'train']
  fig = figure.Figure(figsize=(8, 3), layout='constrained')
  left, right = fig.subplots(1, 2)
  loss = [r.get('loss', np.nan) for r in train]  # a skipped step has no loss
  left.plot([r['step'] for r in train], loss, START)
  left.set(xlabel='step', ylabel='training loss (nats)', yscale='log')
  for name, colour in (('exact_match', END), ('f1', START)):
    right.plot([r['step'] for r in held_out], [r[name] for r in held_out],
               colour, marker='o', label=name)
  right.set(xlabel='step', ylabel='held-out score (%)', ylim=(0, 101))
  right.legend()
  save_figure(fig, path)


def plot_reliability(curves: Mapping[str, Sequence[Mapping[str, float]]],
                     path: pathlib.Path) -> None:
  """Draws a reliability diagram with the number of questions in each bin.

  `curves` maps labels to the results of `calibration.reliability_bins`, two at
  most. The last one is in front.
  """
  fig = figure.Figure(figsize=(4.5, 5), layout='constrained')
  top, below = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
  top.plot([0, 100], [0, 100], color='0.6', linewidth=1, label='calibrated')
  for (label, bins), colour, marker, side in zip(
      curves.items(), (END, START), 'so', (-1, 1), strict=False):
    at = [100 * b['confidence'] for b in bins]
    top.plot(at, [100 * b['accuracy'] for b in bins], color=colour,
             marker=marker, markersize=4, label=label)
    total = sum(b['count'] for b in bins)
    wide = 40 * (bins[0]['high'] - bins[0]['low'])
    below.bar([50 * (b['low'] + b['high']) + side * wide / 2 for b in bins],
              [100 * b['count'] / total for b in bins], wide, color=colour)
  top.set(ylabel='exactly right (%)', ylim=(0, 101), xlim=(0, 100))
  top.legend(loc='upper left')
  below.set(xlabel='probability of the answer (%)', ylabel='questions (%)')
  save_figure(fig, path)


def plot_spans(views: Sequence[tuple[str, Any, str]], path: pathlib.Path, *,
               by_layer: bool = False) -> None:
  """Draws the start, end and span scores of each (question, view, answer).

  A view is an inference.SpanView. The upper plot shows the probability of each
  context token as start and as end. The lower plot shows the scores of all
  spans, with a mark at the best one. `by_layer` adds the scores that the start
  vector S and the end vector E give to the output of each layer, if the head
  has both vectors. Two questions on one context have equal tokens, S and E but
  different scores, because the encoder's token vectors depend on the question.

  A UserError is raised if the context has no token.
  """
  by_layer = by_layer and all(
      v.start_by_layer is not None for _, v, _ in views)
  longest = max(int(v.context_mask.sum()) for _, v, _ in views)
  width = max(8.0, 0.11 * longest)
  ratios = [0.45, 1.0] + by_layer * [0.25, 0.25]
  fig = figure.Figure(figsize=(width * len(views), width * sum(ratios) * 0.6),
                      layout='constrained')
  axes = fig.subplots(len(ratios), len(views), squeeze=False,
                      height_ratios=ratios)
  for column, (question, view, answer) in zip(axes.T, views, strict=True):
    keep = np.flatnonzero(view.context_mask)
    if not len(keep):
      raise errors.UserError('the context has no token to draw')
    column[0].set_title(f'{question}\n→ {answer or "(no answer)"}', wrap=True,
                        parse_math=False)
    _probabilities(column[0], view, keep)
    _band(column[1], view, keep)
    if by_layer:
      _depth(column[2], view.start_by_layer, 'S·h', view, keep)
      _depth(column[3], view.end_by_layer, 'E·h', view, keep)
  save_figure(fig, path)


def _probabilities(ax: axes_lib.Axes, view: Any, keep: np.ndarray) -> None:
  where = np.arange(len(keep))
  ax.bar(where - 0.2, view.p_start[keep], 0.4, color=START, label='p(start)')
  ax.bar(where + 0.2, view.p_end[keep], 0.4, color=END, label='p(end)')
  ax.set(ylabel='probability', ylim=(0, 1))
  ax.set_xticks(where, [view.tokens[i] for i in keep], rotation=90,
                fontsize=7, parse_math=False)
  ax.legend(loc='upper right')


def _band(ax: axes_lib.Axes, view: Any, keep: np.ndarray) -> None:
  tokens = [view.tokens[i] for i in keep]
  where = np.arange(len(keep))
  square = np.where(np.isfinite(view.square), view.square, np.nan)
  image = ax.imshow(square, cmap='viridis')
  best = np.unravel_index(np.nanargmax(square), square.shape)
  ax.plot(best[1], best[0], 's', markersize=9, markerfacecolor='none',
          markeredgecolor=END, markeredgewidth=2)
  ax.set_xticks(where, tokens, rotation=90, fontsize=6, parse_math=False)
  ax.set_yticks(where, tokens, fontsize=6, parse_math=False)
  ax.set(xlabel='end token j', ylabel='start token i')
  ax.figure.colorbar(image, ax=ax, label='score of the span' if view.joint
                     else 'S·h_i + E·h_j')


def _depth(ax: axes_lib.Axes, scores: np.ndarray,  # [1 + N, L]
           name: str, view: Any, keep: np.ndarray) -> None:
  """Draws one row a layer, with a mark at the layer's best token."""
  image = ax.imshow(scores[:, keep], cmap='viridis', aspect='auto')
  ax.plot(scores[:, keep].argmax(axis=1), np.arange(len(scores)), 's',
          markersize=6, markerfacecolor='none', markeredgecolor=END)
  ax.set_xticks(np.arange(len(keep)), [view.tokens[i] for i in keep],
                rotation=90, fontsize=6, parse_math=False)
  ax.set_yticks(np.arange(len(scores)))
  ax.set(ylabel=f'{name}\nafter layer')
  ax.figure.colorbar(image, ax=ax)


def save_figure(fig: figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure to `path` and creates its parent directories."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, dpi=110)
