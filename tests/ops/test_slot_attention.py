"""Gated Slot Attention against float64 NumPy: outputs, final states and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import SlotState, gated_slot_attention_step, write_strength
from tests.helpers import rel_err
from tests.ops.cases import (
    GATES,
    IMPLEMENTATIONS,
    TOLERANCE,
    Sizes,
    assert_all_close,
    assert_close,
    expected,
    make_case,
    outputs_and_gradients,
    slot_attention,
)

GATED = Sizes(B=1, T=290, H=4, G=2, K=12, V=10, M=6)
"""Two spans of `chunked.py`, the second one padded."""

EQUAL_SLOTS = ("-20 everywhere", "-25 everywhere", "-1000 everywhere", "-inf everywhere")
"""Derived write strengths are 1 there to rounding: the slots are alike, and what tells them apart has no gradient."""


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(3, 1, 2, 2, 5, 3, 4), {}),
        (Sizes(1, 2, 1, 1, 1, 1, 1), {"write": True}),
        (Sizes(2, 31, 4, 2, 8, 8, 8), {"state": False}),
        (Sizes(1, 257, 6, 2, 7, 9, 33), {"write": True, "state": False}),
        (Sizes(2, 700, 3, 1, 24, 20, 12), {"write": True}),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, Sizes) else "-".join(x) or "plain",
)
def test_shapes(sizes, options):
    arrays, cotangents = make_case(slot_attention, sizes, **options)
    reference = expected(slot_attention, arrays, cotangents)
    for implementation in IMPLEMENTATIONS:
        results = outputs_and_gradients(slot_attention, arrays, cotangents, implementation=implementation)
        assert_all_close(results, reference, TOLERANCE[jnp.float32], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_gates_with_write_given(dtype, implementation):
    for gates in GATES:
        arrays, cotangents = make_case(slot_attention, GATED, gates=gates, write=True, dtype=dtype)
        results = outputs_and_gradients(slot_attention, arrays, cotangents, implementation=implementation)
        assert_all_close(results, expected(slot_attention, arrays, cotangents), TOLERANCE[dtype], gates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_with_write_derived(implementation):
    for gates in GATES:
        arrays, cotangents = make_case(slot_attention, GATED, gates=gates, state=False)
        outputs, gradients = outputs_and_gradients(slot_attention, arrays, cotangents, implementation=implementation)
        expected_outputs, expected_gradients = expected(slot_attention, arrays, cotangents)
        assert_close(outputs, expected_outputs, TOLERANCE[jnp.float32], gates)
        if gates in EQUAL_SLOTS:
            for name in ("q", "log_decay"):
                assert np.abs(gradients.pop(name)).max() < 1e-5, gates
                assert np.abs(expected_gradients.pop(name)).max() < 1e-5
        assert_close(gradients, expected_gradients, TOLERANCE[jnp.float32], gates)


def test_four_query_heads_per_group_and_gates_in_bfloat16():
    for gates in ("ordinary", "weak", "open"):
        arrays, cotangents = make_case(slot_attention, Sizes(1, 70, 8, 2, 24, 20, 12), gates=gates, dtype=jnp.bfloat16)
        arrays["log_decay"] = arrays["log_decay"].astype(jnp.bfloat16)
        results = outputs_and_gradients(slot_attention, arrays, cotangents, implementation="chunked")
        assert_all_close(results, expected(slot_attention, arrays, cotangents), TOLERANCE[jnp.bfloat16], gates)


@pytest.mark.parametrize("chunk_size", [1, 4, 128])
def test_chunk_sizes(chunk_size):
    arrays, cotangents = make_case(slot_attention, Sizes(1, 90, 2, 1, 8, 6, 5), gates="runs of -20 and -1000")
    results = outputs_and_gradients(
        slot_attention, arrays, cotangents, implementation="chunked", chunk_size=chunk_size, scale=0.4
    )
    assert_all_close(results, expected(slot_attention, arrays, cotangents, scale=0.4), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_is_exact(implementation):
    with jax.enable_x64(True):
        case = make_case(slot_attention, Sizes(1, 20, 4, 2, 8, 6, 5), gates="all kinds", write=True)
        arrays, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), case)
        results = outputs_and_gradients(slot_attention, arrays, cotangents, implementation=implementation, chunk_size=8)
        assert_all_close(results, expected(slot_attention, arrays, cotangents), 1e-13)


def test_output_dtypes():
    arrays, _ = make_case(slot_attention, Sizes(1, 9, 2, 2, 4, 4, 4), dtype=jnp.bfloat16)
    for implementation in (*IMPLEMENTATIONS, None):
        outputs = jax.eval_shape(lambda x, name=implementation: slot_attention(x, implementation=name), arrays)
        dtypes = {name: x.dtype for name, x in outputs.items()}
        assert dtypes == {"out": jnp.bfloat16, "keys": jnp.float32, "values": jnp.float32}


@pytest.mark.parametrize("write", [False, True])
def test_step_by_step(write):
    arrays, cotangents = make_case(slot_attention, Sizes(2, 40, 4, 2, 6, 5, 7), gates="all kinds", write=write)
    state = SlotState(arrays.pop("keys"), arrays.pop("values"))

    @jax.jit
    def run(arrays, state):
        def token(state, x):
            out, state = gated_slot_attention_step(
                x["q"], x["k"], x["v"], x["log_decay"], state, x.get("write"), scale=0.5
            )
            return state, out

        state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: x.swapaxes(0, 1), arrays))
        return {"out": out.swapaxes(0, 1), "keys": state.keys, "values": state.values}

    arrays_with_state = arrays | {"keys": state.keys, "values": state.values}
    outputs, _ = expected(slot_attention, arrays_with_state, cotangents, scale=0.5)
    assert_close(run(arrays, state), outputs, TOLERANCE[jnp.float32])


def test_write_strength_does_not_cancel():
    log_decay = jnp.asarray([-1e-9, -1e-4, -1.0, -30.0, -jnp.inf, 0.0])
    assert rel_err(write_strength(log_decay), -np.expm1(np.asarray(log_decay, np.float64))) < 1e-7
    assert write_strength(log_decay)[0] == pytest.approx(1e-9)
