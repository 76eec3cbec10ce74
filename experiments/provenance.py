"""Where a recorded number comes from."""

import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib


def provenance(module: str, device: str | None = None, versions: dict[str, str] | None = None) -> dict[str, Any]:
    """Device, versions, command and date of a run of `python -m {module}`, for the JSON beside its results.

    Device and versions are jax's unless given.
    """
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__} if versions is None else versions
    return {
        "device": device or device_name(),
        "versions": versions | {"python": platform.python_version()},
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The accelerator's name, or the CPU's with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or 1} cores"
