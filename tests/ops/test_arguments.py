"""Bad arguments raise with a message that names the argument, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import (
    SlotState,
    abc_log_decay,
    gated_linear_attention,
    gated_linear_attention_step,
    gated_slot_attention,
    gated_slot_attention_step,
    short_convolution,
    softmax_attention,
)

B, T, H, G, K, V, M = 2, 5, 4, 2, 3, 6, 7
GOOD = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V), "log_decay": (B, T, G, M)}
STATE = SlotState(jnp.ones((B, G, M, K)), jnp.ones((B, G, M, V)))


def arrays(shapes):
    return {name: -jnp.ones(shape) for name, shape in shapes.items()}


def check(function, error, message, **arguments):
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments)


IN_BOTH = [
    ({"q": None}, TypeError, "q must be an array of shape [B, T, H, K], got NoneType"),
    ({"q": jnp.ones((B, T, K))}, ValueError, "q must have shape [B, T, H, K] with no empty dimension, got [2, 5, 3]"),
    (
        {"q": jnp.ones((B, 0, H, K))},
        ValueError,
        "q must have shape [B, T, H, K] with no empty dimension, got [2, 0, 4, 3]",
    ),
    ({"q": jnp.ones((B, T, H, K), jnp.int32)}, TypeError, "q must be floating point, got dtype int32"),
    ({"k": jnp.ones((B, T, G, 9))}, ValueError, "k must have shape [B=2, T=5, G, K=3]"),
    ({"k": jnp.ones((B, 4, G, K))}, ValueError, "with no empty dimension, got [2, 4, 2, 3]"),
    ({"v": jnp.ones((B, T, 1, V))}, ValueError, "v must have shape [B=2, T=5, G=2, V]"),
    ({"q": jnp.ones((B, T, 3, K))}, ValueError, "multiple of the heads of k and v, got H=3, G=2"),
    (
        {"k": jnp.ones((B, T, G, K), jnp.bfloat16)},
        TypeError,
        "q, k and v must have one dtype, got float32, bfloat16 and float32",
    ),
    ({"segment_ids": jnp.ones((B, T))}, TypeError, "segment_ids must hold integers, got dtype float32"),
    ({"segment_ids": [[0] * T] * B}, TypeError, "segment_ids must be an array of shape [B=2, T=5], got list"),
    ({"segment_ids": jnp.ones((B, 4), jnp.int32)}, ValueError, "segment_ids must have shape [B=2, T=5] with no"),
    ({"chunk_size": 48}, ValueError, "chunk_size must be a power of two or None, got 48"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a power of two or None, got 0"),
    ({"chunk_size": 16.0}, ValueError, "chunk_size must be a power of two or None, got 16.0"),
    (
        {"implementation": "triton"},
        ValueError,
        "implementation must be one of 'scan', 'chunked', 'pallas' or None, got 'triton'",
    ),
    ({"implementation": "pallas"}, ValueError, "implementation='pallas': the kernels"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"scale": jnp.ones(2)}, TypeError, "scale must be a number, got Array([1., 1.]"),
]


@pytest.mark.parametrize(("change", "error", "message"), IN_BOTH)
@pytest.mark.parametrize("function", [gated_slot_attention, gated_linear_attention])
def test_both(function, change, error, message):
    shapes = GOOD | ({"log_decay": (B, T, G, K)} if function is gated_linear_attention else {})
    check(function, error, message, **arrays(shapes) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_decay": jnp.ones((B, T, H, M))}, ValueError, "log_decay must have shape [B=2, T=5, G=2, M]"),
        ({"log_decay": jnp.ones((B, T, G, M), int)}, TypeError, "log_decay must be floating point, got dtype int32"),
        ({"write": jnp.ones((B, T, G, 1))}, ValueError, "write must have shape [B=2, T=5, G=2, M=7]"),
        ({"scale": None}, TypeError, "scale must be a number, got None"),
        ({"scale": jnp.complex64(1j)}, TypeError, "scale must be a number, got"),
        ({"scale": np.array("1")}, TypeError, "scale must be a number, got"),
        ({"initial_state": jnp.ones(3)}, TypeError, "state must be a SlotState(keys, values), got ArrayImpl"),
        ({"initial_state": 5}, TypeError, "state must be a SlotState(keys, values), got int"),
        (
            {"initial_state": STATE._replace(keys=jnp.ones((B, G, K, M)))},
            ValueError,
            "initial_state.keys must have shape [B=2, G=2, M=7, K=3] with no empty dimension, got [2, 2, 3, 7]",
        ),
        (
            {"initial_state": STATE._replace(values=jnp.ones((B, G, M, K)))},
            ValueError,
            "initial_state.values must have shape [B=2, G=2, M=7, V=6]",
        ),
    ],
)
def test_slot_attention(change, error, message):
    check(gated_slot_attention, error, message, **arrays(GOOD) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_decay": jnp.ones((B, T, G, 2))}, ValueError, "log_decay must have shape [B=2, T=5, G=2, K=3]"),
        ({"log_decay": -1.0}, TypeError, "log_decay must be an array of shape [B=2, T=5, G=2, K=3], got float"),
        ({"initial_state": jnp.ones((B, G, V, K))}, ValueError, "initial_state must have shape [B=2, G=2, K=3, V=6]"),
        ({"initial_state": STATE}, TypeError, "initial_state must be an array of shape [B=2, G=2, K=3, V=6]"),
    ],
)
def test_linear_attention(change, error, message):
    check(gated_linear_attention, error, message, **arrays(GOOD | {"log_decay": (B, T, G, K)}) | change)


@pytest.mark.parametrize("number", [np.int64, np.float32, jnp.float32])
@pytest.mark.parametrize("function", [gated_slot_attention, gated_linear_attention])
def test_numbers_of_numpy_and_jax_are_numbers(function, number):
    """As a scale, and whole ones as a chunk size."""
    given = arrays(GOOD if function is gated_slot_attention else GOOD | {"log_decay": (B, T, G, K)})
    chunk_size = number(4) if number is np.int64 else 4
    out, _ = function(**given, scale=number(2), implementation="chunked", chunk_size=chunk_size)
    expected, _ = function(**given, scale=2, implementation="chunked", chunk_size=4)
    np.testing.assert_array_equal(out, expected)


def test_steps():
    token = {name: (shape[0], *shape[2:]) for name, shape in GOOD.items()}
    check(gated_slot_attention_step, ValueError, "q must have shape [B, H, K]", **arrays(GOOD), state=STATE)
    check(
        gated_slot_attention_step, ValueError, "state.keys must have shape", **arrays(token), state=(STATE.values,) * 2
    )
    check(gated_slot_attention_step, TypeError, "scale must be a number", **arrays(token), state=STATE, scale=None)
    wrong = {"write": jnp.ones((B, G, 1)), "state": STATE}
    check(gated_slot_attention_step, ValueError, "write must have shape [B=2, G=2, M=7]", **arrays(token), **wrong)
    token = token | {"log_decay": (B, G, 1)}
    message = "state must have shape [B=2, G=2, K=3, V=6] with no empty dimension, got [2, 2, 7, 3]"
    check(gated_linear_attention_step, ValueError, message, **arrays(token), state=STATE.keys)
    check(gated_linear_attention_step, TypeError, "state must be an array of shape", **arrays(token), state=None)
    state = jnp.ones((B, G, K, V))
    check(gated_linear_attention_step, TypeError, "scale must be a number", **arrays(token), state=state, scale="1")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"write_logits": jnp.ones((B, T, M))}, ValueError, "write_logits must have shape [B, T, G, M]"),
        (
            {"write_logits": jnp.ones((B, T, G, M), bool)},
            TypeError,
            "write_logits must be floating point, got dtype bool",
        ),
        ({"initial_normalizer": jnp.ones((B, M, G))}, ValueError, "initial_normalizer must have shape [B=2, G=2, M=7]"),
        ({"segment_ids": jnp.ones((T, B), int)}, ValueError, "segment_ids must have shape [B=2, T=5] with no"),
    ],
)
def test_abc(change, error, message):
    check(abc_log_decay, error, message, **{"write_logits": jnp.ones((B, T, G, M))} | change)


def test_errors_come_while_tracing_too():
    with pytest.raises(ValueError, match="k must have shape"):
        jax.eval_shape(gated_slot_attention, *(jax.ShapeDtypeStruct((B, T, G, n), jnp.float32) for n in (K, V, V, M)))


def test_a_convolution_has_one_dtype_and_its_state_the_taps_before():
    x, kernel = jnp.ones((1, 5, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    check(
        short_convolution, TypeError, "kernel must have x's dtype bfloat16, got float32", x=x, kernel=jnp.ones((2, 1))
    )
    state = jnp.ones((1, 3, 1), jnp.bfloat16)
    message = "initial_state must have shape [B, W-1, C] = [1, 0, 1], got [1, 3, 1]"
    check(short_convolution, ValueError, message, x=x, kernel=kernel, initial_state=state)


def test_values_of_softmax_attention_are_as_wide_as_its_keys():
    q, v = jnp.ones((B, T, G, K)), jnp.ones((B, T, G, V))
    check(softmax_attention, ValueError, f"v must have shape [B={B}, T={T}, G={G}, K={K}]", q=q, k=q, v=v)
