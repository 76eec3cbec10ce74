"""What `experiments.benchmarks.model` measures, each in a process of its own."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.timing import time_calls
from experiments.provenance import provenance
from gsa_jax.generation import stream
from gsa_jax.models import ModelConfig, abstract_model, count_parameters
from gsa_jax.training import (
    MeshConfig,
    OptimizerConfig,
    compile_train_step,
    compute_dtype,
    init_params,
    init_state,
    make_mesh,
    make_optimizer,
    make_schedule,
    make_train_step,
    put_batch,
    speed,
)

BLOCK = 16
"""Tokens that are drawn between two looks at them, as in experiments.generate."""


def about(config: ModelConfig) -> dict[str, Any]:
    """Where and of what the numbers are: device, versions, command, date and the number of parameters."""
    return provenance("experiments.benchmarks.model") | {"parameters": count_parameters(config)[0]}


def train(
    batch_size: int, length: int, *, config: ModelConfig, param_dtype: str, repeats: int, seconds: float
) -> dict[str, float]:
    """Training steps on random tokens, on one device: what `gsa_jax.training.speed` tells, the milliseconds of a step
    and `first_step_at`, the wall clock at the end of the first one."""
    mesh = make_mesh(MeshConfig())
    recipe = OptimizerConfig(), 1000
    optimizer, schedule = make_optimizer(*recipe), make_schedule(*recipe)
    create, like = init_state(config, optimizer, mesh, 0, jnp.dtype(param_dtype))
    train_step = make_train_step(_structure(config), optimizer, schedule)
    train_step = compile_train_step(train_step, like, (batch_size, length), mesh)
    state, tokens = create(), _random_tokens(config, batch_size, length + 1)
    ids = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((batch_size, length), np.int32)}
    batch = put_batch(ids, mesh)

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    jax.block_until_ready(step())
    first_step_at = time.time()
    seconds = time_calls(step, jax.block_until_ready, repeats=repeats, seconds=seconds)
    return {
        "first_step_at": first_step_at,
        "ms": 1000 * seconds,
        **speed(config, mesh, batch_size * length / seconds),
    }


def decode(
    batch_size: int, *, config: ModelConfig, param_dtype: str, prompt_length: int, blocks: int, repeats: int
) -> dict[str, float]:
    """Generation on one device after a prompt of random tokens: the milliseconds of a step, without those of the
    prompt, over so many blocks of tokens."""
    params = jax.jit(functools.partial(init_params, config, 0, jnp.dtype(param_dtype)))()
    model = nnx.merge(_structure(config), params)
    prompt = _random_tokens(config, batch_size, prompt_length)

    def seconds_of_a_step():
        tokens = stream(model, prompt, (1 + blocks) * BLOCK, block_size=BLOCK)
        jax.block_until_ready(next(tokens))
        start = time.perf_counter()
        jax.block_until_ready(list(tokens))
        return (time.perf_counter() - start) / (blocks * BLOCK)

    seconds_of_a_step()  # compiles
    values = {"ms": 1000 * statistics.median(seconds_of_a_step() for _ in range(repeats))}
    if memory := jax.devices()[0].memory_stats():
        values["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return values


def _structure(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(abstract_model(config, dtype=compute_dtype("auto")))[0]


def _random_tokens(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
