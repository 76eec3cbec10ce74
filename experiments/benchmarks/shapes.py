"""The cases of the benchmarks: shapes by name, one list for every op, implementation, peer and test."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Op = Literal["gsa", "gla"]


class Shape(NamedTuple):
    """The sizes of one call; as many query heads as key heads."""

    op: Op
    B: int
    T: int
    H: int
    K: int
    V: int
    M: int = 0
    """slots, for gsa only"""

    @property
    def sizes(self) -> list[int]:
        """[B, T, H, K, V, M] of gsa, [B, T, H, K, V] of gla."""
        return list(self[1:]) if self.op == "gsa" else list(self[1:-1])

    @property
    def gates(self) -> int:
        """Width of the gate of a head: the slots of gsa, the keys of gla."""
        return self.M or self.K

    @property
    def attention(self) -> tuple[int, int, int, int]:
        """[B, T, H, D] of softmax attention over the same tokens at the same width, in heads of 128."""
        return self.B, self.T, max(1, self.H * self.V // 128), 128

    def forward_bytes(self, itemsize: int) -> int:
        """Bytes of q, k, v, log_decay and the output, each once."""
        return self._bytes(2 * self.K + 2 * self.V, 1, itemsize)

    def forward_backward_bytes(self, itemsize: int) -> int:
        """A forward pass, then q, k, v, log_decay, the output's gradient and theirs, each once."""
        return self.forward_bytes(itemsize) + self._bytes(4 * self.K + 3 * self.V, 2, itemsize)

    def _bytes(self, width, gates, itemsize):
        return self.B * self.T * self.H * (width * itemsize + gates * self.gates * itemsize)


GPU_SHAPES = {
    "gsa-512-1k": Shape("gsa", 32, 1024, 4, 512, 512, 64),
    "gsa-512-2k": Shape("gsa", 16, 2048, 4, 512, 512, 64),
    "gsa-512-8k": Shape("gsa", 4, 8192, 4, 512, 512, 64),
    "gsa-512-32k": Shape("gsa", 1, 32768, 4, 512, 512, 64),
    "gsa-512-128k": Shape("gsa", 1, 131072, 4, 512, 512, 64),
    "gsa-256": Shape("gsa", 8, 4096, 4, 256, 256, 64),
    "gsa-128": Shape("gsa", 8, 4096, 16, 128, 128, 64),
    "gsa-64": Shape("gsa", 8, 4096, 32, 64, 64, 64),
    "gla-256-2k": Shape("gla", 16, 2048, 4, 256, 512),
    "gla-256-8k": Shape("gla", 4, 8192, 4, 256, 512),
    "gla-256-32k": Shape("gla", 1, 32768, 4, 256, 512),
    "gla-256-128k": Shape("gla", 1, 131072, 4, 256, 512),
    "gla-128": Shape("gla", 8, 4096, 16, 128, 128),
    "gla-128x256": Shape("gla", 8, 4096, 4, 128, 256),
}
"""Shapes of models of some billion parameters, for bfloat16: 32,768 tokens, those of the longest rows 131,072."""

GROWTH_SHAPES = {f"gsa-2x{T // 1024}k": Shape("gsa", 2, T, 4, 512, 512, 64) for T in (2048, 4096, 8192, 16384)}
"""Two rows of growing length: time and memory should grow with it and no faster."""

CPU_SHAPES = {
    "gsa-cpu": Shape("gsa", 2, 2048, 4, 64, 64, 64),
    "gla-cpu": Shape("gla", 2, 2048, 4, 64, 64),
    "gsa-cpu-wide": Shape("gsa", 2, 2048, 4, 128, 128, 64),
    "gsa-cpu-long": Shape("gsa", 1, 8192, 4, 64, 64, 64),
    "gsa-cpu-short": Shape("gsa", 8, 256, 2, 32, 32, 32),
}
"""Shapes of models that learn on a CPU, in float32."""

ERROR_SHAPES = {
    "gsa-512-odd": Shape("gsa", 1, 1003, 2, 512, 512, 64),
    "gsa-128-odd": Shape("gsa", 2, 1003, 2, 128, 128, 64),
    "gla-256-odd": Shape("gla", 1, 1003, 2, 256, 512),
}
"""Short enough for the definition in float64, of a length that no chunk divides."""

QUICK_SHAPES = {"gsa-cpu": CPU_SHAPES["gsa-cpu"]}
SHAPES = GPU_SHAPES | GROWTH_SHAPES | CPU_SHAPES | ERROR_SHAPES

GATES = {
    "weak": lambda x: jax.nn.log_sigmoid(x) / 16,
    "ordinary": jax.nn.log_sigmoid,
    "strong": lambda x: 20 * jax.nn.log_sigmoid(x),
    "resets": lambda x: jnp.where(x[..., :1] > 2, -1000.0, jax.nn.log_sigmoid(x) / 16),
}
"""Log decays of a projection: damped as a model's are, as they come, of tokens that forget most of what was, and damped
but for one token in 44 that forgets everything."""


def choose(names: Sequence[str]) -> dict[str, Shape]:
    """The cases of those names, in that order; raises a ValueError that lists the known ones."""
    if unknown := [name for name in names if name not in SHAPES]:
        raise ValueError(f"unknown cases: {', '.join(unknown)}; known are {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in names}


def make_inputs(shape, dtype, seed=0, gates="weak"):
    """Random q, k, v, log_decay of `shape`, all in `dtype` as the peers take them; `gates` is a name in `GATES`."""
    keys = jax.random.split(jax.random.key(seed), 4)
    tokens = (shape.B, shape.T, shape.H)
    q, k, v = (
        jax.random.normal(key, (*tokens, size), jnp.float32).astype(dtype)
        for key, size in zip(keys, (shape.K, shape.K, shape.V), strict=False)
    )
    projected = jax.random.normal(keys[3], (*tokens, shape.gates), jnp.float32)
    return q, k, v, GATES[gates](projected).astype(dtype)
