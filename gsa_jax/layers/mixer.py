"""What every token mixer has in common: two calls, and projections to heads."""

import math

import jax.numpy as jnp
from flax import nnx

from gsa_jax.layers.linear import linear
from gsa_jax.layers.short_conv import ShortConvolution
from gsa_jax.ops.arguments import check_array


class Mixer(nnx.Module):
    """A layer that mixes tokens: y[t] depends on x[0..t] through a state that can be passed on.

    Splitting a sequence anywhere and passing the state on gives the same outputs.
    """

    def __call__(self, x, state=None, segment_ids=None):
        """A whole sequence: x [B, T, D] -> (y [B, T, D], state after the last token).

        `state` is what an earlier call returned or `init_state` made; None is the empty state. `segment_ids` [B, T]
        mark documents packed into one row: where the id changes a document begins that sees nothing before it. The
        state passed in belongs to the row's first document, the returned one to its last.

        Raises:
          TypeError, ValueError: an argument has the wrong dtype or shape, or is of another kind; the message names it.
        """
        raise NotImplementedError

    def step(self, x, state, **inputs):
        """One token: x [B, D] -> (y [B, D], the new state); `inputs` are those that the mixer takes beside."""
        check_array("x", x, {"B": None, "D": None})
        y, state = self(x[:, None], state, **inputs)
        return y[:, 0], state

    def init_state(self, batch_size, max_length=None):
        """An empty state. `max_length`, in tokens, bounds the states that grow with the sequence (softmax attention);
        the others ignore it."""
        raise NotImplementedError


class HeadProjections(nnx.Module):
    """q, k and v of a mixer: projections, short convolutions if wanted, heads split.

    x [B, T, D] -> q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]. The state is that of the three convolutions, or ().
    """

    def __init__(self, hidden_size, num_heads, num_kv_heads, key_size, value_size, conv_size=0, *, dtype, rngs):
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        self.shapes = ((num_heads, key_size), (num_kv_heads, key_size), (num_kv_heads, value_size))
        widths = [heads * size for heads, size in self.shapes]
        self.q, self.k, self.v = (
            linear(hidden_size, width, ("embed", "heads"), dtype=dtype, rngs=rngs) for width in widths
        )
        self.convolutions = nnx.List(
            [ShortConvolution(width, conv_size, dtype=dtype, rngs=rngs) for width in widths] if conv_size else []
        )

    def __call__(self, x, state=(), segment_ids=None):
        projected = [self.q(x), self.k(x), self.v(x)]
        if self.convolutions:
            states = state or (None, None, None)
            convolved = zip(self.convolutions, projected, states, strict=True)
            projected, state = zip(*(conv(y, s, segment_ids) for conv, y, s in convolved), strict=True)
        q, k, v = (y.reshape(*y.shape[:-1], *shape) for y, shape in zip(projected, self.shapes, strict=True))
        return q, k, v, state

    def init_state(self, batch_size):
        """Empty states of the convolutions."""
        return tuple(conv.init_state(batch_size) for conv in self.convolutions)


def check_inputs(x, hidden_size, state=None, kind=object):
    """Raises unless x is [B, T, D], and `state` None or what the layer's `init_state` makes: a `kind`, or a plain tuple
    of its fields."""
    check_array("x", x, {"B": None, "T": None, "D": hidden_size})
    alike = isinstance(state, tuple) and hasattr(kind, "_fields") and len(state) == len(kind._fields)
    if not (state is None or isinstance(state, kind) or alike):
        raise TypeError(f"state must be a {kind.__name__}, as init_state makes it, or None, got {type(state).__name__}")


def head_size(hidden_size, num_heads, **expand):
    """hidden_size / num_heads, times the setting `expand` by its name if there is one; it must be whole."""
    size = math.prod(expand.values()) * hidden_size / num_heads
    if size < 1 or not math.isclose(size, round(size)):
        got = ", ".join(f"{name}={value}" for name, value in {"hidden_size": hidden_size, **expand}.items())
        product = " · ".join(["hidden_size", *expand])
        raise ValueError(f"{product} must be a multiple of the number of heads, got {got}, heads={num_heads}")
    return round(size)


def merge_heads(x):
    """[B, T, H, V] -> [B, T, H·V]."""
    return jnp.reshape(x, (*x.shape[:-2], -1))
