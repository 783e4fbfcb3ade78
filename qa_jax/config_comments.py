"""The comments of the config fields, read from the source of config.py.

--help and docs/configuration.md show them.
"""

import ast
import functools
import io
import pathlib
import re
import tokenize

from qa_jax import config

SHORTEST = 25  # characters of a phrase; a shorter sentence says too little
# A sentence that begins with one of these values explains it. Most are defaults
# that stand for another value.
EXPLAINED = ('0 ', "'' ", '() ', 'auto ')


@functools.cache
def comments() -> dict[str, str]:
  """Returns the comment of each config field by its path, 'model.head'."""
  texts, tree = {}, ast.parse(source())
  classes = {node.name: node for node in tree.body
             if isinstance(node, ast.ClassDef)}
  lines, by_line = source().splitlines(), line_comments(source())
  for node in fields(classes['Config']):
    name, kind = node.target.id, ast.unparse(node.annotation)
    for inner in fields(classes[kind]) if kind in classes else [node]:
      path = name if inner is node else f'{name}.{inner.target.id}'
      texts[path] = field_comment(inner, by_line, lines)
  return texts


def phrase(path: str) -> str:
  """Returns the first sentence about a config field, and each of EXPLAINED.

  The last one has no full stop.
  """
  shown = ''
  for sentence in re.split(r'(?<=[.?!])(?<!et al\.)\s+', comments()[path]):
    if len(shown) < SHORTEST or sentence.startswith(EXPLAINED):
      shown += ' ' * bool(shown) + sentence
  return shown.removesuffix('.')


def source() -> str:
  """Returns the text of config.py."""
  return pathlib.Path(config.__file__).read_text(encoding='utf-8')


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
  """Returns the nodes of the fields of a dataclass."""
  return [inner for inner in node.body if isinstance(inner, ast.AnnAssign)]


def line_comments(text: str) -> dict[int, str]:
  """Returns the comment of every line that has one, without '#'."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return {token.start[0]: token.string.lstrip('# ').strip()
          for token in tokens if token.type == tokenize.COMMENT}


def field_comment(node: ast.AnnAssign, by_line: dict[int, str],
                  lines: list[str]) -> str:
  """Returns the comment above a field, then the comment on its own lines."""
  first = node.lineno
  while lines[first - 2].strip().startswith('#'):
    first -= 1
  return ' '.join(by_line[n] for n in range(first, node.end_lineno + 1)
                  if n in by_line)
