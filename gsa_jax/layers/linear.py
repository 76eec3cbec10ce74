"""The projection every layer is made of: a bias-free matrix with named axes."""

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
        dot_general=_float32_dot_general if float32_out else lax.dot_general,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[-1:]},
        rngs=rngs,
    )


def _float32_dot_general(x, kernel, dimension_numbers, **_):
    """What `nnx.Linear` asks of `lax.dot_general`, x [..., in] times kernel [in, out], without rounding the result."""
    return dot(x, kernel)
