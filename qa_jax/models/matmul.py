"""Matrix products in the compute dtype that accumulate in float32.

The automatic derivative of a bfloat16 product with a float32 result is a
product of float32 with bfloat16, which is computed with an upcast and a slow
kernel. Here the cotangent is rounded like the operands, so the product and both
of its gradients are bfloat16 × bfloat16 → float32. CPUs, GPUs and TPUs have a
native kernel for this form.

Glossary of shapes: N tokens, D input features, F output features.
"""

import functools

import jax
import jax.numpy as jnp

# A precision as JAX takes it; None is its default.
Precision = str | jax.lax.Precision | None


def einsum(spec: str, a: jax.Array, b: jax.Array,
           dtype: jnp.dtype) -> jax.Array:  # float32
  """Computes an einsum of two operands that are rounded to `dtype`.

  Every index of an operand in `spec` must also be in the other operand or in
  the result. The gradients have the dtypes of `a` and `b`. They are computed
  with the precision that holds here, although JAX traces them later.
  """
  return _product(spec, a, b, dtype, float32_precision(dtype))


def dense(x: jax.Array,  # [N, D]
          kernel: jax.Array,  # [D, F] float32
          bias: jax.Array | None,  # [F] float32
          dtype: jnp.dtype) -> jax.Array:  # [N, F] in dtype
  """Computes x W + b with operands that are rounded to `dtype`.

  On a CPU the float32 sum is rounded to bfloat16 once, after the bias. On other
  platforms a bfloat16 product leaves its kernel as bfloat16, still summed in
  float32, so that memory sees half the bytes.
  """
  return _dense(x, kernel, bias, dtype, float32_precision(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _product(spec, a, b, dtype, precision):
  return product(spec, a, b, dtype, precision)


def product(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype,
            precision: Precision, out: jnp.dtype = jnp.float32) -> jax.Array:
  """Computes the value of `einsum` in `out`, for functions with a gradient.

  The sum is float32. Such functions call `float32_precision` where their value
  is traced, and pass it on to the products of their gradient.
  """
  a, b = a.astype(dtype), b.astype(dtype)
  if dtype != jnp.bfloat16:
    return _einsum(spec, a, b, precision).astype(out)
  # Decided when the program is lowered: an exported one has another platform.
  return jax.lax.platform_dependent(
      a, b,
      cpu=lambda a, b: _native(
          spec, _as_laid_out(a), _as_laid_out(b)).astype(out),
      default=functools.partial(_einsum, spec, out=out))


def _einsum(spec, a, b, precision=None, out=jnp.float32):
  return jnp.einsum(spec, a, b, preferred_element_type=out, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dense(x, kernel, bias, dtype, precision):
  times = functools.partial(product, 'nd,df->nf', x, kernel, dtype, precision)
  add = lambda y: y if bias is None else y + bias[None].astype(y.dtype)
  rounded_once = lambda: add(times()).astype(dtype)
  if dtype != jnp.bfloat16:
    return rounded_once()
  return jax.lax.platform_dependent(
      cpu=rounded_once, default=lambda: add(times(out=dtype)))


def _dense_forward(x, kernel, bias, dtype, precision):
  return _dense(x, kernel, bias, dtype, precision), (x, kernel, bias)


def _dense_backward(dtype, precision, residuals, g):
  x, kernel, bias = residuals
  return *_backward('nd,df->nf', dtype, precision, (x, kernel), g), (
      None if bias is None else g.astype(jnp.float32).sum(axis=0))


_dense.defvjp(_dense_forward, _dense_backward)


def float32_precision(dtype: jnp.dtype) -> Precision:
  """Returns the precision with which a product of `dtype` is exact float32.

  JAX's default rounds float32 operands to TF32 on an Ampere or later GPU and to
  bfloat16 on a TPU. JAX's option `jax_default_matmul_precision`
  (JAX_DEFAULT_MATMUL_PRECISION) has precedence where it is set. For the
  precision `tf32` of a config, `models/qa.py` sets it around the encoder.
  """
  if dtype != jnp.float32:
    return None
  return (jax.config.jax_default_matmul_precision
          or jax.lax.Precision.HIGHEST)


def _native(spec, a, b):
  """Computes the product in a form for which XLA has a bfloat16 CPU kernel.

  XLA has one if the sum is over the last index of an operand. In the gradients
  of weights, keys and values it is not; an operand is then transposed, which
  costs much less than the kernel saves. It is the smaller one, but the left one
  for a weight. The result would be transposed with the right one, and each loop
  of the optimizer would read it across its rows, 40 times as slowly.
  """
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  summed = ''.join(i for i in left if i in right and i not in out)
  if len(summed) != 1 or summed in (left[-1], right[-1]):
    return _einsum(spec, a, b)
  if len(out) > 2 and a.size > b.size:
    left, right, a, b = right, left, b, a
  transposed = left.replace(summed, '') + summed
  result = transposed[:-1] + ''.join(i for i in right if i not in transposed)
  y = _einsum(f'{transposed},{right}->{result}',
              _as_laid_out(jnp.einsum(f'{left}->{transposed}', a)), b)
  return jnp.einsum(f'{result}->{out}', _as_laid_out(y))


def _as_laid_out(x):
  """Returns `x` behind a barrier that hides transpose and layout from XLA.

  If XLA merged a transpose into the product or changed the layout of an
  operand, it would compute the product in float32 again.
  """
  return jax.lax.optimization_barrier(x[..., None])[..., 0]


def _forward(spec, a, b, dtype, precision):
  return product(spec, a, b, dtype, precision), (a, b)


def _backward(spec, dtype, precision, operands, g):
  a, b = operands
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  times = functools.partial(product, dtype=dtype, precision=precision)
  return (times(f'{out},{right}->{left}', g, b, out=a.dtype),
          times(f'{left},{out}->{right}', a, g, out=b.dtype))


_product.defvjp(_forward, _backward)
