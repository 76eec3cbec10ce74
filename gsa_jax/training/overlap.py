"""What XLA is told so that devices compute while they communicate: the one place for such options."""

import jax

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
"""Options of XLA's compiler for programs of several devices, by platform. Not measured yet on several GPUs."""


def compiler_options(devices: int) -> dict[str, bool | int]:
    """The options, for `jax.stages.Lowered.compile`, for a program of so many devices of the default backend."""
    return OVERLAP.get(jax.default_backend(), {}) if devices > 1 else {}
