"""Models of every mixer over a mesh that cuts their sequences."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gsa_jax.sharding import MESH_AXES
from tests.models.cases import PAIRS, config, model
from tests.models.over_mesh import CASES
from tests.pallas_kernels.hopper import mesh


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.over_mesh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_logits_states_and_gradients_are_those_of_one_device(results, name):
    assert results[name]["error"] < (0.1 if "bfloat16" in name else 1e-5)


def test_states_are_exchanged_once_a_layer(results):
    """Gathered: the states of the slot attention, keys, values and segment ids of the softmax attention."""
    collectives = results["gsa-softmax"]["collectives"]
    assert (collectives["all-gather"], collectives["reduce-scatter"]) == (3, 2)


@pytest.mark.parametrize(("shape", "axis"), [((3, 12), "axis 0 .* data=2"), ((2, 13), "axis 1 .* context=2")])
def test_tokens_that_the_mesh_can_not_cut(shape, axis):
    lm = model(config(next(iter(PAIRS.values()))))
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": 2, "context": 2}
    with jax.sharding.use_abstract_mesh(mesh(**sizes)), pytest.raises(ValueError, match=f"tokens has shape .* {axis}"):
        jax.eval_shape(lm, jax.ShapeDtypeStruct(shape, jnp.int32))
