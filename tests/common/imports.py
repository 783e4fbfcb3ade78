"""The modules that a file imports, read from its syntax tree."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'qa_jax').rglob('*.py'))


def module_name(path: pathlib.Path) -> str:
  """Returns the dotted name of a file; that of a package for its __init__."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts).removesuffix('.__init__')


@functools.cache
def imported_modules(path: pathlib.Path, deferred: bool = True) -> set[str]:
  """Returns dotted module names that a file imports.

  `deferred` counts imports within functions too. `from package import name`
  is the module package.name if there is one, else the package.
  """
  tree = ast.parse(path.read_text(encoding='utf-8'))
  names = set()
  for node in ast.walk(tree) if deferred else tree.body:
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        whole = ROOT.joinpath(*node.module.split('.'), alias.name)
        is_module = whole.with_suffix('.py').is_file() or (
            whole / '__init__.py').is_file()
        names.add(f'{node.module}.{alias.name}' if is_module else node.module)
  return names
