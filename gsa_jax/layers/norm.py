"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gsa_jax.ops import sharded


class RMSNorm(nnx.RMSNorm):
    """y = scale ⊙ x / sqrt(mean(x²) + epsilon) over the last axis (arXiv 1910.07467), computed in float32.

    `implementation` is that of the mixers: with None or "pallas" kernels do it on Hopper GPUs where they fit, for many
    rows of bfloat16 or float16, with first derivatives in reverse mode only; with the others XLA does.
    """

    def __init__(self, num_features, *, epsilon=1e-5, implementation=None, dtype=jnp.float32, rngs):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=jnp.float32,
            use_fast_variance=False,
            scale_metadata={"axes": (None,)},
            rngs=rngs,
        )
        self.implementation = implementation

    def __call__(self, x, *, swish=False):
        """The norm of x [B, T, ..., D], or of swish(x)."""
        if self._kernels_fit(x):
            return sharded.rms_norm(x, self._scale(), epsilon=self.epsilon, swish=swish)
        return super().__call__(jax.nn.swish(x) if swish else x)

    def of_sum(self, x, update=None):
        """A residual stream x [B, T, D] with an update [B, T, D] added, if there is one, and the norm of that."""
        alike = update is None or (update.shape, update.dtype) == (x.shape, x.dtype)
        if alike and self._kernels_fit(x):
            return sharded.rms_norm_of_sum(x, update, self._scale(), epsilon=self.epsilon)
        x = x if update is None else add(x, update)
        return x, super().__call__(x)

    def _kernels_fit(self, x):
        wanted = self.implementation in (None, "pallas")
        return wanted and x.dtype == self.dtype and sharded.rms_norm_fits(x)

    def _scale(self):
        return self.scale[...].astype(jnp.float32)


def add(x, update):
    """x + update. Of many tokens it is a kernel of its own: the product that the update comes from would add to a copy
    of x."""
    return x + (lax.optimization_barrier(update) if x.shape[1] > 1 else update)
