"""The arrays that a traced program computes."""

import jax.extend.core


def computed_arrays(jaxpr):
  """Yields the abstract results of all equations, inner programs included."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars)
  for inner in jax.extend.core.subjaxprs(jaxpr):
    yield from computed_arrays(inner)
