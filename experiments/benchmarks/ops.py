"""Times the ops: `python -m experiments.benchmarks.ops`.

Forward, and forward with all gradients, of every implementation at named shapes (experiments/benchmarks/shapes.py), as
a table with ratios to the scan. Times are medians; each is of several calls back to back and one wait at the end.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, SHAPES, make_inputs
from experiments.provenance import provenance
from gsa_jax.ops import gated_linear_attention, gated_slot_attention

OPS = {"gsa": gated_slot_attention, "gla": gated_linear_attention}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time. With no argument: the GPU shapes in bfloat16 on a GPU, the CPU shapes in float32 elsewhere."""

    quick: bool = False
    """Only the one small shape that a CPU does in a minute, in float32."""
    shapes: tuple[str, ...] = ()
    """Names from experiments/benchmarks/shapes.py, in place of the default ones."""
    implementations: tuple[Literal["scan", "chunked"], ...] = ("scan", "chunked")
    """Implementations to time; ratios are to the scan."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of queries, keys and values."""
    chunk_size: int | None = None
    """Tokens in a chunk of "chunked"; the platform's own choice by default."""
    repeats: int = 7
    """Measurements, of which the median counts."""
    seconds: float = 0.2
    """How long a measurement lasts at least: that many calls go back to back."""
    out: Path | None = None
    """Where to write the measurements as JSON."""
    plot: Path | None = None
    """Where to draw them."""


def main(config: Config) -> dict:
    """Times, prints, writes; returns what is written."""
    on_gpu = jax.default_backend() == "gpu" and not config.quick
    names = config.shapes or tuple(QUICK_SHAPES if config.quick else GPU_SHAPES if on_gpu else CPU_SHAPES)
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        print(f"unknown shapes: {', '.join(unknown)}; known are {', '.join(SHAPES)}", file=sys.stderr)
        sys.exit(2)
    dtype = config.dtype or ("bfloat16" if on_gpu else "float32")

    console = Console()
    rows = []
    with console.status("") as status:
        for name in names:
            for implementation in config.implementations:
                status.update(f"{name}, {implementation}")
                rows.append(time_shape(name, implementation, dtype, config))
    result = provenance("experiments.benchmarks.ops") | {"rows": rows}
    console.print(as_table(result))
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2) + "\n")
    if config.plot:
        draw(result, config.plot)
    return result


def time_shape(name, implementation, dtype, config):
    """One row: the milliseconds of a forward, and of one with all gradients; None where memory does not suffice."""
    shape = SHAPES[name]
    chunk_size = config.chunk_size if implementation == "chunked" else None
    op = functools.partial(OPS[shape.op], implementation=implementation, chunk_size=chunk_size)
    inputs = make_inputs(shape, jnp.dtype(dtype))
    cotangent = jnp.ones((shape.B, shape.T, shape.H, shape.V), dtype)

    def forward(*inputs):
        return op(*inputs)[0]

    def forward_backward(*inputs):
        out, pullback = jax.vjp(forward, *inputs)
        return out, pullback(cotangent)

    row = {"shape": name, "sizes": shape.sizes, "dtype": dtype, "implementation": implementation}
    for column, function in (("forward_ms", forward), ("forward_backward_ms", forward_backward)):
        try:
            row[column] = 1000 * time_calls(jax.jit(function), inputs, config.repeats, config.seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row[column] = None
    return row


def time_calls(function, inputs, repeats=7, seconds=0.2):
    """The median over `repeats` of the seconds a call takes, when calls stand back to back for `seconds` or more."""

    def run(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*inputs)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    run(1)  # compiles
    calls = max(1, round(seconds / run(1)))
    return statistics.median(run(calls) for _ in range(repeats))


def as_table(result):
    """The rows as a table for the terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    title = f"{result['device']}, {result['rows'][0]['dtype']}, {versions}"
    table = Table(title=title, box=SIMPLE, padding=0, caption="ratio: time of the scan / time of this implementation")
    for heading in ("shape", "B,T,H,K,V(,M)", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("fwd ms", "ratio", "fwd+bwd ms", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    scans = {row["shape"]: row for row in result["rows"] if row["implementation"] == "scan"}
    for row in result["rows"]:
        cells = [row["shape"], ",".join(map(str, row["sizes"])), row["implementation"]]
        for column in ("forward_ms", "forward_backward_ms"):
            milliseconds, scan = row[column], scans.get(row["shape"], {}).get(column)
            cells.append("no memory" if milliseconds is None else f"{milliseconds:.2f}")
            cells.append(f"{scan / milliseconds:.1f}x" if scan and milliseconds else "-")
        table.add_row(*cells)
    return table


def draw(result, path):
    """Draws the times as bars, a group for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    implementations = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    width = 0.8 / len(implementations)
    figure, panels = plt.subplots(2, 1, figsize=(2 + 1.3 * len(names), 7), sharex=True, layout="constrained")
    for panel, column in zip(panels, ("forward_ms", "forward_backward_ms"), strict=True):
        for i, implementation in enumerate(implementations):
            times = {row["shape"]: row[column] for row in result["rows"] if row["implementation"] == implementation}
            places = [j + (i - (len(implementations) - 1) / 2) * width for j in range(len(names))]
            bars = panel.bar(places, [times[name] or 0 for name in names], width, label=implementation)
            labels = [f"{times[name]:.3g}" if times[name] else "no memory" for name in names]
            panel.bar_label(bars, labels, fontsize=8)
        panel.set_ylabel(column.removesuffix("_ms").replace("_", " + ") + ", ms")
    panels[0].legend()
    panels[0].set_title(f"{result['device']}, jax {result['versions']['jax']}, {result['rows'][0]['dtype']}")
    panels[1].set_xticks(range(len(names)), names, rotation=20, ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
