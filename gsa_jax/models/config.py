"""What a language model is made of, as frozen dataclasses, and the presets."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gsa_jax.layers import (
    MIXERS,
    GatedLinearAttentionConfig,
    GatedSlotAttentionConfig,
    HGRN2Config,
    LinearAttentionConfig,
    RetentionConfig,
    SoftmaxAttentionConfig,
    swiglu_size,
)
from gsa_jax.layers.checks import check_numbers


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of pre-norm blocks: a token mixer, then SwiGLU.

    Raises ValueError for unknown mixers and a depth that their pattern does not divide; the layers check their sizes.
    """

    vocab_size: int = 32000
    """tokens"""
    hidden_size: int = 1024
    """width D of the residual stream"""
    num_layers: int = 24
    """blocks"""
    mixers: tuple[str, ...] = ("gsa",)
    """the blocks' mixers by name, repeated through the depth: gsa alone, or gsa gsa gsa softmax"""
    mlp_size: int | None = None
    """width of SwiGLU; 8/3 of the hidden size, rounded up to a multiple of 256, by default; 0 leaves SwiGLU out"""
    tie_embeddings: bool = False
    """the head shares the embedding's matrix"""
    norm_epsilon: float = 1e-5
    """epsilon of the blocks' norms"""
    implementation: Literal["scan", "chunked", "pallas"] | None = None
    """of the recurrences; the fastest that fits by default"""
    remat: Literal["none", "dots", "full"] = "none"
    """what the backward pass recomputes of a block: nothing, all but the matrix products, or everything"""
    unroll: int = 1
    """repeats of the pattern in one turn of the loop over the depth; all of them: no loop, faster, slow to compile"""

    gsa: GatedSlotAttentionConfig = field(default_factory=GatedSlotAttentionConfig)
    """Gated Slot Attention"""
    abc: GatedSlotAttentionConfig = field(default_factory=GatedSlotAttentionConfig)
    """ABC: attention with bounded-memory control"""
    gla: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    """gated linear attention"""
    hgrn2: HGRN2Config = field(default_factory=HGRN2Config)
    """HGRN2"""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """RetNet's retention"""
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    """linear attention without decay"""
    softmax: SoftmaxAttentionConfig = field(default_factory=SoftmaxAttentionConfig)
    """softmax attention with rotary embedding"""

    def __post_init__(self):
        check_numbers(self, "mlp_size")
        if isinstance(self.mixers, str):
            raise ValueError(f"mixers must be a tuple of names, got {self.mixers!r}")
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"mixers must be among {', '.join(MIXERS)}, got {name!r}")
        if not self.mixers or self.num_layers % len(self.mixers):
            raise ValueError(
                f"num_layers must be a multiple of the number of mixers in the repeated pattern, "
                f"got num_layers={self.num_layers}, mixers={self.mixers}"
            )
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f"remat must be one of none, dots, full, got {self.remat!r}")
        if self.implementation not in (None, "scan", "chunked", "pallas"):
            raise ValueError(f"implementation must be scan, chunked, pallas or None, got {self.implementation!r}")

    @property
    def unrolled(self):
        """Whether the blocks stand one after another, without a loop over the depth."""
        return self.unroll * len(self.mixers) >= self.num_layers

    @property
    def resolved_mlp_size(self):
        """The width of SwiGLU."""
        return swiglu_size(self.hidden_size) if self.mlp_size is None else self.mlp_size


_SIZES = {"340m": (1024, 24, 4), "1.3b": (2048, 24, 4), "2.7b": (2560, 32, 5), "7b": (4096, 32, 8)}
"""Hidden size, layers, heads of GSA and GLA: the paper's sizes (section 4.1), and one with the width and depth of the
usual 7B models and the paper's heads of 512: 6.8B parameters, and heads that can be split over eight devices."""


def _at_size(mixer, hidden_size, num_layers, num_heads):
    """A model of one mixer at one of the sizes: what differs from the defaults."""
    settings = {
        "gsa": {"gsa": GatedSlotAttentionConfig(num_heads=num_heads)},
        "abc": {"abc": GatedSlotAttentionConfig(num_heads=num_heads)},
        "gla": {"gla": GatedLinearAttentionConfig(num_heads=num_heads)},
        "hgrn2": {},
        # Retention's wide values and gate take 8 D² parameters to the others' 4 D²: its SwiGLU is half as wide.
        "retention": {
            "retention": RetentionConfig(num_heads=hidden_size // 256),
            "mlp_size": swiglu_size(hidden_size // 2),
        },
        "linear": {"linear": LinearAttentionConfig(num_heads=num_heads)},
        "softmax": {"softmax": SoftmaxAttentionConfig(num_heads=hidden_size // 64)},
    }
    return ModelConfig(
        hidden_size=hidden_size, num_layers=num_layers, mixers=(mixer,), remat="dots", **settings.get(mixer, {})
    )


def _presets():
    tiny = ModelConfig(
        vocab_size=257,
        hidden_size=128,
        num_layers=4,
        tie_embeddings=True,
        remat="dots",
        gsa=GatedSlotAttentionConfig(num_heads=2, num_slots=32),
        abc=GatedSlotAttentionConfig(num_heads=2, num_slots=32),
        gla=GatedLinearAttentionConfig(num_heads=2),
        hgrn2=HGRN2Config(expand_ratio=64),
        retention=RetentionConfig(num_heads=2),
        linear=LinearAttentionConfig(num_heads=2),
        softmax=SoftmaxAttentionConfig(num_heads=2),
    )
    presets = {"tiny": tiny}
    for mixer in MIXERS:
        presets[f"tiny-{mixer}"] = dataclasses.replace(tiny, mixers=(mixer,))
        for size, shape in _SIZES.items():
            presets[f"{mixer}-{size}"] = _at_size(mixer, *shape)
    return presets


PRESETS: dict[str, ModelConfig] = _presets()
"""`tiny`, `tiny-gla`, ..., and every mixer at each size: `gsa-340m`, `gsa-1.3b`, `gsa-2.7b`, `gsa-7b`, `gla-340m`..."""


def preset(name):
    """The preset of that name; raises a ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
