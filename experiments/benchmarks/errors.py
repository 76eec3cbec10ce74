"""Compares rounding errors: `python -m experiments.benchmarks.errors`.

The output and every gradient of the ops, by each implementation and by flash-linear-attention where it is installed,
beside the definition in float64 on the same inputs, rounded to the dtype asked for: ||x - reference|| / ||reference||.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments import output
from experiments.benchmarks import peers
from experiments.benchmarks.model import in_process
from experiments.benchmarks.ops import OPS, PASSES
from experiments.benchmarks.shapes import ERROR_SHAPES, GATES, Shape, choose, make_inputs
from experiments.benchmarks.timing import attempt
from experiments.command_line import user_errors
from experiments.provenance import provenance
from gsa_jax.layers.checks import check_numbers

ARRAYS = ("out", "dq", "dk", "dv", "dlog_decay", "dwrite")
"""The output and the gradients, in the order of the inputs; write is GSA's alone."""


@dataclass(frozen=True)
class Config:
    """What to compare."""

    cases: tuple[str, ...] = tuple(ERROR_SHAPES)
    """Names from experiments/benchmarks/shapes.py, short enough for a scan in float64 with its gradient."""
    gates: tuple[Literal["weak", "ordinary", "strong", "resets"], ...] = tuple(GATES)
    """How much is forgotten."""
    scale: float = 0.1
    """Factor on GSA's logits: 0.1 makes them about one, as they are in models, and 1 makes the softmax sharp."""
    implementations: tuple[Literal["scan", "chunked", "pallas"], ...] = ()
    """Chunked and pallas by default; on a CPU scan and chunked."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of all inputs; bfloat16 on a GPU and float32 elsewhere by default."""
    peers: Literal["measure", "none"] | Path = "measure"
    """fla where it is installed (on a GPU, in bfloat16), none, or an earlier file of this script with fla's errors."""
    out: Path | None = None
    """JSON file to write, with a plot beside it."""

    def __post_init__(self):
        check_numbers(self)
        for name in ("cases", "gates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")


def recorded(file: Path, config: Config) -> dict[str, Any]:
    """fla's rows of an earlier run with the same inputs, and the provenance of that run.

    Raises:
      ValueError: the file has no such rows, or its logits or dtype are not those asked for.
    """
    record = output.read(file, "peers", "settings", "rows")
    wanted = {"dtype": config.dtype, "scale": config.scale}
    if (found := {name: record["settings"].get(name) for name in wanted}) != wanted:
        raise ValueError(f"peers: expected errors with {wanted}, and {file} has them with {found}")
    rows = [row for row in record["rows"] if row["by"] == "fla"]
    rows = [row for row in rows if row["case"] in config.cases and row["gates"] in config.gates]
    if not rows:
        raise ValueError(f"peers: {file} has no errors of fla for the cases and gates asked for")
    facts = {fact: record.get(fact) for fact in ("device", "versions", "command", "date")}
    return {"peers": record.get("peers") or facts, "rows": rows}


def position(config: Config, row: dict[str, Any]) -> tuple:
    """Where a row stands among others: by its inputs, fla's last."""
    return config.cases.index(row["case"]), config.gates.index(row["gates"]), row["by"] == "fla"


class Problem(NamedTuple):
    """An op, and what it gets with each kind of gates."""

    op: str
    scale: float
    given: list[list[jax.Array]]


def main(config: Config) -> dict[str, Any]:
    """Compares, prints, writes; returns what is written."""
    cases, out = choose(config.cases), config.out and output.json_file(config.out)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # fla's processes need memory too
    on_gpu = jax.default_backend() == "gpu"
    config = dataclasses.replace(
        config,
        implementations=config.implementations or (("chunked", "pallas") if on_gpu else ("scan", "chunked")),
        dtype=config.dtype or ("bfloat16" if on_gpu else "float32"),
    )
    theirs = recorded(config.peers, config) if isinstance(config.peers, Path) else {"rows": []}
    with_fla = on_gpu and config.dtype == "bfloat16" and config.peers == "measure" and peers.installed("fla")
    result = provenance("experiments.benchmarks.errors") | {"settings": output.settings(config)} | theirs
    console = Console(width=120, highlight=False)
    for case, by, found in compare({case: problem(shape, config) for case, shape in cases.items()}, config, with_fla):
        console.print(f"{case}, {by}: done")
        result["rows"] += [
            {"case": case, "gates": gates, "by": by} | row for gates, row in zip(config.gates, found, strict=True)
        ]
        result["rows"].sort(key=functools.partial(position, config))
        if out:
            output.write(out, result)
    console.print(title(result), as_table(result["rows"]), sep="\n", markup=False)
    console.print(*remarks(result["rows"]), sep="\n", soft_wrap=True, markup=False)
    if out:
        output.write(out, result, draw(result))
    return result


def compare(
    problems: dict[str, Problem], config: Config, with_fla: bool
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(case, who, `errors` by kind of gates); fla's in the end, all cases side by side: Triton compiles for minutes."""
    exact = {}
    for case, problem in problems.items():
        exact[case] = attempt(functools.partial(exactly, problem))
        for name in config.implementations:
            found = [attempt(functools.partial(run, problem, name, arrays)) for arrays in problem.given]
            yield case, name, against(exact[case], found)
    if not with_fla:
        return
    with ThreadPoolExecutor() as pool:
        theirs = {case: pool.submit(fla, problem) for case, problem in problems.items()}
        for case, future in theirs.items():
            found = attempt(lambda future=future: {"results": future.result()}, Exception)
            yield case, "fla", against(exact[case], found.get("results", [found] * len(config.gates)))


def problem(shape: Shape, config: Config) -> Problem:
    """The op of that shape. Arrays are the output's gradient, q, k, v, log_decay and, for GSA, the write strength."""
    dtype, given = jnp.dtype(config.dtype), []
    for gates in config.gates:
        q, k, v, log_decay = make_inputs(shape, dtype, gates=gates)
        write = [-jnp.expm1(log_decay.astype(jnp.float32)).astype(dtype)] * (shape.op == "gsa")
        given.append([jax.random.normal(jax.random.key(1), v.shape).astype(dtype), q, k, v, log_decay, *write])
    return Problem(shape.op, config.scale if shape.op == "gsa" else 1.0, given)


def run(problem: Problem, implementation: str, arrays: Sequence[jax.Array]) -> dict[str, list[jax.Array]]:
    """{"arrays": [the output, then the inputs' gradients]} of an implementation."""
    out, gradients = program(problem.op, problem.scale, implementation)(*arrays)
    return {"arrays": [out, *gradients]}


@functools.cache
def program(op: str, scale: float, implementation: str) -> Callable[..., tuple[jax.Array, Sequence[jax.Array]]]:
    """The op's forward and backward pass, compiled once for all inputs of a shape."""

    def forward(*inputs):
        return OPS[op](*inputs, scale=scale, implementation=implementation)[0]

    return jax.jit(functools.partial(PASSES["forward_backward"], forward))


def exactly(problem: Problem) -> dict[str, list[list[np.ndarray]]]:
    """{"results": the arrays of `run` for each of the inputs}, by the definition in float64."""
    with jax.enable_x64(True):
        found = [run(problem, "scan", [x.astype(jnp.float64) for x in arrays]) for arrays in problem.given]
    return {"results": [list(map(np.asarray, each["arrays"])) for each in found]}


def fla(problem: Problem) -> list[dict[str, Any]]:
    """What `run` gives for each of the inputs, by flash-linear-attention: PyTorch is imported by another process."""
    given = [[np.asarray(x, np.float32) for x in arrays] for arrays in problem.given]
    return in_process(_fla, problem.op, problem.scale, given)


def _fla(op, scale, given):
    from experiments.benchmarks import torch_peers

    return torch_peers.results(op, scale, given)


def against(exact: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`errors` for each of the inputs, or why there is nothing to compare with."""
    if "error" in exact:
        return [{"error": f"the definition in float64: {exact['error']}"}] * len(found)
    return list(map(errors, found, exact["results"]))


def errors(found: dict[str, Any], exact: Sequence[np.ndarray]) -> dict[str, Any]:
    """{"errors": by the array's name}, or why there are none."""
    if "error" in found:
        return found
    distances = (np.linalg.norm(np.asarray(x, np.float64) - y) for x, y in zip(found["arrays"], exact, strict=True))
    relative = (float(distance / np.linalg.norm(y)) for distance, y in zip(distances, exact, strict=True))
    return {"errors": dict(zip(ARRAYS, relative, strict=False))}


def as_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each case, kind of gates and implementation."""
    table = Table(box=SIMPLE)
    for heading in ("case", "gates", "by", *ARRAYS):
        table.add_column(heading, justify="right" if heading in ARRAYS else "left", no_wrap=True)
    for row in rows:
        found = row.get("errors", {})
        table.add_row(row["case"], row["gates"], row["by"], *(f"{found[x]:.1e}" if x in found else "-" for x in ARRAYS))
    return table


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """What does not fit, and how the errors compare with fla's."""
    lines = [f"{row['case']}, {row['gates']}, {row['by']}: {row['error']}" for row in rows if "error" in row]
    fla = {(row["case"], row["gates"]): row["errors"] for row in rows if row["by"] == "fla" and "errors" in row}
    for name in dict.fromkeys(row["by"] for row in rows if fla and row["by"] != "fla"):
        pairs = [
            (error, fla[row["case"], row["gates"]][array])
            for row in rows
            if row["by"] == name and (row["case"], row["gates"]) in fla
            for array, error in row.get("errors", {}).items()
        ]
        ours, theirs = np.reshape(pairs, (-1, 2)).T
        known = np.isfinite(ours) & np.isfinite(theirs) & (theirs > 0)
        if known.any():
            ratios = ours[known] / theirs[known]
            lines.append(
                f"errors of {name} over fla's: median {np.median(ratios):.2f}, at most {ratios.max():.2f}, at least "
                f"{ratios.min():.1e}; {sum(~known)} of {len(pairs)} where one of the two is not finite"
            )
    return lines


def draw(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """A panel for each case and kind of gates: the error of every array, by implementation."""
    rows, settings = result["rows"], result["settings"]
    cases, gates, names = settings["cases"], settings["gates"], list(dict.fromkeys(row["by"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(1 + 3 * len(gates), 1.2 + 2.4 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), len(gates), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axes = panels[cases.index(row["case"]), gates.index(row["gates"])]
        found, i = row.get("errors", {}), names.index(row["by"])
        axes.plot(list(found), list(found.values()), "osD^"[i % 4], color=f"C{i}", label=row["by"], alpha=0.8)
    for i, j in np.ndindex(panels.shape):
        panels[i, j].set_title(f"{cases[i]}, gates: {gates[j]}", fontsize="medium")
        panels[i, j].set_yscale("log")
        panels[i, j].grid(alpha=0.3)
        panels[i, j].tick_params(axis="x", rotation=30)
    figure.supylabel("‖x - exact‖ / ‖exact‖")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(result))
    return figure


def title(result: dict[str, Any]) -> str:
    """What was compared, and where."""
    settings = result["settings"]
    return (
        f"{result['device']}, {settings['dtype']}, logits times {settings['scale']:g}, jax {result['versions']['jax']}"
    )


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.errors", description=__doc__))
