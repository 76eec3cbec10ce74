"""Inputs for the ops' tests, and one compiled way to run an op forward and backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsa_jax import ops
from tests.helpers import rel_err
from tests.ops import oracle

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}


class Sizes(NamedTuple):
    """The sizes of one call: batch, tokens, query heads, groups, width of keys and values, slots."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    M: int


def slot_attention(arrays, **options):
    """`gated_slot_attention` from and to dictionaries, as `oracle.slot_attention`."""
    state = ops.SlotState(arrays["keys"], arrays["values"]) if "keys" in arrays else None
    q, k, v, log_decay, write = (arrays.get(name) for name in ("q", "k", "v", "log_decay", "write"))
    out, state = ops.gated_slot_attention(q, k, v, log_decay, write, initial_state=state, **options)
    return {"out": out, "keys": state.keys, "values": state.values}


def linear_attention(arrays, **options):
    """`gated_linear_attention` from and to dictionaries, as `oracle.linear_attention`."""
    q, k, v, log_decay = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    out, state = ops.gated_linear_attention(q, k, v, log_decay, initial_state=arrays.get("state"), **options)
    return {"out": out, "state": state}


ORACLES = {slot_attention: oracle.slot_attention, linear_attention: oracle.linear_attention}
OPS = tuple(ORACLES)
IMPLEMENTATIONS = ("scan", "chunked")
_STATIC = ("op", "implementation", "chunk_size", "scale")


@functools.partial(jax.jit, static_argnames=_STATIC)
def outputs(op, arrays, segment_ids=None, **options):
    """The outputs of `op`, compiled."""
    return op(arrays, segment_ids=segment_ids, **options)


@functools.partial(jax.jit, static_argnames=_STATIC)
def outputs_and_gradients(op, arrays, cotangents, segment_ids=None, **options):
    """(outputs, gradients by the inputs' names) of `op`, compiled."""
    results, pullback = jax.vjp(lambda arrays: op(arrays, segment_ids=segment_ids, **options), arrays)
    (gradients,) = pullback(cotangents)
    return results, gradients


def _weak(rng, shape):
    return -np.logaddexp(0, rng.normal(size=shape)) / 16


def _with_runs(rng, shape):
    """Weak gates with runs of strong ones: some tokens of -20, some of -1000, for all slots and for some."""
    gates = _weak(rng, shape)
    for strength in (-20.0, -1000.0) * 4:
        start, slots = rng.integers(shape[1]), rng.random(shape[-1]) < rng.choice([0.5, 1.0])
        gates[:, start : start + rng.integers(1, 40), :, slots] = strength
    return gates


def _with_one(value):
    def gates(rng, shape):
        gates = _weak(rng, shape)
        gates[:, rng.integers(shape[1])] = value
        return gates

    return gates


GATES = {
    "ordinary": lambda rng, shape: -np.logaddexp(0, rng.normal(size=shape)),
    "weak": _weak,
    "open": lambda rng, shape: np.zeros(shape),
    "-20 everywhere": lambda rng, shape: np.full(shape, -20.0),
    "-25 everywhere": lambda rng, shape: np.full(shape, -25.0),
    "-1000 everywhere": lambda rng, shape: np.full(shape, -1000.0),
    "-inf everywhere": lambda rng, shape: np.full(shape, -np.inf),
    "one -inf": _with_one(-np.inf),
    "one -1000": _with_one(-1000.0),
    "runs of -20 and -1000": _with_runs,
    "all kinds": lambda rng, shape: rng.choice([0, -1e-6, -1e-2, -1, -20, -25, -100, -1000, -np.inf], size=shape),
}
"""Log decays by name."""


def make_case(op, sizes, *, gates="ordinary", write=False, state=True, scalar=False, dtype=jnp.float32, seed=0):
    """Random (inputs, cotangents) for `op`, as dictionaries of NumPy arrays.

    q, k, v, write and the cotangent of out are in `dtype`; gates and states are float32.

    Args:
      op: `slot_attention` or `linear_attention`.
      sizes: `Sizes`.
      gates: a name in `GATES`.
      write: with a write strength of its own (slot attention), weak enough for open gates.
      state: with initial states.
      scalar: one gate per head (linear attention).
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape, dtype=dtype: rng.normal(size=shape).astype(dtype)  # noqa: E731
    B, T, H, G, K, V, M = sizes
    rows = M if op is slot_attention else K
    arrays = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, V)}
    arrays["log_decay"] = GATES[gates](rng, (B, T, G, 1 if scalar else rows)).astype(np.float32)
    if write:
        arrays["write"] = (rng.uniform(size=(B, T, G, M)) / 8).astype(dtype)
    widths = {"keys": K, "values": V} if op is slot_attention else {"state": V}
    states = {name: normal(B, G, rows, width, dtype=jnp.float32) for name, width in widths.items()}
    cotangents = {"out": normal(B, T, H, V)}
    cotangents |= {name: normal(*x.shape, dtype=jnp.float32) for name, x in states.items()}
    return arrays | (states if state else {}), cotangents


def expected(op, arrays, cotangents, segment_ids=None, **scale):
    """(outputs, gradients) of `op` in float64 NumPy."""
    if segment_ids is None:
        return ORACLES[op](arrays, cotangents, **scale)
    return oracle.documents(ORACLES[op], arrays, cotangents, segment_ids, **scale)


def assert_close(results, references, tolerance, about=""):
    """Every array is within `tolerance` of its reference, by norm; what float32 can't hold counts as zero."""
    assert results.keys() == references.keys()
    errors = {}
    for name, reference in references.items():
        reference = np.asarray(reference, np.float64)
        errors[name] = rel_err(results[name], np.where(np.abs(reference) < 1e-30, 0, reference))
    assert all(error <= tolerance for error in errors.values()), f"{about} {errors} > {tolerance}"


def assert_all_close(results, references, tolerance, about=""):
    """`assert_close` of outputs and of gradients."""
    for result, reference, what in zip(results, references, ("outputs", "gradients"), strict=True):
        assert_close(result, reference, tolerance, f"{about} {what}")
