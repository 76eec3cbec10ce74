"""Continues a prompt with a trained model and streams the text to the terminal.

python -m experiments.generate runs/tiny --prompt "def " --temperature 0.8 --top-p 0.95
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments.command_line import check_text, user_errors
from gsa_jax.generation import SamplingConfig, stream
from gsa_jax.layers.checks import check_numbers
from gsa_jax.training import load_model, one_device
from gsa_jax.training.data import decode_after, load_tokenizer


@dataclass(frozen=True)
class Arguments:
    """What to continue, and how."""

    run: tyro.conf.Positional[Path]
    """folder of a run of experiments.language_model"""
    prompt: str = "def "
    """what the text begins with"""
    num_tokens: int = 500
    """tokens to draw"""
    seed: int = 0
    """of the draws"""
    block_size: int = 16
    """tokens drawn between two writes to the terminal; does not change them"""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)

    def __post_init__(self):
        check_numbers(self, "seed")
        check_text("prompt", self.prompt)


def main(arguments: Arguments) -> None:
    """Prints the prompt and then the tokens as they come."""
    model, config, _ = load_model(arguments.run)
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = np.concatenate([[tokenizer.separator], tokenizer.encode(arguments.prompt)])
    blocks = stream(
        model,
        prompt[None],
        arguments.num_tokens,
        sampling=arguments.sampling,
        key=jax.random.key(arguments.seed),
        block_size=arguments.block_size,
    )
    print(arguments.prompt, end="", flush=True)
    ids, written = [], 0
    for block in blocks:
        ids.extend(np.asarray(block[0]).tolist())
        text = decode_after(tokenizer, prompt, ids)
        complete = len(text.rstrip("\ufffd"))
        print(text[written:complete], end="", flush=True)
        written = max(written, complete)
    print(text[written:])


if __name__ == "__main__":
    with user_errors():
        arguments = tyro.cli(Arguments, prog="python -m experiments.generate", description=__doc__)
        with jax.set_mesh(one_device()):
            main(arguments)
