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
"""{device: {"memory_read warpgroups 512x8x1x32": 2}}, what a size is, and the shapes it depends on"""


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
    running, kind = _trial.get() or _Trial({}, {}), device().device_kind
    taken = running.sizes.get(name, _table().get(kind, {}).get(name, rule))
    if taken not in options:
        source = "the trial" if name in running.sizes else f"{TABLE} for {kind}"
        raise ValueError(f"{name}: got {taken} from {source}, expected one of {', '.join(map(str, options))}")
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


def device() -> jax.Device | jax.sharding.AbstractDevice:
    """What a kernel is for: the devices of the mesh in context, or the default one."""
    default = jax.config.jax_default_device  # may be a platform's name
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return jax.sharding.get_abstract_mesh().abstract_device or default or jax.devices()[0]


def multiprocessors() -> int:
    """How many it has: as many blocks run at once. An H100's or H200's where that can't be told."""
    found = device()
    return getattr(found, "num_cores", None) or getattr(found, "core_count", None) or 132


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())
