"""Plots of a run and of span scores, drawn by matplotlib without a display."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure
import numpy as np

from qa_jax import errors

START, END = '#0072B2', '#D55E00'  # colour-blind safe (Wong, 2011)
TOKEN_INCHES, LENGTH_INCHES = 0.115, 0.08  # of a column and a row of the band
SHORT_TOKENS = 48  # longer passages are drawn one below the other


def plot_learning_curve(rows: Sequence[Mapping[str, Any]],
                        path: pathlib.Path) -> None:
  """Draws loss and held-out EM and F1 over the train steps of metrics.jsonl."""
  train = [r for r in rows if r['split'] == 'train']
  held_out = [r for r in rows if r['split'] != 'train']
  fig = figure.Figure(figsize=(8, 3), layout='constrained')
  left, right = fig.subplots(1, 2)
  left.plot([r['step'] for r in train],  # a skipped step has no loss
            [r.get('loss', np.nan) for r in train], START)
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
  """Draws the scores of one passage under each (question, SpanView, answer).

  One block a question: the probability of each context token as start and as
  end, then the band of span scores, a column a start token and a row a span
  length. A square marks the best span. `by_layer` adds the start and end
  scores that the head computes from each encoder layer, if it can. Blocks of
  short passages stand side by side. A context without a token is a UserError.
  """
  by_layer = by_layer and all(v.start_by_layer is not None for _, v, _ in views)
  tokens = max(int(v.context_mask.sum()) for _, v, _ in views)
  if not tokens:
    raise errors.UserError('the context has no token to draw')
  lengths = min(max(v.band.shape[1] for _, v, _ in views), tokens)
  heights = [1.4, max(1.2, LENGTH_INCHES * lengths)] + 2 * by_layer * [1.0]
  beside = len(views) if tokens <= SHORT_TOKENS else 1
  below = len(views) // beside
  fig = figure.Figure(
      figsize=(beside * (TOKEN_INCHES * max(tokens, 30) + 1.8),
               below * (sum(heights) + 1.6)), layout='constrained')
  # A colour bar has axes of its own, so that all panels are equally wide.
  axes = fig.subplots(
      len(heights) * below, 2 * beside, squeeze=False,
      height_ratios=heights * below, width_ratios=[1, 0.012] * beside)
  for n, (question, view, answer) in enumerate(views):
    row, column = len(heights) * (n // beside), 2 * (n % beside)
    panels = axes[row:row + len(heights), column]
    bars = axes[row:row + len(heights), column + 1]
    bars[0].set_axis_off()
    keep = np.flatnonzero(view.context_mask)
    panels[0].set_title(f'{question}\n→ {answer or "(no answer)"}', wrap=True,
                        loc='left', parse_math=False)
    _probabilities(panels[0], view, keep)
    _band(panels[1], bars[1], view, keep)
    if by_layer:
      _depth(panels[2], bars[2], view.start_by_layer, 'S·h', keep)
      _depth(panels[3], bars[3], view.end_by_layer, 'E·h', keep)
    for panel in panels:
      panel.set_xlim(-0.5, len(keep) - 0.5)
  save_figure(fig, path)


def _probabilities(ax: axes_lib.Axes, view: Any, keep: np.ndarray) -> None:
  where = np.arange(len(keep))
  ax.bar(where - 0.2, view.p_start[keep], 0.4, color=START, label='p(start)')
  ax.bar(where + 0.2, view.p_end[keep], 0.4, color=END, label='p(end)')
  ax.set(ylabel='probability', ylim=(0, 1))
  ax.set_xticks(where, [view.tokens[i] for i in keep], rotation=90,
                fontsize=7, parse_math=False)
  ax.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, fontsize=8)


def _band(ax: axes_lib.Axes, bar: axes_lib.Axes, view: Any,
          keep: np.ndarray) -> None:
  band = view.band[keep, :len(keep)].T  # [span length - 1, start token]
  band = np.where(np.isfinite(band), band, np.nan)
  image = ax.imshow(band, cmap='viridis', aspect='auto')
  best = np.unravel_index(np.nanargmax(band), band.shape)
  ax.plot(best[1], best[0], 's', markersize=8, markerfacecolor='none',
          markeredgecolor=END, markeredgewidth=2)
  ax.set_xticks([])
  shown = np.arange(0, len(band) + 1, 2 if len(band) <= 10 else 5)
  shown[0] = 1
  ax.set_yticks(shown - 1, shown)
  ax.set(xlabel='start token i (labels above)', ylabel='span length in tokens')
  ax.figure.colorbar(image, cax=bar, label='span score' if view.joint
                     else 'S·h_i + E·h_j')


def _depth(ax: axes_lib.Axes, bar: axes_lib.Axes, scores: np.ndarray,
           name: str, keep: np.ndarray) -> None:
  """Draws one row a layer and marks the best token of each layer."""
  image = ax.imshow(scores[:, keep], cmap='viridis', aspect='auto')
  ax.plot(scores[:, keep].argmax(axis=1), np.arange(len(scores)), 's',
          markersize=6, markerfacecolor='none', markeredgecolor=END)
  ax.set_xticks([])
  ax.set_yticks(np.arange(len(scores)))
  ax.set(ylabel=f'{name}\nafter layer')
  ax.figure.colorbar(image, cax=bar)


def save_figure(fig: figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure to `path` and creates its parent directories."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, dpi=110)
