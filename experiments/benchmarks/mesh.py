"""Times training over the devices of a host: `python -m experiments.benchmarks.mesh`.

First on one device, then on all of them along each axis of the mesh alone, with as many tokens per device, so that
perfect scaling is as many times the tokens per second; last one sequence that no device could train on by itself, cut
along `context`. Every case has a process of its own, as in `experiments.benchmarks.model`, and what is measured is
printed and written at once.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments import output
from experiments.benchmarks import model_cases
from experiments.benchmarks.model import in_process
from experiments.benchmarks.timing import attempt
from experiments.command_line import user_errors
from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import ModelConfig
from gsa_jax.sharding import MESH_AXES
from gsa_jax.training import MeshConfig


@dataclass(frozen=True)
class Config:
    """What to time."""

    preset: str = "gsa-1.3b"
    """The model: tiny, tiny-gla, ..., gsa-340m, gsa-1.3b, gsa-2.7b, gsa-7b, and the same sizes of the other mixers."""
    batch: int = 8
    """Rows on one device."""
    length: int = 2048
    """Tokens of a row on one device."""
    long_sequence: int = 262_144
    """Tokens of the one long sequence, whose blocks are a loop and all recomputed in the backward pass; 0: none."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, gradients and moments."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes of a block; the preset's own choice by default."""
    unroll: int | None = None
    """Repeats of the mixers' pattern in one turn of the loop over the depth; the preset's own number by default."""
    axes: tuple[str, ...] = MESH_AXES
    """Axes of the mesh to spread over, one after the other."""
    overlap: bool = True
    """Give XLA the options that let devices compute while they communicate."""
    repeats: int = 3
    """Measurements, of which the median counts."""
    seconds: float = 1.0
    """How long a measurement lasts at least: that many steps go back to back."""
    out: Path | None = None
    """JSON file to write anew after every case, with a plot beside it."""

    def __post_init__(self):
        check_numbers(self, "long_sequence")
        for axis in self.axes:
            if axis not in MESH_AXES:
                raise ValueError(f"axes must be among {', '.join(MESH_AXES)}, got {axis!r}")

    @property
    def model(self) -> ModelConfig:
        """The preset with what was asked for instead of its own."""
        return model_cases.changed_preset(self.preset, remat=self.remat, unroll=self.unroll)


def main(config: Config) -> dict[str, Any]:
    """Times, prints, writes; returns what is written."""
    out = config.out and output.json_file(config.out)
    result = in_process(model_cases.about, "experiments.benchmarks.mesh", config.model)
    result["settings"] = output.settings(config)
    result["rows"] = []
    measure = functools.partial(
        model_cases.train,
        param_dtype=config.param_dtype,
        repeats=config.repeats,
        seconds=config.seconds,
        overlap=config.overlap,
    )
    if result["num_devices"] == 1:
        print("there is one device: no axis to spread over, and no long sequence")
    for case in cases(config, result["num_devices"]):
        print(f"{describe(case)}: ", end="", flush=True)
        model = dataclasses.replace(config.model, remat=case["remat"], unroll=case["unroll"])
        settings = {"config": model, "mesh": MeshConfig(**case["mesh"]), "began": time.time()}
        run = functools.partial(in_process, measure, case["batch"], case["length"], **settings)
        row = case | attempt(run, Exception)
        print(row.get("error") or f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)
        result["rows"].append(row)
        if out:
            output.write(out, result, draw(result))
    failed = [f"{describe(row)}: {row['error']}" for row in result["rows"] if "error" in row]
    console = Console(width=120)
    console.print("", title(result), as_table(result), *failed, sep="\n", highlight=False, markup=False)
    return result


def cases(config: Config, devices: int) -> list[dict[str, Any]]:
    """One device, all of them along each axis with as many tokens per device, and the long sequence."""
    depth = {"remat": config.model.remat, "unroll": config.model.unroll}
    one = {"mesh": {}, "batch": config.batch, "length": config.length} | depth
    if devices == 1:
        return [one]
    spread = []
    for axis in config.axes:
        longer = {"length": devices * config.length} if axis == "context" else {"batch": devices * config.batch}
        spread.append(one | {"mesh": {axis: devices}} | longer)
    saving = {"remat": "full", "unroll": 1}
    long = {"mesh": {"context": devices}, "batch": 1, "length": config.long_sequence} | saving
    return [one, *spread, *[long] * bool(config.long_sequence)]


def describe(case: dict[str, Any]) -> str:
    """A case in words, such as "fsdp=2, 16 x 2048"."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in case["mesh"].items()) or "one device"
    return f"{mesh}, {case['batch']} x {case['length']:,}"


def title(result: dict[str, Any]) -> str:
    """What was timed, and where."""
    settings, jax_version = result["settings"], result["versions"]["jax"]
    return f"{settings['preset']}, {settings['param_dtype']} parameters; {result['device']}, jax {jax_version}"


def as_table(result: dict[str, Any]) -> Table:
    """A line for each case: speed, how many times that of one device, MFU, and the memory of a device."""
    table = Table(box=SIMPLE)
    for heading in ("mesh, rows x tokens", "tokens/s", "times one device", "MFU", "peak GiB of a device"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            describe(row),
            f"{row['tokens_per_second']:,.0f}" if "ms" in row else "-",
            f"{times(row, result):.2f}" if times(row, result) else "-",
            f"{row['mfu']:.1%}" if "mfu" in row else "-",
            f"{row['memory_gib']:.1f}" if "memory_gib" in row else "-",
        )
    return table


def times(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """The row's tokens per second as a multiple of one device's; None if either could not be measured."""
    one = result["rows"][0]
    return row["tokens_per_second"] / one["tokens_per_second"] if "ms" in row and "ms" in one else None


def draw(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Tokens per second of each case as bars, with the memory of a device."""
    rows = [row for row in result["rows"] if "ms" in row]
    figure = matplotlib.figure.Figure(figsize=(8, 0.8 + 0.5 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    speeds, names = [row["tokens_per_second"] for row in rows], [describe(row) for row in rows]
    bars = axes.barh(range(len(rows)), speeds, height=0.6, tick_label=names)
    axes.bar_label(bars, [_label(row, result) for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("training, tokens/s; times one device, memory of a device at its peak")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title(result), fontsize=10)
    return figure


def _label(row: dict[str, Any], result: dict[str, Any]) -> str:
    """What stands beside a bar, such as "1.90x, 41 GiB"."""
    memory = [f"{row['memory_gib']:.0f} GiB"] if "memory_gib" in row else []
    ratio = times(row, result)
    return ", ".join([f"{ratio:.2f}x", *memory] if ratio else memory)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.mesh", description=__doc__))
