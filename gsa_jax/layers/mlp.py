"""The channel mixer of Llama-like blocks."""

import jax
import jax.numpy as jnp
from flax import nnx

from gsa_jax.layers.linear import linear


class SwiGLU(nnx.Module):
    """y = W_down (swish(W_gate x) ⊙ W_up x) (arXiv 2002.05202)."""

    def __init__(self, hidden_size, mlp_size=None, *, dtype=jnp.float32, rngs):
        mlp_size = swiglu_size(hidden_size) if mlp_size is None else mlp_size
        self.gate = linear(hidden_size, mlp_size, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = linear(hidden_size, mlp_size, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(mlp_size, hidden_size, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.swish(self.gate(x)) * self.up(x))


def swiglu_size(hidden_size):
    """8/3 of the hidden size, which has a plain 4d MLP's parameters, rounded up to a multiple of 256."""
    return 256 * -(-round(hidden_size * 8 / 3) // 256)
