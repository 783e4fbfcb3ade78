"""The inspect page: one HTML file with the scores of a passage's tokens.

The page has no script and loads nothing. Its Content-Security-Policy allows
only its style sheet, and every text is escaped. S and E are the start vector
and the end vector of the span head.
"""

import base64
from collections.abc import Sequence
import hashlib
import importlib.resources
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib import colors
import numpy as np

from qa_jax import errors
from qa_jax.decoding import candidates as candidates_lib
from qa_jax.decoding import null_rules
from qa_jax.inference import predict
from qa_jax.inference.span_view import SpanView
from qa_jax.metrics import selective

LEVELS = 9  # levels of tint in the passage
SHADES = tuple(colors.to_hex(c) for c in matplotlib.colormaps['viridis'](
    np.linspace(0, 1, 16)))
CELL = 12  # pixels, width and height of a cell of a heat map
MARKS = 3  # number of best spans marked on the band


def render_page(qa: predict.QA, questions: Sequence[str], context: str,
                *, title: str) -> str:
  """Returns the HTML page of a context with one question, or two side by side.

  A UserError is raised if the context has no token or more than one window.
  """
  views = [qa.spans(question, context) for question in questions]
  if not views[0].context_mask.any():
    raise errors.UserError('the context has no token to show')
  answers = qa.answer_batch([
      {'question': question, 'context': context} for question in questions])
  panels = [_panel(qa, *parts, context=context)
            for parts in zip(questions, views, answers, strict=True)]
  style, = read_sources('page.css')
  return load_template('page.html').render(
      title=title, panels=panels, head=qa.config.model.head, cell=CELL,
      shades=SHADES, levels=range(LEVELS + 1), style=markupsafe.Markup(style),
      style_hash=content_hash(style),
      moved=_start_scores(views, answers) if len(views) > 1 else [])


def load_template(name: str) -> jinja2.Template:
  """Reads a template of this folder; it escapes every text."""
  return jinja2.Environment(
      loader=jinja2.PackageLoader('qa_jax', 'serving'), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True).get_template(name)


def read_sources(*names: str) -> list[str]:
  """Reads the texts of files of this folder."""
  folder = importlib.resources.files('qa_jax.serving')
  return [(folder / name).read_text(encoding='utf-8') for name in names]


def content_hash(text: str) -> str:
  """Returns the hash of an inline style or script for a policy."""
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'


def _panel(qa: predict.QA, question: str, view: SpanView,
           answer: predict.Answer, *, context: str) -> dict[str, Any]:
  keep = np.flatnonzero(view.context_mask)
  tokens = [view.tokens[i] for i in keep]
  cell_of = {int(i): n for n, i in enumerate(keep)}
  marks = [(cell_of[place[1]], cell_of[place[0]],
            f'{rank}: {c["text"]}, {c["score"]:.2f}')
           for rank, c in enumerate(answer.n_best[:MARKS], 1)
           if (place := view.locate(c['start'], c['end']))]
  depth = []
  if view.start_by_layer is not None:
    layers = ['embeddings', *(f'layer {n}' for n in range(
        1, len(view.start_by_layer)))]
    for name, scores in (('S·h', view.start_by_layer[:, keep]),
                         ('E·h', view.end_by_layer[:, keep])):
      depth.append((name, _heat(scores, layers, tokens, [
          (int(j), n, f'{layers[n]}: {tokens[j]}')
          for n, j in enumerate(scores.argmax(axis=1))])))
  return {
      'question': question, 'answer': answer, 'candidates': [
          {**c, 'p': float(np.exp(c['score'] - view.log_normaliser))}
          for c in answer.n_best],
      'passage': _passage(view, answer, context, keep),
      'null': _null_decision(qa, view), 'joint': view.joint, 'depth': depth,
      'band': _heat(view.square, tokens, tokens, marks)}


def _passage(view: SpanView, answer: predict.Answer, context: str,
             keep: np.ndarray) -> list[dict[str, Any]]:
  """Returns the passage in pieces: a token's text and the text before it."""
  pieces, done = [], 0
  for i in keep:
    begin, end = (max(int(x), done) for x in view.offsets[i])
    p_start, p_end = float(view.p_start[i]), float(view.p_end[i])
    pieces.append({
        'before': context[done:begin], 'text': context[begin:end],
        'token': view.tokens[i],
        'answer': bool(answer.start < end <= answer.end and answer.text),
        'start': float(view.start[i]), 'end': float(view.end[i]),
        'p_start': p_start, 'p_end': p_end,
        's': _level(p_start), 'e': _level(p_end)})
    done = end
  return [*pieces, {'before': context[done:], 'text': ''}]


def _level(p: float) -> int:
  """Returns the tint of a probability: 0 below 0.005, else 1 … LEVELS."""
  return 0 if p < 0.005 else min(1 + int(p * LEVELS), LEVELS)


def _null_decision(qa: predict.QA, view: SpanView) -> dict[str, Any]:
  """Returns null score, no-answer score and the null rule's decision."""
  decode = qa.config.decode
  best = np.array([max(float(view.band.max()), candidates_lib.NO_SPAN)])
  score = float(null_rules.find_rule(decode.null_rule).score(
      null_rules.WindowScores(
          null=np.array([view.null_score], np.float64), best=best,
          first=np.array([0]), normaliser=np.array([view.log_normaliser])))[0])
  return {'score': view.null_score, 'rule': decode.null_rule, 'value': score,
          'threshold': decode.null_threshold,
          'silent': selective.declines(score, decode.null_threshold)}


def _heat(values: np.ndarray, rows: Sequence[str], columns: Sequence[str],
          marks: Sequence[tuple[int, int, str]]) -> dict[str, Any]:
  """Returns a heat map for SVG; a mark is (column, row, title)."""
  finite = values[np.isfinite(values)]
  low, high = float(finite.min()), float(finite.max())
  shade = np.full(values.shape, -1)  # -1: no cell
  shade[np.isfinite(values)] = ((finite - low) / max(high - low, 1e-9)
                                * (len(SHADES) - 1e-3)).astype(int)
  paths = [(colour, ''.join(f'M{CELL * x} {CELL * y}h{CELL}v{CELL}h-{CELL}z'
                            for y, x in np.argwhere(shade == n)))
           for n, colour in enumerate(SHADES) if (shade == n).any()]
  return {'rows': rows, 'columns': columns, 'paths': paths, 'marks': marks,
          'low': low, 'high': high,
          'margin': 12 + 6 * max(map(len, rows))}  # pixels for the row labels


def _start_scores(views: Sequence[SpanView],
                  answers: Sequence[predict.Answer]) -> list[dict[str, Any]]:
  """Returns the best candidates' first tokens, scored under each question."""
  rows = []
  for view, answer in zip(views, answers, strict=True):
    best = answer.n_best[0]
    if place := view.locate(best['start'], best['end']):
      n = place[0] - int(view.context_mask.argmax())
      row = {'token': view.tokens[place[0]], 'scores': [
          float(v.start[v.context_mask][n]) for v in views]}
      if row not in rows:
        rows.append(row)
  return rows
