"""Functions on arrays: Gated Slot Attention, gated linear attention and ABC's gate."""

from gsa_jax.ops.abc import abc_log_decay, abc_log_decay_step
from gsa_jax.ops.linear_attention import gated_linear_attention, gated_linear_attention_step
from gsa_jax.ops.slot_attention import SlotState, gated_slot_attention, gated_slot_attention_step, write_strength

__all__ = [
    "SlotState",
    "abc_log_decay",
    "abc_log_decay_step",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_slot_attention",
    "gated_slot_attention_step",
    "write_strength",
]
