"""Times a language model end to end: `python -m experiments.benchmarks.model`.

Training steps on random tokens by `gsa_jax.training`'s own step: tokens per second, MFU (six operations for every
parameter that a token is multiplied with), peak memory, and the seconds from the start of the process to the end of the
first step. Then decoding by `gsa_jax.generation`: milliseconds of a step after a prompt. Every case has a process of
its own, so that its peak memory and its first step are its own.
"""

import dataclasses
import functools
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments.benchmarks import model_cases, peers
from experiments.benchmarks.model_report import as_table, draw, remarks, title
from experiments.benchmarks.timing import REFUSALS, attempt
from experiments.command_line import user_errors
from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import ModelConfig, preset

FAILURES = (*REFUSALS, BrokenProcessPool)


@dataclass(frozen=True)
class Config:
    """What to time."""

    preset: str = "gsa-1.3b"
    """The model: tiny, tiny-gla, ..., gsa-340m, gsa-1.3b, gsa-2.7b, gsa-7b, and the same sizes of the other mixers."""
    cases: tuple[str, ...] = ("8x2048", "4x4096", "2x8192", "1x16384")
    """Training steps: rows x tokens of a row."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, gradients and moments. Activations are bfloat16 on a GPU and float32 on a CPU in any case."""
    implementation: Literal["scan", "chunked", "pallas"] | None = None
    """Of the recurrences; the fastest that fits by default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes of a block; the preset's own choice by default."""
    decode_batches: tuple[int, ...] = (1, 16)
    """Decoding: rows."""
    prompt: int = 2048
    """Tokens of the prompt."""
    decode_blocks: int = 8
    """Blocks of 16 tokens in a measurement of decoding."""
    repeats: int = 5
    """Measurements, of which the median counts."""
    seconds: float = 2.0
    """How long a measurement of training lasts at least: that many steps go back to back."""
    peers: Path | None = None
    """JSON file of a peer's numbers, recorded on such a device, to compare with."""
    out: Path | None = None
    """JSON file to write, with a plot beside it."""

    def __post_init__(self):
        check_numbers(self)

    @property
    def model(self) -> ModelConfig:
        """The preset with what was asked for instead of its own."""
        changes = {"implementation": self.implementation, "remat": self.remat}
        return dataclasses.replace(preset(self.preset), **{name: value for name, value in changes.items() if value})


def main(config: Config) -> dict[str, Any]:
    """Times, prints, writes; returns what is written."""
    shapes = [parse(case) for case in config.cases]
    common = {"config": config.model, "param_dtype": config.param_dtype, "repeats": config.repeats}
    train = functools.partial(model_cases.train, **common, seconds=config.seconds)
    decode = functools.partial(model_cases.decode, **common, prompt_length=config.prompt, blocks=config.decode_blocks)

    result = in_process(model_cases.about, config.model)
    result["settings"] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    result["peers"] = peers.read(config.peers, device=result["device"]) if config.peers else None
    result |= {"training": [], "decoding": []}
    console = Console(width=120)
    with console.status("") as status:
        for batch_size, length in shapes:
            status.update(f"training, {batch_size} x {length}")
            start = time.time()
            row = attempt(lambda shape=(batch_size, length): in_process(train, *shape), FAILURES)
            if "first_step_at" in row:
                row["first_step_seconds"] = row.pop("first_step_at") - start
            result["training"].append({"batch": batch_size, "length": length} | row)
        for batch_size in config.decode_batches:
            status.update(f"decoding, {batch_size} rows")
            row = attempt(lambda batch_size=batch_size: in_process(decode, batch_size), FAILURES)
            result["decoding"].append({"batch": batch_size, "prompt": config.prompt} | row)
    tables = [as_table(result, part) for part in ("training", "decoding") if result[part]]
    console.print(title(result), *tables, *remarks(result), sep="\n", highlight=False, markup=False)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2) + "\n")
        draw(result).savefig(config.out.with_suffix(".png"), dpi=150)
    return result


def parse(case: str) -> tuple[int, int]:
    """Rows and length of a case: (8, 2048) for "8x2048"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", case)
    if not match:
        raise ValueError(f"cases: got {case!r}, expected rows x tokens, such as 8x2048")
    return int(match[1]), int(match[2])


def in_process(function: Callable[..., dict[str, Any]], *arguments) -> dict[str, Any]:
    """What `function` returns in a new process: this one leaves the devices to it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.model", description=__doc__))
