"""What `python -m experiments.mqar` can be asked for, and the models it makes of it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gsa_jax.layers import (
    MIXERS,
    GatedLinearAttentionConfig,
    GatedSlotAttentionConfig,
    HGRN2Config,
    LinearAttentionConfig,
    RetentionConfig,
    SoftmaxAttentionConfig,
)
from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import ModelConfig


@dataclass(frozen=True)
class Config:
    """Trains two-layer models on multi-query associative recall, over mixers, widths and learning rates.

    With no argument a small setting that GSA solves in minutes on two CPU cores. `--protocol figure` is that of the
    papers' figures (Zoology, arXiv 2312.04927; GSA, arXiv 2409.07146). Their data sets are those of `--length 64
    --num-pairs 4`, of 128 and 8, 256 and 16, 512 and 64.
    """

    protocol: Literal["small", "figure"] = "small"
    """Where the settings come from that are None below."""
    length: int = 64
    """Tokens T of an example, even and at least four times the pairs."""
    num_pairs: int = 4
    """Pairs N of an example, and queries."""
    mixers: tuple[Literal[*MIXERS], ...] = ("gsa",)
    """Mixers by name."""
    hidden_sizes: tuple[int, ...] | None = None
    """Widths. None: 64; in the figure 64 128 256 512."""
    learning_rates: tuple[float, ...] | None = None
    """Peaks; the best counts. None: 0.01; in the figure four from 1e-4 to 1e-2, evenly in the logarithm."""
    epochs: int | None = None
    """At most; the learning rate falls to 0 over them. None: 4; in the figure 64."""
    batch_size: int | None = None
    """Examples a step. None: 128; in the figure 512 up to length 128, 256 up to 256, 128 beyond."""
    steps_a_test: int | None = None
    """Steps between two tests. None: 50; in the figure an epoch."""
    num_slots: int = 64
    """Slots M of GSA and ABC."""
    conv_size: int | None = None
    """Taps of the short convolutions of all mixers but HGRN2, 0 for none. None: 4; in the figure 0."""
    train_examples: int | None = None
    """Examples to train on. None: 25600; in the figure 100000."""
    test_examples: int = 3_000
    """Examples to test on."""
    vocab_size: int = 8192
    """Tokens: half of them keys, half values."""
    seed: int = 0
    """Of the parameters, the examples and their order."""
    out: Path = Path("runs/mqar")
    """Folder for results.json and accuracy.png; nothing may be in it yet."""
    resume: bool = False
    """Go on with the study in that folder: trainings that it has the results of are not run again. Mixers, widths and
    learning rates may be others."""

    def resolved(self) -> "Config":
        """The same with every None filled in by the protocol, but for `steps_a_test`, where it means an epoch.

        Raises:
          ValueError: a setting out of its bounds.
        """
        defaults = SMALL if self.protocol == "small" else _figure(self.length)
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)
        config._check()
        return config

    def _check(self) -> None:
        check_numbers(self, "conv_size", "seed")
        if self.batch_size > self.train_examples:
            raise ValueError(f"batch_size: {self.batch_size}, expected at most train_examples={self.train_examples}")
        for name in ("mixers", "hidden_sizes", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there is none, expected at least one")
        for size in self.hidden_sizes:
            unit = 2 * num_heads(size)
            if size < unit or size % unit:
                raise ValueError(f"hidden_sizes: {size} must be a multiple of {unit}, twice the number of its heads")
        for rate in self.learning_rates:
            if not 0 < rate < np.inf:
                raise ValueError(f"learning_rates: {rate} is not a positive number")

    def model(self, mixer: str, hidden_size: int) -> ModelConfig:
        """Two layers of a mixer without a channel mixer, tied embeddings."""
        heads = num_heads(hidden_size)
        slots = GatedSlotAttentionConfig(num_heads=heads, num_slots=self.num_slots, conv_size=self.conv_size)
        common = {"num_heads": heads, "conv_size": self.conv_size}
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=hidden_size,
            num_layers=2,
            mixers=(mixer,),
            mlp_size=0,
            tie_embeddings=True,
            gsa=slots,
            abc=slots,
            gla=GatedLinearAttentionConfig(**common),
            hgrn2=HGRN2Config(expand_ratio=hidden_size // heads),
            retention=RetentionConfig(**common),
            linear=LinearAttentionConfig(**common),
            softmax=SoftmaxAttentionConfig(**common),
        )


def num_heads(hidden_size: int) -> int:
    """Heads of about 128 channels: one up to width 255, two at 256, at 512 four, as many as in the paper's models.

    HGRN2 gets as many by its `expand_ratio`, the channels of a head.
    """
    return max(1, hidden_size // 128)


SMALL: dict[str, Any] = {
    "hidden_sizes": (64,),
    "learning_rates": (1e-2,),
    "epochs": 4,
    "train_examples": 25_600,
    "batch_size": 128,
    "steps_a_test": 50,
    "conv_size": 4,
}
"""A setting for two CPU cores.

The short convolution spares the first layer the work of bringing a key and the value behind it together: without one
the accuracy stays near 1/4, a guess among the context's values, for hundreds of steps. Kept at its
peak, the learning rate is too high for the last percents (0.94 from step 400 to 450, with 16 slots): hence the short
epochs, over which it falls.
"""


def _figure(length: int) -> dict[str, Any]:
    """The paper's setting for examples of that length."""
    return {
        "hidden_sizes": (64, 128, 256, 512),
        "learning_rates": tuple(np.logspace(-4, -2, 4).tolist()),
        "epochs": 64,
        "train_examples": 100_000,
        "batch_size": 512 if length <= 128 else 256 if length <= 256 else 128,
        "conv_size": 0,
    }
