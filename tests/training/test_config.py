import dataclasses
import json
import re

import pytest

from gsa_jax.layers import GatedSlotAttentionConfig
from gsa_jax.models import preset
from gsa_jax.training import ConfigError, MeshConfig, OptimizerConfig, TrainConfig, recipe
from gsa_jax.training.config import differences

GROUPED = dataclasses.replace(preset("tiny"), gsa=GatedSlotAttentionConfig(num_heads=2, num_kv_heads=1))
HGRN2 = preset("tiny-hgrn2")
NARROW = dataclasses.replace(preset("tiny"), mlp_size=33)


@pytest.mark.parametrize("name", ["tiny", "gsa-340m", "hgrn2-1.3b"])
def test_json_gives_back_the_recipe_of_every_preset(name):
    config = recipe(name)
    assert TrainConfig.from_json(config.to_json()) == config


def test_json_of_settings_that_are_not_defaults():
    model = dataclasses.replace(preset("tiny"), mixers=("gsa", "softmax"), num_layers=4)
    config = TrainConfig(model, mesh=MeshConfig(data=2), eval_batches=3, optimizer=OptimizerConfig(clip=float("inf")))
    assert TrainConfig.from_json(config.to_json()) == config


def test_json_that_leaves_something_out_takes_the_default():
    values = json.loads(recipe("tiny").to_json())
    del values["keep"], values["model"]["gsa"]["damping"]
    assert TrainConfig.from_json(json.dumps(values)) == recipe("tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {}, "stpes": 3}', "config: unknown field 'stpes', expected some of model, data"),
        ('{"model": {"gsa": {"slots": 3}}}', "config.model.gsa: unknown field 'slots', expected some of num_heads"),
        ('{"steps": 3}', "config: expected an object with the field 'model'"),
        ("[1]", "config: expected an object with the field 'model'"),
        ("{", "config: expected JSON, got"),
        ('{"model": {"num_layers": {"a": 1}}}', "config.model.num_layers: expected int, got {'a': 1}"),
        ('{"model": {}, "steps": "ten"}', "config.steps: expected int, got 'ten'"),
        ('{"model": {"mixers": "gsa"}}', "config.model.mixers: expected tuple[str, ...], got 'gsa'"),
        ('{"model": {"remat": "some"}}', "config.model.remat: expected Literal['none', 'dots', 'full'], got"),
        ('{"model": {"mlp_size": 2.5}}', "config.model.mlp_size: expected int | None, got 2.5"),
        (
            '{"model": {"mixers": ["gsa", ["gla"]]}}',
            "config.model.mixers: expected tuple[str, ...], got ['gsa', ['gla']]",
        ),
        ('{"model": {}, "steps": [3]}', "config.steps: expected int, got [3]"),
        ('{"model": {}, "optimizer": null}', "config.optimizer: expected OptimizerConfig, got None"),
    ],
)
def test_json_of_something_else_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig.from_json(text)


@pytest.mark.parametrize("text", ["{", '{"model": {"hidden_size": 0}}', '{"model": {}, "steps": "ten"}', "\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"^{file}: "):
        TrainConfig.read(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"batch_size": 10, "accumulation": 4}, "batch_size=10: expected a multiple of accumulation x mesh.data"),
        ({"batch_size": 6, "mesh": MeshConfig(data=2, fsdp=2)}, "batch_size=6: expected a multiple of .* = 4"),
        ({"length": 9, "mesh": MeshConfig(context=2)}, "length=9: expected a multiple of mesh.context=2"),
        ({"mesh": MeshConfig(tensor=4)}, "model.gsa.num_heads=2: expected a multiple of mesh.tensor=4"),
        ({"model": GROUPED, "mesh": MeshConfig(tensor=2)}, "model.gsa.num_kv_heads=1: expected a multiple of mesh"),
        ({"model": HGRN2, "mesh": MeshConfig(tensor=4)}, "hgrn2.expand_ratio=2: expected a multiple of mesh.tensor=4"),
        ({"model": NARROW, "mesh": MeshConfig(tensor=2)}, "model.mlp_size=33: expected a multiple of mesh.tensor=2"),
        ({"eval_batches": 0}, "eval_batches=0"),
        ({"accumulation": 0}, "accumulation=0: expected at least 1"),
        ({"keep": 0}, "keep=0"),
        ({"seed": -1}, "seed=-1"),
        ({"run_dir": ""}, "run_dir='': expected the name of a folder"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": preset("tiny")} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"final_fraction": -0.1}, "final_fraction must be at least 0 and finite, got -0.1"),
        ({"final_fraction": 1.5}, "final_fraction=1.5: expected at most 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"b1": -0.9}, "b1 must be at least 0 and finite, got -0.9"),
        ({"b1": 1.0}, "b1=1.0: expected less than 1"),
        ({"b2": 1.5}, "b2=1.5: expected less than 1"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"clip": float("nan")}, "clip must be positive, got nan"),
    ],
)
def test_numbers_of_an_optimizer_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    OptimizerConfig(warmup_steps=0, final_fraction=0.0, weight_decay=0.0, b1=0.0, b2=0.0, clip=float("inf"))
    OptimizerConfig(final_fraction=1.0)


def test_a_mesh_axis_has_at_least_one_device():
    with pytest.raises(ValueError, match="fsdp must be at least 1, got 0"):
        MeshConfig(fsdp=0)


@pytest.mark.parametrize(
    ("name", "tokens", "warmup"),
    [
        ("gsa-340m", 2**19, 2**29),
        ("gla-340m", 2**19, 2**29),
        ("gsa-1.3b", 2**21, 2**30),
        ("softmax-2.7b", 2**21, 2**30),
    ],
)
def test_recipes_are_the_papers(name, tokens, warmup):
    config = recipe(name)
    assert config.length == 2048 and config.batch_size * config.length == tokens
    assert config.optimizer.warmup_steps * tokens == pytest.approx(warmup, rel=0.05)
    assert (config.optimizer.learning_rate, config.optimizer.final_fraction) == (3e-4, 0.1)
    assert (config.optimizer.weight_decay, config.optimizer.clip) == (0.01, 1.0)
    assert config.eval_batches * config.batch_size == 1024


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("tiny", {}, 1),
        ("gsa-340m", {}, 32),
        ("gsa-1.3b", {}, 128),
        ("gsa-1.3b", {"mesh": MeshConfig(data=8, fsdp=8)}, 2),
        ("gsa-7b", {"mesh": MeshConfig(data=64, fsdp=8, tensor=8)}, 1),
        ("gsa-1.3b", {"mesh": MeshConfig(context=4)}, 32),
        ("gsa-1.3b", {"length": 1500}, 128),
        ("gsa-1.3b", {"length": 2**18, "batch_size": 3}, 3),
        ("gsa-1.3b", {"batch_size": 22}, 11),
        ("gsa-1.3b", {"accumulation": 64}, 64),
    ],
)
def test_a_device_computes_16k_tokens_at_a_time(name, changes, parts):
    """As many rows as make them, if they divide its rows of the batch, or else fewer, and at least one."""
    assert dataclasses.replace(recipe(name), **changes).parts == parts


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"gsa-340m.*got 'gsa-70b'"):
        recipe("gsa-70b")


def test_differences_name_the_fields():
    there = recipe("tiny")
    here = dataclasses.replace(there, seed=1, model=dataclasses.replace(there.model, num_layers=8))
    there, here = json.loads(there.to_json()), json.loads(here.to_json())
    assert differences(there, there) == {}
    assert differences(there, here) == {
        "model.num_layers": "model.num_layers is 4 there and 8 here",
        "seed": "seed is 0 there and 1 here",
    }
