"""What the benchmark of the ops tells: a table, remarks below it, and a plot of time against sequence length."""

from collections.abc import Iterable
from typing import Any

import matplotlib.figure
import matplotlib.ticker
from rich.box import SIMPLE
from rich.table import Table

from experiments.benchmarks.shapes import SHAPES

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
OURS = ("chunked", "pallas")
"""The implementations that are compared with everything else: the scan, and the peers."""


def all_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Our rows and the peers', case by case; a peer that was recorded before says so in its name."""
    peers = result["peers"] or {"rows": []}
    mark = " (recorded)" if "file" in peers else ""
    rows = result["rows"] + [row | {"by": row["by"] + mark} for row in peers["rows"]]
    return [row for case in _cases(result) for row in rows if row["case"] == case]


def ratios(row: dict[str, Any], other: dict[str, Any] | None) -> list[float | None]:
    """How many times faster `row` is than `other`, in each pass."""
    times = [(row[name].get("ms"), other and other[name].get("ms")) for name in PASSES]
    return [theirs / ours if ours and theirs else None for ours, theirs in times]


def floor_shares(row: dict[str, Any], rate: float) -> list[float | None]:
    """The time in which a copy moves as many bytes as inputs and outputs have, over the time of each pass."""
    passes = [row[name] for name in PASSES]
    return [p["bytes"] / rate / (p["ms"] / 1000) if {"bytes", "ms"} <= p.keys() else None for p in passes]


def as_table(result: dict[str, Any]) -> Table:
    """A line for each case and implementation."""
    rows = all_rows(result)
    by_name = {(row["case"], row["by"]): row for row in rows}
    others = [by for by in _names(rows) if by not in OURS]
    rate = result["copy_bytes_per_second"]

    table = Table(title=_title(result), box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("case", "B,T,H,K,V(,M)", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "fwd ms",
        "fwd+bwd ms",
        *("vs " + other.replace(" (", "\n(") for other in others),
        *["of floor"] * bool(rate),
        "temp MiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        comparisons = [ratios(row, by_name.get((row["case"], other))) for other in others]
        table.add_row(
            row["case"],
            ",".join(map(str, SHAPES[row["case"]].sizes)),
            row["by"],
            *("-" if "error" in row[name] else f"{row[name]['ms']:.3g}" for name in PASSES),
            *(_pair(values, "{:.1f}x") if row["by"] in OURS else "" for values in comparisons),
            *([_pair(floor_shares(row, rate), "{:.0%}")] if rate else []),
            _pair([row[name].get("temp_mib") for name in PASSES], "{:.0f}"),
        )
    return table


def remarks(result: dict[str, Any]) -> list[str]:
    """Lines that say what the columns mean, what does not fit, and where the peers' times come from."""
    lines = [
        "Two numbers in a cell: forward / forward + backward. vs X: time of X over time here. "
        "temp: memory beyond inputs and outputs."
    ]
    if rate := result["copy_bytes_per_second"]:
        lines.append(
            f"of floor: the time in which a copy ({rate / 1e12:.2f} TB/s read and written) moves as many bytes as the "
            "inputs and outputs of each pass have, over the time here."
        )
    for row in all_rows(result):
        errors = {name: row[name]["error"] for name in PASSES if "error" in row[name]}
        if len(set(errors.values())) == 1 and len(errors) == 2:
            lines.append(f"{row['case']}, {row['by']}: {errors['forward']}")
        else:
            lines += [f"{row['case']}, {row['by']}, {PASSES[name]}: {error}" for name, error in errors.items()]
    if peers := result["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
        source = f"recorded in {peers['file']}" if "file" in peers else "measured in this run"
        lines.append(f"Peers: {source}, on {peers['device']}, {versions}. {peers.get('note', '')}".strip())
    return lines + _about_attention(all_rows(result))


def draw(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Time against sequence length where cases differ in it alone, at a constant number of tokens; else every case."""
    rows = all_rows(result)
    families = {}
    for case in _cases(result):
        shape = SHAPES[case]
        families.setdefault((shape._replace(B=0, T=0), shape.B * shape.T), []).append(case)
    curves = {family: cases for family, cases in families.items() if len(cases) > 1} or families

    figure = matplotlib.figure.Figure(figsize=(1.5 + 5 * len(curves), 8), layout="constrained")
    panels = figure.subplots(len(PASSES), len(curves), sharex="col", squeeze=False)
    for column, ((sizes, tokens), cases) in enumerate(curves.items()):
        of_family = [row for row in rows if row["case"] in cases]
        for axes, name in zip(panels[:, column], PASSES, strict=True):
            _draw_times(axes, of_family, name, _names(rows), result["copy_bytes_per_second"])
        slots = f", M {sizes.M}" if sizes.M else ""
        panels[0, column].set_title(f"{sizes.op}, H {sizes.H}, K {sizes.K}, V {sizes.V}{slots}; B·T = {tokens:,}")
        panels[-1, column].set_xlabel("T, tokens in a row")
    for axes, label in zip(panels[:, 0], PASSES.values(), strict=True):
        axes.set_ylabel(f"{label}, ms")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("\n".join([_title(result), *_about_attention(rows)]))
    return figure


def _draw_times(axes, rows, name, order, rate) -> None:
    """A line for each implementation and peer, in the colors of their `order`, and one for the floor."""
    for i, by in enumerate(order):
        points = sorted(
            (SHAPES[row["case"]].T, row[name]["ms"]) for row in rows if row["by"] == by and "ms" in row[name]
        )
        style = "-" if by in OURS else "--"
        if points:
            axes.plot(*zip(*points, strict=True), style, color=f"C{i}", marker="o", markersize=4, label=by)
    if rate:
        floor = sorted(
            {(SHAPES[row["case"]].T, 1000 * row[name]["bytes"] / rate) for row in rows if "bytes" in row[name]}
        )
        axes.plot(*zip(*floor, strict=True), ":", color="gray", marker=".", label="floor: inputs and outputs copied")
    lengths = sorted({SHAPES[row["case"]].T for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _cases(result) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in result["rows"]))


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["by"] for row in rows))


def _about_attention(rows) -> list[str]:
    if not any(by.startswith(("torch", "cudnn")) for by in _names(rows)):
        return []
    return ["torch flash and cudnn, cudnn: causal softmax attention over the same tokens and width, in heads of 128."]


def _title(result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "python")
    return f"{result['device']}, {result['dtype']}, {versions}"


def _pair(values: Iterable[float | None], form: str) -> str:
    """A cell of both passes; "-" stands for what was not measured."""
    values = list(values)
    if values == [None, None]:
        return "-"
    return " / ".join("-" if value is None else form.format(value) for value in values)
