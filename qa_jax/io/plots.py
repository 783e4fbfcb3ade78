"""Plots of a run and of span scores, drawn by matplotlib without a display."""

from collections.abc import Mapping, Sequence
import io
import pathlib
import textwrap
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure
import numpy as np

from qa_jax import errors
from qa_jax.io import files

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
  """Draws a reliability diagram and the number of questions in each bin.

  `curves` maps labels to the results of `calibration.reliability_bins`, two at
  most. The last one is in front.
  """
  fig = figure.Figure(figsize=(5.5, 5.2), layout='constrained')
  top, below = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
  top.plot([0, 100], [0, 100], color='0.6', linewidth=1, label='calibrated')
  most = max(b['count'] for bins in curves.values() for b in bins)
  for (label, bins), colour, marker, side in zip(
      curves.items(), (END, START), 'so', (-1, 1), strict=False):
    # No line joins the bins: each is a mean of different questions.
    top.plot([100 * b['confidence'] for b in bins],
             [100 * b['accuracy'] for b in bins], marker, color=colour,
             markersize=5, label=label)
    wide = 45 * (bins[0]['high'] - bins[0]['low'])
    at = [50 * (b['low'] + b['high']) + side * wide / 2 for b in bins]
    below.bar(at, [b['count'] for b in bins], wide, color=colour)
    for x, b in zip(at, bins, strict=True):
      below.text(x, b['count'] + 0.02 * most, f'{b["count"]}', rotation=90,
                 ha='center', va='bottom', fontsize=6)
  top.set(ylabel='exactly right (%)', ylim=(-3, 103), xlim=(0, 100))
  fig.legend(*top.get_legend_handles_labels(), fontsize=8, ncols=3,
             loc='outside upper center')
  below.set(xlabel='probability of the answer (%)', ylabel='questions',
            ylim=(0, 1.35 * most))
  save_figure(fig, path)


def plot_spans(views: Sequence[tuple[str, Any, str]], path: pathlib.Path, *,
               tokens: Sequence[np.ndarray] | None = None,
               by_layer: bool = False) -> None:
  """Draws the scores of one passage under each (question, SpanView, answer).

  One block a question: the probability of each context token as start and as
  end, then the band of span scores, a column a start token and a row a span
  length. A square marks the answer. `tokens` are the numbers of the context
  tokens to draw for each view, ascending; a blank column stands for tokens that
  are left out. The first column is [CLS] with probability and score of null,
  unless the null rule is `never`. All blocks have one colour scale. `by_layer`
  adds the start and end scores that the head computes from each encoder layer,
  if it can. Blocks of few tokens stand side by side. A context without a token,
  or without any score to draw, is a UserError.
  """
  by_layer = by_layer and all(v.start_by_layer is not None for _, v, _ in views)
  if not all(v.context_mask.any() for _, v, _ in views):
    raise errors.UserError('the context has no token to draw')
  columns = [_columns(view, None if tokens is None else tokens[n])
             for n, (_, view, _) in enumerate(views)]
  count = max(map(len, columns))
  bands = [_band(view, c) for (_, view, _), c in zip(
      views, columns, strict=True)]
  if any(np.isnan(band).all() for band in bands):  # neither span nor null
    raise errors.UserError('the context has no legal span to draw')
  lengths = max(map(len, bands))
  heights = [1.4, max(1.2, LENGTH_INCHES * lengths)] + 2 * by_layer * [1.0]
  beside = len(views) if count <= SHORT_TOKENS else 1
  below = len(views) // beside
  fig = figure.Figure(
      figsize=(beside * (TOKEN_INCHES * max(count, 30) + 1.8),
               below * (sum(heights) + 1.6)), layout='constrained')
  # A colour bar has axes of its own, so that all panels are equally wide.
  axes = fig.subplots(
      len(heights) * below, 2 * beside, squeeze=False,
      height_ratios=heights * below, width_ratios=[1, 0.012] * beside)
  layers = [[np.where(c >= 0, getattr(view, name)[:, c], np.nan)
             for (_, view, _), c in zip(views, columns, strict=True)]
            for name in ('start_by_layer', 'end_by_layer')] if by_layer else []
  for n, (question, view, answer) in enumerate(views):
    row, column = len(heights) * (n // beside), 2 * (n % beside)
    panels = axes[row:row + len(heights), column]
    bars = axes[row:row + len(heights), column + 1]
    bars[0].set_axis_off()
    panels[0].set_title(
        f'{textwrap.fill(question, int(1.3 * max(count, 30)))}\n'
        f'→ {answer or "(no answer)"}', loc='left', parse_math=False,
        fontsize=10)
    _probabilities(panels[0], view, columns[n])
    _image(panels[1], bars[1], bands, n, 'span score' if view.joint
           else 'S·h_i + E·h_j')
    outcomes = np.where((columns[n] == 0) == (not answer), bands[n], np.nan)
    if np.isnan(outcomes).all():  # no answer, but [CLS] is not shown
      outcomes = bands[n]
    best = np.unravel_index(np.nanargmax(outcomes), bands[n].shape)
    panels[1].plot(best[1], best[0], 's', markersize=8, markerfacecolor='none',
                   markeredgecolor=END, markeredgewidth=2)
    shown = np.arange(0, len(bands[n]) + 1, 2 if len(bands[n]) <= 10 else 5)
    shown[0] = 1
    panels[1].set_yticks(shown - 1, shown)
    panels[1].set(xlabel='start token i (labels above)',
                  ylabel='span length in tokens')
    for panel, bar, scores, name in zip(
        panels[2:], bars[2:], layers, ('S·h', 'E·h'), strict=False):
      _image(panel, bar, scores, n, '')
      panel.plot(np.nanargmax(scores[n], axis=1), np.arange(len(scores[n])),
                 's', markersize=6, markerfacecolor='none', markeredgecolor=END)
      panel.set_yticks(np.arange(len(scores[n])))
      panel.set(ylabel=f'{name}\nafter layer')
    for panel in panels:
      panel.set_xlim(-0.5, len(columns[n]) - 0.5)
  save_figure(fig, path)


def _columns(view: Any, numbers: np.ndarray | None) -> np.ndarray:
  """Returns the window position of each column; -1 is a blank one."""
  places = np.flatnonzero(view.context_mask)
  places = places if numbers is None else places[numbers]
  places = np.insert(places, np.flatnonzero(np.diff(places) > 1) + 1, -1)
  return (places if view.null_rule == 'never'
          else np.concatenate([[0, -1], places]))


def _band(view: Any, columns: np.ndarray) -> np.ndarray:
  """Returns the scores [span length - 1, column], NaN where there is no span.

  Span lengths are up to the number of columns. The null score is in the column
  of [CLS].
  """
  band = np.where(columns >= 0, view.band[columns, :len(columns)].T, np.nan)
  band[0, columns == 0] = view.null_score
  return np.where(np.isfinite(band), band, np.nan)


def _probabilities(ax: axes_lib.Axes, view: Any, columns: np.ndarray) -> None:
  where, blank = np.arange(len(columns)), columns < 0
  for side, p, colour, label in ((-0.2, view.p_start, START, 'p(start)'),
                                 (0.2, view.p_end, END, 'p(end)')):
    ax.bar(where + side, np.where(blank, 0, p[columns]), 0.4, color=colour,
           label=label)
  ax.set(ylabel='probability', ylim=(0, 1))
  ax.set_xticks(where, ['⋯' if i < 0 else view.tokens[i] for i in columns],
                rotation=90, fontsize=7, parse_math=False)
  ax.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=1, fontsize=7,
            frameon=False)


def _image(ax: axes_lib.Axes, bar: axes_lib.Axes, images: Sequence[np.ndarray],
           n: int, label: str) -> None:
  """Draws images[n] on the colour scale that all of `images` share."""
  image = ax.imshow(images[n], cmap='viridis', aspect='auto',
                    vmin=min(map(np.nanmin, images)),
                    vmax=max(map(np.nanmax, images)))
  ax.set_xticks([])
  ax.figure.colorbar(image, cax=bar, label=label)


def save_figure(fig: figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure to `path`, as `files.write_bytes` does."""
  picture = io.BytesIO()
  fig.savefig(picture, dpi=110, format=path.suffix[1:])
  files.write_bytes(path, picture.getvalue())
