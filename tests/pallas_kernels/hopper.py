"""Lowering for a Hopper GPU on a machine that has none."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.ops.cases import slot_attention

H100 = "NVIDIA H100 80GB HBM3"


def mesh(device_kind=H100, num_cores=132, **axes):
    """Abstract devices of that kind, one unless axes are given."""
    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform="cuda")
    axes = axes or {"gpu": 1}
    return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), abstract_device=device)


def count_kernels(function, *arguments, on=None, what="custom_call @mosaic_gpu"):
    """How many calls of kernels there are in `function`, lowered for the devices of a mesh; raises if one can't be."""
    with jax.sharding.use_abstract_mesh(on or mesh()):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    _, *parts = re.split(r"func\.func (?:public|private) @(\w+)", lowered.as_text())
    functions = dict(zip(parts[::2], parts[1::2], strict=True))

    def count(name):
        body = functions[name]
        return body.count(what) + sum(map(count, re.findall(r"\bcall @(\w+)", body)))

    return count("main")


def shapes(op, sizes, *, dtype=jnp.bfloat16, gates_dtype=jnp.float32, write=False):
    """The inputs of `op` in shapes and dtypes, as a dictionary."""
    B, T, H, G, K, V, M = sizes
    per_group = {"k": (K, dtype), "v": (V, dtype), "log_decay": (M if op is slot_attention else K, gates_dtype)}
    if write:
        per_group["write"] = (M, dtype)
    arrays = {name: jax.ShapeDtypeStruct((B, T, G, width), dtype) for name, (width, dtype) in per_group.items()}
    return {"q": jax.ShapeDtypeStruct((B, T, H, K), dtype)} | arrays


def forward_and_backward(op, arrays, **options):
    """The outputs of `op`, and the gradients of its inputs from cotangents equal to the outputs."""
    outputs, pullback = jax.vjp(lambda arrays: op(arrays, **options), arrays)
    return outputs, pullback(outputs)[0]
