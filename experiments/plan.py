"""Plans a mesh without a device: where every array lies, what each axis moves, which mesh is best for how many GPUs.

    python -m experiments.plan --preset gsa-7b --mesh.fsdp 8 --mesh.data 8     # every array, bytes per device, traffic
    python -m experiments.plan --preset gsa-7b --gpus 64 256 1024 4096         # the best meshes of so many GPUs

Nothing is allocated. The numbers are estimates from the hardware's rates (`--hardware.*`); docs/sharding.md says how.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.command_line import replaced, user_errors
from gsa_jax.layers.checks import check_numbers
from gsa_jax.sharding import MESH_AXES
from gsa_jax.training import ConfigError, MeshConfig, TrainConfig, recipe
from gsa_jax.training.plan import Hardware, Placed, Plan, best_plans, describe, placement, plan


@dataclass(frozen=True)
class Arguments:
    """What to plan."""

    preset: str = "gsa-1.3b"
    """model and recipe: tiny, gsa-340m, gsa-1.3b, gsa-2.7b, gsa-7b, and the same sizes of the other mixers"""
    mesh: MeshConfig = MeshConfig()
    """the devices"""
    gpus: tuple[int, ...] = ()
    """in place of a mesh: numbers of GPUs, to find the best meshes for"""
    best: int = 3
    """how many of the best meshes to print"""
    batch_size: int | None = None
    """sequences of a step over all devices; the recipe's by default"""
    length: int | None = None
    """tokens of a sequence; the recipe's by default"""
    accumulation: int | None = None
    """parts a batch is computed in; as few as fit into memory by default"""
    remat: Literal["none", "dots", "full"] | None = None
    """what the backward pass computes again; the preset's choice by default"""
    hardware: Hardware = Hardware()
    """the GPUs and their links"""

    def __post_init__(self):
        check_numbers(self)
        if self.gpus and self.mesh != MeshConfig():
            raise ConfigError(f"gpus={self.gpus}: expected no mesh beside them, got {describe(self.mesh)}")

    @property
    def config(self) -> TrainConfig:
        """The run: the recipe with what was asked for instead of its own."""
        config = recipe(self.preset)
        model = replaced(config.model, remat=self.remat)
        sizes = {"batch_size": self.batch_size, "length": self.length, "accumulation": self.accumulation}
        return replaced(config, model=model, mesh=self.mesh, **sizes)


def main(arguments: Arguments) -> None:
    """Prints the plan."""
    config = arguments.config
    console = Console(width=150, highlight=False)
    title = f"{arguments.preset}, {config.batch_size} x {config.length} tokens a step"
    if arguments.gpus:
        table = costs(f"{title}: the {arguments.best} shortest steps")
        for gpus in arguments.gpus:
            plans = best_plans(config, gpus, arguments.hardware)[: arguments.best]
            for i, found in enumerate(plans):
                add_costs(table, found, last=i == len(plans) - 1)
            if not plans:
                table.add_row(str(gpus), "no mesh divides the batch and fits into memory", end_section=True)
        console.print(table)
        return
    result = plan(config, arguments.hardware)
    console.print(arrays(f"{arguments.preset} on {describe(config.mesh)}", placement(config)))
    table = costs(title)
    add_costs(table, result)
    console.print(table)
    if result.memory > arguments.hardware.memory:
        sizes = f"{result.memory / 1e9:,.1f} GB, expected at most {arguments.hardware.memory / 1e9:,.1f} GB"
        console.print(f"does not fit into a device's memory: {sizes}")


def arrays(title: str, rows: list[Placed]) -> Table:
    """Every array with its placement, and what they take together."""
    table = Table(title=title, box=SIMPLE)
    for column in ("array", "shape", "dtype", "split over"):
        table.add_column(column)
    table.add_column("bytes per device", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, shape, row.dtype, row.split, f"{row.bytes_per_device:,}")
    table.add_section()
    table.add_row("all", "", "", "", f"{sum(row.bytes_per_device for row in rows):,}")
    return table


def costs(title: str) -> Table:
    """An empty table for `add_costs`."""
    table = Table(title=title, box=SIMPLE, caption="GB, and along the axes GB that a device sends · ms of its link")
    for column in ("GPUs", "mesh", "parts", "state", "kept", *MESH_AXES, "arithmetic", "step"):
        table.add_column(column, justify="left" if column == "mesh" else "right", no_wrap=True)
    return table


def add_costs(table: Table, result: Plan, *, last: bool = False) -> None:
    """Adds a line with the costs of one mesh."""
    table.add_row(
        str(math.prod(dataclasses.asdict(result.mesh).values())),
        describe(result.mesh),
        str(result.accumulation),
        *(f"{size / 1e9:,.1f}" for size in (result.state, result.activations)),
        *(
            f"{result.sent[axis] / 1e9:,.2f} · {1e3 * result.seconds[axis]:,.0f}" if axis in result.sent else ""
            for axis in MESH_AXES
        ),
        *(f"{1e3 * seconds:,.0f} ms" for seconds in (result.compute, result.step)),
        end_section=last,
    )


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, prog="python -m experiments.plan", description=__doc__))
