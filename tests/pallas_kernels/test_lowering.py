"""The kernels lower for an H100 on a machine without a GPU, through the public functions and jax's transformations."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.sizes import Choice, trial
from tests.ops.cases import OPS, Sizes, slot_attention
from tests.pallas_kernels.hopper import count_kernels, forward_and_backward, mesh, shapes

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SMALL = Sizes(B=2, T=100, H=2, G=1, K=64, V=64, M=16)
RUN = functools.partial(forward_and_backward, functools.partial(slot_attention, implementation="pallas"))
FORWARD, BACKWARD = 4, 6
"""kernels in each direction; for a long sequence of few heads each pass over the states is two"""


def option(name, value):
    return name if value is True else f"{name}={value.__name__}"


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(1, 131072, 4, 4, 64, 128, 64), {}),
        (Sizes(1, 256, 2, 2, 128, 64, 16), {"dtype": F16, "gates_dtype": F16}),
        (Sizes(1, 2, 4, 1, 256, 256, 32), {"gates_dtype": BF16}),
        (Sizes(1, 256, 2, 1, 512, 128, 64), {"dtype": F16, "gates_dtype": BF16, "write": True}),
        (Sizes(1, 130, 4, 2, 128, 64, 128), {"gates_dtype": BF16}),
        (Sizes(2, 100, 2, 2, 64, 512, 100), {"dtype": F16}),
        (Sizes(2, 100, 4, 2, 128, 512, 32), {"gates_dtype": F16, "write": True}),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, Sizes) else "-".join(map(option, x, x.values())),
)
def test_slot_attention(sizes, options):
    kernels = FORWARD + BACKWARD + (5 if sizes.T > 100_000 else 0)
    assert count_kernels(RUN, shapes(slot_attention, sizes, **options)) == kernels


@pytest.mark.parametrize("sizes", [Sizes(16, 2048, 4, 4, 512, 512, 64), Sizes(1, 32768, 4, 2, 256, 64, 64)])
def test_without_gradients(sizes):
    """The key memory is read as it is written, which `key_read` does, where that pays."""
    forward = functools.partial(slot_attention, implementation="pallas")
    with trial({}) as choices:
        kernels = count_kernels(forward, shapes(slot_attention, sizes))
    assert choices[f"key_read {sizes.B * sizes.H}x{sizes.T // 64}x{sizes.K}"] == Choice(taken=1, options=(0, 1))
    assert kernels == FORWARD + (2 if sizes.B == 1 else 0)


def test_vmap():
    entry = shapes(slot_attention, SMALL)
    stacked = jax.tree.map(lambda x: x.update(shape=(3, *x.shape)), entry)
    assert count_kernels(jax.vmap(RUN), stacked) == FORWARD + BACKWARD
    axes = {name: 0 if name == "log_decay" else None for name in entry}
    some = {name: (stacked if axes[name] == 0 else entry)[name] for name in entry}
    assert count_kernels(jax.vmap(slot_attention, in_axes=(axes,)), some) == FORWARD


@pytest.mark.parametrize(("op", "kernels"), list(zip(OPS, (FORWARD + BACKWARD, 6), strict=True)))
def test_64_bit_integers(op, kernels):
    run = functools.partial(forward_and_backward, functools.partial(op, implementation="pallas"))
    with jax.enable_x64(True):
        assert count_kernels(run, shapes(op, SMALL)) == kernels


def layers(arrays):
    """The loss of three layers, rematerialized, in a loop."""
    x, log_decay = arrays["q"], arrays["log_decay"]

    @jax.checkpoint
    def layer(x, factor):
        per_group = x[:, :, :1]
        inputs = {"q": x, "k": factor * per_group, "v": per_group, "log_decay": log_decay}
        return x + slot_attention(inputs)["out"], None

    return jax.lax.scan(layer, x, jnp.ones(3, x.dtype))[0].astype(F32).sum()


def test_gradient_of_a_scan_over_rematerialized_layers():
    assert count_kernels(jax.grad(layers), shapes(slot_attention, SMALL)) == 2 * FORWARD + BACKWARD


def test_shard_map():
    forward = jax.shard_map(slot_attention, in_specs=P("data"), out_specs=P("data"))
    arrays = shapes(slot_attention, SMALL._replace(B=8))
    assert count_kernels(forward, arrays, on=mesh(data=4)) == FORWARD


def test_gradient_of_a_shard_map_over_batch_and_heads_with_gates_for_the_whole_batch():
    specs = dict.fromkeys("qkv", P("data", None, "heads")) | {"log_decay": P(None, None, "heads")}
    sharded = jax.shard_map(lambda x: layers(x)[None, None], in_specs=(specs,), out_specs=P("data", "heads"))
    arrays = shapes(slot_attention, SMALL._replace(B=4, H=4, G=2))
    arrays["log_decay"] = arrays["log_decay"].update(shape=(2, *arrays["log_decay"].shape[1:]))
    kernels = count_kernels(jax.grad(lambda arrays: sharded(arrays).sum()), arrays, on=mesh(data=2, heads=2))
    assert kernels == 2 * FORWARD + BACKWARD
