"""Times a language model end to end: `python -m experiments.benchmarks.model`.

Training steps on random tokens by `gsa_jax.training`'s own step: tokens per second, MFU (six operations for every
parameter that a token is multiplied with), peak memory, and the seconds from the start of the process to the end of the
first step and of what comes before it. Then decoding by `gsa_jax.generation`: milliseconds of a step after a prompt.
Every case has a process of its own, so that its peak memory and its first step are its own. What is measured is printed
and written at once: a run that is cut short loses nothing, and --resume goes on with it.
"""

import functools
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments import output
from experiments.benchmarks import model_cases, peers
from experiments.benchmarks.model_report import as_table, describe, draw, name_case, remarks, title
from experiments.benchmarks.timing import attempt
from experiments.command_line import user_errors
from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import ModelConfig
from gsa_jax.training import MeshConfig

SELECTION = ("cases", "decode_batches", "peers", "out", "resume")
"""The settings that may differ between a run and the one that it resumes."""


@dataclass(frozen=True)
class Config:
    """What to time."""

    preset: str = "gsa-1.3b"
    """The model: tiny, tiny-gla, ..., gsa-340m, gsa-1.3b, gsa-2.7b, gsa-7b, and the same sizes of the other mixers."""
    cases: tuple[str, ...] = ("8x2048", "4x4096", "2x8192", "1x16384")
    """Training steps: rows x tokens of a row; none at all if nothing is named."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, gradients and moments. Activations are bfloat16 on a GPU and float32 on a CPU in any case."""
    implementation: Literal["scan", "chunked", "pallas"] | None = None
    """Of the recurrences; the fastest that fits by default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes of a block; the preset's own choice by default."""
    unroll: int | None = None
    """Repeats of the mixers' pattern in one turn of the loop over the depth; the preset's own number by default."""
    decode_batches: tuple[int, ...] = (1, 16)
    """Decoding: rows; none at all if nothing is named."""
    prompt: int = 2048
    """Tokens of the prompt."""
    decode_blocks: int = 8
    """Blocks of 16 tokens in a measurement of decoding."""
    repeats: int = 5
    """Measurements, of which the median counts."""
    seconds: float = 1.0
    """How long a measurement of training lasts at least: that many steps go back to back."""
    peers: Path | None = None
    """JSON file of a peer's numbers, recorded on such a device, to compare with."""
    out: Path | None = None
    """JSON file to write anew after every case, with a plot beside it."""
    resume: bool = False
    """Keep what --out holds, from a run with these settings on such a device, and measure what it lacks."""

    def __post_init__(self):
        check_numbers(self)
        if self.resume and not self.out:
            raise ValueError("resume: there is nothing to go on with, expected the file of an earlier run in out")

    @property
    def model(self) -> ModelConfig:
        """The preset with what was asked for instead of its own."""
        changes = {"implementation": self.implementation, "remat": self.remat, "unroll": self.unroll}
        return model_cases.changed_preset(self.preset, **changes)


def main(config: Config) -> dict[str, Any]:
    """Times, prints, writes; returns what is written."""
    common = {"config": config.model, "param_dtype": config.param_dtype, "repeats": config.repeats}
    train = functools.partial(model_cases.train, **common, mesh=MeshConfig(), seconds=config.seconds)
    decode = functools.partial(model_cases.decode, **common, blocks=config.decode_blocks)
    cases = [("training", train, dict(zip(("batch", "length"), parse(case), strict=True))) for case in config.cases]
    cases += [("decoding", decode, {"batch": batch, "prompt": config.prompt}) for batch in config.decode_batches]

    out = config.out and output.json_file(config.out)
    result = in_process(model_cases.about, "experiments.benchmarks.model", config.model)
    result["settings"] = output.settings(config)
    facts = {"device": result["device"], "preset": config.preset}
    result["peers"] = peers.read(config.peers, "training", **facts) if config.peers else None
    result |= {"training": [], "decoding": []}
    if config.resume and out.exists():
        result |= measured_before(out, result)
    for part, measure, case in cases:
        if any(case.items() <= row.items() for row in result[part]):
            continue
        print(f"{name_case(part, case)}: ", end="", flush=True)
        row = case | attempt(
            lambda measure=measure, case=case: in_process(measure, **case, began=time.time()), Exception
        )
        print(describe(row), flush=True)
        result[part].append(row)
        if out:
            output.write(out, result, draw(result))
    tables = [as_table(result, part) for part in ("training", "decoding") if result[part]]
    console = Console(width=120)
    console.print("", title(result), *tables, *remarks(result), sep="\n", highlight=False, markup=False)
    return result


def measured_before(file: Path, result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows that an earlier run left in `file`, without those that failed.

    Raises:
      ValueError: it was on another kind of device, with other versions or with other settings than `result`.
    """
    earlier = output.read(file, "resume", "settings", "device", "versions", "training", "decoding")
    for record in (earlier, here := json.loads(json.dumps(result))):
        for name in SELECTION:
            record["settings"].pop(name, None)
    for fact in ("device", "versions", "settings"):
        if earlier[fact] != here[fact]:
            raise ValueError(f"resume: {file} has the {fact} {earlier[fact]}, and here they are {here[fact]}")
    return {part: [row for row in earlier[part] if "error" not in row] for part in ("training", "decoding")}


def parse(case: str) -> tuple[int, int]:
    """Rows and length of a case: (8, 2048) for "8x2048"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", case)
    if not match:
        raise ValueError(f"cases: got {case!r}, expected rows x tokens, such as 8x2048")
    return int(match[1]), int(match[2])


def in_process(function: Callable[..., dict[str, Any]], *arguments, **options) -> dict[str, Any]:
    """What `function` returns in a new process: this one leaves the devices to it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.model", description=__doc__))
