import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.models import preset
from gsa_jax.ops import pallas
from gsa_jax.sharding import MESH_AXES, partition_spec
from gsa_jax.training import (
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    init_state,
    make_mesh,
    make_optimizer,
    one_device,
    sharding,
    shardings,
)
from gsa_jax.training.compiler import OVERLAP, UNROLLED, compiler_options
from gsa_jax.training.step import abstract_state


@pytest.mark.parametrize("sizes", [{"data": 3}, {"tensor": 2, "fsdp": 2}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(
        ConfigError, match=rf"mesh: data=.*{next(iter(sizes.items()))[1]}.* expected {len(jax.devices())}"
    ):
        make_mesh(MeshConfig(**sizes))


def test_sizes_of_one_take_one_device():
    assert make_mesh(MeshConfig()).shape == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_parameters_and_moments_are_split_by_their_axes():
    mesh = AbstractMesh((2, 2, 4, 1), ("data", "fsdp", "tensor", "context"))
    params = nnx.State(
        {
            "stacked": nnx.Param(jnp.zeros((3, 8, 12)), axes=("embed", "mlp")),
            "into": nnx.Param(jnp.zeros((3, 12, 8)), axes=("mlp", "embed")),
            "head": nnx.Param(jnp.zeros((8, 257)), axes=("embed", "vocab")),  # 257 columns can't be split in four
            "alone": nnx.Param(jnp.zeros((4, 8)), axes=(None, "heads")),
            "norm": nnx.Param(jnp.zeros((3, 8)), axes=(None,)),
        }
    )
    expected = {
        "stacked": P(None, "fsdp", "tensor"),
        "into": P(None, "tensor", "fsdp"),
        "head": P("fsdp", None),
        "alone": P(None, "tensor"),
        "norm": P(None, None),
    }
    opt_state = make_optimizer(OptimizerConfig(), steps=10).init(params)
    split, opt_split = shardings((params, opt_state), mesh)
    moments = opt_split[1][0]
    for tree in (split, moments.mu, moments.nu):
        assert {name: sharding.spec for name, sharding in nnx.to_pure_dict(tree).items()} == expected
    assert moments.count.spec == P()


@pytest.mark.parametrize(
    ("names", "shape", "parts"),
    [
        (("embed", "mlp"), (8, 12), (4, 12)),
        (("mlp", "embed"), (12, 8), (6, 8)),  # rows, where nothing else splits them
        (("vocab", "embed"), (257, 8), (257, 4)),
        ((None, "mlp", "embed"), (4, 12, 8), (4, 6, 8)),  # layers in a stack stay together
        ((None, "heads"), (12, 8), (12, 8)),
    ],
)
def test_fsdp_alone_splits_rows_of_matrices(names, shape, parts):
    mesh = AbstractMesh((1, 2, 1, 1), MESH_AXES)
    assert NamedSharding(mesh, partition_spec(names, shape, mesh)).shard_shape(shape) == parts


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        optax.masked(optax.adamw(1e-3), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.contrib.muon(1e-3),
        optax.MultiSteps(optax.lion(1e-3), 2),
    ],
    ids=["adafactor", "masked", "muon", "multi-steps"],
)
def test_the_states_of_optaxs_optimizers_are_placed(optimizer):
    """With parameters left out, and arrays of fewer axes than the parameters."""
    create, like = init_state(preset("tiny"), optimizer, make_mesh(MeshConfig()), seed=0)
    placed = jax.eval_shape(create)
    assert jax.tree.map(jnp.shape, placed) == jax.tree.map(jnp.shape, like)
    moments = abstract_state(preset("tiny"), optimizer, AbstractMesh((1, 4, 1, 1), MESH_AXES)).opt_state
    assert any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(moments) if x.ndim > 1)


def test_a_batch_that_the_mesh_cannot_cut_is_named(monkeypatch):
    monkeypatch.setattr(sharding, "rows_of_host", lambda mesh: (0, 1))
    with pytest.raises(
        ValueError, match=r"batch\['inputs'\] has shape \[3, 8\]: axis 0 must be a multiple of the mesh"
    ):
        sharding.put_batch({"inputs": np.zeros((3, 8), np.int32)}, AbstractMesh((2, 2, 1, 1), MESH_AXES))


def test_one_device_takes_kernels_where_there_are_several(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert pallas.spreads()
    with jax.set_mesh(one_device()):
        assert not pallas.spreads()


def test_axes_that_a_mesh_lacks_split_nothing():
    data, others = (AbstractMesh((2,), (name,)) for name in ("data", "rows"))
    for mesh, spec in ((data, P("data", None, None)), (others, P(None, None, None))):
        assert partition_spec(("batch", "length", "embed"), (4, 6, 8), mesh) == spec


@pytest.mark.parametrize("options", [*OVERLAP.values(), *UNROLLED.values()])
def test_the_compiler_knows_its_options(options):
    jax.jit(lambda x: x + 1).lower(1.0).compile(options)


def test_the_options_are_for_their_platform_and_program(monkeypatch):
    rolled, unrolled = preset("tiny"), dataclasses.replace(preset("tiny"), unroll=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(rolled, 8) == OVERLAP["gpu"] and compiler_options(rolled, 1) == {}
    assert compiler_options(unrolled, 1) == UNROLLED["gpu"]
    assert compiler_options(unrolled, 8) == OVERLAP["gpu"] | UNROLLED["gpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert compiler_options(unrolled, 8) == {}
