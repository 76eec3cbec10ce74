import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.models import LanguageModel, abstract_model, preset
from gsa_jax.training import (
    MeshConfig,
    OptimizerConfig,
    compile_train_step,
    init_state,
    make_eval_step,
    make_mesh,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from gsa_jax.training.step import compute_dtype
from tests.helpers import rel_err
from tests.training.tiny import MODEL

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)


@pytest.fixture(scope="module")
def state():
    """A first state."""
    create, _ = init_state(MODEL, make_optimizer(OPTIMIZER, steps=10), make_mesh(MeshConfig()), seed=1)
    return create()


def _step(accumulation):
    graphdef, _ = nnx.split(abstract_model(MODEL, dtype=jnp.float32))
    optimizer, schedule = make_optimizer(OPTIMIZER, steps=10), make_schedule(OPTIMIZER, steps=10)
    return jax.jit(make_train_step(graphdef, optimizer, schedule, accumulation))


@pytest.fixture(scope="module")
def step():
    """The training step without accumulation."""
    return _step(accumulation=1)


@pytest.fixture(scope="module")
def batch():
    """Four rows of 16 tokens, of which the last are padding, five more in every row."""
    tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, MODEL.vocab_size)
    segment_ids = (jnp.arange(16) < 16 - 5 * jnp.arange(4)[:, None]).astype(jnp.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}


def test_the_state_begins_as_the_model_does(state):
    model = LanguageModel(MODEL, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    for mine, models in zip(jax.tree.leaves(state.params), jax.tree.leaves(nnx.state(model)), strict=True):
        assert rel_err(mine, models) < 1e-6


def test_a_step_gives_the_loss_and_changes_every_parameter(state, step, batch):
    graphdef, _ = nnx.split(abstract_model(MODEL, dtype=jnp.float32))
    after, metrics = step(state, batch)
    sums = jax.jit(make_eval_step(graphdef))(state.params, {**batch, "target_bytes": batch["segment_ids"]})
    assert metrics["tokens"] == sums["tokens"] == sums["bytes"] == 16 + 11 + 6 + 1
    assert rel_err(metrics["loss"], sums["nll"] / sums["tokens"]) < 1e-6
    assert metrics["loss"] == pytest.approx(np.log(MODEL.vocab_size), rel=0.2)
    assert metrics["learning_rate"] == pytest.approx(OPTIMIZER.learning_rate / 2)
    assert after.step == 1
    for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(new, old)


def test_accumulation_gives_the_gradient_of_the_whole_batch(state, step, batch):
    whole, metrics = step(state, batch)
    parts, metrics_of_parts = _step(accumulation=2)(state, batch)
    for name, value in metrics.items():
        assert rel_err(metrics_of_parts[name], value) < 1e-5
    for new, other in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True):
        assert rel_err(new, other) < 1e-5  # Adam's moments are the gradient and its square


def test_a_step_that_is_not_finite_changes_nothing_and_tells(state, step, batch):
    bad = state._replace(params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params))
    after, metrics = step(bad, batch)
    assert not np.isfinite(metrics["loss"])
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(bad), strict=True):
        np.testing.assert_array_equal(new, old)


def test_parameters_in_bfloat16_train_and_stay_bfloat16(state, step, batch):
    optimizer, schedule = make_optimizer(OPTIMIZER, steps=10), make_schedule(OPTIMIZER, steps=10)
    create, like = init_state(MODEL, optimizer, make_mesh(MeshConfig()), 1, jnp.bfloat16)
    first = create()
    for mine, full in zip(jax.tree.leaves(first.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(mine, full.astype(jnp.bfloat16))
    graphdef, _ = nnx.split(abstract_model(MODEL, dtype=jnp.bfloat16))
    low_precision_step = compile_train_step(
        make_train_step(graphdef, optimizer, schedule), like, batch["inputs"].shape, make_mesh(MeshConfig())
    )
    _, metrics_of_full = step(state, batch)
    after, metrics = low_precision_step(first, batch)
    assert rel_err(metrics["loss"], metrics_of_full["loss"]) < 1e-2
    assert rel_err(metrics["grad_norm"], metrics_of_full["grad_norm"]) < 3e-2
    assert {x.dtype.name for x in jax.tree.leaves(after)} == {"bfloat16", "int32"}
    _, metrics_after = low_precision_step(after, batch)
    assert metrics_after["loss"] < metrics["loss"]


def test_the_step_of_the_tiny_model_lowers_for_tpus():
    model = preset("tiny")
    graphdef, _ = nnx.split(abstract_model(model, dtype=jnp.bfloat16))
    optimizer = make_optimizer(OPTIMIZER, steps=10)
    _, like = init_state(model, optimizer, make_mesh(MeshConfig()), seed=0)
    step = jax.jit(make_train_step(graphdef, optimizer, make_schedule(OPTIMIZER, steps=10)), donate_argnums=0)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), jax.ShapeDtypeStruct((4, 256), jnp.int32))
    assert jax.export.export(step, platforms=["tpu"])(like, batch).platforms == ("tpu",)


def test_the_dtype_of_the_computation():
    assert compute_dtype("auto") == jnp.float32  # the tests run on the CPU
    assert compute_dtype("bfloat16") == jnp.bfloat16
