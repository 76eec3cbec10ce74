"""Times the peers: `python -m experiments.benchmarks.peers CASE... --out peers.json`.

flash-linear-attention (Triton) on the same shapes, and PyTorch's causal attention (by flash attention and by cuDNN, its
own choice on Hopper) over the same tokens at the same width, all in bfloat16. A process of its own, so that PyTorch and
JAX don't share the GPU's memory; what it needs comes with `pip install -e ".[bench]"`. Times are taken as ours are.
Every result is printed as a line of JSON as it comes; the file is what `experiments.benchmarks.ops --peers` reads.

Triton compiles and tries many tile sizes on first use, minutes for an op. So a process for every kind of op compiles
first, side by side; the process that measures then chooses the tile sizes, alone on the GPU.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import output
from experiments.benchmarks.shapes import GPU_SHAPES, Shape, choose
from experiments.command_line import user_errors
from experiments.provenance import provenance
from gsa_jax.layers.checks import check_numbers

PACKAGES = {"fla": "flash-linear-attention", "torch": "torch", "triton": "triton"}
"""What the peers are made of: modules and the packages that they come in."""


@dataclass(frozen=True)
class Config:
    """What to time."""

    cases: tyro.conf.Positional[tuple[str, ...]] = tuple(GPU_SHAPES)
    """Names from experiments/benchmarks/shapes.py."""
    out: Path | None = None
    """JSON file to write, anew after every result."""
    compile_only: bool = False
    """Fill Triton's cache and measure nothing."""
    repeats: int = 7
    """Measurements, of which the median counts."""
    seconds: float = 0.2
    """How long a measurement lasts at least: that many calls go back to back."""

    def __post_init__(self):
        check_numbers(self, "seconds")


def main(config: Config) -> None:
    """Compiles, then times one case after the other."""
    cases = choose(config.cases)
    if not installed("torch"):
        raise ValueError('the peers need PyTorch, which is not installed; pip install -e ".[bench]" does it')
    import torch

    from experiments.benchmarks import torch_peers

    if not torch.cuda.is_available():
        raise ValueError("the peers need a GPU, and PyTorch finds none")
    out = config.out and output.json_file(config.out)
    peers = [peer for peer in torch_peers.PEERS if peer != "fla" or installed("fla")]
    if "fla" in peers:
        side_by_side(torch_peers.compile_kernels, list(cases.values()))
    if config.compile_only:
        return
    device = f"1 x {torch.cuda.get_device_name()}"
    versions = {name: importlib.metadata.version(name) for module, name in PACKAGES.items() if installed(module)}
    record = provenance("experiments.benchmarks.peers", device, versions) | {"dtype": "bfloat16", "rows": []}
    for case, shape in cases.items():
        for peer in peers:
            times = torch_peers.measure(peer, shape, repeats=config.repeats, seconds=config.seconds)
            record["rows"].append({"case": case, "by": peer} | times)
            print(json.dumps(record["rows"][-1]), flush=True)
            if out:
                output.write(out, record)


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def side_by_side(compile_kernels, shapes: list[Shape]) -> None:
    """Compiles in a process for each of the shapes that differ in more than batch and length."""
    kinds = {shape._replace(B=0, T=0): shape for shape in reversed(shapes)}
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=compile_kernels, args=(shape,)) for shape in kinds.values()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def read(file: Path, part: str = "rows", **here: str) -> dict[str, Any]:
    """A peer's numbers and where they come from, as this script or `experiments.benchmarks.ops` wrote them into `file`.

    Raises:
      ValueError: there are none (of that part), or their device (in kind) or another of the facts in `here` is not what
        it is here.
    """
    record = output.read(file, "peers")
    record = record.get("peers", record)
    if not record or part not in record:
        raise ValueError(f"peers: {file} has no numbers of peers in {part!r}")
    for fact, value in here.items():
        if _kind(record.get(fact, "unknown")) != _kind(value):
            raise ValueError(f"{file}: the peers' {fact} is {record.get(fact, 'unknown')}, and here it is {value}")
    return record | {"file": str(file)}


def _kind(device: str) -> str:
    """A device's name without how many there are."""
    return device.split(" x ")[-1]


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.peers", description=__doc__))
