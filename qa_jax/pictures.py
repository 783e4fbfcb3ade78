"""Pictures of a run and of a question: matplotlib, no display needed.

Glossary of shapes: L window length, W longest span.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib import figure
import numpy as np

START, END = '#0072B2', '#D55E00'  # colour-blind safe (Wong, 2011)


def learning_curve(rows: Sequence[Mapping[str, Any]],
                   path: pathlib.Path) -> None:
  """Draws loss and EM/F1 over steps from the rows of metrics.jsonl."""
  train = [r for r in rows if r['split'] == 'train']
  held_out = [r for r in rows if r['split'] != 'train']
  fig = figure.Figure(figsize=(8, 3), layout='constrained')
  left, right = fig.subplots(1, 2)
  left.plot([r['step'] for r in train], [r['loss'] for r in train], START)
  left.set(xlabel='step', ylabel='training loss (nats)', yscale='log')
  for name, colour in (('exact_match', END), ('f1', START)):
    right.plot([r['step'] for r in held_out], [r[name] for r in held_out],
               colour, marker='o', label=name)
  right.set(xlabel='step', ylabel='held-out score (%)', ylim=(0, 101))
  right.legend()
  save(fig, path)


def spans(views: Sequence[tuple[str, Any, str]],
          path: pathlib.Path) -> None:
  """Draws, per (question, SpanView, answer), what S and E read out.

  Above, the softmax of both scores over the context tokens; below, the band
  of the outer sum start[i] + end[j], the best span marked. The same passage
  under two questions shows the point: S and E are the same two vectors, the
  tokens are the same, and other numbers come out, since the encoder has put
  the question into every token's vector.
  """
  fig = figure.Figure(figsize=(8 * len(views), 7), layout='constrained')
  for column, (question, view, answer) in enumerate(views):
    keep = np.flatnonzero(view.context_mask)
    tokens = [view.tokens[i] for i in keep]
    top = fig.add_subplot(2, len(views), column + 1)
    where = np.arange(len(keep))
    top.bar(where - 0.2, _softmax(view.start[keep]), 0.4, color=START,
            label='p(start) = softmax(S·h)')
    top.bar(where + 0.2, _softmax(view.end[keep]), 0.4, color=END,
            label='p(end) = softmax(E·h)')
    top.set(title=f'{question}\n→ {answer or "(no answer)"}',
            ylabel='probability', ylim=(0, 1))
    top.set_xticks(where, tokens, rotation=90, fontsize=7)
    top.legend(loc='upper right')

    square = np.full((len(keep), len(keep)), np.nan)
    for row, i in enumerate(keep):
      width = min(view.band.shape[1], len(keep) - row)
      square[row, row:row + width] = view.band[i, :width]
    square[~np.isfinite(square)] = np.nan
    bottom = fig.add_subplot(2, len(views), len(views) + column + 1)
    image = bottom.imshow(square, cmap='viridis')
    best = np.unravel_index(np.nanargmax(square), square.shape)
    bottom.plot(best[1], best[0], 's', markersize=9, markerfacecolor='none',
                markeredgecolor=END, markeredgewidth=2)
    bottom.set_xticks(where, tokens, rotation=90, fontsize=6)
    bottom.set_yticks(where, tokens, fontsize=6)
    bottom.set(xlabel='end token j', ylabel='start token i')
    fig.colorbar(image, ax=bottom, label='S·h_i + E·h_j')
  save(fig, path)


def _softmax(scores: np.ndarray) -> np.ndarray:
  exp = np.exp(scores - scores.max())
  return exp / exp.sum()


def save(fig: figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure, and the folders above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, dpi=110)
