"""Trains a language model.

    python -m experiments.language_model                                           # bytes, some minutes on 2 CPU cores
    python -m experiments.language_model --preset gsa-340m --data "corpus/*.jsonl" --data.tokenizer tokenizer.json
    python -m experiments.language_model --resume                                  # goes on after an interruption

The run's folder gets the settings, checkpoints, metrics.jsonl, TensorBoard curves and a plot. At the end the script
prints the validation bits per byte, for byte tokens beside those of a bigram model on the same tokens, and a sample.
"""

import argparse
import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments.bigram import bigram_bits_per_byte
from experiments.command_line import check_text, user_errors
from gsa_jax.generation import generate
from gsa_jax.models import PRESETS
from gsa_jax.training import (
    ConfigError,
    TrainConfig,
    TrainSummary,
    initialize_hosts,
    load_model,
    one_device,
    plot_curves,
    recipe,
    train,
)
from gsa_jax.training.data import decode_after, load_tokenizer, training_batches, validation_batches


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "tiny"
    """model and recipe, the defaults of all settings below: tiny, gsa-340m, gsa-1.3b, gsa-2.7b, gsa-7b, gla-340m..."""
    resume: bool = False
    """go on with the run in --run-dir from its last checkpoint, with its settings and not those of --preset"""
    prompt: str = "def "
    """what the sample at the end begins with"""
    coordinator: str | None = None
    """of a run of several processes: address:port of process 0; under Slurm's srun all three are found"""
    num_processes: int | None = None
    """how many processes there are"""
    process_id: int | None = None
    """which of them this is, from 0"""

    def __post_init__(self):
        check_text("prompt", self.prompt)


def main(arguments: Arguments) -> None:
    """Trains, then prints how well and a sample."""
    config = arguments.config
    summary = train(config, resume=arguments.resume)
    text = None if summary.interrupted else sample(summary.run_dir, arguments.prompt)
    if jax.process_index() > 0:
        return
    if summary.skipped:
        print(f"left out {len(summary.skipped)} documents; the first: {summary.skipped[0]}")
    if summary.interrupted:
        print(f"stopped by {summary.interrupted} after step {summary.step}, saved; to go on:")
        print(f"python -m experiments.language_model --resume --run-dir {shlex.quote(str(summary.run_dir))}")
        return
    report(config, summary)
    print(f"\nA sample, after {arguments.prompt!r}:\n{text}")
    print(f"\nMore: python -m experiments.generate {summary.run_dir} --prompt {arguments.prompt!r}")


def report(config: TrainConfig, summary: TrainSummary) -> None:
    """Prints the validation bits per byte, for byte tokens beside those of a bigram model, and adds it to the plot."""
    print(f"\nvalidation bits per byte: {summary.metrics['validation_bits_per_byte']:.3f}")
    if config.data.tokenizer == "byte":
        bigram = bigram_baseline(config)
        print(f"  a byte bigram model's:  {bigram:.3f}, on the same tokens")
        plot_curves(summary.run_dir, references={"byte bigram model": bigram})
    print(f"curve, metrics and checkpoints: {summary.run_dir}/")


def bigram_baseline(config: TrainConfig) -> float:
    """Bits per byte of a bigram model of the training split on the batches that the run is evaluated on."""
    train = training_batches(
        config.data, batch_size=config.batch_size, length=config.length, seed=config.seed, num_epochs=1
    )
    held_out = validation_batches(config.data, batch_size=config.batch_size, length=config.length)
    return bigram_bits_per_byte(train, itertools.islice(held_out, config.eval_batches))


def sample(run_dir: Path, prompt: str, num_tokens: int = 300) -> str:
    """What the run's model makes of the prompt."""
    model, config, _ = load_model(run_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)])
    with jax.set_mesh(one_device()):
        return prompt + decode_after(tokenizer, ids, generate(model, ids[None], num_tokens)[0])


def defaults(arguments: list[str]) -> TrainConfig:
    """The settings that the command line starts from: those of --preset, or of the run that --resume goes on with."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--run-dir", "--run_dir")
    chosen, _ = parser.parse_known_args(arguments)
    if chosen.preset not in PRESETS:
        raise ConfigError(f"--preset {chosen.preset}: unknown, expected one of {', '.join(PRESETS)}")
    config = recipe(chosen.preset)
    stored = Path(chosen.run_dir or config.run_dir) / "config.json"
    return TrainConfig.read(stored) if chosen.resume and stored.is_file() else config


def join_hosts(arguments: list[str]) -> None:
    """Joins the other processes that the command line names or Slurm started; before the settings are read, as counting
    the parameters of a recipe's model may start jax."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", "--num_processes", type=int)
    parser.add_argument("--process-id", "--process_id", type=int)
    chosen, _ = parser.parse_known_args(arguments)
    initialize_hosts(**vars(chosen))


LESS_MEMORY = (
    "a larger --accumulation takes less, with --resume too; in a new --run-dir a smaller --batch-size, a shorter "
    "--length or --model.remat full"
)

if __name__ == "__main__":
    with user_errors(less_memory=LESS_MEMORY):
        join_hosts(sys.argv[1:])
        default = Arguments(defaults(sys.argv[1:]))
        main(tyro.cli(Arguments, default=default, prog="python -m experiments.language_model", description=__doc__))
