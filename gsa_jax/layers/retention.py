"""Retention, the mixer of RetNet."""

from dataclasses import dataclass

import jax.numpy as jnp

from gsa_jax.layers.checks import check_numbers
from gsa_jax.layers.linear_attention import LinearAttentionLayer
from gsa_jax.layers.rotary import rotate


@dataclass(frozen=True)
class RetentionConfig:
    """Settings of a retention layer; the defaults are RetNet's proportions with the head size of 256."""

    num_heads: int = 4
    """query heads H"""
    num_kv_heads: int | None = None
    """states G, each shared by H / G query heads; H by default"""
    expand_k: float = 1.0
    """total key width over hidden size, as if G were H"""
    expand_v: float = 2.0
    """total value width over hidden size, as if G were H"""
    rope_theta: float = 10000.0
    """base of the rotary embedding of queries and keys"""
    conv_size: int = 0
    """taps of the short convolutions of q, k and v; 0 leaves them out"""
    norm_epsilon: float = 1e-5
    """epsilon of the per-head output norm"""

    def __post_init__(self):
        check_numbers(self, "conv_size")


class Retention(LinearAttentionLayer):
    """Retention (RetNet, arXiv 2307.08621, section 2.1): head g forgets at the fixed rate 1 - 2^(-5-g).

        y = W_o (RMSNorm(GLA(rotate(W_q x), rotate(W_k x), W_v x, 1 - 2^(-5-g))) ⊙ swish(W_g x))

    The norm is over each head. The state's memory is float32 [B, G, K, V].
    """

    Config = RetentionConfig

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        config = self.Config() if config is None else config
        super().__init__(hidden_size, config, output_gate=True, implementation=implementation, dtype=dtype, rngs=rngs)

    def map_features(self, x, position):
        positions = position + jnp.arange(x.shape[1])[None]
        return rotate(x, positions, self.config.rope_theta)

    def log_decay(self, x):
        """log(1 - 2^(-5-g)) of each head g, [B, T, G, 1]."""
        num_groups = self.memory_shape[0]
        per_head = jnp.log1p(-(2.0 ** (-5 - jnp.arange(num_groups, dtype=jnp.float32))))
        return jnp.broadcast_to(per_head[:, None], (*x.shape[:-1], num_groups, 1))
