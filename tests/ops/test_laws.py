"""Laws that hold for every input: splitting, chunking, batching, grouping. Hypothesis draws the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import (
    GATES,
    IMPLEMENTATIONS,
    OPS,
    TOLERANCE,
    Sizes,
    assert_close,
    linear_attention,
    make_case,
    outputs,
)

SIZES = Sizes(B=2, T=40, H=4, G=2, K=6, V=5, M=7)
few = settings(max_examples=8, deadline=None)
ops, implementations = st.sampled_from(OPS), st.sampled_from(IMPLEMENTATIONS)
cases = st.fixed_dictionaries({"gates": st.sampled_from(list(GATES)), "seed": st.integers(0, 1000)})


def run(op, arrays, implementation="chunked", chunk_size=8):
    return jax.device_get(outputs(op, arrays, implementation=implementation, chunk_size=chunk_size))


@few
@given(ops, implementations, cases, st.sampled_from([13, 27]))
def test_a_sequence_may_be_split_anywhere(op, implementation, case, length):
    arrays, cotangents = make_case(op, SIZES, **case)
    states = cotangents.keys() - {"out"}
    tokens = {name: x for name, x in arrays.items() if name not in states}
    first = run(op, arrays | {name: x[:, :length] for name, x in tokens.items()}, implementation)
    rest = {name: x[:, length:] for name, x in tokens.items()}
    second = run(op, rest | {name: first[name] for name in states}, implementation)
    joined = second | {"out": np.concatenate([first["out"], second["out"]], axis=1)}
    assert_close(joined, run(op, arrays, implementation), TOLERANCE[jnp.float32])


@few
@given(ops, cases, st.sampled_from([1, 4, 64]))
def test_the_chunk_size_changes_nothing(op, case, chunk_size):
    arrays, _ = make_case(op, SIZES, **case)
    assert_close(run(op, arrays, chunk_size=chunk_size), run(op, arrays), TOLERANCE[jnp.float32])


@few
@given(ops, cases)
def test_implementations_agree(op, case):
    arrays, _ = make_case(op, SIZES, **case)
    assert_close(run(op, arrays), run(op, arrays, "scan"), TOLERANCE[jnp.float32])


@few
@given(ops, implementations, cases)
def test_batch_entries_are_independent(op, implementation, case):
    arrays, _ = make_case(op, SIZES, **case)
    others, _ = make_case(op, SIZES, seed=case["seed"] + 1)
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), arrays, others)
    before, after = run(op, arrays, implementation), run(op, mixed, implementation)
    for name in before:
        np.testing.assert_array_equal(after[name][0], before[name][0])


@few
@given(ops, implementations, cases)
def test_the_future_changes_nothing(op, implementation, case):
    arrays, _ = make_case(op, SIZES, **case)
    others, _ = make_case(op, SIZES, seed=case["seed"] + 1)
    tokens = [name for name in arrays if arrays[name].shape[1] == SIZES.T]
    mixed = arrays | {name: np.concatenate([arrays[name][:, :21], others[name][:, 21:]], axis=1) for name in tokens}
    before, after = run(op, arrays, implementation), run(op, mixed, implementation)
    np.testing.assert_array_equal(after["out"][:, :21], before["out"][:, :21])


@few
@given(ops, implementations, cases)
def test_grouped_heads_are_repeated_heads(op, implementation, case):
    arrays, _ = make_case(op, SIZES, **case)
    axes = {name: None if name == "q" else 2 if x.shape[1] == SIZES.T else 1 for name, x in arrays.items()}
    repeated = {name: x if axes[name] is None else np.repeat(x, 2, axes[name]) for name, x in arrays.items()}
    grouped, single = run(op, arrays, implementation), run(op, repeated, implementation)
    assert_close(
        grouped, {name: x if name == "out" else x[:, ::2] for name, x in single.items()}, TOLERANCE[jnp.float32]
    )


@few
@given(implementations, cases)
def test_one_gate_per_head_is_broadcast(implementation, case):
    arrays, _ = make_case(linear_attention, SIZES, scalar=True, **case)
    wide = arrays | {"log_decay": np.broadcast_to(arrays["log_decay"], arrays["k"].shape)}
    results = run(linear_attention, arrays, implementation), run(linear_attention, wide, implementation)
    assert_close(*results, TOLERANCE[jnp.float32])
