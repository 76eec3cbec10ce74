"""Multi-query associative recall: `python -m experiments.mqar`."""

import itertools
from typing import Any

import tyro

from experiments import output
from experiments.command_line import user_errors
from experiments.mqar.config import Config
from experiments.mqar.report import best_runs, describe, summarize, write_results
from experiments.mqar.train import Functions, make_examples, make_functions, train
from experiments.provenance import provenance
from gsa_jax.models import ModelConfig, count_parameters
from gsa_jax.training.metrics import Console, duration


@user_errors()
def main(config: Config) -> dict[str, Any]:
    """Trains every combination, writes after each; returns what is written."""
    config = config.resolved()
    models = {key: config.model(*key) for key in itertools.product(config.mixers, config.hidden_sizes)}
    functions = {key: make_functions(model) for key, model in models.items()}
    task = (config.length, config.num_pairs, config.vocab_size)
    sizes = (config.train_examples, config.test_examples)
    examples = [make_examples(config.seed + i, size, *task) for i, size in enumerate(sizes)]
    results = {"settings": output.settings(config), **provenance("experiments.mqar"), "runs": []}
    file = output.new_folder(config.out) / "results.json"
    output.write(file, results)  # from here on the folder is taken
    try:
        sweep(config, models, functions, examples, results)
    finally:
        if not results["runs"]:
            file.unlink()
    return results


def sweep(
    config: Config,
    models: dict[tuple[str, int], ModelConfig],
    functions: dict[tuple[str, int], Functions],
    examples: list[Any],
    results: dict[str, Any],
) -> None:
    """Trains every combination and adds it to the results, in memory and on disk."""
    total = len(models) * len(config.learning_rates)
    with Console() as console:
        for key, rate in itertools.product(models, config.learning_rates):
            parameters, _ = count_parameters(models[key])
            number = len(results["runs"]) + 1
            console.start(f"[{number}/{total}] {name(*key, rate)}: {parameters:,} parameters")
            reports = []
            for report in train(functions[key], *examples, config, rate):
                reports.append(report)
                seconds_left = report.seconds / report.step * (report.num_steps - report.step)
                stays = report.accuracy is not None
                console.step(report.step, report.num_steps, describe(report), seconds_left, stays=stays)
            model = dict(zip(("mixer", "hidden_size"), key, strict=True), learning_rate=rate, parameters=parameters)
            results["runs"].append(summarize(model, reports))
            write_results(config.out, results)
        for run in best_runs(results["runs"]):
            what = name(run["mixer"], run["hidden_size"], run["learning_rate"])
            console.note(
                f"{what}: accuracy {run['accuracy']:.4f} ({run['ended']}) "
                f"after {run['steps']} steps, {duration(run['seconds'])}"
            )
        console.note(f"results.json and accuracy.png are in {config.out}")


def name(mixer: str, hidden_size: int, learning_rate: float) -> str:
    """A training for people."""
    return f"{mixer}, width {hidden_size}, learning rate {learning_rate:.2g}"


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.mqar"))
