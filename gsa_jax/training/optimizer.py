"""AdamW with warm-up, cosine decay and clipping."""

import jax
import optax
from flax import nnx

from gsa_jax.training.config import OptimizerConfig
from gsa_jax.training.sharding import axes, is_variable


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step n = 1 .. steps: linear to the peak at the warm-up's last step, then a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for a run of `steps` steps; it works on an `nnx.State` of parameters that carry the names of their axes."""
    schedule = make_schedule(config, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            lambda count: schedule(count + 1),  # optax counts the steps before this one
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def decay_mask(params: nnx.State) -> nnx.State:
    """True for matrices, False for vectors; the axis along which layers are stacked does not count."""
    return jax.tree.map(lambda variable: len(axes(variable)) > 1, params, is_leaf=is_variable)
