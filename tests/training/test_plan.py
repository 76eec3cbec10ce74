"""Plans against numbers worked out by hand for gsa-1.3b: D = 2048, 24 layers, MLP 5632, 4 heads of 64 slots."""

import dataclasses
import math
import re

import pytest

from experiments import plan as script
from gsa_jax.training import ConfigError, MeshConfig, recipe
from gsa_jax.training.plan import Hardware, best_plans, describe, placement, plan

D, LAYERS, MLP, HEADS, SLOTS, VOCAB = 2048, 24, 5632, 4, 64, 32000
MATRICES = LAYERS * (4 * D * D + D * HEADS * SLOTS + 3 * D * MLP)
TABLE = VOCAB * D
VECTORS = LAYERS * 3 * D + D


def config(batch_size=1024, model=None, accumulation=None, **mesh):
    base = recipe("gsa-1.3b")
    return dataclasses.replace(
        base, model=model or base.model, mesh=MeshConfig(**mesh), batch_size=batch_size, accumulation=accumulation
    )


def test_every_array_is_placed_and_counted():
    rows = {row.name: row for row in placement(config(data=2, fsdp=8, tensor=4))}
    name = "blocks/0/mlp/down/kernel"
    for prefix in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        row = rows[f"{prefix}/{name}"]
        assert (row.shape, row.dtype, row.split) == ((LAYERS, MLP, D), "float32", "- tensor fsdp")
        assert row.bytes_per_device == 4 * LAYERS * MLP * D // 32
        assert rows[f"{prefix}/norm/scale"].split == ""
    assert rows["params/embedding/embedding"].split == "tensor fsdp"
    total = sum(row.bytes_per_device for row in rows.values())
    assert total == 3 * 4 * ((MATRICES + 2 * TABLE) // 32 + VECTORS) + 3 * 4  # the counts of steps


def test_a_batch_axis_sums_gradients_and_fsdp_gathers_too():
    (data,) = plan(config(data=8, accumulation=1), Hardware()).sent.values()
    assert data == pytest.approx(2 * 7 / 8 * (2 * (MATRICES + TABLE + VECTORS) + 4 * TABLE))
    (fsdp,) = plan(config(fsdp=8, accumulation=4), Hardware()).sent.values()
    block, embedding, head = 2 * MATRICES, 2 * TABLE, 4 * TABLE
    assert fsdp == pytest.approx(4 * 7 / 8 * (3 * block + 2 * embedding + 2 * head))


def test_tensor_sums_activations_and_context_exchanges_states():
    tokens = 1024 * 2048
    (tensor,) = plan(config(tensor=4, accumulation=1024), Hardware()).sent.values()
    assert tensor == pytest.approx(2 * 3 / 4 * tokens * 2 * D * (4 * LAYERS + 2))
    model = dataclasses.replace(recipe("gsa-1.3b").model, remat="none")
    with_states = plan(config(context=4, model=model, accumulation=256), Hardware()).sent["context"]
    gradients = plan(config(data=4, accumulation=256), Hardware()).sent["data"]
    states = 4 * LAYERS * 1024 * HEADS * SLOTS * (D // HEADS) * 2
    assert with_states - gradients == pytest.approx(2 * 3 * states)


def test_the_link_is_that_of_the_farthest_neighbours():
    hardware = Hardware(node=8, nvlink=400e9, network=40e9)
    result = plan(config(data=4, fsdp=4, tensor=2), hardware)
    rates = {axis: result.sent[axis] / seconds for axis, seconds in result.seconds.items()}
    assert rates == pytest.approx({"data": 40e9, "fsdp": 400e9, "tensor": 400e9})


def test_activations_are_cut_until_they_fit():
    roomy, tight = (plan(config(fsdp=8), Hardware(memory=memory)) for memory in (1e12, 50e9))
    assert roomy.accumulation == 1 and tight.accumulation > 1
    assert tight.activations * tight.accumulation == pytest.approx(roomy.activations, rel=1e-6)
    assert tight.state + tight.activations <= 50e9
    with pytest.raises(ConfigError, match="mesh: fsdp=8 needs 3 GB for the state and, row by row, .* at most 1 GB"):
        plan(config(fsdp=8), Hardware(memory=1e9))


def test_arithmetic_counts_what_is_computed_again_and_the_scores_of_softmax_attention():
    tokens, hardware = 1024 * 2048, Hardware(flops=1e12)

    def operations(model):
        return plan(config(model=model, accumulation=1024), hardware).compute * 1e12 / tokens

    model = recipe("gsa-1.3b").model
    parameters = MATRICES + VECTORS
    assert operations(model) == pytest.approx(6 * (parameters + TABLE))
    assert operations(dataclasses.replace(model, remat="full")) == pytest.approx(8 * parameters + 6 * TABLE)
    hybrid = dataclasses.replace(model, mixers=("gsa", "softmax"))
    windowed = dataclasses.replace(hybrid, softmax=dataclasses.replace(hybrid.softmax, window=512))
    assert operations(hybrid) - operations(windowed) == pytest.approx(LAYERS / 2 * 12 * (1024 - 512) * D)


def test_parts_asked_for_are_kept_on_every_mesh():
    roomy, tight = (best_plans(config(accumulation=4), 16, Hardware(memory=memory)) for memory in (1e12, 30e9))
    assert {found.accumulation for found in roomy + tight} == {4}
    assert len(roomy) > len(tight) == sum(found.memory <= 30e9 for found in roomy)


def test_the_best_meshes_use_all_devices_and_come_in_order():
    plans = best_plans(config(), 64, Hardware())
    assert all(math.prod(dataclasses.asdict(found.mesh).values()) == 64 for found in plans)
    assert {found.mesh.tensor for found in plans} == {1, 2, 4}
    assert describe(plans[0].mesh) == "data=8, fsdp=8"
    assert [found.step for found in plans] == pytest.approx(sorted(found.step for found in plans), abs=1e-4)


def test_the_script_prints_arrays_and_costs(capsys):
    script.main(script.Arguments(preset="gsa-7b", mesh=MeshConfig(data=8, fsdp=8)))
    output = capsys.readouterr().out
    assert "params/blocks/0/mlp/down/kernel" in output and "data=8, fsdp=8" in output and "3,281 ms" in output
    assert "does not fit" not in output
    script.main(script.Arguments(preset="gsa-7b", mesh=MeshConfig(fsdp=8), accumulation=1))
    assert re.search(
        r"does not fit into a device's memory: \d.* GB, expected at most 130.0 GB", capsys.readouterr().out
    )
    script.main(script.Arguments(preset="gsa-7b", gpus=(1, 1024), best=1))
    output = capsys.readouterr().out
    assert "data=128, fsdp=8" in output and "one device" in output
