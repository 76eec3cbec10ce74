"""The tiny models, their training step and generation lower for TPUs, on a machine that has none."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gsa_jax.generation import SamplingConfig, generate
from gsa_jax.layers import MIXERS
from gsa_jax.models import abstract_model, preset
from gsa_jax.training import (
    MeshConfig,
    OptimizerConfig,
    init_state,
    make_mesh,
    make_optimizer,
    make_schedule,
    make_train_step,
)


@pytest.fixture(autouse=True)
def as_on_a_tpu(monkeypatch):
    """What asks for the platform is told that it is a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def export(function, *arguments):
    """The function lowered for TPUs; raises if it cannot be."""
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    assert exported.platforms == ("tpu",)
    return exported


def ids(*shape):
    """Token ids of that shape."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("mixer", MIXERS)
def test_forward(mixer):
    definition, parameters = nnx.split(abstract_model(preset(f"tiny-{mixer}"), dtype=jnp.bfloat16))

    def forward(parameters, tokens, segment_ids):
        return nnx.merge(definition, parameters)(tokens, segment_ids=segment_ids)[0]

    exported = export(forward, parameters, ids(2, 256), ids(2, 256))
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [((2, 256, 257), jnp.float32)]
    products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert any("bf16" in line for line in products)


@pytest.mark.parametrize("mixer", ["gsa", "hgrn2"])
def test_training_step(mixer):
    config, optimizer_config = preset(f"tiny-{mixer}"), OptimizerConfig()
    definition = nnx.graphdef(abstract_model(config, dtype=jnp.bfloat16))
    optimizer = make_optimizer(optimizer_config, steps=10)
    step = make_train_step(definition, optimizer, make_schedule(optimizer_config, steps=10))
    _, state = init_state(config, optimizer, make_mesh(MeshConfig()), seed=0)
    exported = export(step, state, dict.fromkeys(("inputs", "targets", "segment_ids"), ids(2, 256)))
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert [x.shape for x in exported.out_avals[: len(shapes)]] == shapes


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation(mixer):
    """The prompt's pass and the decode loop."""
    definition, parameters = nnx.split(abstract_model(preset(f"tiny-{mixer}"), dtype=jnp.bfloat16))

    def continue_prompt(parameters, prompt):
        model = nnx.merge(definition, parameters)
        return generate(model, prompt, 8, sampling=SamplingConfig(temperature=0.7, top_k=20, top_p=0.9))

    exported = export(continue_prompt, parameters, ids(2, 16))
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [((2, 8), jnp.int32)]
