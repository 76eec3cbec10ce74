"""Where a script's numbers go: a JSON file, written in one go, and the plot beside it."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def json_file(out: Path, argument: str = "out") -> Path:
    """The file that an `--out` stands for, its name ending in .json; its folder is there and takes files.

    Raises:
      ValueError: no file can be written there; the message names the argument.
    """
    file = out if out.suffix == ".json" else out.with_name(f"{out.name}.json")
    if file.is_dir():
        raise ValueError(f"{argument}: {file} is a folder, expected a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(f"{argument}: {file} can't be written ({error}), expected a file that can") from error
    return file


def new_folder(path: Path) -> Path:
    """The folder that an `--out` stands for, made if it is not there and empty if it is.

    Raises:
      ValueError: something is there, or no folder can be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not any(path.iterdir()):
            return path
    except OSError as error:
        raise ValueError(f"out: {path} can't be made ({error}), expected a folder that can") from error
    raise ValueError(f"out: {path} is not empty and is left as it is, expected a new folder")


def read(file: Path, argument: str, *fields: str) -> dict[str, Any]:
    """What a script wrote into `file`, which has these fields.

    Raises:
      ValueError: it is not such a file; the message names the argument that asks for it.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {file} can't be read ({error}), expected JSON that a script wrote") from error
    there = result if isinstance(result, dict) else {}
    missing = [field for field in fields if field not in there]
    if missing:
        raise ValueError(f"{argument}: {file} has no {missing[0]!r}, expected a file with {', '.join(fields)}")
    if there is not result:
        raise ValueError(f"{argument}: {file} holds a {type(result).__name__}, expected an object that a script wrote")
    return result


def settings(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def write(file: Path, result: dict[str, Any], figure: Figure | None = None, allow_nan: bool = True) -> None:
    """Puts the result into `file` in one go, so that a script that is stopped leaves no half of it, and the figure
    beside it.

    Raises:
      ValueError: a number is not finite, unless `allow_nan`.
    """
    text = json.dumps(result, indent=2, allow_nan=allow_nan)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(file)
    if figure:
        figure.savefig(file.with_suffix(".png"), dpi=150)
