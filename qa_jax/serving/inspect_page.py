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
import unicodedata

import jinja2
import markupsafe
import matplotlib
from matplotlib import colors
import numpy as np

from qa_jax import errors
from qa_jax.inference import predict
from qa_jax.inference import span_view
from qa_jax.inference.span_view import SpanView
from qa_jax.metrics import selective

LEVELS = 9  # levels of tint in the passage
SHADES = tuple(colors.to_hex(c) for c in matplotlib.colormaps['viridis'](
    np.linspace(0, 1, 16)))
CELL = 12  # pixels, width and height of a cell of a heat map
MARKS = 3  # number of best spans marked on the band
GAP = '⋯'  # label of a row or column in place of tokens that are left out


def answer_questions(
    qa: predict.QA, questions: Sequence[str], context: str, *,
    n_best: int | None = None
    ) -> list[tuple[str, SpanView, predict.Answer]]:
  """Returns each question about one context with its view and its answer.

  `n_best` is that of `QA.answer`.
  """
  views = [qa.spans(question, context) for question in questions]
  answers = qa.answer_batch([
      {'question': question, 'context': context} for question in questions],
                            n_best=n_best)
  return [*zip(questions, views, answers, strict=True)]


def render_page(qa: predict.QA,
                answered: Sequence[tuple[str, SpanView, predict.Answer]],
                context: str, *, title: str) -> str:
  """Returns the HTML page of a context with one question, or two side by side.

  `answered` is that of `answer_questions`. Heat maps show the tokens near the
  best spans and, below, all tokens of the window. A UserError is raised if the
  context has no token, or if nothing has a score: no legal span, and no null
  because the null rule is `never`.
  """
  _, views, answers = zip(*answered, strict=True)
  if not views[0].context_mask.any():
    raise errors.UserError('the context has no token to show')
  decode = qa.config.decode
  if decode.null_rule == 'never' and not any(
      np.isfinite(view.band).any() for view in views):
    raise errors.UserError(
        'the context has no legal span to show: no span of whole words has at '
        f'most decode.max_answer_length={decode.max_answer_length} tokens; '
        'raise it, or set decode.whole_words=False')
  panels = [_panel(qa, *parts, context=context) for parts in answered]
  near = span_view.focus_tokens(views)
  whole = [np.arange(view.context_mask.sum()) for view in views]
  for name, chosen in (('near', near), ('whole', whole)):
    if name == 'near' or any(map(len, map(np.setdiff1d, whole, near))):
      for panel, maps in zip(panels, _maps(views, answers, chosen),
                             strict=True):
        panel['maps'][name] = maps
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
  threshold = qa.config.decode.null_threshold
  return {
      'question': question, 'answer': answer,
      'passage': _passage(view, answer, context),
      'cls': {'token': view.tokens[0], 'answer': not answer.text,
              **_scores(view, 0)},
      'window': view.window + 1, 'windows': view.windows,
      'null': {'score': view.null_score, 'rule': view.null_rule,
               'value': view.na_score, 'threshold': threshold,
               'silent': selective.declines(view.na_score, threshold)},
      'joint': view.joint, 'maps': {'whole': None}}  # filled in later


def _maps(views: Sequence[SpanView], answers: Sequence[predict.Answer],
          chosen: Sequence[np.ndarray]) -> list[dict[str, Any]]:
  """Returns the heat maps of each view, with one colour scale for all views.

  `chosen` has the context tokens to draw, for each view. Row and column 0 are
  [CLS], whose cell has the null score, unless the null rule is `never`.
  """
  panels: list[dict[str, Any]] = []
  for view, answer, numbers in zip(views, answers, chosen, strict=True):
    inside = np.flatnonzero(view.context_mask)[numbers]
    places = _with_gaps(inside, null=view.null_rule != 'never')
    at = {int(place): n for n, place in enumerate(places) if place >= 0}
    names = [view.tokens[i] if i >= 0 else GAP for i in places]
    cells = [(0, 0, view.null_score)] if 0 in at else []
    # A long window has few spans among the pairs of its tokens.
    cells += [(row, at[i + d], view.band[i, d]) for i, row in at.items()
              for d in range(view.band.shape[1])
              if view.context_mask[i] and i + d in at]
    marks = [(at[place[1]], at[place[0]],
              f'{rank}: {c["text"]}, {c["score"]:.2f}')
             for rank, c in enumerate(answer.n_best[:MARKS], 1)
             if (place := view.locate(c['start'], c['end']))
             and place[0] in at and place[1] in at]
    maps = {'band': {'cells': np.array(cells), 'rows': names, 'columns': names,
                     'marks': marks}, 'depth': []}
    if view.start_by_layer is not None:
      layers = ['embeddings', *(f'layer {n}' for n in range(
          1, len(view.start_by_layer)))]
      for name, scores in (('S·h', view.start_by_layer),
                           ('E·h', view.end_by_layer)):
        values = np.where(places >= 0, scores[:, places], np.nan)
        maps['depth'].append((name, {
            'cells': np.array([(*place, values[place])
                               for place in np.ndindex(values.shape)]),
            'rows': layers, 'columns': names, 'marks': [
                (int(j), n, f'{layers[n]}: {names[j]}')
                for n, j in enumerate(np.nanargmax(values, axis=1))]}))
    panels.append(maps)
  for group in ([p['band'] for p in panels],
                *([p['depth'][n][1] for p in panels]
                  for n in range(len(panels[0]['depth'])))):
    _shade(group)
  every = [m for p in panels for m in (p['band'], *(d[1] for d in p['depth']))]
  left = max(_label_pixels(m['rows']) for m in every)
  for m in every:
    m['left'] = left  # so that the columns of all maps are aligned
  return panels


def _with_gaps(places: np.ndarray, *, null: bool) -> np.ndarray:
  """Returns window positions with -1 where tokens between two are left out.

  With `null`, position 0 and a gap come first.
  """
  ends = np.flatnonzero(np.diff(places) > 1) + 1
  gaps = np.insert(places, ends, -1)
  return np.concatenate([[0, -1], gaps]) if null else gaps


def _passage(view: SpanView, answer: predict.Answer,
             context: str) -> list[dict[str, Any]]:
  """Returns the passage in pieces: a token's text and the text before it."""
  pieces, done = [], 0
  for i in np.flatnonzero(view.context_mask):
    begin, end = (max(int(x), done) for x in view.offsets[i])
    pieces.append({
        'before': context[done:begin], 'text': context[begin:end],
        'token': view.tokens[i],
        'answer': answer.start < end <= answer.end,
        **_scores(view, i)})
    done = end
  return [*pieces, {'before': context[done:], 'text': '', 'token': ''}]


def _scores(view: SpanView, i: int) -> dict[str, float]:
  """Returns the scores, probabilities and tints of a token."""
  p_start, p_end = float(view.p_start[i]), float(view.p_end[i])
  return {'start': float(view.start[i]), 'end': float(view.end[i]),
          'p_start': p_start, 'p_end': p_end,
          's': _level(p_start), 'e': _level(p_end)}


def _level(p: float) -> int:
  """Returns the tint of a probability: 0 below 0.005, else 1 … LEVELS."""
  return 0 if p < 0.005 else min(1 + int(p * LEVELS), LEVELS)


def _shade(maps: Sequence[dict[str, Any]]) -> None:
  """Adds the cells of heat maps for SVG, on one colour scale.

  A map has `cells` [N, 3]: row, column and value (NaN or -inf: not drawn). It
  has labels of `rows` and `columns`, and `marks`: (column, row, title).
  """
  drawn = [m.pop('cells') for m in maps]
  drawn = [cells[np.isfinite(cells[:, 2])] for cells in drawn]
  values = np.concatenate(drawn)[:, 2]
  low, high = float(values.min()), float(values.max())
  for m, cells in zip(maps, drawn, strict=True):
    shade = ((cells[:, 2] - low) / max(high - low, 1e-9)
             * (len(SHADES) - 1e-3)).astype(int)
    m['paths'] = [
        (colour, ''.join(f'M{CELL * x} {CELL * y}h{CELL}v{CELL}h-{CELL}z'
                         for y, x in cells[shade == n, :2].astype(int)))
        for n, colour in enumerate(SHADES) if (shade == n).any()]
    m |= {'low': low, 'high': high, 'top': _label_pixels(m['columns'])}


def _label_pixels(texts: Sequence[str]) -> int:
  """Returns the length of the longest label in the monospaced 10.5 px font."""
  wide = lambda c: 2 if unicodedata.east_asian_width(c) in 'WF' else 1
  return 10 + 13 * max(sum(map(wide, text)) for text in texts) // 2


def _start_scores(views: Sequence[SpanView],
                  answers: Sequence[predict.Answer]) -> list[dict[str, Any]]:
  """Returns the best candidates' first tokens, scored under each question."""
  if not np.array_equal(*(v.offsets[v.context_mask] for v in views)):
    return []  # windows with different tokens
  rows = []
  for view, answer in zip(views, answers, strict=True):
    best = answer.n_best[0] if answer.n_best else None  # None: no legal span
    if best and (place := view.locate(best['start'], best['end'])):
      n = place[0] - int(view.context_mask.argmax())
      row = {'token': view.tokens[place[0]], 'scores': [
          float(v.start[v.context_mask][n]) for v in views]}
      if row not in rows:
        rows.append(row)
  return rows
