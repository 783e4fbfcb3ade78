"""Lists of overrides, to write sweep() of a config file with.

  return grid.product(grid.over('model.head', ['independent', 'biaffine']),
                      grid.over('optim.learning_rate', [1e-4, 3e-4]))
"""

from collections.abc import Iterable
import itertools
from typing import Any

Variants = list[dict[str, Any]]


def over(field: str, values: Iterable[Any]) -> Variants:
  """One variant a value."""
  return [{field: value} for value in values]


def seeds(count: int) -> Variants:
  """Seeds 0 … count - 1, in place of --seeds."""
  return over('seed', range(count))


def product(*lists: Variants) -> Variants:
  """Every combination, the last list varying fastest."""
  return [_merged(c) for c in itertools.product(*lists)]


def together(*lists: Variants) -> Variants:
  """The first of each, the second of each, … of lists of one length."""
  return [_merged(c) for c in zip(*lists, strict=True)]


def chain(*lists: Variants) -> Variants:
  """One list after the other."""
  return [*itertools.chain(*lists)]


def _merged(variants: Iterable[dict[str, Any]]) -> dict[str, Any]:
  merged: dict[str, Any] = {}
  for variant in variants:
    twice = merged.keys() & variant.keys()
    if twice:
      raise ValueError(f'{min(twice)} is varied twice')
    merged |= variant
  return merged
