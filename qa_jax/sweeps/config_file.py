"""The functions sweep() and search_space() of the config file at `path`."""

from collections.abc import Collection, Iterable, Iterator, Mapping
import runpy
from typing import Any

from qa_jax import errors


def grid_variants(path: str, overrides: Collection[str],
                  has_seeds: bool) -> list[Mapping[str, Any]]:
  """Returns the variants of sweep(), or the default if the file has none.

  `overrides` are the fields that the user sets for all variants, and
  `has_seeds` says whether the user sets --seeds. sweep() may vary neither.
  """
  if not {'sweep', 'search_space'} & runpy.run_path(path).keys():
    return [{}]
  variants = call(path, 'sweep', 'grid')
  if not isinstance(variants, Iterable):
    raise errors.UserError(f'{path}: sweep() gives {variants!r}, expected '
                           'a list of overrides')
  for variant in variants:
    if not isinstance(variant, Mapping) or not all(
        isinstance(key, str) for key in variant):
      raise errors.UserError(f'{path}: sweep() yields {variant!r}, expected '
                             "overrides such as {'model.head': 'biaffine'}")
    for key in {*overrides} & variant.keys():
      raise errors.UserError(
          f'--config.{key}: {path} varies it; leave it to sweep()')
    if 'seed' in variant and has_seeds:
      raise errors.UserError(f'--seeds: {path} sets seeds; leave them to it')
  return list(variants)


def call(path: str, name: str, sampler: str) -> Any:
  """Returns the result of the function `name`, which `sampler` needs."""
  function = runpy.run_path(path).get(name)
  if function is None:
    raise errors.UserError(
        f'{path} has no {name}(), which --sampler={sampler} needs')
  try:
    result = function()
    return list(result) if isinstance(result, Iterator) else result
  except Exception as e:  # a config file is code: it may raise anything
    raise errors.UserError(
        f'{path}: {name}(): {type(e).__name__}: {e}') from None
