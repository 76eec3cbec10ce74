"""Finds faster sizes for the kernels on this GPU: `python -m experiments.benchmarks.tune`.

Some sizes a kernel is free to choose: warpgroups of a block, segments of a long sequence (pallas_kernels/sizes.py).
Case by case this tries the others of each, one size after another, with the forward and the backward pass together, and
adds what is faster than what is in use to the table that the kernels read. Results stay as they are but for rounding.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments import output
from experiments.benchmarks.ops import OPS, PASSES
from experiments.benchmarks.shapes import GPU_SHAPES, Shape, choose, make_inputs
from experiments.benchmarks.timing import time_calls
from experiments.command_line import user_errors
from gsa_jax.layers.checks import check_numbers
from pallas_kernels import sizes
from pallas_kernels.sizes import Choice


@dataclass(frozen=True)
class Config:
    """What to tune."""

    cases: tuple[str, ...] = tuple(GPU_SHAPES)
    """Names from experiments/benchmarks/shapes.py."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of queries, keys and values."""
    gain: float = 0.02
    """The part of the time that another size has to save."""
    repeats: int = 7
    """Measurements, of which the median counts."""
    seconds: float = 0.1
    """How long a measurement lasts at least: that many calls go back to back."""
    table: Path = sizes.TABLE
    """JSON file to add to. The kernels read the default one."""

    def __post_init__(self):
        check_numbers(self)


class Trial(NamedTuple):
    """What became of a size."""

    size: str
    before: int
    after: int
    seconds: dict[int, float | None]
    """of a forward and backward pass, by what the size was; None where a kernel with it does not compile"""

    def __str__(self):
        times = (f"{n}: {_milliseconds(seconds)}" for n, seconds in self.seconds.items())
        outcome = f"stays {self.after}" if self.after == self.before else f"was {self.before}, is {self.after}"
        return f"{self.size}: {', '.join(times)}; {outcome}"


def main(config: Config) -> dict[str, dict[str, int]]:
    """Tries, prints, writes; returns what is written."""
    cases, device = choose(config.cases), sizes.device().device_kind
    file = output.json_file(config.table, "table")
    table = output.read(file, "table") if file.exists() else {}
    console, settled, others = Console(soft_wrap=True, highlight=False), {}, 0
    with console.status("") as status:
        for name, shape in cases.items():
            for trial in tune(shape, config, settled, lambda size, name=name: status.update(f"{name}: {size}")):
                console.print(f"{name}: {trial}")
                if trial.after != trial.before:
                    others += 1
                    table.setdefault(device, {})[trial.size] = trial.after
                    output.write(file, table)
    console.print(f"{device}: {len(settled)} sizes, of which {others} are now others")
    return table


def tune(shape: Shape, config: Config, settled: dict[str, int], tell: Callable[[str], None]) -> Iterator[Trial]:
    """The sizes of the op at `shape`, one after another, each beside those that are settled.

    `settled` has the sizes that are not to be tried, and gets those that were; `tell` gets the name of each first.
    """
    run = timer(shape, config)
    lowered, choices = lower(shape, config.dtype, settled)
    program = lowered.compile()
    while left := choices.keys() - settled.keys():
        size = min(left)
        tell(size)
        before, options = choices[size]
        others = {n: lower(shape, config.dtype, settled | {size: n}) for n in options if n != before}
        programs = {before: program} | compiled({n: lowered for n, (lowered, _) in others.items()})
        seconds = {n: each and run(each) for n, each in programs.items()}
        after = fastest(seconds, before, config.gain)
        if after != before:  # the least of several is often luck: once more
            after = fastest({n: run(programs[n]) for n in (before, after)}, before, config.gain)
        settled[size] = after
        yield Trial(size, before, after, seconds)
        if after != before:
            program, (_, choices) = programs[after], others[after]


def fastest(seconds: dict[int, float | None], before: int, gain: float) -> int:
    """The size that takes the fewest seconds, or `before` unless that saves the part `gain`."""
    best = min((n for n in seconds if seconds[n] is not None), key=seconds.get)
    return best if seconds[best] < (1 - gain) * seconds[before] else before


def compiled(lowered: dict[int, jax.stages.Lowered]) -> dict[int, jax.stages.Compiled | None]:
    """The programs; None for what the compiler refuses: a kernel with another size may need more than there is."""

    def attempt(each):
        try:
            return each.compile()
        except jax.errors.JaxRuntimeError:
            return None

    with ThreadPoolExecutor() as pool:
        programs = {n: pool.submit(attempt, each) for n, each in lowered.items()}
        wait(programs.values())  # which would slow what is timed
    return {n: program.result() for n, program in programs.items()}


def lower(shape: Shape, dtype: str, taken: dict[str, int]) -> tuple[jax.stages.Lowered, dict[str, Choice]]:
    """Forward and backward pass with these sizes, to be compiled, and the sizes that the kernels chose."""
    op = functools.partial(OPS[shape.op], implementation="pallas")
    q, k, v, gates = jax.eval_shape(functools.partial(make_inputs, shape, jnp.dtype(dtype)))
    both = functools.partial(PASSES["forward_backward"], lambda *inputs: op(*inputs)[0])
    with sizes.trial(taken) as choices:
        return jax.jit(both).lower(v, q, k, v, gates), choices


def timer(shape: Shape, config: Config) -> Callable[[jax.stages.Compiled], float]:
    """A function that times a program of `lower` on inputs of that shape: the seconds of a call."""
    inputs = jax.jit(functools.partial(make_inputs, shape, jnp.dtype(config.dtype)))()

    def seconds(program):
        call = functools.partial(program, inputs[2], *inputs)  # the output is like v, and so is its gradient
        return time_calls(call, jax.block_until_ready, repeats=config.repeats, seconds=config.seconds)

    return seconds


def _milliseconds(seconds: float | None) -> str:
    return "does not compile" if seconds is None else f"{1000 * seconds:.3f} ms"


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.tune", description=__doc__))
