"""On meshes of eight devices the loss and the gradient are those of one, and nothing is moved that need not be."""

import json
import os
import subprocess
import sys

import pytest

MESHES = [
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
]
"""Every axis and every pair of the first three; `python -m tests.training.meshes` takes any others."""
MATRICES, VECTORS = 10, 4
"""Parameters of the model in `meshes.py`: eight matrices a layer, embedding and head; three norms a layer, one more."""


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.training.meshes", json.dumps(MESHES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def name(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_loss_and_gradient_are_those_of_one_device(results, mesh):
    result = results[MESHES.index(mesh)]
    assert abs(result["loss"]) < 1e-5 and result["gradient"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_every_collective_is_one_that_the_mesh_asks_for(results, mesh):
    found = dict(results[MESHES.index(mesh)]["collectives"])

    def take(kind, axis, shape):
        """The number of arrays that are moved so along `axis`, alone or with others."""
        keys = [key for key in found if key.startswith(kind) and axis in key.split()[1].split("+") and shape in key]
        return sum(found[key] for key in keys), keys

    accounted = set()
    for axis in mesh.keys() - {"tensor"}:  # gradients are summed over all that have other tokens
        for shape, count in (("f32[2]", MATRICES), ("f32[1]", VECTORS)):
            number, keys = take("all-reduce", axis, shape)
            assert number == count, (axis, shape)
            accounted.update(keys)
    if "fsdp" in mesh:  # a layer's matrices are gathered for the forward and for the backward pass, the others once
        assert take("all-gather", "fsdp", "f32[2]") == (2 * 8 + 2, ["all-gather fsdp f32[2]"])
        accounted.add("all-gather fsdp f32[2]")
    if "tensor" in mesh:
        # Activations [B, T, D]: forward, those of the embedding, the mixer and SwiGLU; backward, those of the head and
        # of six matrices that read the residual stream. [B, T]: the norm over all heads and its gradient, maximum and
        # sum of the logits, and the target's logit. The last is the norm's scale.
        counts = {"all-reduce tensor f32[3]": 10, "all-reduce tensor f32[2]": 5, "all-gather tensor f32[2]": 1}
        assert {key: found[key] for key in counts} == counts
        accounted.update(counts)
    rest = {key for key in found.keys() - accounted if "context" not in key}
    assert not rest
