"""A program for a process with eight devices: the ops of `gsa_jax.ops.sharded` on meshes and on one device.

Prints as JSON for each of `CASES`, in float64, how far outputs and gradients are from those of one device at most
("error"), and the collectives in the compiled program ("collectives": {"all-gather": 1}).
"""

import collections
import functools
import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gsa_jax.ops import sharded, softmax
from gsa_jax.sharding import MESH_AXES
from tests.helpers import rel_err
from tests.ops.cases import GATES

B, T, H, G, K, V, M, W = 4, 32, 4, 2, 6, 5, 7, 4
DOCUMENTS = np.stack([np.arange(T) // 3, np.arange(T) // 8, np.repeat([0, 1, 0], [5, 8, 19]), np.zeros(T, int)])
"""Borders everywhere, where the parts of four devices meet, a document through several parts, and one alone."""


class Case(NamedTuple):
    """A call on a mesh."""

    op: str
    mesh: dict[str, int]
    state: bool = True
    """with an initial state, and with the last state among the outputs"""
    documents: bool = True
    options: dict[str, Any] = {}


CONTEXT, MIXED, ROWS = {"context": 8}, {"data": 2, "tensor": 2, "context": 2}, {"fsdp": 2, "context": 4}
SCAN = {"implementation": "scan"}
CASES = {
    "slot": Case("slot", CONTEXT),
    "slot-rows": Case("slot", ROWS, options=SCAN),
    "slot-heads": Case("slot", MIXED, options=SCAN),
    "slot-whole-sequences": Case("slot", {"data": 2, "fsdp": 2, "tensor": 2}, options=SCAN),
    "slot-alone": Case("slot", CONTEXT, state=False, documents=False),
    "slot-write": Case("slot-write", MIXED, state=False, options=SCAN),
    "linear": Case("linear", CONTEXT, options=SCAN),
    "linear-alone": Case("linear", MIXED, state=False, documents=False),
    "linear-per-head": Case("linear-per-head", CONTEXT, state=False, options=SCAN),
    "abc": Case("abc", CONTEXT),
    "abc-alone": Case("abc", MIXED, state=False, documents=False),
    "convolution": Case("convolution", CONTEXT),
    "convolution-alone": Case("convolution", MIXED, state=False, documents=False),
    "softmax": Case("softmax", CONTEXT, state=False),
    "softmax-alone": Case("softmax", MIXED, state=False, documents=False),
    "softmax-window-of-neighbours": Case("softmax", CONTEXT, state=False, options={"window": 5}),
    "softmax-window-of-all": Case("softmax", ROWS, state=False, options={"window": 10}),
}


def operands(op: str, state: bool):
    """(function, its floating arguments by name, in float64)."""
    rng = np.random.default_rng(0)
    gates = GATES["all kinds"](rng, (B, T, G, {"slot": M, "slot-write": M, "linear-per-head": 1}.get(op, K)))
    qkv = {"q": rng.normal(size=(B, T, H, K)), "k": rng.normal(size=(B, T, G, K)), "v": rng.normal(size=(B, T, G, V))}
    match op.split("-")[0]:
        case "slot":
            function, arrays = sharded.gated_slot_attention, qkv | {"log_decay": gates}
            initial = (rng.normal(size=(B, G, M, K)), rng.normal(size=(B, G, M, V)))
            if op == "slot-write":
                arrays["write"] = rng.uniform(size=gates.shape)
        case "linear":
            function, arrays = sharded.gated_linear_attention, qkv | {"log_decay": gates}
            initial = rng.normal(size=(B, G, K, V))
        case "abc":
            function, arrays = sharded.abc_log_decay, {"write_logits": 3 * rng.normal(size=(B, T, G, M))}
            initial = rng.normal(size=(B, G, M))
            return function, arrays | ({"initial_normalizer": initial} if state else {})
        case "convolution":
            function, arrays = sharded.short_convolution, {"x": rng.normal(size=(B, T, 6))}
            arrays["kernel"], initial = rng.normal(size=(W, 6)), rng.normal(size=(B, W - 1, 6))
        case "softmax":
            return sharded.softmax_attention, qkv | {"v": rng.normal(size=(B, T, G, K))}
    return function, arrays | ({"initial_state": initial} if state else {})


def outputs_and_gradients(case: Case, arrays):
    """What is compared; without states only the first output is used."""
    function, _ = operands(case.op, case.state)
    segment_ids = jnp.asarray(DOCUMENTS) if case.documents else None

    def call(arrays):
        results = function(**arrays, segment_ids=segment_ids, **case.options)
        return results if case.state or case.op == "softmax" else results[0]

    results, pullback = jax.vjp(call, arrays)
    finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), results)
    return finite, pullback(jax.tree.map(jnp.cos, finite))[0]


def compiled(case: Case):
    """(outputs and gradients, text of the program), on the case's mesh or, without one, on one device."""
    sizes = [case.mesh.get(name, 1) for name in MESH_AXES]
    mesh = jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 4, devices=jax.devices()[: math.prod(sizes)])
    _, arrays = operands(case.op, case.state)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(outputs_and_gradients, case))
        program = program.lower(arrays).compile()
        return program(arrays), program.as_text()


def main():
    """What the module's docstring says."""
    references, results = {}, {}
    for name, case in CASES.items():
        alone = case._replace(mesh={})
        if repr(alone) not in references:
            references[repr(alone)], _ = compiled(alone)
        arrays, text = compiled(case)
        errors = jax.tree.map(rel_err, arrays, references[repr(alone)])
        collectives = re.findall(r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", text)
        results[name] = {"error": max(jax.tree.leaves(errors)), "collectives": collections.Counter(collectives)}
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    softmax.SCORES_AT_ONCE = B * H * T * 4 // 8  # blocks of 4 queries
    print(json.dumps(main()))
