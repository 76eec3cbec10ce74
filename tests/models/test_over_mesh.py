"""Models of every mixer over a mesh that cuts their sequences."""

import json
import os
import subprocess
import sys

import pytest

from tests.models.over_mesh import CASES


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
    assert results[name]["error"] < 1e-5


def test_states_are_exchanged_once_a_layer(results):
    """Gathered: the states of the slot attention, keys, values and segment ids of the softmax attention."""
    collectives = results["gsa-softmax"]["collectives"]
    assert (collectives["all-gather"], collectives["reduce-scatter"]) == (3, 2)
