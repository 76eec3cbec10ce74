"""What a run tells: lines on the console, metrics.jsonl, TensorBoard, and a plot of the curves."""

import datetime
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress
import tensorboardX
from jax.sharding import Mesh

from gsa_jax.models import ModelConfig, count_parameters

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 990e12,
    "H200": 990e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
"""Peak bfloat16 rates in FLOP/s, by a part of the device's kind; the first match counts."""


def peak_flops(device: jax.Device) -> float | None:
    """The peak bfloat16 rate of a device in FLOP/s, None if it is not a known one."""
    return next((rate for kind, rate in PEAK_FLOPS.items() if kind in device.device_kind), None)


def speed(config: ModelConfig, mesh: Mesh, tokens_per_second: float) -> dict[str, float]:
    """Tokens per second over all devices and, for devices that tell, MFU and the peak memory of one in GiB.

    MFU, the share of the peak rate that is used, counts six operations for every parameter that a token is multiplied
    with, and nothing for what the mixers do between their projections.
    """
    values = {"tokens_per_second": tokens_per_second}
    device = mesh.local_devices[0]
    if peak := peak_flops(device):
        _, multiplied = count_parameters(config)
        values["mfu"] = 6 * multiplied * tokens_per_second / (peak * mesh.size)
    if memory := device.memory_stats():
        values["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return values


class MetricsLog:
    """metrics.jsonl, one JSON object per logged step, and the same values as TensorBoard curves.

    Lines are only ever appended, but for a resumed run: what the run it continues wrote after the checkpoint is cut off
    first, so that no step stands there twice. Only the first host writes; a context manager.
    """

    def __init__(self, run_dir: Path, *, after_step: int, tensorboard: bool):
        """Goes on after `after_step`, 0 for a new run."""
        writes = jax.process_index() == 0
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl" if writes else Path(os.devnull)
        if path.is_file():
            _cut(path, after_step)
        self._file = path.open("a")
        self._tensorboard = None
        if tensorboard and writes:
            self._tensorboard = tensorboardX.SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes the values of one step; nothing is left in buffers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed run left unfinished is not one.

    Raises:
      ValueError: another line is no JSON object with a step; the message names the file and the line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    return [metrics for _, metrics in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The finished lines of a file of metrics, as they stand there and what they mean."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                metrics = json.loads(line)
                metrics["step"] + 0
            except (ValueError, TypeError, LookupError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with a step, got {line[:80]!r}"
                ) from error
            yield line, metrics


def _cut(path: Path, after_step: int) -> None:
    """Cuts off the lines behind `after_step`."""
    earlier = itertools.takewhile(lambda line: line[1]["step"] <= after_step, _lines(path))
    os.truncate(path, sum(len(line) for line, _ in earlier))


class Console:
    """The progress of trainings on standard output: a bar on a terminal, and lines that stay; a context manager.

    Only the first host prints.
    """

    def __init__(self):
        self._console = rich.console.Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)
        self._progress = rich.progress.Progress(
            rich.progress.BarColumn(20),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
        )
        self._task = self._progress.add_task("")
        self.is_terminal = self._console.is_terminal

    def __enter__(self) -> "Console":
        if self.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.is_terminal:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False)

    def start(self, title: str) -> None:
        """A training begins."""
        self.note(title)
        self._progress.reset(self._task, description="compiling")

    def step(self, step: int, steps: int, values: list[str], seconds_left: float, *, stays: bool) -> None:
        """Shows where the training stands, in a line that stays if asked."""
        line = " · ".join([f"step {step}/{steps}", *values, f"{duration(seconds_left)} left"])
        self._progress.update(self._task, total=steps, completed=step, description=line)
        if stays:
            self.note(line)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def describe(values: dict[str, float]) -> list[str]:
    """The values of a line of metrics.jsonl for people."""
    formats = {
        "loss": "loss {:.4f}",
        "validation_bits_per_byte": "validation {:.4f} bits/byte",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    return [text.format(values[name]) for name, text in formats.items() if name in values]


def plot_curves(run_dir: Path | str, *, references: dict[str, float] | None = None) -> Path:
    """Draws the training loss and the validation bits per byte of a run into its curve.png, and returns that path.

    Args:
      run_dir: the folder of the run.
      references: bits per byte of other models by name, drawn as dashed lines.
    """
    import matplotlib.figure  # here, as it takes a fifth of the time in which the whole package is imported

    run_dir, metrics = Path(run_dir), read_metrics(run_dir)
    panels = {"loss": "training loss\n(nats per token)", "validation_bits_per_byte": "validation\n(bits per byte)"}
    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    for axes, (name, label), color in zip(
        figure.subplots(2, sharex=True), panels.items(), ("tab:blue", "tab:orange"), strict=True
    ):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3)
            axes.annotate(f"{points[-1][1]:.3f}", points[-1], xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for name, value in (references or {}).items():
        axes.axhline(value, color="gray", linestyle="--", linewidth=1)
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{name} {value:.3f}", (1, value), xytext=(-4, 3), color="gray", **place)
    axes.set_xlabel("step")
    figure.align_ylabels()
    figure.suptitle(run_dir.name)
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=150)
    return path
