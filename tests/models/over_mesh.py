"""A program for a process with eight devices: language models over meshes and on one device.

Prints as JSON for each of `CASES` how far logits, states and gradients are from those of one device at most ("error"),
and the collectives of the compiled program, those of a loop over layers once ("collectives": {"all-gather": 1}).
"""

import collections
import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from gsa_jax.sharding import BATCH, MESH_AXES, without_single_devices
from tests.helpers import rel_err
from tests.models import cases

B, T = 4, 32
DOCUMENTS = np.stack([np.arange(T) // 3, np.arange(T) // 8, np.repeat([0, 1, 0], [5, 8, 19]), np.zeros(T, int)])


class Case(NamedTuple):
    """A model on a mesh."""

    mesh: dict[str, int]
    settings: dict[str, Any] = {}
    states: bool = True
    """whether the states after the last token are among the outputs"""
    dtype: Any = jnp.float32
    axes: tuple[str, ...] = MESH_AXES
    """the axes that the mesh has at all"""


CASES = {
    "gsa-softmax": Case({"context": 8}, states=False),
    "hgrn2-gsa": Case({"data": 2, "context": 4}, {"remat": "full"}, axes=("context", "data")),
    "retention-abc": Case({"data": 2, "tensor": 2, "context": 2}),
    "linear-gla": Case({"fsdp": 2, "tensor": 2, "context": 2}),
    "linear-gla in bfloat16": Case({"data": 2, "tensor": 2, "context": 2}, dtype=jnp.bfloat16),
}
"""By the names of `cases.PAIRS`, their first word; together they have every mixer."""


def compiled(name, case):
    """(logits, states and gradients, text of the program), on the case's mesh or, without one, on one device."""
    sizes, kinds = [case.mesh.get(name, 1) for name in case.axes], (AxisType.Auto,) * len(case.axes)
    mesh = jax.make_mesh(sizes, case.axes, kinds, devices=jax.devices()[: math.prod(sizes)])
    config = cases.config(cases.PAIRS[name.split()[0]], **case.settings)
    graphdef, parameters = nnx.split(cases.model(config, dtype=case.dtype))

    def loss(parameters, tokens, segment_ids):
        logits, state = nnx.merge(graphdef, parameters)(tokens, segment_ids=segment_ids)
        return jnp.sum(jnp.cos(logits)), (logits, state if case.states else ())

    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, without_single_devices(BATCH, mesh))
        arrays = (parameters, *jax.device_put((cases.token_ids(T, B), DOCUMENTS), tokens))
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(*arrays).compile()
        return program(*arrays), program.as_text()


def main():
    """What the module's docstring says."""
    results = {}
    for name, case in CASES.items():
        expected, _ = compiled(name, case._replace(mesh={}))
        arrays, text = compiled(name, case)
        errors = jax.tree.map(rel_err, arrays, expected)
        collectives = re.findall(r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", text)
        results[name] = {"error": max(jax.tree.leaves(errors)), "collectives": collections.Counter(collectives)}
    return results


if __name__ == "__main__":
    print(json.dumps(main()))
