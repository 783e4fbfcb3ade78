"""Reports as lists of blocks, written as Markdown or as one HTML page."""

import base64
from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import jinja2


class Title(NamedTuple):
  """A heading; level 1 is the title of the report."""

  level: int
  text: str
  kind = 'title'


class Text(NamedTuple):
  """A paragraph."""

  text: str
  kind = 'text'


class Table(NamedTuple):
  """A table with its first column aligned left and all others right."""

  head: Sequence[str]
  rows: Sequence[Sequence[str]]
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
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto;
  max-width: 68em; padding: 0 1em; }
div { overflow-x: auto; }
table { border-collapse: collapse; border-top: 2px solid #222;
  border-bottom: 2px solid #222; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #222; }
th, td { padding: 0.2em 0.8em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: #f4f4f4; }
img { max-width: 100%; }
</style>
</head>
<body>
{%- for block in blocks %}
{%- if block.kind == 'title' %}
<h{{ block.level }}>{{ block.text }}</h{{ block.level }}>
{%- elif block.kind == 'text' %}
<p>{{ block.text }}</p>
{%- elif block.kind == 'table' %}
<div><table>
<thead><tr>{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr>\
</thead>
<tbody>
{%- for row in block.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
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
<p><img alt="{{ block.title }}" src="data:image/png;base64,\
{{ images[block.file] }}"></p>
{%- endif %}
{%- endfor %}
</body>
</html>
'''


def to_html(blocks: Sequence[Block], folder: pathlib.Path) -> str:
  """Returns one HTML page that contains the pictures of `folder`."""
  images = {b.file: base64.b64encode((folder / b.file).read_bytes()).decode()
            for b in blocks if isinstance(b, Picture)}
  template = jinja2.Template(
      TEMPLATE, autoescape=True, undefined=jinja2.StrictUndefined,
      keep_trailing_newline=True)
  return template.render(blocks=blocks, images=images)


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
      lines = [block.head, [':--', *['--:'] * (len(block.head) - 1)],
               *block.rows]
      return '\n'.join('| ' + ' | '.join(
          cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)
