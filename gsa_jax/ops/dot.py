"""The matrix product of this library: factors in their own dtype, sums in float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def dot(x, y, *, out_dtype=jnp.float32):
    """x @ y as `jnp.matmul`, with float32 sums (float64 for float64 factors); the result is float32 or of `out_dtype`.

    float32 factors are multiplied exactly on every platform. bfloat16 and float16 factors are multiplied as they are,
    in the backward pass too: there the cotangent is rounded to their dtype, where plain autodiff would multiply in
    float32, at half the speed of matrix units or less. They have no forward-mode derivatives (`jax.jvp`).
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    if dtype in (jnp.float32, jnp.float64):
        return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
    return _low_precision_dot(x, y, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_dot(x, y, out_dtype):
    return lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: jnp.matmul(_wide(x), _wide(y)).astype(out_dtype),
        default=functools.partial(jnp.matmul, preferred_element_type=out_dtype),
    )


def _forward(x, y, out_dtype):
    return _low_precision_dot(x, y, out_dtype), (x, y)


def _backward(out_dtype, factors, cotangent):
    def default(x, y, cotangent):
        return jax.vjp(jnp.matmul, x, y)[1](cotangent)

    def cpu(x, y, cotangent):
        return tuple(factor.astype(x.dtype) for factor in default(_wide(x), _wide(y), _wide(cotangent)))

    return lax.platform_dependent(*factors, cotangent.astype(factors[0].dtype), cpu=cpu, default=default)


def _wide(x):
    """For CPUs: depending on layouts, XLA sums low-precision products there in low precision, or can't compile them."""
    return x.astype(jnp.float32)


_low_precision_dot.defvjp(_forward, _backward)
