"""Root-mean-square normalization."""

import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.RMSNorm):
    """y = scale ⊙ x / sqrt(mean(x²) + epsilon) over the last axis (arXiv 1910.07467), computed in float32."""

    def __init__(self, num_features, *, epsilon=1e-5, dtype=jnp.float32, rngs):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=jnp.float32,
            use_fast_variance=False,
            scale_metadata={"axes": (None,)},
            rngs=rngs,
        )
