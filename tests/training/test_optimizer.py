import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gsa_jax.models import abstract_model
from gsa_jax.training import OptimizerConfig, make_optimizer, make_schedule
from gsa_jax.training.optimizer import decay_mask
from tests.training.tiny import MODEL


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    schedule = make_schedule(OptimizerConfig(learning_rate=3e-4, warmup_steps=100), steps=1100)
    steps = np.array([1, 50, 100, 350, 600, 1100])
    expected = 3e-4 * np.array([0.01, 0.5, 1, 0.1 + 0.9 * (0.5 + np.sqrt(0.125)), 0.55, 0.1])
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-5)


def test_schedule_without_warmup_starts_near_the_peak():
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, final_fraction=0), steps=4)
    np.testing.assert_allclose(schedule(np.arange(1, 5)), [0.853553, 0.5, 0.146447, 0], atol=1e-6)


def test_a_run_shorter_than_the_warmup_ends_within_it():
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=100), steps=50)
    np.testing.assert_allclose(schedule(np.array([1, 50])), [0.01, 0.5], rtol=1e-5)


def test_only_matrices_decay():
    _, params = nnx.split(abstract_model(MODEL, dtype=jnp.float32))
    mask = dict(nnx.to_flat_state(decay_mask(params)))
    matrices = {"embedding", "kernel"}
    assert all(decayed == (path[-1] in matrices) for path, decayed in mask.items())
    assert set(mask.values()) == {True, False}


def test_the_stacked_axis_of_layers_does_not_make_a_matrix():
    params = nnx.State(
        {
            "norms": nnx.Param(jnp.ones((3, 4)), axes=(None,)),
            "bias": nnx.Param(jnp.ones(4), axes=("heads",)),
            "kernel": nnx.Param(jnp.ones((4, 4)), axes=("embed", "heads")),
        }
    )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, final_fraction=1, weight_decay=0.1), steps=10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = nnx.to_pure_dict(optax.apply_updates(params, updates))
    np.testing.assert_array_equal(after["norms"], 1)
    np.testing.assert_array_equal(after["bias"], 1)
    np.testing.assert_allclose(after["kernel"], 1 - 0.5 * 0.1, rtol=1e-6)


@pytest.mark.parametrize("clip", [1.0, float("inf")])
def test_a_step_is_adamw_on_the_clipped_gradient(clip):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip=clip, epsilon=1e-2)
    optimizer = make_optimizer(config, steps=10)
    value, grad = np.array([[1.0, -2.0]]), np.array([[3.0, 4.0]])
    params = nnx.State({"kernel": nnx.Param(jnp.array(value, jnp.float32), axes=("embed", "mlp"))})
    grads = jax.tree.map(lambda _: jnp.array(grad, jnp.float32), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    grad = grad * min(1, clip / 5)
    expected = -0.05 * (grad / (np.abs(grad) + 1e-2) + 0.01 * value)
    np.testing.assert_allclose(updates["kernel"][...], expected, rtol=1e-5)
