"""The ops under `jax.shard_map`, batch and heads over 8 devices; in a process of its own, that has 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.ops import SlotState, gated_slot_attention
from tests.ops.cases import IMPLEMENTATIONS, OPS, Sizes, assert_all_close, expected, make_case, outputs_and_gradients
from tests.ops.cases import slot_attention

assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("data", "heads"))
tokens, state = P("data", None, "heads", None), P("data", "heads", None, None)

for op in OPS:
    for implementation, initial in zip(IMPLEMENTATIONS, (False, True)):
        arrays, cotangents = make_case(op, Sizes(4, 20, 4, 2, 6, 5, 7), gates="all kinds", state=initial)
        segment_ids = np.arange(20)[None] // np.asarray([[3], [7], [8], [20]])
        specs = jax.tree.map(lambda x: tokens if x.shape[1] == 20 else state, (arrays, cotangents))
        inputs = (arrays, cotangents, segment_ids)
        in_specs = (*specs, P("data", None))
        inputs = jax.device_put(inputs, jax.tree.map(lambda spec: NamedSharding(mesh, spec), in_specs))
        run = functools.partial(outputs_and_gradients.__wrapped__, op, implementation=implementation, chunk_size=8)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=specs[::-1])
        results = jax.jit(sharded)(*inputs)
        assert results[0]["out"].sharding.spec == tokens
        assert_all_close(results, expected(op, arrays, cotangents, segment_ids), 2e-5, implementation)

def from_zeros(q, k, v, log_decay, implementation):
    size, groups, slots = q.shape[0], k.shape[2], log_decay.shape[3]
    zeros = SlotState(*(jnp.zeros((size, groups, slots, x.shape[-1])) for x in (k, v)))
    return gated_slot_attention(q, k, v, log_decay, initial_state=zeros, implementation=implementation)[0]

arrays, _ = make_case(slot_attention, Sizes(4, 20, 4, 2, 6, 5, 7), state=False)
arrays = [np.asarray(arrays[name]) for name in ("q", "k", "v", "log_decay")]
placed = jax.device_put(arrays, NamedSharding(mesh, tokens))
for implementation in IMPLEMENTATIONS:
    run = functools.partial(from_zeros, implementation=implementation)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=tokens, out_specs=tokens)
    np.testing.assert_allclose(jax.jit(sharded)(*placed), run(*arrays), rtol=1e-4, atol=1e-5)
print("all sharded")
"""


def test_shard_map_over_batch_and_heads():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "all sharded\n", result.stderr
