"""The ops over a mesh of devices: each device runs them on its own part of the arrays.

Under `jax.set_mesh(mesh)`, with some of the axes `MESH_AXES`, rows are cut over data and fsdp, heads over tensor, and
tokens over context (what the parts of a sequence exchange is in `gsa_jax.ops.context`). A call is a `jax.shard_map`
with all axes manual, so XLA has nothing to spread, and kernels run inside. Arguments and results are arrays of the
whole shape: each function here means what its namesake of `gsa_jax.ops` does, or of `pallas_kernels.rms_norm`, and
takes the same arguments. It is its namesake where there is no such mesh, on a mesh of one device, and where a
`jax.shard_map` is around already.
"""

import functools
import inspect
import math

import jax
from jax.sharding import PartitionSpec as P

from gsa_jax import ops
from gsa_jax.ops import abc, context, convolution, linear_attention, pallas, slot_attention, softmax
from gsa_jax.sharding import BATCH, RULES, check_divides, spreading_mesh, without_single_devices
from pallas_kernels import rms_norm as kernels

TOKENS = P(*BATCH, RULES["heads"])
"""How arrays [B, T, heads, ...] and [B, T, channels] are cut."""
STATE = P(RULES["batch"], RULES["heads"])
"""How states [B, heads, ...] are cut."""
LAST_TOKENS = P(RULES["batch"], None, RULES["heads"])
"""How a state [B, W - 1, channels] is cut, which all parts of a sequence have."""


def _over_mesh(op, part, in_specs, out_specs, check=None):
    """`op`, over the mesh in context if there is one; `part` is what a device does where sequences are cut.

    `in_specs` has the arguments that are arrays, by name. The function raises what `check(arguments)` does, before it
    cuts them, and a ValueError that names an array that the mesh can't cut.
    """

    @functools.wraps(op)
    def over_mesh(*args, **kwargs):
        mesh = spreading_mesh()
        if mesh is None:
            return op(*args, **kwargs)
        if check:
            check(*args, **kwargs)
        specs, results = jax.tree.map(lambda spec: without_single_devices(spec, mesh), (in_specs, out_specs))
        options = inspect.signature(op).bind(*args, **kwargs).arguments
        arrays = {name: options.pop(name) for name in in_specs if options.get(name) is not None}
        for name, array in arrays.items():
            check_divides(mesh, specs[name], name, array)
        on_device = part if mesh.shape.get("context", 1) > 1 else op
        return jax.shard_map(
            lambda arrays: on_device(**arrays, **options),
            in_specs=({name: specs[name] for name in arrays},),
            out_specs=results,
        )(arrays)

    return over_mesh


_GATED = dict.fromkeys(("q", "k", "v", "log_decay", "write"), TOKENS) | {"initial_state": STATE, "segment_ids": BATCH}

gated_slot_attention = _over_mesh(
    ops.gated_slot_attention, context.gated_slot_attention, _GATED, (TOKENS, STATE), slot_attention.check
)
gated_linear_attention = _over_mesh(
    ops.gated_linear_attention, context.gated_linear_attention, _GATED, (TOKENS, STATE), linear_attention.check
)
abc_log_decay = _over_mesh(
    ops.abc_log_decay,
    context.abc_log_decay,
    {"write_logits": TOKENS, "initial_normalizer": STATE, "segment_ids": BATCH},
    (TOKENS, STATE),
    abc.check,
)
short_convolution = _over_mesh(
    ops.short_convolution,
    context.short_convolution,
    {"x": TOKENS, "kernel": P(None, RULES["heads"]), "initial_state": LAST_TOKENS, "segment_ids": BATCH},
    (TOKENS, LAST_TOKENS),
    convolution.check,
)
softmax_attention = _over_mesh(
    ops.softmax_attention,
    context.softmax_attention,
    dict.fromkeys("qkv", TOKENS) | {"segment_ids": BATCH},
    TOKENS,
    softmax.check,
)


def rms_norm_fits(x):
    """Whether `rms_norm` and `rms_norm_of_sum`, which are kernels for Hopper GPUs, take x [B, T, ..., D]."""
    mesh = spreading_mesh()
    if mesh is None:
        return not pallas.spreads() and pallas.rms_norm_misfit(x) is None
    parts = [math.prod(mesh.shape.get(axis, 1) for axis in RULES[name]) for name in ("batch", "length")]
    if x.ndim < 3 or mesh.shape.get("tensor", 1) > 1 or any(size % n for size, n in zip(x.shape, parts, strict=False)):
        return False
    part = jax.ShapeDtypeStruct((x.shape[0] // parts[0], x.shape[1] // parts[1], *x.shape[2:]), x.dtype)
    return pallas.rms_norm_misfit(part, mesh) is None


rms_norm = _over_mesh(kernels.rms_norm, kernels.rms_norm, {"x": BATCH, "scale": P()}, BATCH)
rms_norm_of_sum = _over_mesh(
    kernels.rms_norm_of_sum, kernels.rms_norm_of_sum, {"x": BATCH, "update": BATCH, "scale": P()}, (BATCH, BATCH)
)
