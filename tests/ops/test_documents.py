"""Packed documents: each as if run alone, and none sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax import ops
from tests.ops.cases import (
    GATES,
    IMPLEMENTATIONS,
    OPS,
    TOLERANCE,
    Sizes,
    assert_all_close,
    expected,
    make_case,
    outputs_and_gradients,
)

SIZES = Sizes(B=2, T=40, H=4, G=2, K=6, V=5, M=7)


def segment_ids(borders):
    """Ids [B, T] with a new document at each of the borders; the ids of the second row repeat, neighbours differ."""
    ids = np.sum([np.arange(SIZES.T) >= border for border in borders], axis=0)
    return np.asarray([ids, ids % 2], np.int32)


drawn = given(
    st.sets(st.integers(1, SIZES.T - 1), min_size=1, max_size=6).map(sorted),
    st.sampled_from(list(GATES)),
    st.integers(0, 1000),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_documents(op, implementation):
    options = {"implementation": implementation, "chunk_size": 8}
    write = {"write": True} if op is OPS[0] else {}

    @settings(max_examples=6, deadline=None)
    @drawn
    def equal_those_run_alone(borders, gates, seed):
        arrays, cotangents = make_case(op, SIZES, gates=gates, seed=seed, **write)
        ids = segment_ids(borders)
        results = outputs_and_gradients(op, arrays, cotangents, ids, **options)
        assert_all_close(results, expected(op, arrays, cotangents, ids), TOLERANCE[jnp.float32], gates)

    @settings(max_examples=6, deadline=None)
    @drawn
    def leak_nothing(borders, gates, seed):
        arrays, cotangents = make_case(op, SIZES, gates=gates, seed=seed, **write)
        others = make_case(op, SIZES, seed=seed + 1, **write)
        ids = segment_ids(borders)
        changed = (np.arange(SIZES.T) >= borders[0]) & (np.arange(SIZES.T) < (*borders, SIZES.T)[1])

        def replace(x, y):
            return np.where(changed[None, :, None, None], y, x) if x.shape[1] == SIZES.T else x

        before = outputs_and_gradients(op, arrays, cotangents, ids, **options)
        after = outputs_and_gradients(op, *jax.tree.map(replace, (arrays, cotangents), others), ids, **options)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if x.shape[1] == SIZES.T:
                np.testing.assert_array_equal(x[:, ~changed], y[:, ~changed])

    equal_those_run_alone()
    leak_nothing()


@pytest.mark.parametrize("op", OPS)
def test_one_document_is_no_documents(op):
    arrays, _ = make_case(op, SIZES)
    with_ids = op(arrays, segment_ids=jnp.full((SIZES.B, SIZES.T), 7), implementation="scan")
    without = op(arrays, implementation="scan")
    jax.tree.map(np.testing.assert_array_equal, with_ids, without)


def test_the_derived_write_strength_is_that_of_the_gate_given():
    """A border closes the gate of a document's first token, which is still written with 1 - exp(log_decay)."""
    q = k = v = jnp.ones((1, 2, 1, 1))
    log_decay = jnp.full((1, 2, 1, 1), -0.5)
    _, state = ops.gated_slot_attention(q, k, v, log_decay, segment_ids=jnp.asarray([[0, 1]]))
    np.testing.assert_allclose(state.values, 1 - np.exp(-0.5), rtol=1e-6)
