"""One HTML file that shows what S and E read out of a passage, and how.

Glossary of shapes: L window length, W longest span, N encoder layers.

No script, no asset, nothing to fetch: the policy in the page forbids all but
its own style sheet, and every text is escaped.
"""

import base64
from collections.abc import Sequence
import dataclasses
import hashlib
import importlib.resources
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib import colors
import numpy as np

from qa_jax import errors
from qa_jax.decoding import candidates
from qa_jax.decoding import null_rules
from qa_jax.inference import predict
from qa_jax.inference.span_view import SpanView
from qa_jax.metrics import selective

LEVELS = 9  # of tint in the passage
SHADES = tuple(colors.to_hex(c) for c in matplotlib.colormaps['viridis'](
    np.linspace(0, 1, 16)))
CELL = 12  # pixels
MARKS = 3  # best spans marked on the band


@dataclasses.dataclass(frozen=True)
class Heat:
  """A heat map as SVG: one path a shade, in cells of CELL pixels."""

  rows: Sequence[str]
  columns: Sequence[str]
  paths: Sequence[tuple[str, str]]  # (colour, path)
  marks: Sequence[tuple[int, int, str]]  # (column, row, what it is)
  low: float
  high: float
  margin: int  # pixels left for the labels of rows


def render_page(qa: predict.QA, questions: Sequence[str], context: str,
                *, title: str) -> str:
  """The page of one passage under one question, or under two side by side.

  Raises:
    UserError: a context without tokens, or of more than one window.
  """
  views = [qa.spans(question, context) for question in questions]
  if not views[0].context_mask.any():
    raise errors.UserError('the context has no token to show')
  answers = qa.answer_batch([
      {'question': question, 'context': context} for question in questions])
  panels = [_panel(qa, *one, context=context)
            for one in zip(questions, views, answers, strict=True)]
  style, = read_sources('page.css')
  return load_template('page.html').render(
      title=title, panels=panels, head=qa.config.model.head, cell=CELL,
      shades=SHADES, levels=range(LEVELS + 1), style=markupsafe.Markup(style),
      style_hash=content_hash(style),
      moved=_moved(views, answers) if len(views) > 1 else [])


def load_template(name: str) -> jinja2.Template:
  """A file of this folder, with every text escaped that it is given."""
  return jinja2.Environment(
      loader=jinja2.PackageLoader('qa_jax', 'serving'), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True).get_template(name)


def read_sources(*names: str) -> list[str]:
  """The texts of files of this folder, to stand in a page."""
  folder = importlib.resources.files('qa_jax.serving')
  return [(folder / name).read_text(encoding='utf-8') for name in names]


def content_hash(text: str) -> str:
  """What a Content-Security-Policy calls an inline style or script."""
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'


def _panel(qa: predict.QA, question: str, view: SpanView,
           answer: predict.Answer, *, context: str) -> dict[str, Any]:
  keep = np.flatnonzero(view.context_mask)
  tokens = [view.tokens[i] for i in keep]
  found = [{**c, 'p': float(np.exp(c['score'] - view.log_normaliser))}
           for c in answer.n_best]
  at = {int(i): n for n, i in enumerate(keep)}
  marks = []
  for rank, candidate in enumerate(answer.n_best[:MARKS], 1):
    place = view.locate(candidate['start'], candidate['end'])
    if place:
      marks.append((at[place[1]], at[place[0]],
                    f'{rank}: {candidate["text"]}, {candidate["score"]:.2f}'))
  depth = []
  if view.start_by_layer is not None:
    layers = ['embeddings', *(f'layer {n}' for n in range(
        1, len(view.start_by_layer)))]
    for name, scores in (('S·h', view.start_by_layer),
                         ('E·h', view.end_by_layer)):
      best = scores[:, keep].argmax(axis=1)
      depth.append((name, _heat(scores[:, keep], layers, tokens, [
          (int(j), n, f'{layers[n]}: {tokens[j]}')
          for n, j in enumerate(best)])))
  return {
      'question': question, 'answer': answer, 'found': found,
      'passage': _passage(view, answer, context, keep),
      'null': _null(qa, view), 'joint': view.joint, 'depth': depth,
      'band': _heat(view.square, tokens, tokens, marks)}


def _passage(view: SpanView, answer: predict.Answer, context: str,
             keep: np.ndarray) -> list[dict[str, Any]]:
  """The passage in pieces: a token as it is written, and what is before it."""
  p_start, p_end = view.p_start, view.p_end
  pieces, done = [], 0
  for i in keep:
    begin, end = (max(int(x), done) for x in view.offsets[i])
    pieces.append({
        'before': context[done:begin], 'text': context[begin:end],
        'token': view.tokens[i], 'answer': bool(
            answer.start < end <= answer.end and answer.text),
        'start': float(view.start[i]), 'end': float(view.end[i]),
        'p_start': float(p_start[i]), 'p_end': float(p_end[i]),
        's': _level(p_start[i]), 'e': _level(p_end[i])})
    done = end
  pieces.append({'before': context[done:], 'text': ''})
  return pieces


def _level(p: float) -> int:
  """0 for nearly nothing, 1 … LEVELS for the rest."""
  return 0 if p < 0.005 else min(1 + int(p * LEVELS), LEVELS)


def _null(qa: predict.QA, view: SpanView) -> dict[str, Any]:
  """What the null rule made of this window."""
  decode = qa.config.decode
  best = max(float(view.band.max()), candidates.NO_SPAN)
  score = float(null_rules.NULL_RULES[decode.null_rule].score(
      null_rules.WindowScores(
          null=np.array([view.null_score], np.float64),
          best=np.array([best]), first=np.array([0]),
          normaliser=np.array([view.log_normaliser])))[0])
  return {'score': view.null_score, 'rule': decode.null_rule, 'value': score,
          'threshold': decode.null_threshold,
          'silent': selective.declines(score, decode.null_threshold)}


def _heat(values: np.ndarray, rows: Sequence[str], columns: Sequence[str],
          marks: Sequence[tuple[int, int, str]]) -> Heat:
  finite = values[np.isfinite(values)]
  low, high = float(finite.min()), float(finite.max())
  shade = np.full(values.shape, -1)
  seen = np.isfinite(values)
  shade[seen] = ((values[seen] - low) / max(high - low, 1e-9)
                 * (len(SHADES) - 1e-3)).astype(int)
  paths = []
  for n, colour in enumerate(SHADES):
    path = ''.join(f'M{CELL * x} {CELL * y}h{CELL}v{CELL}h-{CELL}z'
                   for y, x in np.argwhere(shade == n))
    if path:
      paths.append((colour, path))
  return Heat(rows, columns, paths, marks, low, high,
              12 + 6 * max(map(len, rows)))


def _moved(views: Sequence[SpanView],
           answers: Sequence[predict.Answer]) -> list[dict[str, Any]]:
  """The first token of each answer, and its start score under each question."""
  rows = []
  for view, answer in zip(views, answers, strict=True):
    best = answer.n_best[0]
    place = view.locate(best['start'], best['end'])
    if place:
      n = place[0] - int(view.context_mask.argmax())
      row = {'token': view.tokens[place[0]], 'scores': [
          float(v.start[int(v.context_mask.argmax()) + n]) for v in views]}
      if row not in rows:
        rows.append(row)
  return rows
