"""Bits per byte and perplexity of a trained model on text, also far beyond the length it was trained at.

    python -m experiments.evaluate runs/tiny                          # the run's own validation split
    python -m experiments.evaluate runs/tiny --data book.txt

Documents are read in windows, one after another, with the state carried over, so a document may have any length. The
result is also broken down by the position in the document: does the model hold its loss where it was never trained?
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import tyro
from flax import nnx
from jax import lax
from rich.progress import track

from experiments import output
from experiments.command_line import replaced, user_errors
from experiments.provenance import provenance
from gsa_jax.layers.checks import check_numbers
from gsa_jax.training import ConfigError, load_model, one_device
from gsa_jax.training.data import evaluation_stream


@dataclass(frozen=True)
class Arguments:
    """What to evaluate."""

    run: tyro.conf.Positional[Path]
    """folder of a run of experiments.language_model"""
    data: str | None = None
    """text, JSONL or Parquet files: a file, a directory or a glob; the run's validation split by default"""
    text_field: str | None = None
    """JSONL field or Parquet column that holds the text; that of the training data by default"""
    skip_bad: bool = False
    """skip and count documents that cannot be read, instead of stopping; the run's validation split as in training"""
    length: int | None = None
    """tokens of a window; those of a training row by default"""
    batch_size: int = 16
    """documents read side by side"""
    max_batches: int | None = None
    """stop after so many batches"""
    cache: int = 8192
    """tokens that softmax attention remembers, if the model has any"""
    out: Path | None = None
    """JSON file to write, with a plot beside it; by default RUN/evaluation.json for the whole validation split alone"""

    def __post_init__(self):
        check_numbers(self)


def main(arguments: Arguments) -> None:
    """Evaluates, prints a table, saves numbers and plot."""
    model, config, step = load_model(arguments.run)
    split = "validation" if arguments.data is None else "all"
    skip_bad = arguments.skip_bad or (arguments.data is None and config.data.skip_bad)
    data = replaced(config.data, path=arguments.data, text_field=arguments.text_field, skip_bad=skip_bad)
    whole = arguments.data is None and arguments.max_batches is None
    out = arguments.out or (arguments.run / "evaluation.json" if whole else None)
    out = out and output.json_file(out)
    corpus, length = data.open(split), arguments.length or config.length
    if not len(corpus):
        raise ConfigError(f"--data {data.path}: no documents in the split {split!r}")
    batches = evaluation_stream(data, batch_size=arguments.batch_size, length=length, corpus=corpus)
    sums = evaluate(model, batches, arguments)
    results = summarize(sums) | {"run": str(arguments.run), "step": step, "data": data.path, "split": split}
    results |= {"trained_at_length": config.length, "window": length, "max_batches": arguments.max_batches}
    results |= provenance("experiments.evaluate")
    print_table(results)
    if corpus.skipped:
        print(f"left out {len(corpus.skipped)} documents; the first: {corpus.skipped[0]}")
    if not out:
        print("\nnot saved; --out FILE.json keeps the numbers and a plot")
        return
    output.write(out, results, draw(results))
    print(f"\nsaved {out} and {out.with_suffix('.png')}")


def evaluate(model, batches, arguments: Arguments) -> np.ndarray:
    """Sums over tokens by position: row i is for positions [2^(i-1), 2^i), columns are nats, tokens and bytes."""
    empty = model.init_state(arguments.batch_size, arguments.cache)
    definition, parameters = nnx.split(model)
    sums, state = np.zeros((33, 3)), empty
    batches = itertools.islice(batches, arguments.max_batches)
    for batch in track(batches, "evaluating", total=arguments.max_batches):
        nats, state = token_losses(definition, parameters, state, empty, batch)
        real = batch["segment_ids"] > 0
        bucket = np.ceil(np.log2(batch["positions"][real] + 1)).astype(int)
        columns = (np.asarray(nats)[real], np.ones(real.sum()), batch["target_bytes"][real])
        sums += np.stack([np.bincount(bucket, column, minlength=len(sums)) for column in columns], axis=1)
    return sums


@jax.jit
def token_losses(definition, parameters, state, empty, batch):
    """Every token's loss in nats, [B, T] float32, and the state after the window."""
    model = nnx.merge(definition, parameters)
    state = model.reset_state(state, empty, batch["positions"][:, 0] == 0)
    hidden, state = model.hidden(batch["inputs"], state, batch["segment_ids"])

    def row(inputs):
        hidden, targets = inputs
        logits = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        return -jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]

    return lax.map(row, (hidden, batch["targets"])), state


def summarize(sums: np.ndarray) -> dict:
    """The numbers over all tokens and by position.

    Raises:
      ValueError: they are of no text.
    """
    if not sums[:, 2].any():
        raise ValueError("data: there is no text in it, expected at least one byte")

    def rates(nats, tokens, num_bytes):
        return {
            "tokens": int(tokens),
            "bytes": int(num_bytes),
            "perplexity": float(np.exp(nats / tokens)),
            "bits_per_byte": float(nats / np.log(2) / num_bytes) if num_bytes else None,
        }

    by_position = [{"from": 2**i // 2, "to": 2**i} | rates(*row) for i, row in enumerate(sums) if row[1] > 0]
    return rates(*sums.sum(axis=0)) | {"by_position": by_position}


def print_table(results: dict) -> None:
    """The results by position and in all."""
    print(f"{'position in document':>22} {'tokens':>12} {'perplexity':>11} {'bits/byte':>10}")
    for row in results["by_position"]:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print(f"{row['from']:>10,} to {row['to'] - 1:>8,} {row['tokens']:>12,} {row['perplexity']:>11.4f} {bits:>10}")
    print(f"{'all':>22} {results['tokens']:>12,} {results['perplexity']:>11.4f} {results['bits_per_byte']:>10.4f}")


def draw(results: dict) -> matplotlib.figure.Figure:
    """Bits per byte over the position in the document, with the training length marked."""
    rows = [row for row in results["by_position"] if row["bits_per_byte"] is not None]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["to"] for row in rows], [row["bits_per_byte"] for row in rows], marker="o")
    axes.axvline(results["trained_at_length"], color="gray", linestyle="--", label="length trained at")
    axes.set(xscale="log", xlabel="position in the document, up to (tokens)", ylabel="bits per byte")
    axes.set_title(f"{results['run']}, step {results['step']}, on {results['data']} ({results['split']})")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    with user_errors():
        arguments = tyro.cli(Arguments, prog="python -m experiments.evaluate", description=__doc__)
        with jax.set_mesh(one_device()):
            main(arguments)
