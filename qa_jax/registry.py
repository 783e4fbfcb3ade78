"""Builds table entries from spec strings such as 'biaffine(rank=32)'.

A spec string names an entry of a table and calls it with keyword literals. It
can be printed, swept and stored in a config. A spec string such as
'my_project.heads:Gated(rank=3)' imports its constructor instead. A stored file
is data, so `check_code` refuses such specs of stored files unless the user
allows the package.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
import importlib
import inspect
import math
import re
from typing import Any

from qa_jax import errors

# Annotation of an argument → types of literals that the argument accepts.
LITERALS = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}
# The sizes of numbers that are neither 0 nor infinite in int32 and float32.
SIZES = {int: (1, 2**31 - 1), float: (1.2e-38, 3.4e38)}
# The module of an importable constructor, with its colon.
MODULE = re.compile(r'\s*((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*):(?=[A-Za-z_])')
# Packages whose code stored files may name in this process: --allow_code.
_allowed: set[str] = set()


def parse_spec(spec: str, what: str = 'spec') -> tuple[str, dict[str, Any]]:
  """Parses 'name(a=1, b="x")' into ('name', {'a': 1, 'b': 'x'}).

  The name may begin with a module: 'package.module:name'. Raises a UserError,
  which begins with `what`, unless `spec` is a name or a call with keyword
  literals.
  """
  module = MODULE.match(spec)
  try:
    node = ast.parse(spec[module.end() if module else 0:].strip(),
                     mode='eval').body
    prefix = f'{module[1]}:' if module else ''
    if isinstance(node, ast.Name):
      return prefix + node.id, {}
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and not node.args and all(k.arg for k in node.keywords)
        and len({k.arg for k in node.keywords}) == len(node.keywords)):
      return prefix + node.func.id, {
          k.arg: ast.literal_eval(k.value) for k in node.keywords}
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    pass
  raise errors.UserError(
      f'{what} {spec[:200]!r} is not of the form name or name(key=literal, …)')


def is_importable(spec: str) -> bool:
  """Returns whether a spec begins with a module: 'package.module:name'."""
  return bool(MODULE.match(spec))


def split_sum(spec: str) -> list[str]:
  """Splits a spec at each "+" outside of quotes and parentheses."""
  parts, depth, quote = [''], 0, ''
  for c in spec:
    if quote:
      quote = '' if c == quote else quote
    elif depth and c in '"\'':
      quote = c
    depth += (c == '(') - (c == ')') if not quote else 0
    if c == '+' and not depth:
      parts.append('')
    else:
      parts[-1] += c
  return parts


def imported_modules(spec: str) -> set[str]:
  """Returns the modules that a spec and the specs in its arguments import."""
  # A "+" may end the path of a file, so any may begin a part of a mixture.
  begins = [0, *(m.end() for m in re.finditer(r'\+', spec))]
  modules = {m[1] for begin in begins if (m := MODULE.match(spec, begin))}
  for part in split_sum(spec):
    try:
      _, arguments = parse_spec(part)
    except errors.UserError:
      continue  # a path, or a spec that is refused when it is built
    for value in arguments.values():
      if isinstance(value, str):
        modules |= imported_modules(value)
  return modules


def allow_code(packages: Iterable[str]) -> None:
  """Allows the code of packages to all stored files that this process reads."""
  for package in packages:
    errors.require(re.fullmatch(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*', package),
                   f'--allow_code: {package!r} is no name of a package')
    _allowed.add(package)


def check_code(where: str, specs: Mapping[str, str],
               allowed: Iterable[str] = ()) -> None:
  """Checks that stored specs import code of allowed packages only.

  `specs` are spec strings by their config field, stored in the file `where`.

  Raises:
    UserError: a spec names a module that is in none of the packages `allowed`
      and of `allow_code`.
  """
  packages = {*allowed, *_allowed}
  for field, spec in specs.items():
    for module in sorted(imported_modules(spec)):
      if not any(f'{module}.'.startswith(f'{p}.') for p in packages):
        package = module.partition('.')[0]
        raise errors.UserError(
            f'{where}: config.{field}={spec!r} would run code of {module}; if '
            f'you trust this file, allow it: --allow_code={package}, in Python '
            f'allow_code=({package!r},)')


def build(table: Mapping[str, Callable[..., Any]], spec: str, *,
          what: str, kind: type = object,
          given: Mapping[str, Any] | None = None) -> Any:
  """Calls the constructor that `spec` names and returns the result.

  The constructor gets the arguments `given` beside those of `spec`, which
  cannot name them. The result must be an instance of `kind`.

  Raises:
    UserError: `bind` refuses the spec, an imported constructor fails, or the
      result is of another type.
  """
  constructor, arguments = bind(table, spec, what=what, given=given)
  name, _ = parse_spec(spec)
  with errors.naming(f'{what} {name!r}', imported_modules(name)):
    built = constructor(**(given or {}), **arguments)
  if not isinstance(built, kind):
    raise errors.UserError(f'{what} {name!r} returns {type(built).__name__}, '
                           f'expected {kind.__name__}')
  return built


def bind(table: Mapping[str, Callable[..., Any]], spec: str, *, what: str,
         given: Mapping[str, Any] | None = None
         ) -> tuple[Callable[..., Any], dict[str, Any]]:
  """Returns the constructor and the arguments of `spec`, without a call.

  The constructor is an entry of `table` or is imported.

  Raises:
    UserError: the entry or an argument is unknown, a required argument is
      missing, an argument has another type than its annotation or does not fit
      32 bits, or the import fails.
  """
  name, arguments = parse_spec(spec, what)
  constructor = find_constructor(table, name, what=what)
  parameters = dict(inspect.signature(constructor).parameters)
  open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  parameters = {key: p for key, p in parameters.items()
                if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                and key not in (given or {})}
  if 'parent' in parameters:  # a Flax module: users set neither field
    del parameters['parent'], parameters['name']
  for key, value in arguments.items():
    if key not in parameters:
      if open_ended:
        continue
      hint = (errors.did_you_mean(key, parameters) if parameters
              else '; it takes none')
      raise errors.UserError(f'{what} {name!r} has no argument {key!r}{hint}')
    wanted = parameters[key].annotation
    if wanted in LITERALS and type(value) not in LITERALS[wanted]:
      raise errors.UserError(f'{what} {name!r}: {key}={value!r}, expected '
                             f'{wanted.__name__}')
    low, high = SIZES.get(wanted, (None, None))
    if low and 0 < abs(value) < math.inf and not low <= abs(value) <= high:
      raise errors.UserError(
          f'{what} {name!r}: {key}={value!r} is 0 or not finite in 32 bits; '
          f'its size must be in {low} … {high}')
  for key, parameter in parameters.items():
    if parameter.default is parameter.empty and key not in arguments:
      raise errors.UserError(f'{what} {name!r} needs the argument {key!r}')
  return constructor, arguments


def find_constructor(table: Mapping[str, Callable[..., Any]], name: str, *,
                     what: str) -> Callable[..., Any]:
  """Returns the entry of `table`, or the import that 'module:name' names.

  Raises a UserError if there is no such entry or the import fails.
  """
  if ':' in name:
    return _import_constructor(name, what)
  errors.check_known(what, name, table)
  return table[name]


def _import_constructor(name: str, what: str) -> Callable[..., Any]:
  module, _, attribute = name.partition(':')
  with errors.naming(f'{what} {name!r}', [module]):
    try:
      imported = importlib.import_module(module)
    except ImportError as e:
      raise errors.UserError(
          f'{what} {name!r}: {" ".join(str(e).split())}; is its directory on '
          'PYTHONPATH?') from e
  try:
    constructor = getattr(imported, attribute)
    inspect.signature(constructor)
  except AttributeError as e:
    raise errors.UserError(f'{what} {name!r}: {" ".join(str(e).split())}'
                           ) from e
  except (TypeError, ValueError):
    raise errors.UserError(
        f'{what} {name!r} is no function or class with a signature') from None
  return constructor
