"""The ops over a mesh: the numbers of one device, one exchange of states, and what can't be cut."""

import functools
import json
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from gsa_jax.ops import sharded
from gsa_jax.sharding import MESH_AXES
from tests.ops.cases import OPS, TOLERANCE, Sizes, assert_close, make_case, slot_attention
from tests.ops.over_mesh import CASES
from tests.pallas_kernels.hopper import count_kernels, mesh, shapes

FUNCTIONS = dict(zip(OPS, (sharded.gated_slot_attention, sharded.gated_linear_attention), strict=True))


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.over_mesh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_device(results, name):
    float32_inside = CASES[name].op == "softmax"  # the scores of jax.nn.dot_product_attention
    assert results[name]["error"] < (1e-6 if float32_inside else 1e-14)


ONE_EXCHANGE = {"all-gather": 1, "reduce-scatter": 1}
"""Of states in the forward pass, of their gradients in the backward pass."""
COLLECTIVES = {
    "slot-alone": ONE_EXCHANGE,
    "slot-write": ONE_EXCHANGE | {"collective-permute": 1},  # of the segment ids at the parts' borders
    "slot-whole-sequences": {},
    "linear-alone": ONE_EXCHANGE,
    "linear-per-head": ONE_EXCHANGE | {"collective-permute": 1},
    "abc-alone": ONE_EXCHANGE,
    "convolution-alone": {"collective-permute": 2, "all-reduce": 1},  # of the kernel's gradient
    "softmax-alone": ONE_EXCHANGE,
    "softmax-window-of-neighbours": {"collective-permute": 3},
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_nothing_else_passes_between_devices(results, name):
    assert results[name]["collectives"] == COLLECTIVES[name]


@pytest.mark.parametrize("op", OPS)
def test_every_device_runs_the_kernels_on_its_part(op):
    def forward(arrays):
        return FUNCTIONS[op](**arrays)[0]

    arrays = shapes(op, Sizes(B=4, T=256, H=4, G=2, K=64, V=64, M=64))
    one, many = mesh(), mesh(data=2, fsdp=1, tensor=2, context=2)
    assert count_kernels(forward, arrays, on=many) == count_kernels(forward, arrays, on=one) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gates", ["weak", "all kinds"])
@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_several_gpus_give_the_numbers_of_one(op, gates, axis):
    devices = jax.device_count()
    if devices == 1:
        pytest.skip("needs several GPUs")
    T = 128 * devices
    arrays, cotangents = make_case(
        op, Sizes(2, T, 2 * devices, devices, 64, 128, 64), gates=gates, state=False, dtype=jnp.bfloat16
    )
    segment_ids = jnp.arange(T)[None] // jnp.asarray([[50], [T]])

    def run(function, arrays):
        out, pullback = jax.vjp(lambda arrays: function(**arrays, segment_ids=segment_ids)[0], arrays)
        return pullback(cotangents["out"])[0] | {"out": out}

    expected = jax.jit(functools.partial(run, FUNCTIONS[op]))(arrays)
    sizes = tuple(devices if name == axis else 1 for name in MESH_AXES)
    with jax.set_mesh(jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 4)):
        results = jax.jit(functools.partial(run, FUNCTIONS[op]))(arrays)
    assert_close(results, expected, TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"T": 30}, "q has shape [4, 30, 4, 6]: axis 1 must be a multiple of the mesh's context=4"),
        ({"B": 3}, "q has shape [3, 32, 4, 6]: axis 0 must be a multiple of the mesh's data=2 x fsdp=2"),
        ({"G": 1}, "k has shape [4, 32, 1, 6]: axis 2 must be a multiple of the mesh's tensor=2"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused(sizes, message):
    arrays = shapes(slot_attention, Sizes(4, 32, 4, 2, 6, 5, 7)._replace(**sizes))
    with (
        jax.sharding.use_abstract_mesh(mesh(data=2, fsdp=2, tensor=2, context=4)),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        jax.eval_shape(lambda arrays: sharded.gated_slot_attention(**arrays), arrays)


def test_a_part_has_the_tokens_that_a_convolution_needs():
    x, kernel = jax.ShapeDtypeStruct((1, 8, 6), jnp.float32), jax.ShapeDtypeStruct((4, 6), jnp.float32)
    with (
        jax.sharding.use_abstract_mesh(mesh(data=1, fsdp=1, tensor=1, context=4)),
        pytest.raises(ValueError, match="must have the 3 tokens that the next one needs, got 2"),
    ):
        jax.eval_shape(sharded.short_convolution, x, kernel)


@pytest.mark.parametrize("explicit", [MESH_AXES, ("tensor",), ("data", "context")])
def test_explicit_axes_are_refused(explicit):
    kinds = tuple(AxisType.Explicit if name in explicit else AxisType.Auto for name in MESH_AXES)
    arrays = shapes(slot_attention, Sizes(4, 32, 4, 2, 6, 5, 7))
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 4, 2), MESH_AXES, kinds)),
        pytest.raises(ValueError, match=f"mesh: {', '.join(explicit)} must be Auto, got Explicit"),
    ):
        jax.eval_shape(lambda arrays: sharded.gated_slot_attention(**arrays), arrays)


def test_explicit_axes_of_other_meshes_or_of_one_device_change_nothing():
    arrays = shapes(slot_attention, Sizes(4, 32, 4, 2, 6, 5, 7))
    alone = jax.eval_shape(lambda arrays: sharded.gated_slot_attention(**arrays), arrays)
    for sizes, names in (((2,), ("rows",)), ((1, 1, 1, 1), MESH_AXES)):
        with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, names, (AxisType.Explicit,) * len(names))):
            under = jax.eval_shape(lambda arrays: sharded.gated_slot_attention(**arrays), arrays)
        chex.assert_trees_all_equal_shapes_and_dtypes(under, alone)
