"""The state of a training run, and the two compiled functions that run over it: a training and an evaluation step."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gsa_jax.models import LanguageModel, ModelConfig
from gsa_jax.sharding import BATCH
from gsa_jax.training.loss import sharded_next_token_loss
from gsa_jax.training.sharding import shardings

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes."""

    step: jax.Array
    """steps taken so far, int32 scalar"""
    params: nnx.State
    """parameters, float32 unless asked for otherwise"""
    opt_state: Any
    """the optimizer's state"""


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of the computation that a config asks for: "float32", "bfloat16" or "auto", which looks for a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def init_params(config: ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> nnx.State:
    """A new model's parameters."""
    return jax.tree.map(lambda x: x.astype(dtype), nnx.state(LanguageModel(config, rngs=nnx.Rngs(seed))))


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    param_dtype: jnp.dtype = jnp.float32,
) -> tuple[Callable[[], TrainState], TrainState]:
    """How a run begins: a function that makes the first state, sharded from the start, and its `abstract_state`.

    Parameters in bfloat16, and with them gradients and moments, take half the memory, and small updates are lost in
    their rounding: for comparisons with models that are trained that way.
    """
    like = abstract_state(config, optimizer, mesh, param_dtype)
    create = functools.partial(_create_state, config, optimizer, seed, param_dtype)
    return jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, like)), like


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    param_dtype: jnp.dtype = jnp.float32,
) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings, which is what a checkpoint needs; allocates nothing."""
    state = jax.eval_shape(functools.partial(_create_state, config, optimizer, 0, param_dtype))
    placed = shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def _create_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, param_dtype: jnp.dtype
) -> TrainState:
    params = init_params(config, seed, param_dtype)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, schedule: optax.Schedule, accumulation: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, to be jitted: (state, batch) -> (state, metrics).

    The loss is the mean over the tokens of the batch, however many parts it is computed in. A step whose loss or
    gradient is not finite returns the state as it was: its metrics tell.

    Args:
      graphdef: the model's structure, as `nnx.split` gives it.
      optimizer, schedule: as `gsa_jax.training.optimizer` makes them.
      accumulation: parts of a batch; they are every accumulation-th row, so that no row changes its device.

    The batch has inputs, targets, segment_ids [batch, length] int32, the metrics are scalars: loss (nats per token),
    grad_norm (before clipping), learning_rate, tokens.
    """

    loss_of = functools.partial(loss_sum, graphdef)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def add_part(sums, part):
            (nll, tokens), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, part)
            return jax.tree.map(jnp.add, sums, (grads, nll, tokens)), None

        zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.int32(0))
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)
        (grads, nll, tokens), _ = jax.lax.scan(add_part, zeros, parts, unroll=accumulation == 1)
        # Whole arrays: the norm and the optimizer would each gather their layers as they go, at half the speed.
        grads = jax.lax.optimization_barrier(grads)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        loss, grad_norm = nll / tokens, optax.tree.norm(grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        learning_rate = schedule(state.step + 1)
        return updated, {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens": tokens}

    return train_step


def compile_train_step(
    train_step: Callable,
    like: TrainState,
    batch_shape: tuple[int, int],
    mesh: Mesh,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """The step for one device or many: the state stays where `like` has it, and its memory is used again.

    `options` are XLA's; `gsa_jax.training.compiler_options` knows good ones.
    """
    array = jax.ShapeDtypeStruct(batch_shape, jnp.int32, sharding=NamedSharding(mesh, BATCH))
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), array)
    placed = jax.tree.map(lambda x: x.sharding, like)
    with jax.set_mesh(mesh):
        lowered = jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None)).lower(like, batch)
    return lowered.compile(options)


def create_and_compile(
    create: Callable[[], TrainState], *arguments, **options
) -> tuple[TrainState, jax.stages.Compiled]:
    """`create()` and, meanwhile, `compile_train_step(*arguments, **options)`: XLA compiles the one while Python lowers
    the other."""
    with ThreadPoolExecutor(1) as thread:
        state = thread.submit(create)
        compiled = compile_train_step(*arguments, **options)
        return state.result(), compiled


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[nnx.State, Batch], dict[str, jax.Array]]:
    """The evaluation step, to be jitted: (params, batch) -> sums over the batch of nll (nats), tokens and bytes.

    The batch has target_bytes [batch, length] beside what the training step takes.
    """

    def eval_step(params: nnx.State, batch: Batch) -> dict[str, jax.Array]:
        nll, tokens = loss_sum(graphdef, params, batch)
        return {"nll": nll, "tokens": tokens, "bytes": jnp.sum(batch["target_bytes"])}

    return eval_step


def loss_sum(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss in nats summed over the tokens of a batch, and their number."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
    return sharded_next_token_loss(model.head_matrix(), hidden, batch["targets"], batch["segment_ids"] > 0)
