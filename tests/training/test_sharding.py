import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gsa_jax.training import ConfigError, MeshConfig, OptimizerConfig, make_mesh, make_optimizer, shardings
from tests.training.tiny import FAST_COMPILE

# Three steps from the same parameters on the same batches, on one device and on a mesh of eight.
EIGHT_DEVICES = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from gsa_jax.training import *
from flax import nnx
from gsa_jax.models import abstract_model
from tests.training.tiny import MODEL

def run(model, mesh, accumulation):
    mesh, config = make_mesh(mesh), OptimizerConfig(learning_rate=1e-2)
    optimizer = make_optimizer(config, 10)
    create, like = init_state(model, optimizer, mesh, seed=0)
    graphdef, _ = nnx.split(abstract_model(model, dtype=jnp.float32))
    step = jax.jit(make_train_step(graphdef, optimizer, make_schedule(config, 10), accumulation))
    state, losses = create(), []
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, like))
    for tokens in np.random.default_rng(0).integers(0, model.vocab_size, (3, 8, 33), dtype=np.int32):
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((8, 32), np.int32)}
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    kernel = state.params["blocks"][0]["mlp"]
    return losses, [tuple(x.sharding.spec) for x in jax.tree.leaves(kernel)]

model = dataclasses.replace(MODEL, mixers=("gsa",), implementation="scan")
print(json.dumps([run(model, MeshConfig(), 1)[0], *run(model, MeshConfig(data=2, fsdp=2, tensor=2), 2)]))
"""


def test_eight_devices_give_the_losses_of_one():
    environment = os.environ | FAST_COMPILE | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses, sharded_losses, specs = json.loads(done.stdout.splitlines()[-1])
    assert losses[2] < losses[0]
    assert sharded_losses == pytest.approx(losses, rel=1e-5)
    assert sorted(specs, key=str) == [[None, "fsdp", "tensor"]] * 2 + [[None, "tensor", "fsdp"]]


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
            "head": nnx.Param(jnp.zeros((8, 257)), axes=("embed", "vocab")),  # 257 rows can't be split in four
            "norm": nnx.Param(jnp.zeros((3, 8)), axes=(None,)),
        }
    )
    expected = {"stacked": P(None, "fsdp", "tensor"), "head": P("fsdp", None), "norm": P(None, None)}
    opt_state = make_optimizer(OptimizerConfig(), steps=10).init(params)
    split, opt_split = shardings((params, opt_state), mesh)
    moments = opt_split[1][0]
    for tree in (split, moments.mu, moments.nu):
        assert {name: sharding.spec for name, sharding in nnx.to_pure_dict(tree).items()} == expected
    assert moments.count.spec == P()
