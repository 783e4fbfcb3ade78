"""Helpers that build the list of overrides that sweep() returns.

  return grid.product(grid.over('model.head', ['independent', 'biaffine']),
                      grid.over('optim.learning_rate', [1e-4, 3e-4]))
"""

from collections.abc import Iterable
import itertools
from typing import Any

Variants = list[dict[str, Any]]


def over(field: str, values: Iterable[Any]) -> Variants:
  """Returns one variant for each value of a config field."""
  return [{field: value} for value in values]


def seeds(count: int) -> Variants:
  """Returns variants with seeds 0 … count - 1; they replace --seeds."""
  return over('seed', range(count))


def product(*lists: Variants) -> Variants:
  """Returns all combinations of variants; the last list varies fastest."""
  return [_merged(c) for c in itertools.product(*lists)]


def together(*lists: Variants) -> Variants:
  """Merges the i-th variants of all lists, which must be equally long."""
  return [_merged(c) for c in zip(*lists, strict=True)]


def chain(*lists: Variants) -> Variants:
  """Concatenates lists of variants."""
  return [*itertools.chain(*lists)]


def _merged(variants: Iterable[dict[str, Any]]) -> dict[str, Any]:
  merged: dict[str, Any] = {}
  for variant in variants:
    twice = merged.keys() & variant.keys()
    if twice:
      raise ValueError(f'{min(twice)} is varied twice')
    merged |= variant
  return merged
