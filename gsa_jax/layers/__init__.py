"""Flax (nnx) modules: token mixers, one a file, and what stands around them in a block."""

from gsa_jax.layers.hgrn2 import HGRN2, HGRN2Config, lower_bounds
from gsa_jax.layers.linear_attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    LinearAttention,
    LinearAttentionConfig,
)
from gsa_jax.layers.mixer import Mixer
from gsa_jax.layers.mlp import SwiGLU, swiglu_size
from gsa_jax.layers.norm import RMSNorm
from gsa_jax.layers.retention import Retention, RetentionConfig
from gsa_jax.layers.short_conv import ShortConvolution
from gsa_jax.layers.slot_attention import ABC, GatedSlotAttention, GatedSlotAttentionConfig
from gsa_jax.layers.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig

MIXERS: dict[str, type[Mixer]] = {
    "gsa": GatedSlotAttention,
    "abc": ABC,
    "gla": GatedLinearAttention,
    "hgrn2": HGRN2,
    "retention": Retention,
    "linear": LinearAttention,
    "softmax": SoftmaxAttention,
}
"""The mixers by the names that `gsa_jax.models.ModelConfig.mixers` takes."""

__all__ = [
    "ABC",
    "HGRN2",
    "MIXERS",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GatedSlotAttention",
    "GatedSlotAttentionConfig",
    "HGRN2Config",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mixer",
    "RMSNorm",
    "Retention",
    "RetentionConfig",
    "ShortConvolution",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SwiGLU",
    "lower_bounds",
    "swiglu_size",
]
