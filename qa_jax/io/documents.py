"""Reports as lists of blocks, written as Markdown or as one HTML page."""

import base64
from collections.abc import Collection, Sequence
import pathlib
import re
from typing import NamedTuple


class Title(NamedTuple):
  """A heading; level 1 is the title of the report."""

  level: int
  text: str
  kind = 'title'


class Text(NamedTuple):
  """A paragraph."""

  text: str
  kind = 'text'


class Marked(NamedTuple):
  """A text with marked parts, a cell of a table that is HTML alone."""

  parts: Sequence[tuple[str, str]]  # (text, kind); kind '' is not marked


class Table(NamedTuple):
  """A table with its first column aligned left and all others right.

  A table of `texts` has all columns aligned left and breaks lines.
  """

  head: Sequence[str]
  rows: Sequence[Sequence[str | Marked]]
  grey: Collection[int] = ()  # rows that are shown in grey
  texts: bool = False
  kind = 'table'


class Items(NamedTuple):
  """A list of pairs (name, description)."""

  items: Sequence[tuple[str, str]]
  kind = 'items'


class Picture(NamedTuple):
  """A PNG picture with its title."""

  title: str
  file: str  # name in the folder of the report
  kind = 'picture'


Block = Title | Text | Table | Items | Picture

# The page has no script and loads nothing, and every text is escaped, so that
# the files of a run cannot inject anything.
TEMPLATE = '''\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{{ blocks[0].text }}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --stripe: #f4f4f4;
  --grey: #757575; --gold: #bfe3cf; --prediction: #fbd9b8; --both: #ffe98f;
  --rule: #ccc; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); margin: 2em auto; padding: 0 1em; }
h1, h2, p, li { max-width: 60em; overflow-wrap: anywhere; }
/* A wide table scrolls in its box and fades into the margin of the page. */
div { overflow-x: auto; margin: 1em -1em 1em 0; padding-right: 1em;
  mask-image: linear-gradient(to left, transparent, #000 1em); }
table { font-size: .88em; border-collapse: collapse;
  border-top: 2px solid var(--ink);
  border-bottom: 2px solid var(--ink); font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid var(--ink); }
th, td { padding: 0.2em 0.5em; text-align: right; vertical-align: bottom; }
td { white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: normal;
  min-width: 8em; }
tr { background: var(--paper); }
tbody tr:nth-child(even) { background: var(--stripe); }
/* The name of a row stays in sight while its numbers scroll. */
table:not(.texts) tr > :first-child { position: sticky; left: 0;
  background: inherit; }
tr.grey { color: var(--grey); font-style: italic; }
.texts { width: 100%; }
.texts th, .texts td { text-align: left; white-space: normal;
  vertical-align: top; min-width: 5em; overflow-wrap: anywhere; }
.texts th { white-space: nowrap; }
.texts td { border-top: 1px solid var(--rule); }
mark { color: inherit; border-radius: 3px; padding: 0 .1em; }
.gold { background: var(--gold); }
.prediction { background: var(--prediction); }
.both { background: var(--both); }
img { max-width: 100%; min-width: 30em; background: #fff; }
@media (max-width: 40em) {
  h1 { font-size: 1.5em; }
  h2 { font-size: 1.25em; }
  th, td { padding: .2em .35em; }
  td:first-child { max-width: 10em; overflow-wrap: anywhere; }
  /* Whole pictures would have letters that are too small to read. */
  img { max-width: none; min-width: 0; max-height: 20em; }
  .texts tr { display: block; padding: .5em 0; }
  .texts thead { display: none; }
  .texts td { display: block; border: 0; padding: 0; }
  .texts td:empty { display: none; }
  .texts td::before { content: attr(data-name) ': '; color: var(--grey); }
}
@media print {
  div { overflow: visible; mask-image: none; }
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --stripe: #202429; --grey: #9a9a9a;
    --gold: #1f5638; --prediction: #6b3f12; --both: #625300; --rule: #444; }
}
</style>
</head>
<body>
{%- for block in blocks %}
{%- if block.kind == 'title' %}
<h{{ block.level }}>{{ block.text }}</h{{ block.level }}>
{%- elif block.kind == 'text' %}
<p>{{ block.text }}</p>
{%- elif block.kind == 'table' %}
<div><table{{ ' class="texts"' | safe if block.texts }}>
<thead><tr>{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr>\
</thead>
<tbody>
{%- for row in block.rows %}
<tr{{ ' class="grey"' | safe if loop.index0 in block.grey }}>\
{% for cell in row %}<td\
{% if block.texts %} data-name="{{ block.head[loop.index0] }}"{% endif %}>\
{% if cell is string %}{{ breakable(cell) if loop.first else cell }}{% else %}\
{% for text, kind in cell.parts %}{% if kind %}\
<mark class="{{ kind }}">{{ text }}</mark>{% else %}{{ text }}{% endif %}\
{% endfor %}{% endif %}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table></div>
{%- elif block.kind == 'items' %}
<ul>
{%- for name, text in block.items %}
<li><code>{{ name }}</code>: {{ text }}</li>
{%- endfor %}
</ul>
{%- else %}
<div><img alt="{{ block.title }}" src="data:image/png;base64,\
{{ images[block.file] }}"></div>
{%- endif %}
{%- endfor %}
</body>
</html>
'''


def to_html(blocks: Sequence[Block], folder: pathlib.Path) -> str:
  """Returns one HTML page that contains the pictures of `folder`."""
  images = {b.file: base64.b64encode((folder / b.file).read_bytes()).decode()
            for b in blocks if isinstance(b, Picture)}
  import jinja2  # here: only a report needs it
  import markupsafe
  # Names of rows may break after their punctuation.
  breakable = lambda name: markupsafe.Markup(re.sub(
      r'(?<=[=(,/_])|(?<=\.)(?=[a-z])', '<wbr>', str(markupsafe.escape(name))))
  template = jinja2.Template(
      TEMPLATE, autoescape=True, undefined=jinja2.StrictUndefined,
      keep_trailing_newline=True)
  return template.render(blocks=blocks, images=images, breakable=breakable)


def to_markdown(blocks: Sequence[Block]) -> str:
  """Returns the report as Markdown, which links the pictures by file name."""
  return '\n\n'.join(_markdown(block).strip() for block in blocks) + '\n'


def _markdown(block: Block) -> str:
  match block:
    case Title():
      return f'{"#" * block.level} {block.text}'
    case Text():
      return block.text
    case Picture():
      return f'![{block.title}]({block.file})'
    case Items():
      return '\n'.join(f'- `{name}`: {text}' for name, text in block.items)
    case Table():
      rows = [[f'*{cell}*' for cell in row] if i in block.grey else row
              for i, row in enumerate(block.rows)]
      lines = [block.head, [':--', *['--:'] * (len(block.head) - 1)], *rows]
      return '\n'.join('| ' + ' | '.join(
          cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)
