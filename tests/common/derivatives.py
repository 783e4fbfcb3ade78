"""Gradients against differences of a function."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

STEP = 0.02


def assert_are_gradients(function: Callable[[Any], float], arrays: Any,
                         gradients: Any, rtol: float = 3e-3) -> None:
  """Checks `gradients` of a function of a tree of arrays, array by array.

  The derivative along one direction, the gradient plus a random vector, must be
  the central difference of fourth order (Fornberg, 1988, table 1).
  """
  leaves, tree = jax.tree.flatten(arrays)
  rng = np.random.default_rng(3)
  for n, (leaf, gradient) in enumerate(zip(
      leaves, jax.tree.leaves(gradients), strict=True)):
    random = rng.normal(size=leaf.shape)
    direction = random / np.linalg.norm(random) + gradient / max(
        np.linalg.norm(gradient), 1e-9)

    def at(steps, n=n, leaf=leaf, direction=direction):
      moved = np.float32(leaf + steps * STEP * direction)
      return function(tree.unflatten([*leaves[:n], moved, *leaves[n + 1:]]))

    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
    np.testing.assert_allclose(
        (gradient * direction).sum(), difference, rtol=rtol, atol=2e-3,
        err_msg=f'array {n} of shape {leaf.shape}')
