"""Times the ops: `python -m experiments.benchmarks.ops`.

Forward, and forward with all gradients, of every implementation at named shapes (experiments/benchmarks/shapes.py), and
of the peers: flash-linear-attention, and the softmax attention of PyTorch and of cuDNN over the same tokens at the same
width. A table says how they compare and how near each is to the least time that moving its inputs and outputs takes.
Times are medians; each is of several calls back to back and one wait at the end.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments import output
from experiments.benchmarks import peers
from experiments.benchmarks.ops_report import as_table, draw, remarks
from experiments.benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, Shape, choose, make_inputs
from experiments.benchmarks.timing import REFUSALS, attempt, copy_rate, time_calls
from experiments.command_line import user_errors
from experiments.provenance import provenance
from gsa_jax.layers.checks import check_numbers
from gsa_jax.ops import gated_linear_attention, gated_slot_attention
from gsa_jax.ops.arguments import check_chunk_size

OPS = {"gsa": gated_slot_attention, "gla": gated_linear_attention}


@dataclass(frozen=True)
class Config:
    """What to time. With no argument: the GPU cases in bfloat16 on a GPU, the CPU cases in float32 elsewhere."""

    quick: bool = False
    """Only the one small case that a CPU does in a minute, in float32, with the scan and without peers."""
    cases: tuple[str, ...] = ()
    """Names from experiments/benchmarks/shapes.py, in place of the default ones."""
    implementations: tuple[Literal["scan", "chunked", "pallas"], ...] = ()
    """Implementations to time, chunked and pallas by default. One that does not take a case says why."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of queries, keys and values."""
    chunk_size: int | None = None
    """Tokens in a chunk of "chunked"; the platform's own choice by default."""
    peers: Literal["measure", "none"] | Path = "measure"
    """Those that are installed (on a GPU, in bfloat16), none, or a JSON file of times taken before on such a device."""
    repeats: int = 7
    """Measurements, of which the median counts."""
    seconds: float = 0.2
    """How long a measurement lasts at least: that many calls go back to back."""
    out: Path | None = None
    """JSON file to write, row by row, with a plot beside it at the end."""

    def __post_init__(self):
        check_numbers(self, "seconds")
        check_chunk_size(self.chunk_size)


def main(config: Config) -> dict[str, Any]:
    """Times, prints, writes; returns what is written."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to the process of the peers
    on_gpu = jax.default_backend() == "gpu" and not config.quick
    cases = choose(config.cases or tuple(QUICK_SHAPES if config.quick else GPU_SHAPES if on_gpu else CPU_SHAPES))
    out = config.out and output.json_file(config.out)
    dtype = config.dtype or ("bfloat16" if on_gpu else "float32")
    with_peers = on_gpu and dtype == "bfloat16" and config.peers != "none"
    result = provenance("experiments.benchmarks.ops") | {"dtype": dtype, "peers": None, "rows": []}
    if isinstance(config.peers, Path):
        result["peers"] = peers.read(config.peers, device=result["device"], dtype=dtype)
    elif with_peers and peers.installed("torch"):
        result["peers"] = measure_peers(cases, config)
    result["copy_bytes_per_second"] = copy_rate() if on_gpu else None

    implementations = config.implementations or (("scan",) if config.quick else ()) + ("chunked", "pallas")
    names = implementations + (("cudnn",) if with_peers else ())
    console = Console(width=180)
    with console.status("compiling") as status, ThreadPoolExecutor() as pool:
        subjects = {
            (case, name): subject(shape, name, dtype, config) for case, shape in cases.items() for name in names
        }
        inputs = {key: pool.submit(compiled_inputs, each) for key, each in subjects.items()}
        passes = {(*key, of): pool.submit(compiled_pass, each, of) for key, each in subjects.items() for of in PASSES}
        wait([*inputs.values(), *passes.values()])  # which would slow what is timed
        for (case, name), each in subjects.items():
            status.update(f"{case}, {name}")
            arrays = inputs[case, name].result()()
            times = {of: time_pass(each, arrays, of, passes[case, name, of].result(), config) for of in PASSES}
            result["rows"].append({"case": case, "by": name} | times)
            if out:
                output.write(out, result)
    console.print(as_table(result))
    console.print(*remarks(result), sep="\n", soft_wrap=True, highlight=False, markup=False)
    if out:
        output.write(out, result, draw(result))
    return result


def measure_peers(cases: dict[str, Shape], config: Config) -> dict[str, Any] | None:
    """The times of the peers, measured in a process of their own; None if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        options = {"--out": out, "--repeats": config.repeats, "--seconds": config.seconds}
        arguments = [*cases, *(str(word) for option in options.items() for word in option)]
        subprocess.run([sys.executable, "-m", "experiments.benchmarks.peers", *arguments], check=False)
        return json.loads(out.read_text()) if out.exists() else None


class Subject(NamedTuple):
    """What is timed."""

    function: Callable
    """of q, k, v and maybe gates, to the output"""
    inputs: Callable[[], tuple]
    """q, k, v and maybe gates"""
    bytes: dict[str, int] | None
    """of the inputs and outputs of each of `PASSES`"""
    refusals: type | tuple[type, ...]
    """what it raises for a case that it does not take"""


def subject(shape: Shape, name: str, dtype: str, config: Config) -> Subject:
    """An implementation of the op of `shape`, or "cudnn": cuDNN's causal attention, as JAX calls it, over the same
    tokens at the same width."""
    if name == "cudnn":
        attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return Subject(attention, functools.partial(_attention_inputs, shape), None, Exception)
    chunk_size = config.chunk_size if name == "chunked" else None
    op = functools.partial(OPS[shape.op], implementation=name, chunk_size=chunk_size)
    itemsize = jnp.dtype(dtype).itemsize
    sizes = {"forward": shape.forward_bytes(itemsize), "forward_backward": shape.forward_backward_bytes(itemsize)}
    inputs = functools.partial(make_inputs, shape, jnp.dtype(dtype))
    return Subject(lambda *inputs: op(*inputs)[0], inputs, sizes, REFUSALS)


def _attention_inputs(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, shape.attention, jnp.bfloat16) for key in keys)


def _forward_backward(function, cotangent, *inputs):
    out, pullback = jax.vjp(function, *inputs)
    return out, pullback(cotangent)


PASSES = {"forward": lambda function, _, *inputs: function(*inputs), "forward_backward": _forward_backward}
"""Of a function, its output's gradient and its inputs."""


def compiled_inputs(each: Subject) -> Callable[[], tuple]:
    """The function that makes the inputs and the output's gradient, which come last, compiled."""

    def make():
        inputs = each.inputs()
        return *inputs, jax.random.normal(jax.random.key(1), inputs[2].shape, inputs[2].dtype)  # the output is like v

    return jax.jit(make).lower().compile()


def compiled_pass(each: Subject, name: str) -> dict[str, Any]:
    """{"run": one of `PASSES`, compiled}, or why it is not taken."""

    def compile():
        inputs = jax.eval_shape(each.inputs)
        return {"run": jax.jit(functools.partial(PASSES[name], each.function)).lower(inputs[2], *inputs).compile()}

    return attempt(compile, each.refusals)


def time_pass(each: Subject, arrays: tuple, name: str, compiled: dict[str, Any], config: Config) -> dict[str, Any]:
    """Milliseconds and temporary memory of one of `PASSES`, and the bytes of its inputs and outputs, or what went
    wrong."""
    *inputs, cotangent = arrays

    def measure(run):
        seconds = time_calls(
            lambda: run(cotangent, *inputs), jax.block_until_ready, repeats=config.repeats, seconds=config.seconds
        )
        return {"ms": 1000 * seconds, "temp_mib": run.memory_analysis().temp_size_in_bytes / 2**20}

    times = attempt(lambda: measure(compiled["run"]), each.refusals) if "run" in compiled else compiled
    return times | ({"bytes": each.bytes[name]} if each.bytes else {})


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.ops", description=__doc__))
