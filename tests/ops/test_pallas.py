"""Which calls go to the Hopper kernels, and what a call that can't is told."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from gsa_jax.ops import pallas
from pallas_kernels.linear_attention import LARGEST_KEY
from tests.ops.cases import OPS, Sizes, linear_attention, slot_attention
from tests.pallas_kernels.hopper import count_kernels, mesh, shapes

FITTING = Sizes(B=2, T=100, H=2, G=2, K=64, V=64, M=64)
HOPPERS = (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H100 PCIe",
    "NVIDIA H200",
    "NVIDIA GH200 480GB",
    "NVIDIA H800",
    "NVIDIA H20",
)
OTHERS = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA L40S", "NVIDIA H1000", "TPU v5 lite", "cpu")


@pytest.mark.parametrize(("op", "M"), [*((op, 64) for op in OPS), (slot_attention, 128)])
def test_what_fits_goes_to_the_kernels(op, M):
    assert count_kernels(op, shapes(op, FITTING._replace(M=M))) > 0


@pytest.mark.parametrize("op", OPS)
def test_a_scale_may_be_learned(op):
    """The kernels are compiled for a number: an array is multiplied into the queries."""
    arrays = shapes(op, FITTING)

    def loss(scale, arrays):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in op(arrays, scale=scale).values())

    assert count_kernels(jax.grad(loss), jax.ShapeDtypeStruct((), jnp.float32), arrays) > 0


def test_beside_other_devices_only_where_a_mesh_says_which(monkeypatch):
    assert not pallas.spreads()
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert pallas.spreads()
    for axes, spreads in (({}, False), ({"data": 2}, True)):
        with jax.sharding.use_abstract_mesh(mesh(**axes)):
            assert pallas.spreads() == spreads


NO_FIT = {
    "dtype": (slot_attention, {}, {"dtype": jnp.float32}, "q, k and v must be bfloat16 or float16, got float32"),
    "K": (slot_attention, {"K": 48}, {}, "K must be a multiple of 64, got K=48"),
    "V": (slot_attention, {"V": 100}, {}, "V must be a multiple of 64, got V=100"),
    "M": (slot_attention, {"M": 129}, {}, "M must be at most 128, got M=129"),
    "linear dtype": (linear_attention, {}, {"dtype": jnp.float32}, "q, k and v must be bfloat16 or float16"),
    "linear K": (linear_attention, {"K": 65}, {}, "K must be a multiple of 64, got K=65"),
    "linear, large K": (linear_attention, {"K": 2048}, {}, f"K must be at most {LARGEST_KEY}, got K=2048"),
    "linear V": (linear_attention, {"V": 32}, {}, "V must be a multiple of 64, got V=32"),
}
CHUNK_SIZE = "chunk_size=32 can't be chosen, the kernels' chunks have 64 tokens"


@pytest.mark.parametrize(("op", "sizes", "options", "message"), NO_FIT.values(), ids=NO_FIT)
def test_arrays_that_do_not_fit(op, sizes, options, message):
    check_refused(op, shapes(op, FITTING._replace(**sizes), **options), message)


@pytest.mark.parametrize("op", OPS)
def test_a_chunk_size_of_ones_own(op):
    check_refused(op, shapes(op, FITTING), CHUNK_SIZE, chunk_size=32)


@pytest.mark.parametrize("op", OPS)
def test_several_devices_without_shard_map(op):
    message = (
        "XLA can't spread a kernel over the devices of the mesh {'data': 2, 'heads': 2}: use gsa_jax.ops.sharded or"
    )
    check_refused(op, shapes(op, FITTING), message, on=mesh(data=2, heads=2))


@pytest.mark.parametrize("device", OTHERS)
def test_other_devices(device):
    message = f"the kernels need a Hopper GPU, such as an H100 or H200, and the device is {device!r}"
    check_refused(slot_attention, shapes(slot_attention, FITTING), message, on=mesh(device))


def check_refused(op, arrays, message, on=None, **options):
    """ "pallas" raises with that message; None takes another implementation."""
    with (
        jax.sharding.use_abstract_mesh(on or mesh()),
        pytest.raises(ValueError, match=re.escape(f"implementation='pallas': {message}")),
    ):
        jax.eval_shape(functools.partial(op, implementation="pallas", **options), arrays)
    assert count_kernels(functools.partial(op, **options), arrays, on=on) == 0


@pytest.mark.parametrize("device", HOPPERS)
def test_hopper_devices(device):
    with jax.sharding.use_abstract_mesh(mesh(device)):
        jax.eval_shape(functools.partial(slot_attention, implementation="pallas"), shapes(slot_attention, FITTING))


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_takes_the_chunked_form(op):
    arrays = shapes(op, FITTING)

    def program(**options):
        jaxpr = jax.make_jaxpr(functools.partial(op, **options))(arrays)
        return re.sub("0x[0-9a-f]+", "", str(jaxpr))  # addresses of functions

    assert program() == program(implementation="chunked") != program(implementation="scan")
    with pytest.raises(ValueError, match="implementation='pallas': the kernels need a Hopper GPU.* device is 'cpu'"):
        jax.eval_shape(functools.partial(op, implementation="pallas"), arrays)
