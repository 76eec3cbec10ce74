"""HGRN2: gated linear RNN with state expansion."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gsa_jax.layers.checks import check_numbers
from gsa_jax.layers.linear import linear
from gsa_jax.layers.mixer import Mixer, check_inputs, merge_heads
from gsa_jax.layers.norm import RMSNorm
from gsa_jax.ops import sharded
from gsa_jax.ops.arguments import check_array


@dataclass(frozen=True)
class HGRN2Config:
    """Settings of an HGRN2 layer; the defaults are the paper's."""

    expand_ratio: int = 128
    """rows of the state per head: the head size; hidden_size / expand_ratio heads"""
    norm_epsilon: float = 1e-5
    """epsilon of the output norm"""

    def __post_init__(self):
        check_numbers(self)


class HGRN2(Mixer):
    """HGRN2 (arXiv 2404.07904, section 3.2): the key is what the forget gate leaves free.

        f = lower_bound + (1 - lower_bound) ⊙ sigmoid(W_f x)
        y = W_o RMSNorm(GLA(q = swish(W_q x), k = 1 - f, v = W_i x, gate f))

    The norm spans all heads. The state is float32 [B, H, K, V] with K = V = expand_ratio.
    """

    Config = HGRN2Config

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        config = self.Config() if config is None else config
        if hidden_size < 1 or hidden_size % config.expand_ratio:
            raise ValueError(
                f"hidden_size must be a multiple of expand_ratio, got {hidden_size}, {config.expand_ratio}"
            )
        self.head_size = config.expand_ratio
        self.num_heads = hidden_size // config.expand_ratio
        self.implementation = implementation
        into_heads = ("embed", "heads")
        self.q = linear(hidden_size, hidden_size, into_heads, dtype=dtype, rngs=rngs)
        self.forget = linear(hidden_size, hidden_size, into_heads, dtype=dtype, float32_out=True, rngs=rngs)
        self.input = linear(hidden_size, hidden_size, into_heads, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(
            hidden_size, epsilon=config.norm_epsilon, implementation=implementation, dtype=dtype, rngs=rngs
        )
        self.out = linear(hidden_size, hidden_size, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x, state=None, segment_ids=None, *, lower_bound=0.0):
        """As every mixer; `lower_bound` of the forget gate, a number or [D], in [0, 1), from `lower_bounds`."""
        check_inputs(x, self.out.out_features)
        if jnp.shape(lower_bound) not in ((), (self.out.out_features,)):
            raise ValueError(f"lower_bound must have shape [] or [D], got {list(jnp.shape(lower_bound))}")
        if state is not None:
            sizes = {"B": x.shape[0], "H": self.num_heads, "K": self.head_size, "V": self.head_size}
            check_array("state", state, sizes)
        log_forget, key = self.log_forget(self.forget(x), lower_bound)
        q = jax.nn.swish(self.q(x))
        out, state = sharded.gated_linear_attention(
            self._heads(q),
            self._heads(key.astype(q.dtype)),
            self._heads(self.input(x)),
            self._heads(log_forget),
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return self.out(self.norm(merge_heads(out))), state

    @staticmethod
    def log_forget(logits, lower_bound):
        """(log f, 1 - f) of the forget gate f = lower_bound + (1 - lower_bound) sigmoid(logits), both without
        cancellation; 1 - f is the key."""
        key = (1 - lower_bound) * nnx.sigmoid(-logits)
        bounded = jnp.greater(lower_bound, 0)  # log_sigmoid alone is exact and differentiable for closed gates
        forget = jnp.where(bounded, lower_bound + (1 - lower_bound) * nnx.sigmoid(logits), 1)
        closer_to_one = jnp.log1p(-jnp.minimum(key, 0.5))
        log_forget = jnp.where(key < 0.5, closer_to_one, jnp.log(forget))
        return jnp.where(bounded, log_forget, jax.nn.log_sigmoid(logits)), key

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_size)

    def init_state(self, batch_size, max_length=None):
        return jnp.zeros((batch_size, self.num_heads, self.head_size, self.head_size), jnp.float32)


def lower_bounds(logits):
    """The layers' lower bounds of the forget gate from learned logits [L, D]: 0 in the first layer, growing with depth
    (HGRN, arXiv 2311.04823, section 3.2): a cumulative softmax over the layers less its first row."""
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=0)[1:]
    below_one = 1 - jnp.finfo(jnp.float32).eps
    return jnp.pad(jnp.minimum(jnp.cumsum(shares, axis=0), below_one), ((1, 0), (0, 0)))
