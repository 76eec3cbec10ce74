"""Causal depthwise convolution over a few tokens, as used before linear recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx

from gsa_jax.ops import sharded


class ShortConvolution(nnx.Module):
    """y[t] = swish(Σ_{i<W} kernel[W-1-i] ⊙ x[t-i]), within a document (as in arXiv 2312.00752, section 3.4).

    The state is the last W - 1 inputs [B, W-1, C]; an empty one is zeros.
    """

    def __init__(self, num_channels, width, *, dtype=jnp.float32, rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0, out_axis=1)
        self.kernel = nnx.Param(init(rngs.params(), (width, num_channels), jnp.float32), axes=(None, "heads"))
        self.dtype = dtype

    def init_state(self, batch_size):
        """Zeros: the inputs before the first token."""
        *_, width, num_channels = self.kernel.shape  # of all layers, where they are stacked
        return jnp.zeros((batch_size, width - 1, num_channels), self.dtype)

    def __call__(self, x, state=None, segment_ids=None):
        """x [B, T, C] -> (y [B, T, C], the new state); `state` holds the inputs before x, of x's first document."""
        kernel = self.kernel[...].astype(self.dtype)
        y, state = sharded.short_convolution(x.astype(self.dtype), kernel, initial_state=state, segment_ids=segment_ids)
        return jax.nn.swish(y), state
