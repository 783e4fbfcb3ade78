"""Products in the compute dtype that accumulate in float32, both ways.

Glossary of shapes: N tokens, D and F features.

The derivative of a bfloat16 product with a float32 result is, left to itself, a
product of float32 with bfloat16: an upcast and the slow kernel. Here the
cotangent is rounded as the operands are, so all three products of a layer are
bfloat16 × bfloat16 → float32, the form that has a native kernel on CPUs,
GPUs and TPUs alike.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array,
           dtype: jnp.dtype) -> jax.Array:  # float32
  """Σ a·b of operands rounded to `dtype`.

  `spec` names every index of an operand in the other or in the result; the
  gradients have the dtypes of `a` and `b`.
  """
  return _product(spec, a, b, dtype)


def _product(spec, a, b, dtype):
  return jnp.einsum(spec, a.astype(dtype), b.astype(dtype),
                    preferred_element_type=jnp.float32)


def _forward(spec, a, b, dtype):
  return _product(spec, a, b, dtype), (a, b)


def _backward(spec, dtype, operands, g):
  a, b = operands
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  return (_product(f'{out},{right}->{left}', g, b, dtype).astype(a.dtype),
          _product(f'{left},{out}->{right}', a, g, dtype).astype(b.dtype))


einsum.defvjp(_forward, _backward)
