"""Causal depthwise convolution over a few tokens, as used before linear recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx

from gsa_jax.ops.arguments import document_starts


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
        width, num_channels = self.kernel.shape
        return jnp.zeros((batch_size, width - 1, num_channels), self.dtype)

    def __call__(self, x, state=None, segment_ids=None):
        """x [B, T, C] -> (y [B, T, C], the new state); `state` holds the inputs before x, of x's first document."""
        batch_size, length, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        before = kernel.shape[0] - 1
        state = self.init_state(batch_size) if state is None else state
        inputs = jnp.concatenate([state, x.astype(self.dtype)], axis=1)
        if segment_ids is None:
            taps = (kernel[i] * inputs[:, i : i + length] for i in range(before + 1))
            return jax.nn.swish(sum(taps)), inputs[:, length:]

        document = jnp.cumsum(document_starts(segment_ids), axis=1)
        document = jnp.pad(document, ((0, 0), (before, 0)))
        same = (document[:, i : i + length] == document[:, before:] for i in range(before + 1))
        taps = (
            jnp.where(is_same[..., None], kernel[i] * inputs[:, i : i + length], 0) for i, is_same in enumerate(same)
        )
        in_last_document = document[:, length:] == document[:, -1:]
        return jax.nn.swish(sum(taps)), jnp.where(in_last_document[..., None], inputs[:, length:], 0)
