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
from experiments.command_line import replaced
from experiments.provenance import provenance
from gsa_jax.generation import stream
from gsa_jax.models import ModelConfig, abstract_model, count_parameters, preset
from gsa_jax.training import (
    MeshConfig,
    OptimizerConfig,
    compiler_options,
    compute_dtype,
    create_and_compile,
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


def changed_preset(name: str, **changes: Any) -> ModelConfig:
    """The preset of that name with `changes` in place of its own settings, but for those that are None."""
    return replaced(preset(name), **changes)


def about(script: str, config: ModelConfig) -> dict[str, Any]:
    """Where and of what a script's numbers are: devices, versions, command, date and the number of parameters."""
    return provenance(script) | {"num_devices": jax.device_count(), "parameters": count_parameters(config)[0]}


class Stopwatch:
    """How many seconds after the start of its process each part of a case is done, printed as the parts pass."""

    def __init__(self, began: float):
        self.began = began
        self.seconds: dict[str, float] = {}

    def done(self, part: str) -> None:
        """The part's seconds: recorded under "{part}_seconds"."""
        seconds = time.time() - self.began
        self.seconds[f"{part.replace(' ', '_')}_seconds"] = seconds
        print(f"{part} {seconds:.1f} s, ", end="", flush=True)


def train(
    batch: int,
    length: int,
    *,
    began: float,
    config: ModelConfig,
    mesh: MeshConfig,
    param_dtype: str,
    repeats: int,
    seconds: float,
    overlap: bool = True,
) -> dict[str, float]:
    """Training steps on random tokens, on one device or a mesh: the milliseconds of a step, what
    `gsa_jax.training.speed` tells, and the seconds from `began`, when this process was started, until imports, device,
    initial state, compiled step and first step were there. `overlap`: whether XLA gets the options that hide
    communication."""
    stopwatch = Stopwatch(began)
    stopwatch.done("imports")
    mesh = make_mesh(mesh)
    stopwatch.done("device")
    recipe = OptimizerConfig(), 1000
    optimizer, schedule = make_optimizer(*recipe), make_schedule(*recipe)
    create, like = init_state(config, optimizer, mesh, 0, jnp.dtype(param_dtype))

    def create_and_wait():
        state = jax.block_until_ready(create())
        stopwatch.done("init")
        return state

    train_step = make_train_step(_structure(config), optimizer, schedule)
    options = compiler_options(config, mesh.size if overlap else 1)
    state, train_step = create_and_compile(create_and_wait, train_step, like, (batch, length), mesh, options)
    stopwatch.done("compile")
    tokens = _random_tokens(config, batch, length + 1)
    ids = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((batch, length), np.int32)}
    ids = put_batch(ids, mesh)

    def step():
        nonlocal state
        state, metrics = train_step(state, ids)
        return metrics

    jax.block_until_ready(step())
    stopwatch.done("first step")
    seconds = time_calls(step, jax.block_until_ready, repeats=repeats, seconds=seconds)
    return stopwatch.seconds | {"ms": 1000 * seconds, **speed(config, mesh, batch * length / seconds)}


def decode(
    batch: int, prompt: int, *, began: float, config: ModelConfig, param_dtype: str, blocks: int, repeats: int
) -> dict[str, float]:
    """Generation on one device after a prompt of random tokens: the milliseconds of a step, without those of the
    prompt, over so many blocks of tokens, and the seconds from `began` until imports, device, parameters and the first
    tokens were there."""
    stopwatch = Stopwatch(began)
    stopwatch.done("imports")
    device = jax.devices()[0]
    stopwatch.done("device")
    params = jax.block_until_ready(jax.jit(functools.partial(init_params, config, 0, jnp.dtype(param_dtype)))())
    model = nnx.merge(_structure(config), params)
    stopwatch.done("init")
    tokens = _random_tokens(config, batch, prompt)

    def seconds_of_a_step():
        drawn = stream(model, tokens, (1 + blocks) * BLOCK, block_size=BLOCK)
        jax.block_until_ready(next(drawn))
        start = time.perf_counter()
        jax.block_until_ready(list(drawn))
        return (time.perf_counter() - start) / (blocks * BLOCK)

    jax.block_until_ready(next(stream(model, tokens, BLOCK, block_size=BLOCK)))
    stopwatch.done("first tokens")
    values = {"ms": 1000 * statistics.median(seconds_of_a_step() for _ in range(repeats))}
    if memory := device.memory_stats():
        values["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return stopwatch.seconds | values


def _structure(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(abstract_model(config, dtype=compute_dtype("auto")))[0]


def _random_tokens(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
