"""What the end-to-end benchmark tells: two tables, remarks below them, and a plot of tokens per second."""

from typing import Any

import matplotlib.figure
from rich.box import SIMPLE
from rich.table import Table

SHAPES = {"training": ("batch", "length"), "decoding": ("batch", "prompt")}
"""The parts of a result, and what their cases are told apart by."""

COLUMNS = {
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "ms a step": ("ms", "{:,.2f}"),
    "MFU": ("mfu", "{:.1%}"),
    "peak GiB": ("memory_gib", "{:.1f}"),
    "s to first step": ("first_step_seconds", "{:.1f}"),
}


def name_case(part: str, case: dict[str, Any]) -> str:
    """A case of a part in words, such as "training, 8 x 2048"."""
    return f"{part}, {' x '.join(str(case[name]) for name in SHAPES[part])}"


def describe(row: dict[str, Any]) -> str:
    """What was measured of a case, or went wrong, in a line."""
    if "error" in row:
        return row["error"]
    return ", ".join(f"{heading} {form.format(row[name])}" for heading, (name, form) in COLUMNS.items() if name in row)


def title(result: dict[str, Any]) -> str:
    """What was timed, and where."""
    settings = result["settings"]
    implementation = settings["implementation"] or "default"
    return (
        f"{settings['preset']}, {settings['param_dtype']} parameters, {implementation} implementation; "
        f"{result['device']}, jax {result['versions']['jax']}"
    )


def as_table(result: dict[str, Any], part: str) -> Table:
    """A line for each case of "training" or "decoding", with the columns that any of them has."""
    rows, peers = result[part], _peers(result, part)
    columns = {heading: column for heading, column in COLUMNS.items() if any(column[0] in row for row in rows)}
    table = Table(box=SIMPLE)
    for heading in (f"{part}, {' x '.join(SHAPES[part])}", *columns, *["vs " + _peer_name(result)] * bool(peers)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shape = tuple(row[name] for name in SHAPES[part])
        cells = [form.format(row[name]) if name in row else "-" for name, form in columns.values()]
        if peers:
            comparable = shape in peers and "ms" in row
            cells.append(f"{peers[shape]['ms'] / row['ms']:.2f}x" if comparable else "-")
        table.add_row(" x ".join(map(str, shape)), *cells)
    return table


def remarks(result: dict[str, Any]) -> list[str]:
    """Lines that say what does not fit and where a peer's numbers come from."""
    lines = [f"{name_case(part, row)}: {row['error']}" for part in SHAPES for row in result[part] if "error" in row]
    if peers := result["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
        lines.append(
            f"{peers['name']}: recorded in {peers['file']}, on {peers['device']}, {versions}. {peers['note']} "
            f"The ratio is its milliseconds over those here."
        )
    return lines


def draw(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Tokens per second of training over the length of the rows."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    recorded = list(_peers(result, "training").values())
    for rows, style, label in ((result["training"], "-", "here"), (recorded, "--", _peer_name(result))):
        points = sorted((row["length"], row["tokens_per_second"]) for row in rows if "ms" in row)
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
    cases = {row["length"]: f"{row['batch']} x {row['length']:,}" for row in [*recorded, *result["training"]]}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases), list(cases.values()))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rows x tokens of a row")
    axes.set_ylabel("training, tokens/s")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set_title(title(result), fontsize=10)
    return figure


def _peers(result, part) -> dict[tuple[int, ...], dict[str, Any]]:
    """The recorded peer's rows by their shapes."""
    rows = result["peers"][part] if result["peers"] else []
    return {tuple(row[name] for name in SHAPES[part]): row for row in rows}


def _peer_name(result) -> str:
    return f"{result['peers']['name']} (recorded)" if result["peers"] else ""
