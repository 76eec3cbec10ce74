"""The sizes that a kernel is free to choose: those of a table, by device and shape, else those of the kernel's rule.

`sizes.json` holds what was found to be faster than the rule. `python -m experiments.benchmarks.tune` extends it.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

TABLE = Path(__file__).with_suffix(".json")
"""{device: {"memory_read warpgroups 512x8x1": 2}}, what a size is, and the shapes it depends on"""


class Choice(NamedTuple):
    """A size that was chosen."""

    taken: int
    options: tuple[int, ...]
    """sizes that would do as well"""


class _Trial(NamedTuple):
    sizes: dict[str, int]
    choices: dict[str, Choice]


_trial: contextvars.ContextVar[_Trial | None] = contextvars.ContextVar("trial", default=None)


def choose(size: str, shape: tuple[int, ...], rule: int, options: Iterable[int]) -> int:
    """A size by what it is and the shapes that it depends on: a trial's, the table's for this device, or `rule`.

    Raises:
      ValueError: the trial or the table has a size that would not do.
    """
    name, options = f"{size} {'x'.join(map(str, shape))}", tuple(sorted({rule, *options}))
    running = _trial.get() or _Trial({}, {})
    taken = running.sizes.get(name, _table().get(device_kind(), {}).get(name, rule))
    if taken not in options:
        raise ValueError(f"{name}: got {taken}, expected one of {', '.join(map(str, options))}")
    running.choices[name] = Choice(taken, options)
    return taken


@contextlib.contextmanager
def trial(sizes: dict[str, int]) -> Iterator[dict[str, Choice]]:
    """Kernels traced inside take these sizes, by name; yields the choices that they make."""
    jax.clear_caches()
    token = _trial.set(_Trial(sizes, {}))
    try:
        yield _trial.get().choices
    finally:
        _trial.reset(token)
        jax.clear_caches()


def device_kind() -> str:
    """The GPU that a kernel is for: the mesh's in context, or the first one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def multiprocessors() -> int:
    """How many it has: as many blocks run at once. An H100's or H200's where that can't be told."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = device.num_cores if device else getattr(jax.devices()[0], "core_count", None)
    return found or 132


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())
