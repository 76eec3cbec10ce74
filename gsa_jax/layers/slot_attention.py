"""Gated Slot Attention, and ABC, its predecessor without a learned decay."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsa_jax.layers.checks import check_numbers
from gsa_jax.layers.feature_maps import feature_map
from gsa_jax.layers.linear import linear
from gsa_jax.layers.mixer import HeadProjections, Mixer, check_inputs, head_size, merge_heads
from gsa_jax.layers.norm import RMSNorm
from gsa_jax.ops import SlotState, sharded


@dataclass(frozen=True)
class GatedSlotAttentionConfig:
    """Settings of a slot attention layer; the defaults are the paper's."""

    num_heads: int = 4
    """query heads H"""
    num_kv_heads: int | None = None
    """memories G, each shared by H / G query heads; H by default"""
    num_slots: int = 64
    """slots M of a memory"""
    expand_k: float = 1.0
    """total key width over hidden size, as if G were H"""
    expand_v: float = 1.0
    """total value width over hidden size, as if G were H"""
    feature_map: str = "swish"
    """map of queries and keys: swish, relu, elu1 or identity"""
    damping: float = 8.0
    """tau of the gate sigmoid(W x)^(1/tau): the larger, the slower the memory forgets"""
    conv_size: int = 0
    """taps of the short convolutions of q, k and v; 0 leaves them out"""
    norm_epsilon: float = 1e-5
    """epsilon of the output norm"""

    def __post_init__(self):
        check_numbers(self, "conv_size")


class SlotAttentionState(NamedTuple):
    """What a slot attention layer passes on."""

    memory: SlotState
    convolutions: tuple
    gate: Any
    """ABC's running normalizer [B, G, M]; () for Gated Slot Attention"""


class GatedSlotAttention(Mixer):
    """Gated Slot Attention (arXiv 2409.07146, section 3.3): M slots a head, written through a gate, read by a softmax.

        q, k = φ(W_q x), φ(W_k x);  v = swish(W_v x);  a = sigmoid(W_a x)^(1/tau)
        y = W_o RMSNorm(swish(GSA(q, k, v, a, 1 - a)))

    The norm spans all heads. The state's memories are float32, [B, G, M, K] and [B, G, M, V].
    """

    Config = GatedSlotAttentionConfig

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        config = self.Config() if config is None else config
        num_kv_heads = config.num_kv_heads or config.num_heads
        key_size = head_size(hidden_size, config.num_heads, expand_k=config.expand_k)
        value_size = head_size(hidden_size, config.num_heads, expand_v=config.expand_v)
        self.config = config
        self.implementation = implementation
        self.memory_shape = (num_kv_heads, config.num_slots, key_size, value_size)
        self.feature_map = feature_map(config.feature_map)
        self.projections = HeadProjections(
            hidden_size, config.num_heads, num_kv_heads, key_size, value_size, config.conv_size, dtype=dtype, rngs=rngs
        )
        gate_size = num_kv_heads * config.num_slots
        self.gate = linear(hidden_size, gate_size, ("embed", "heads"), dtype=dtype, float32_out=True, rngs=rngs)
        out_size = config.num_heads * value_size
        self.norm = RMSNorm(
            out_size, epsilon=config.norm_epsilon, implementation=implementation, dtype=dtype, rngs=rngs
        )
        self.out = linear(out_size, hidden_size, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x, state=None, segment_ids=None):
        check_inputs(x, self.out.out_features, state, SlotAttentionState)
        memory, conv_state, gate_state = (None, (), None) if state is None else state
        q, k, v, conv_state = self.projections(x, conv_state, segment_ids)
        log_decay, gate_state = self.log_decay(x, gate_state, segment_ids)
        out, memory = sharded.gated_slot_attention(
            self.feature_map(q),
            self.feature_map(k),
            jax.nn.swish(v),
            log_decay,
            initial_state=memory,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.out(self.norm(merge_heads(out), swish=True))
        return y, SlotAttentionState(memory, conv_state, gate_state)

    def log_decay(self, x, gate_state, segment_ids):
        """log_sigmoid(W_a x) / tau in float32, [B, T, G, M], and the gate's state, of which there is none here."""
        return jax.nn.log_sigmoid(self._gate_logits(x)) / self.config.damping, ()

    def _gate_logits(self, x):
        num_kv_heads, num_slots, _, _ = self.memory_shape
        return self.gate(x).reshape(*x.shape[:-1], num_kv_heads, num_slots)

    def init_state(self, batch_size, max_length=None):
        groups, slots, key_size, value_size = self.memory_shape
        memory = SlotState(
            jnp.zeros((batch_size, groups, slots, key_size), jnp.float32),
            jnp.zeros((batch_size, groups, slots, value_size), jnp.float32),
        )
        return SlotAttentionState(memory, self.projections.init_state(batch_size), self._init_gate_state(batch_size))

    def _init_gate_state(self, batch_size):
        return ()


class ABC(GatedSlotAttention):
    """Attention with bounded-memory control (ABC, arXiv 2110.02488): a slot is the mean of all tokens so far, weighted
    with the exponentials of the write logits s = W_a x.

        Kmem[t] = Σ_{i<=t} exp(s[i] - z[t]) ⊗ k[i],   z[t] = log Σ_{i<=t} exp(s[i]);   Vmem[t] alike

    z is a running normalizer, which the code follows as a gate (`gsa_jax.ops.abc_log_decay`): Gated Slot Attention with
    a[t] = exp(z[t-1] - z[t]) and the write strength exp(s[t] - z[t]) = 1 - a[t]. It is the same recurrence: the gates
    after token i multiply to exp(z[i] - z[t]), which makes its write, exp(s[i] - z[i]), the exp(s[i] - z[t]) above.

    The GSA paper (section 2) prints the weight of token i as exp(s[i] - z[i]) and no gate. Taken by the letter that is
    another recurrence, whose weights add up to more than one; its authors' code has the gate, as this one has.

    All else is Gated Slot Attention's: the maps of q, k and v, the query scale 1, the norm. `damping` plays no part.
    """

    def log_decay(self, x, gate_state, segment_ids):
        """ABC's gate from the write logits W_a x, and the running normalizer [B, G, M]."""
        return sharded.abc_log_decay(self._gate_logits(x), initial_normalizer=gate_state, segment_ids=segment_ids)

    def _init_gate_state(self, batch_size):
        groups, slots, _, _ = self.memory_shape
        return jnp.full((batch_size, groups, slots), -jnp.inf, jnp.float32)
