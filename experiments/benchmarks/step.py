"""Times decoding's part of the op alone: `python -m experiments.benchmarks.step`.

A token of Gated Slot Attention through the states of a model's layers, by `gsa_jax.ops.gated_slot_attention_step`: the
default is the memory of gsa-1.3b. As in `gsa_jax.generation`, every layer has its state to itself, gets what the layer
before gave, and many tokens are one call. The states are all there is to move: read once, written once, which is
compared with the rate of a copy on the same device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from experiments import output
from experiments.benchmarks.shapes import Shape, make_inputs
from experiments.benchmarks.timing import attempt, copy_rate, time_calls
from experiments.command_line import user_errors
from experiments.provenance import provenance
from gsa_jax.layers.checks import check_numbers
from gsa_jax.ops import SlotState, gated_slot_attention_step


@dataclass(frozen=True)
class Config:
    """What to time."""

    batches: tuple[int, ...] = (1, 16, 64)
    """Rows."""
    layers: int = 24
    """States that a token passes through."""
    heads: int = 4
    """Heads H."""
    size: int = 512
    """Width D of a key and of a value."""
    slots: int = 64
    """Slots M."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of queries, keys and values; the states are float32."""
    tokens: int = 16
    """Tokens of a call."""
    repeats: int = 7
    """Measurements, of which the median counts."""
    seconds: float = 0.2
    """How long a measurement lasts at least: that many calls go back to back."""
    copy_mib: int = 1024
    """Size of the copy that the rate is measured with."""
    out: Path | None = None
    """JSON file to write anew after every batch size."""

    def __post_init__(self):
        check_numbers(self)


def main(config: Config) -> dict[str, Any]:
    """Times, prints, writes; returns what is written."""
    out = config.out and output.json_file(config.out)
    result = provenance("experiments.benchmarks.step")
    result["settings"] = output.settings(config)
    rate = result["copy_bytes_per_second"] = copy_rate(config.copy_mib)
    result["rows"] = []
    print(
        f"gsa, {config.layers} layers, H {config.heads}, D {config.size}, M {config.slots}, {config.dtype}; "
        f"{result['device']}, jax {result['versions']['jax']}; a copy reads and writes {rate / 1e12:.3g} TB/s"
    )
    for batch in config.batches:
        row = {"batch": batch} | attempt(lambda batch=batch: measure(batch, config))
        result["rows"].append(row)
        print(describe(row, rate), flush=True)
        if out:
            output.write(out, result)
    return result


def measure(batch: int, config: Config) -> dict[str, float]:
    """The milliseconds of a token through all layers, and the bytes of their states, read and written."""
    shape = Shape("gsa", batch, config.layers, config.heads, config.size, config.size, config.slots)
    q, k, v, log_decay = (jnp.unstack(x, axis=1) for x in make_inputs(shape, jnp.dtype(config.dtype)))
    layers = list(zip(q, k, log_decay, strict=True))
    sizes = (batch, config.heads, config.slots, config.size)
    states = [SlotState(jnp.zeros(sizes), jnp.zeros(sizes)) for _ in layers]
    moved = 2 * sum(x.nbytes for x in jax.tree.leaves(states))

    run = jax.jit(through_layers, static_argnames="tokens", donate_argnames=("states", "v"))
    carry = states, v[0]

    def call():
        nonlocal carry
        carry = run(*carry, layers, tokens=config.tokens)
        return carry

    seconds = time_calls(call, jax.block_until_ready, repeats=config.repeats, seconds=config.seconds) / config.tokens
    return {"ms": 1000 * seconds, "bytes": moved}


def through_layers(
    states: list[SlotState], v: jax.Array, layers: list[tuple[jax.Array, ...]], *, tokens: int
) -> tuple[list[SlotState], jax.Array]:
    """(states, v) after so many tokens; a layer's output is the value v of the next, [B, H, D], and `layers` holds what
    else each one gets, q, k and log_decay, which it finds no sooner than v."""

    def token(carry, _):
        states, v = carry
        after = []
        for state, inputs in zip(states, layers, strict=True):
            v, (q, k, log_decay) = lax.optimization_barrier((v, inputs))
            v, state = gated_slot_attention_step(q, k, v, log_decay, state)
            after.append(state)
        return (after, v), None

    return lax.scan(token, (states, v), length=tokens)[0]


def describe(row: dict[str, Any], rate: float) -> str:
    """A row in a line: its time, and the share of a copy's rate at which it moves its bytes."""
    if "error" in row:
        return f"batch {row['batch']}: {row['error']}"
    moved = row["bytes"] / (row["ms"] / 1000)
    return (
        f"batch {row['batch']}: {row['ms']:.3g} ms for {row['bytes'] / 1e6:,.0f} MB of states read and written, "
        f"{moved / 1e12:.3g} TB/s, {moved / rate:.0%} of a copy"
    )


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.step", description=__doc__))
