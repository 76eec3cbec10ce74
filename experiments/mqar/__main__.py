"""Multi-query associative recall: `python -m experiments.mqar`."""

import itertools
from pathlib import Path
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
    file = config.out / "results.json"
    if config.resume:
        results["runs"] = earlier_runs(file, results["settings"])
    else:
        output.write(output.new_folder(config.out) / file.name, results)  # from here on the folder is taken
    try:
        sweep(config, models, functions, examples, results)
    except KeyboardInterrupt:
        if results["runs"]:
            count = len(results["runs"])
            print(f"finished trainings: {count}, in {file}; the same command with --resume runs the others")
        raise
    finally:
        if not results["runs"]:
            file.unlink()
    return results


def earlier_runs(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings in a file of results.

    Raises:
      ValueError: there is none, or they had other settings than these, mixers, widths and learning rates apart.
    """
    earlier = output.read(file, "resume", "settings", "runs")
    free = {"mixers", "hidden_sizes", "learning_rates", "out", "resume"}
    for name, value in settings.items():
        if name not in free and earlier["settings"].get(name) != value:
            raise ValueError(f"resume: {file} has {name}={earlier['settings'].get(name)}, expected {value}")
    return earlier["runs"]


def sweep(
    config: Config,
    models: dict[tuple[str, int], ModelConfig],
    functions: dict[tuple[str, int], Functions],
    examples: list[Any],
    results: dict[str, Any],
) -> None:
    """Trains every combination and adds it to the results, in memory and on disk."""
    done = {(run["mixer"], run["hidden_size"], run["learning_rate"]) for run in results["runs"]}
    trainings = [
        (key, rate) for key, rate in itertools.product(models, config.learning_rates) if (*key, rate) not in done
    ]
    with Console() as console:
        for number, (key, rate) in enumerate(trainings, 1):
            parameters, _ = count_parameters(models[key])
            console.start(f"[{number}/{len(trainings)}] {name(*key, rate)}: {parameters:,} parameters")
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
