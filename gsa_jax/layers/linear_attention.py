"""Gated linear attention and plain linear attention."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gsa_jax.layers.checks import check_numbers
from gsa_jax.layers.feature_maps import feature_map
from gsa_jax.layers.linear import linear
from gsa_jax.layers.mixer import HeadProjections, Mixer, check_inputs, head_size, merge_heads
from gsa_jax.layers.norm import RMSNorm
from gsa_jax.ops import sharded


class LinearAttentionState(NamedTuple):
    """What a linear attention layer passes on."""

    memory: jax.Array
    """H, float32 [B, G, K, V]"""
    convolutions: tuple
    position: jax.Array
    """tokens seen so far, int32"""


class LinearAttentionLayer(Mixer):
    """The frame of the layers with a linear read: heads, a log decay, the recurrence, a norm per head, an output gate.

        y = W_o (RMSNorm(GLA(q, k, v, log decay)) ⊙ swish(W_g x))

    Without `output_gate` the last factor is missing. Subclasses give the maps of q and k and the log decay.
    """

    def __init__(self, hidden_size, config, *, output_gate, implementation, dtype, rngs):
        num_kv_heads = config.num_kv_heads or config.num_heads
        key_size = head_size(hidden_size, config.num_heads, expand_k=config.expand_k)
        value_size = head_size(hidden_size, config.num_heads, expand_v=config.expand_v)
        self.config = config
        self.implementation = implementation
        self.memory_shape = (num_kv_heads, key_size, value_size)
        self.projections = HeadProjections(
            hidden_size, config.num_heads, num_kv_heads, key_size, value_size, config.conv_size, dtype=dtype, rngs=rngs
        )
        out_size = config.num_heads * value_size
        self.output_gate = (
            linear(hidden_size, out_size, ("embed", "heads"), dtype=dtype, rngs=rngs) if output_gate else None
        )
        self.norm = RMSNorm(
            value_size, epsilon=config.norm_epsilon, implementation=implementation, dtype=dtype, rngs=rngs
        )
        self.out = linear(out_size, hidden_size, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x, state=None, segment_ids=None):
        check_inputs(x, self.out.out_features, state, LinearAttentionState)
        memory, conv_state, position = (None, (), jnp.int32(0)) if state is None else state
        q, k, v, conv_state = self.projections(x, conv_state, segment_ids)
        out, memory = sharded.gated_linear_attention(
            self.map_features(q, position),
            self.map_features(k, position),
            v,
            self.log_decay(x),
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        out = merge_heads(self.norm(out))
        if self.output_gate is not None:
            out = out * jax.nn.swish(self.output_gate(x))
        return self.out(out), LinearAttentionState(memory, conv_state, position + x.shape[1])

    def map_features(self, x, position):
        """The map of queries and keys [B, T, heads, K]; `position` is that of the first token."""
        return x

    def log_decay(self, x):
        """The log decay [B, T, G, K or 1]."""
        raise NotImplementedError

    def init_state(self, batch_size, max_length=None):
        memory = jnp.zeros((batch_size, *self.memory_shape), jnp.float32)
        return LinearAttentionState(memory, self.projections.init_state(batch_size), jnp.int32(0))


@dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """Settings of a gated linear attention layer; the defaults are the paper's."""

    num_heads: int = 4
    """query heads H"""
    num_kv_heads: int | None = None
    """states G, each shared by H / G query heads; H by default"""
    expand_k: float = 0.5
    """total key width over hidden size, as if G were H"""
    expand_v: float = 1.0
    """total value width over hidden size, as if G were H"""
    damping: float = 16.0
    """tau of the gate sigmoid(W_2 W_1 x + b)^(1/tau)"""
    gate_rank: int = 16
    """rank of the gate's projection"""
    conv_size: int = 0
    """taps of the short convolutions of q, k and v; 0 leaves them out"""
    norm_epsilon: float = 1e-5
    """epsilon of the per-head output norm"""

    def __post_init__(self):
        check_numbers(self, "conv_size")


class GatedLinearAttention(LinearAttentionLayer):
    """Gated linear attention (arXiv 2312.06635, section 4.4): a data-dependent gate for every row of the state.

        a = sigmoid(W_2 W_1 x + b)^(1/tau);   y = W_o (RMSNorm(GLA(W_q x, W_k x, W_v x, a)) ⊙ swish(W_g x))

    The norm is over each head. The state's memory is float32 [B, G, K, V].
    """

    Config = GatedLinearAttentionConfig

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        config = self.Config() if config is None else config
        super().__init__(hidden_size, config, output_gate=True, implementation=implementation, dtype=dtype, rngs=rngs)
        groups, key_size, _ = self.memory_shape
        self.gate_down = linear(
            hidden_size, config.gate_rank, ("embed", None), float32_out=True, dtype=dtype, rngs=rngs
        )
        self.gate_up = linear(
            config.gate_rank,
            groups * key_size,
            (None, "heads"),
            use_bias=True,
            float32_out=True,
            dtype=jnp.float32,
            rngs=rngs,
        )

    def log_decay(self, x):
        """log_sigmoid(W_2 W_1 x + b) / tau in float32 from W_1 x on, [B, T, G, K]."""
        groups, key_size, _ = self.memory_shape
        logits = self.gate_up(self.gate_down(x)).reshape(*x.shape[:-1], groups, key_size)
        return jax.nn.log_sigmoid(logits) / self.config.damping


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Settings of a linear attention layer without decay."""

    num_heads: int = 4
    """query heads H"""
    num_kv_heads: int | None = None
    """states G, each shared by H / G query heads; H by default"""
    expand_k: float = 1.0
    """total key width over hidden size, as if G were H"""
    expand_v: float = 1.0
    """total value width over hidden size, as if G were H"""
    feature_map: str = "elu1"
    """map of queries and keys: swish, relu, elu1 or identity"""
    conv_size: int = 0
    """taps of the short convolutions of q, k and v; 0 leaves them out"""
    norm_epsilon: float = 1e-5
    """epsilon of the per-head output norm"""

    def __post_init__(self):
        check_numbers(self, "conv_size")


class LinearAttention(LinearAttentionLayer):
    """Linear attention (arXiv 2006.16236) whose normalizer is an RMSNorm of each head's output (arXiv 2210.10340).

        y = W_o RMSNorm(Σ_{s<=t} (φ(q[t])·φ(k[s])) v[s])

    The state's memory is float32 [B, G, K, V].
    """

    Config = LinearAttentionConfig

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        config = self.Config() if config is None else config
        super().__init__(hidden_size, config, output_gate=False, implementation=implementation, dtype=dtype, rngs=rngs)
        self.feature_map = feature_map(config.feature_map)

    def map_features(self, x, position):
        return self.feature_map(x)

    def log_decay(self, x):
        """Zeros: nothing is forgotten."""
        return jnp.zeros((*x.shape[:-1], self.memory_shape[0], 1), jnp.float32)
