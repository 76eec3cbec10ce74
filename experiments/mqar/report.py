"""What a run tells: a line of progress, its results as JSON, and a plot."""

import math
from pathlib import Path
from typing import Any

import matplotlib.figure

from experiments import output
from experiments.mqar.train import SOLVED, Report

LINE_STYLES = ("-", "--", ":", "-.")


def describe(report: Report) -> list[str]:
    """What a training says of itself on the way."""
    accuracy = [] if report.accuracy is None else [f"accuracy {report.accuracy:.3f}"]
    return [f"loss {report.loss:.3f}", *accuracy, f"{report.examples_per_second:,.0f} examples/s"]


def summarize(model: dict[str, Any], reports: list[Report]) -> dict[str, Any]:
    """One training as JSON: `model` (mixer, hidden_size, learning_rate), how it ended, and its tests."""
    last = reports[-1]
    fields = ("step", "learning_rate", "loss", "accuracy", "seconds")
    finite = [report for report in reports if math.isfinite(report.loss)]
    curve = [{name: getattr(report, name) for name in fields} for report in finite if report.accuracy is not None]
    best = max((point["accuracy"] for point in curve), default=0.0)
    ended = f"above {SOLVED}" if best > SOLVED else "all epochs done" if last in finite else "loss not finite"
    return {**model, "accuracy": best, "ended": ended, "steps": last.step, "seconds": last.seconds, "curve": curve}


def best_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every mixer and width the run whose accuracy is highest; among equals the one with the fewest steps."""
    best = {}
    for run in sorted(runs, key=lambda run: (-run["accuracy"], run["steps"])):
        best.setdefault((run["mixer"], run["hidden_size"]), run)
    return [best[key] for key in dict.fromkeys((run["mixer"], run["hidden_size"]) for run in runs)]


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results` with its `runs` into results.json of that folder, the best runs by name, and accuracy.png."""
    fields = ("mixer", "hidden_size", "learning_rate", "accuracy", "ended", "steps", "seconds")
    best = [{name: run[name] for name in fields} for run in best_runs(results["runs"])]
    output.write(out / "results.json", {**results, "best": best}, allow_nan=False)
    plot(results).savefig(out / "accuracy.png", dpi=150)


def plot(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """Accuracy over steps of the best runs (the others faint), and over the width if there are several."""
    widths = sorted({run["hidden_size"] for run in results["runs"]})
    figure = matplotlib.figure.Figure(figsize=(11 if len(widths) > 1 else 7, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if len(widths) > 1 else 1, sharey=True, squeeze=False)[0]
    _plot_steps(panels[0], results["runs"], widths)
    if len(widths) > 1:
        _plot_widths(panels[1], results["runs"], widths)
    for axes in panels:
        axes.axhline(SOLVED, color="gray", linewidth=0.8, linestyle=(0, (1, 3)), label=f"{SOLVED}: training stops")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    panels[0].set_ylabel("test accuracy")
    settings = results["settings"]
    figure.suptitle(f"MQAR, length {settings['length']}, {settings['num_pairs']} pairs, 2 layers")
    return figure


def _plot_steps(axes, runs, widths) -> None:
    best = best_runs(runs)
    for run in sorted(runs, key=lambda run: run in best):  # the best on top
        steps = [point["step"] for point in run["curve"]]
        label = f"{run['mixer']}, width {run['hidden_size']}, learning rate {run['learning_rate']:.2g}"
        axes.plot(
            steps,
            [point["accuracy"] for point in run["curve"]],
            color=_color(run, runs),
            linestyle=LINE_STYLES[widths.index(run["hidden_size"]) % len(LINE_STYLES)],
            marker="o" if len(steps) < 30 else None,
            markersize=3,
            alpha=1.0 if run in best else 0.25,
            label=label if run in best else None,
        )
    axes.set_xlabel("step")


def _plot_widths(axes, runs, widths) -> None:
    best = best_runs(runs)
    for mixer in dict.fromkeys(run["mixer"] for run in runs):
        points = sorted((run["hidden_size"], run["accuracy"]) for run in best if run["mixer"] == mixer)
        color = _color({"mixer": mixer}, runs)
        axes.plot(*zip(*points, strict=True), color=color, marker="o", label=mixer)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("width, best learning rate")


def _color(run, runs) -> str:
    mixers = list(dict.fromkeys(run["mixer"] for run in runs))
    return f"C{mixers.index(run['mixer'])}"
