"""Builds table entries from spec strings such as 'biaffine(rank=32)'.

A spec string names an entry of a table and calls it with keyword literals. It
can be printed, swept and stored in a config, and it cannot run other code.
"""

import ast
from collections.abc import Callable, Mapping
import inspect
from typing import Any

from qa_jax import errors

# Annotation of an argument → types of literals that the argument accepts.
LITERALS = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
  """Parses 'name(a=1, b="x")' into ('name', {'a': 1, 'b': 'x'}).

  Raises a UserError unless `spec` is a name or a call with keyword literals.
  """
  try:
    node = ast.parse(spec.strip(), mode='eval').body
    if isinstance(node, ast.Name):
      return node.id, {}
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and not node.args and all(k.arg for k in node.keywords)
        and len({k.arg for k in node.keywords}) == len(node.keywords)):
      return node.func.id, {
          k.arg: ast.literal_eval(k.value) for k in node.keywords}
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    pass
  raise errors.UserError(
      f'spec {spec[:200]!r} is not of the form name or name(key=literal, …)')


def build(table: Mapping[str, Callable[..., Any]], spec: str, *,
          what: str) -> Any:
  """Calls the entry of `table` that `spec` names and returns the result.

  Raises:
    UserError: the entry or an argument is unknown, a required argument is
      missing, or an argument has another type than its annotation.
  """
  name, arguments = parse_spec(spec)
  errors.check_known(what, name, table)
  parameters = dict(inspect.signature(table[name]).parameters)
  if 'parent' in parameters:  # a Flax module: users set neither field
    del parameters['parent'], parameters['name']
  for key, value in arguments.items():
    if key not in parameters:
      hint = (errors.did_you_mean(key, parameters) if parameters
              else '; it takes none')
      raise errors.UserError(f'{what} {name!r} has no argument {key!r}{hint}')
    kind = parameters[key].annotation
    if kind in LITERALS and type(value) not in LITERALS[kind]:
      raise errors.UserError(f'{what} {name!r}: {key}={value!r}, expected '
                             f'{kind.__name__}')
  for key, parameter in parameters.items():
    if parameter.default is parameter.empty and key not in arguments:
      raise errors.UserError(f'{what} {name!r} needs the argument {key!r}')
  return table[name](**arguments)
