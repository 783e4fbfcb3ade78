"""The functions sweep() and search_space() of the config file at `path`.

A function with an argument `variant` gets the variant of `path:variant`, if the
user names one.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import inspect
import runpy
from typing import Any

import numpy as np

from qa_jax import errors


def grid_variants(path: str, overrides: Collection[str],
                  has_seeds: bool, variant: str = ''
                  ) -> list[Mapping[str, Any]]:
  """Returns the variants of sweep(), or the default if the file has none.

  `overrides` are the fields that the user sets for all variants, and
  `has_seeds` says whether the user sets --seeds. sweep() may vary neither.
  """
  if not {'sweep', 'search_space'} & runpy.run_path(path).keys():
    return [{}]
  variants = call(path, 'sweep', 'grid', variant)
  if not isinstance(variants, Iterable):
    raise errors.UserError(f'{path}: sweep() gives {variants!r}, expected '
                           'a list of overrides')
  for given in variants:
    if not isinstance(given, Mapping) or not all(
        isinstance(key, str) for key in given):
      raise errors.UserError(f'{path}: sweep() yields {given!r}, expected '
                             "overrides such as {'model.head': 'biaffine'}")
    check_overrides(path, overrides, given, 'sweep')
    if 'seed' in given and has_seeds:
      raise errors.UserError(f'--seeds: {path} sets seeds; leave them to it')
  return list(variants)


def check_overrides(path: str, overrides: Collection[str],
                    varied: Collection[str], name: str) -> None:
  """Raises a UserError if the user sets a field that function `name` varies."""
  for key in sorted({*overrides} & {*varied}):
    raise errors.UserError(
        f'--config.{key}: {path} varies it; leave it to {name}()')


def call(path: str, name: str, sampler: str, variant: str = '') -> Any:
  """Returns the result of the function `name`, which `sampler` needs."""
  function = runpy.run_path(path).get(name)
  if function is None:
    raise errors.UserError(
        f'{path} has no {name}(), which --sampler={sampler} needs')
  try:
    takes = variant and 'variant' in inspect.signature(function).parameters
    result = function(variant) if takes else function()
    return _plain(list(result) if isinstance(result, Iterator) else result)
  except Exception as e:  # a config file is code: it may raise anything
    raise errors.UserError(
        f'{path}: {name}(): {type(e).__name__}: {e}') from None


def _plain(value: Any) -> Any:
  """Turns numbers and arrays of numpy, as of np.geomspace, into Python's."""
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(map(_plain, value))
  return value
