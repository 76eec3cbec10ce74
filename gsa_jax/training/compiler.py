"""What XLA is told about a training step: the one place for such options."""

import jax

from gsa_jax.models import ModelConfig

_MESSAGE = 2**28
"""Bytes up to which gathers or scattered sums become one, for the full rate of links. Whole sums, which XLA copies side
by side for that, become one up to a quarter of it."""

OVERLAP = {
    "gpu": {
        # Orders a program by estimates of how long its parts take, so that collectives run beside arithmetic.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_gather_combine_threshold_bytes": _MESSAGE,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _MESSAGE,
        "xla_gpu_all_reduce_combine_threshold_bytes": _MESSAGE // 4,
    }
}
"""For programs of several devices, by platform, so that they compute while they communicate: docs/sharding.md says what
they brought."""

UNROLLED = {
    "gpu": {
        # Without a loop, cuBLAS reads and writes a layer's matrices in their stacks, where Triton's kernels want
        # copies, and no Triton kernel is tried for each layer's products anew: on an H200 gsa-1.3b compiles in 26 s
        # instead of 94. A loop is faster with Triton: its step took 287 ms, without 318.
        "xla_gpu_enable_triton_gemm": False,
        # Two products with one factor stay two: to make one of them XLA copies the others side by side, 0.7 of 247 ms.
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
}
"""For models without a loop over their depth, by platform."""


def compiler_options(config: ModelConfig, num_devices: int) -> dict[str, bool | int]:
    """The options for `compile_train_step` where such a model is trained on so many devices of the default backend."""
    platform = jax.default_backend()
    options = OVERLAP.get(platform, {}) if num_devices > 1 else {}
    return options | (UNROLLED.get(platform, {}) if config.unrolled else {})
