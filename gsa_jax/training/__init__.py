"""Training language models: configuration, data, sharding, the step, checkpoints, metrics and the loop."""

from gsa_jax.training.checkpoint import CheckpointError, Checkpoints, load_model
from gsa_jax.training.compiler import compiler_options
from gsa_jax.training.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig, recipe
from gsa_jax.training.data import DataConfig, DataError
from gsa_jax.training.hosts import initialize as initialize_hosts
from gsa_jax.training.loop import NonFiniteError, TrainSummary, train
from gsa_jax.training.loss import next_token_loss
from gsa_jax.training.metrics import plot_curves, read_metrics, speed
from gsa_jax.training.optimizer import make_optimizer, make_schedule
from gsa_jax.training.sharding import make_mesh, one_device, put_batch, shardings
from gsa_jax.training.step import (
    TrainState,
    compile_train_step,
    compute_dtype,
    create_and_compile,
    init_params,
    init_state,
    make_eval_step,
    make_train_step,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "ConfigError",
    "DataConfig",
    "DataError",
    "MeshConfig",
    "NonFiniteError",
    "OptimizerConfig",
    "TrainConfig",
    "TrainState",
    "TrainSummary",
    "compile_train_step",
    "compiler_options",
    "compute_dtype",
    "create_and_compile",
    "init_params",
    "init_state",
    "initialize_hosts",
    "load_model",
    "make_eval_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "next_token_loss",
    "one_device",
    "plot_curves",
    "put_batch",
    "read_metrics",
    "recipe",
    "shardings",
    "speed",
    "train",
]
