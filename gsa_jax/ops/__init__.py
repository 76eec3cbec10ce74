"""Functions on arrays: Gated Slot Attention, gated linear attention, ABC's gate, and what models have beside them."""

from gsa_jax.ops.abc import abc_log_decay, abc_log_decay_step
from gsa_jax.ops.convolution import short_convolution
from gsa_jax.ops.linear_attention import gated_linear_attention, gated_linear_attention_step
from gsa_jax.ops.slot_attention import SlotState, gated_slot_attention, gated_slot_attention_step, write_strength
from gsa_jax.ops.softmax import softmax_attention

__all__ = [
    "SlotState",
    "abc_log_decay",
    "abc_log_decay_step",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_slot_attention",
    "gated_slot_attention_step",
    "short_convolution",
    "softmax_attention",
    "write_strength",
]
