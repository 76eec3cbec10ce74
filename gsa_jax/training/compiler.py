"""What XLA is told about a training step: the one place for such options."""

import jax
from jax.sharding import Mesh

from gsa_jax.models import ModelConfig

_LAYER = 2**29
"""Bytes up to which collectives of one kind become one: about the parameters of a layer, in bfloat16."""

OVERLAP = {
    "gpu": {
        # Orders a program by estimates of how long its parts take, so that collectives run beside arithmetic.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Two layers a turn of the loop over layers: the parameters of the next are gathered during the one before.
        "xla_gpu_enable_while_loop_double_buffering": True,
        # A layer's parameters in one collective, and its gradients: links reach their rates with large messages.
        "xla_gpu_all_gather_combine_threshold_bytes": _LAYER,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _LAYER,
        "xla_gpu_all_reduce_combine_threshold_bytes": _LAYER,
    }
}
"""For programs of several devices, by platform: they are to compute while they communicate. Not measured yet."""

UNROLLED = {
    "gpu": {
        # Without a loop, cuBLAS reads and writes a layer's matrices in their stacks, where Triton's kernels want
        # copies, and no Triton kernel is tried for each layer's products anew: on an H200 gsa-1.3b compiles in 26 s
        # instead of 94. A loop is faster with Triton: its step took 287 ms, without 318.
        "xla_gpu_enable_triton_gemm": False,
    }
}
"""For models without a loop over their depth, by platform."""


def compiler_options(config: ModelConfig, mesh: Mesh) -> dict[str, bool | int]:
    """The options for `compile_train_step` where such a model is trained on such a mesh of the default backend."""
    platform = jax.default_backend()
    options = OVERLAP.get(platform, {}) if mesh.size > 1 else {}
    return options | (UNROLLED.get(platform, {}) if config.unrolled else {})
