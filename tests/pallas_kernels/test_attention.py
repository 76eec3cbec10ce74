"""The public functions by the kernels, in the interpreter, against float64 NumPy: outputs and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sizes
from tests.ops.cases import (
    Sizes,
    assert_all_close,
    expected,
    linear_attention,
    make_case,
    outputs_and_gradients,
    slot_attention,
)
from tests.pallas_kernels.hopper import mesh

TOLERANCE = 7e-3
"""by norm; the chunked form, in bfloat16 too, comes to 5e-3 as well"""


@pytest.fixture
def run(interpreted, monkeypatch):
    """`outputs_and_gradients` with the kernels."""
    monkeypatch.setattr(sizes, "device", lambda: mesh().abstract_device)
    compiled = jax.jit(
        functools.partial(outputs_and_gradients.__wrapped__, implementation="pallas", scale=0.1), static_argnums=0
    )

    def run(*arguments):
        with interpreted():
            return jax.block_until_ready(compiled(*arguments))

    return run


@pytest.mark.parametrize(
    ("op", "sizes", "kinds", "options"),
    [
        (slot_attention, Sizes(1, 50, 2, 1, 128, 64, 64), ("-20 everywhere", "weak"), {"write": True}),
        (slot_attention, Sizes(1, 75, 1, 1, 64, 64, 100), ("all kinds",), {}),
        (linear_attention, Sizes(2, 133, 1, 1, 128, 64, 0), ("all kinds",), {}),
        (linear_attention, Sizes(1, 70, 4, 2, 64, 128, 0), ("one -inf",), {"scalar": True, "dtype": jnp.float16}),
    ],
    ids=["write given", "many slots, write derived", "linear", "linear, one gate a head"],
)
def test_outputs_and_gradients(run, op, sizes, kinds, options):
    for gates in kinds:
        arrays, cotangents = make_case(op, sizes, gates=gates, **{"dtype": jnp.bfloat16} | options)
        results = run(op, arrays, cotangents)
        assert_all_close(results, expected(op, arrays, cotangents, scale=0.1), TOLERANCE, gates)


@pytest.mark.parametrize("gates", ["weak", "ordinary", "-20 everywhere"])
def test_linear_attention_rounds_little_but_its_results(run, gates):
    """Rounding an exact result to bfloat16 is an error of 1.66e-3; `out` has one more rounding, of its scores."""
    arrays, cotangents = make_case(linear_attention, Sizes(1, 100, 1, 1, 128, 64, 0), gates=gates, dtype=jnp.bfloat16)
    results = run(linear_attention, arrays, cotangents)
    assert_all_close(results, expected(linear_attention, arrays, cotangents, scale=0.1), 2.8e-3, gates)


def test_documents_with_write_derived(run):
    sizes, gates = Sizes(1, 101, 2, 1, 64, 128, 16), "runs of -20 and -1000"
    arrays, cotangents = make_case(slot_attention, sizes, gates=gates, dtype=jnp.float16)
    segment_ids = np.repeat([[5, 6, 0]], [9, 55, 37], axis=1)
    results = run(slot_attention, arrays, cotangents, segment_ids)
    assert_all_close(results, expected(slot_attention, arrays, cotangents, segment_ids, scale=0.1), TOLERANCE)
