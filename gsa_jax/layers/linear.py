"""The projection every layer is made of: a bias-free matrix with named axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gsa_jax.ops.dot import dot


def linear(in_size, out_size, axes, *, dtype, rngs, use_bias=False, float32_out=False):
    """`nnx.Linear` with float32 parameters, computing in `dtype`; the result is float32 if `float32_out`.

    `axes` names the kernel's two axes ("embed", "heads", "mlp", "vocab" or None); the table in
    `gsa_jax.sharding` maps the names to mesh axes. They stand in the parameter's metadata under "axes".
    """
    return nnx.Linear(
        in_size,
        out_size,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        dot_general=_float32_dot_general if float32_out else _dot_general,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[-1:]},
        rngs=rngs,
    )


def _dot_general(x, kernel, _, **options):
    """What `nnx.Linear` asks of `lax.dot_general`: x [..., in] times kernel [in, out]."""
    return _rows(x, kernel, lambda x: lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options))


def _float32_dot_general(x, kernel, _, **options):
    """The same without rounding the result."""
    return _rows(x, kernel, lambda x: dot(x, kernel))


def _rows(x, kernel, multiply):
    """multiply(x) of rows [..., in], where a row that is alone gets one of zeros beside it, but on CPUs.

    A single row times a matrix of a few million numbers is to XLA for GPUs no product but a sum, whose terms it writes
    to memory and reads again: three times the bytes of the matrix. Results are float32 at first, all alike: XLA makes
    one product of several with the same row.
    """
    if x.size != x.shape[-1]:
        return multiply(x)

    def multiply_pair(x):
        pair = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return dot(pair, kernel)[:1].reshape(*x.shape[:-1], -1).astype(jax.eval_shape(multiply, x).dtype)

    return lax.platform_dependent(x, cpu=multiply, default=multiply_pair)
