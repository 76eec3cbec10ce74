"""Gated linear attention against float64 NumPy: outputs, final states and every gradient."""

import jax
import jax.numpy as jnp
import pytest

from gsa_jax.ops import gated_linear_attention, gated_linear_attention_step
from tests.ops.cases import (
    GATES,
    IMPLEMENTATIONS,
    TOLERANCE,
    Sizes,
    assert_all_close,
    assert_close,
    expected,
    linear_attention,
    make_case,
    outputs_and_gradients,
)

GATED = Sizes(B=1, T=290, H=4, G=2, K=12, V=10, M=0)
"""Two spans of `chunked.py`, the second one padded."""


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(3, 1, 2, 2, 5, 3, 0), {}),
        (Sizes(1, 3, 1, 1, 1, 1, 0), {"scalar": True}),
        (Sizes(2, 32, 4, 2, 8, 8, 0), {"state": False}),
        (Sizes(1, 33, 6, 2, 7, 9, 0), {"scalar": True, "state": False}),
        (Sizes(1, 257, 2, 1, 16, 12, 0), {}),
        (Sizes(2, 699, 3, 1, 24, 20, 0), {"scalar": True}),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, Sizes) else "-".join(x) or "plain",
)
def test_shapes(sizes, options):
    arrays, cotangents = make_case(linear_attention, sizes, **options)
    reference = expected(linear_attention, arrays, cotangents)
    for implementation in IMPLEMENTATIONS:
        results = outputs_and_gradients(linear_attention, arrays, cotangents, implementation=implementation)
        assert_all_close(results, reference, TOLERANCE[jnp.float32], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_gates(dtype, implementation):
    for gates in GATES:
        arrays, cotangents = make_case(linear_attention, GATED, gates=gates, dtype=dtype)
        results = outputs_and_gradients(linear_attention, arrays, cotangents, implementation=implementation)
        assert_all_close(results, expected(linear_attention, arrays, cotangents), TOLERANCE[dtype], gates)


def test_four_query_heads_per_group_and_gates_in_bfloat16():
    for gates in ("ordinary", "weak", "open"):
        arrays, cotangents = make_case(linear_attention, Sizes(1, 70, 8, 2, 24, 20, 0), gates=gates, dtype=jnp.bfloat16)
        arrays["log_decay"] = arrays["log_decay"].astype(jnp.bfloat16)
        results = outputs_and_gradients(linear_attention, arrays, cotangents, implementation="chunked")
        assert_all_close(results, expected(linear_attention, arrays, cotangents), TOLERANCE[jnp.bfloat16], gates)


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_chunk_sizes(chunk_size):
    arrays, cotangents = make_case(linear_attention, Sizes(1, 90, 2, 1, 8, 6, 0), gates="runs of -20 and -1000")
    results = outputs_and_gradients(
        linear_attention, arrays, cotangents, implementation="chunked", chunk_size=chunk_size, scale=1.5
    )
    assert_all_close(results, expected(linear_attention, arrays, cotangents, scale=1.5), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_is_exact(implementation):
    with jax.enable_x64(True):
        case = make_case(linear_attention, Sizes(1, 20, 4, 2, 8, 6, 0), gates="all kinds")
        arrays, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), case)
        results = outputs_and_gradients(
            linear_attention, arrays, cotangents, implementation=implementation, chunk_size=8
        )
        assert_all_close(results, expected(linear_attention, arrays, cotangents), 1e-13)


def test_output_dtypes():
    arrays, _ = make_case(linear_attention, Sizes(1, 9, 2, 2, 4, 4, 0), dtype=jnp.bfloat16)
    for implementation in (*IMPLEMENTATIONS, None):
        outputs = jax.eval_shape(lambda x, name=implementation: linear_attention(x, implementation=name), arrays)
        assert {name: x.dtype for name, x in outputs.items()} == {"out": jnp.bfloat16, "state": jnp.float32}


@pytest.mark.parametrize("scalar", [False, True])
def test_step_by_step(scalar):
    arrays, cotangents = make_case(linear_attention, Sizes(2, 40, 4, 2, 6, 5, 0), gates="all kinds", scalar=scalar)

    @jax.jit
    def run(arrays):
        def token(state, x):
            out, state = gated_linear_attention_step(x["q"], x["k"], x["v"], x["log_decay"], state)
            return state, out

        tokens = {name: x.swapaxes(0, 1) for name, x in arrays.items() if name != "state"}
        state, out = jax.lax.scan(token, arrays["state"], tokens)
        return {"out": out.swapaxes(0, 1), "state": state}

    outputs, _ = expected(linear_attention, arrays, cotangents)
    assert_close(run(arrays), outputs, TOLERANCE[jnp.float32])


def test_sums_that_only_their_scale_brings_into_the_range_of_float16():
    q = jnp.full((1, 4, 1, 256), 16.0, jnp.float16)
    gates = jnp.full((1, 4, 1, 256), -100.0)
    out, _ = gated_linear_attention(q, q, jnp.ones((1, 4, 1, 1), jnp.float16), gates, implementation="chunked")
    assert jnp.all(out == 256 * 16 * 16 / 16)
