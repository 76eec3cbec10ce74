"""The benchmark of decoding's part of the op: its bytes, its chain of layers, and a run of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import step
from experiments.benchmarks.shapes import Shape, make_inputs
from experiments.provenance import device_name
from gsa_jax.ops import SlotState, gated_slot_attention

TINY = step.Config(batches=(1, 3), layers=2, heads=2, size=8, slots=4, tokens=2, repeats=1, seconds=0.01, copy_mib=1)


def test_the_target_of_64_rows_by_hand():
    """24 layers x 64 rows x 4 heads x 64 slots x 512, twice, in float32, read and written: 0.75 ms at 4.3 TB/s."""
    states = [jax.eval_shape(lambda: SlotState(*(jnp.zeros((64, 4, 64, 512)),) * 2))] * 24
    moved = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))
    assert moved == 2 * 24 * 64 * 4 * 64 * 512 * 2 * 4
    line = step.describe({"batch": 64, "ms": 1.0, "bytes": moved}, rate=4.3e12)
    assert line == "batch 64: 1 ms for 3,221 MB of states read and written, 3.22 TB/s, 75% of a copy"


def test_tokens_go_through_the_layers_one_by_one():
    """Three tokens through two layers, a layer's outputs the next one's values; the last gives the next token's."""
    q, k, v, log_decay = make_inputs(Shape("gsa", 1, 2, 2, 8, 8, 4), jnp.float32)
    layers = [(q[:, i], k[:, i], log_decay[:, i]) for i in range(2)]
    zeros = jnp.zeros((1, 2, 4, 8))
    states, out = step.through_layers([SlotState(zeros, zeros)] * 2, v[:, 0], layers, tokens=3)
    reference, value = [SlotState(zeros, zeros)] * 2, v[:, :1]
    for _ in range(3):
        for i in range(2):
            token = (q[:, i : i + 1], k[:, i : i + 1], value, log_decay[:, i : i + 1])
            value, reference[i] = gated_slot_attention(*token, initial_state=reference[i], implementation="scan")
    np.testing.assert_allclose(out, value[:, 0], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), states, reference)


def test_a_run_prints_and_writes_every_batch_size(tmp_path, capsys):
    out = tmp_path / "deep" / "step.json"
    result = step.main(dataclasses.replace(TINY, out=out))
    assert json.loads(out.read_text()) == result
    assert result["device"] == device_name() and result["copy_bytes_per_second"] > 0
    assert [row["bytes"] for row in result["rows"]] == [2 * 2 * batch * 2 * 4 * 8 * 2 * 4 for batch in (1, 3)]
    assert all(row["ms"] > 0 for row in result["rows"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("gsa, 2 layers, H 2, D 8, M 4, bfloat16; ")
    assert [line.split(":")[0] for line in lines] == ["batch 1", "batch 3"]
    assert all(line.endswith("of a copy") for line in lines)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        step.Config(layers=0)
