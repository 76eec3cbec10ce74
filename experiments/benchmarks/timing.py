"""How every benchmark measures, ours and the peers'."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.command_line import out_of_memory

REFUSALS = (NotImplementedError, ValueError)
"""What an implementation raises for a case that it does not take."""


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], *, repeats: int, seconds: float) -> float:
    """The median over `repeats` of the seconds that a call takes, when calls stand back to back for `seconds` or more.

    `wait` gets the last call's result and returns when it is there.
    """

    def run(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / calls

    run(1)  # warms up
    calls = max(1, round(seconds / run(1)))
    return statistics.median(run(calls) for _ in range(repeats))


def copy_rate(mib: int = 1024) -> float:
    """The bytes per second that a copy of an array reads and writes."""
    x = jnp.zeros(mib * 2**18, jnp.float32)
    copy = jax.jit(jnp.copy)
    return 2 * x.nbytes / time_calls(lambda: copy(x), jax.block_until_ready, repeats=7, seconds=0.2)


def attempt(measure: Callable[[], dict], refusals: type | tuple[type, ...] = REFUSALS) -> dict:
    """What `measure()` returns; {"error": why not} where memory does not suffice or it raises one of `refusals`."""
    try:
        return measure()
    except Exception as error:
        if out_of_memory(error):
            return {"error": "not enough memory"}
        if not isinstance(error, refusals):
            raise
        outcome = "does not fit" if isinstance(error, REFUSALS) else "failed"
        reason = str(error).strip() or type(error).__name__
        return {"error": f"{outcome}: {reason.splitlines()[0]}"}
