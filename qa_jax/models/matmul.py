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
  a, b = a.astype(dtype), b.astype(dtype)
  if dtype == jnp.bfloat16 and jax.default_backend() == 'cpu':
    return _native(spec, _as_laid_out(a), _as_laid_out(b))
  return _einsum(spec, a, b)


def _einsum(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _native(spec, a, b):
  """The product in a form for which XLA has a bfloat16 kernel on CPUs.

  It has one where an operand ends in the index that is summed over. Neither
  does in the gradients of weights, keys and values: there the smaller is laid
  out anew, a small part of what the kernel saves.
  """
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  summed = ''.join(i for i in left if i in right and i not in out)
  if len(summed) != 1 or summed in (left[-1], right[-1]):
    return _einsum(spec, a, b)
  if a.size > b.size:
    left, right, a, b = right, left, b, a
  rows = left.replace(summed, '') + summed
  found = rows[:-1] + ''.join(i for i in right if i not in rows)
  y = _einsum(f'{rows},{right}->{found}',
              _as_laid_out(jnp.einsum(f'{left}->{rows}', a)), b)
  return jnp.einsum(f'{found}->{out}', _as_laid_out(y))


def _as_laid_out(x):
  """`x`, for XLA to see neither a transpose to merge nor its layout.

  From a dot of either it takes back the operands' bfloat16.
  """
  return jax.lax.optimization_barrier(x[..., None])[..., 0]


def _forward(spec, a, b, dtype):
  return _product(spec, a, b, dtype), (a, b)


def _backward(spec, dtype, operands, g):
  a, b = operands
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  return (_product(f'{out},{right}->{left}', g, b, dtype).astype(a.dtype),
          _product(f'{left},{out}->{right}', a, g, dtype).astype(b.dtype))


einsum.defvjp(_forward, _backward)
