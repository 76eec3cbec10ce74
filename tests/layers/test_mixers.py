"""Every mixer: its paper's equations, and the laws that all of them keep."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax.layers import MIXERS
from tests.helpers import rel_err
from tests.layers import definitions
from tests.layers.cases import HIDDEN, TOLERANCE, VARIANTS, Layer, float64, tokens

LENGTH = 13
PIECES = (4, 4, 5)


@pytest.fixture(scope="module", params=VARIANTS)
def layer(request):
    """Each variant's layer, compiled once for all tests."""
    return Layer(request.param)


def test_every_mixer_is_among_the_variants():
    assert {variant.mixer for variant in VARIANTS.values()} == set(MIXERS) == set(definitions.MIXERS)


def define(layer, x):
    """The layer's definition for x [B, T, D]."""
    mixer, config, inputs = layer.variant
    parameters = float64(layer.module)
    rows = np.asarray(x, np.float64)
    return np.stack([definitions.MIXERS[mixer](parameters, row, config, **dict(inputs)) for row in rows])


def test_computes_its_definition(layer):
    x = tokens(LENGTH)
    assert rel_err(layer(x)[0], define(layer, x)) < TOLERANCE


@pytest.mark.parametrize("t", [0, 5, LENGTH - 1])
def test_the_future_changes_nothing(layer, t):
    x = tokens(LENGTH)
    before, after = layer(x)[0], layer(x.at[:, t].add(1.0))[0]
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert rel_err(after[:, t], before[:, t]) > 1e-3


def test_a_sequence_may_be_split_anywhere(layer):
    @settings(max_examples=4, deadline=None)
    @given(st.permutations(PIECES), st.booleans(), st.integers(0, 100))
    def law(lengths, from_empty_state, seed):
        x = tokens(LENGTH, seed=seed)
        state, pieces = layer.module.init_state(2, max_length=LENGTH) if from_empty_state else None, []
        for piece in jnp.split(x, np.cumsum(lengths)[:-1], axis=1):
            y, state = layer(piece, state)
            pieces.append(y)
        assert rel_err(jnp.concatenate(pieces, axis=1), layer(x)[0]) < TOLERANCE

    law()


def test_token_by_token(layer):
    x = tokens(LENGTH)
    y, state = layer.steps(x, layer.module.init_state(2, LENGTH))
    assert rel_err(y, layer(x)[0]) < TOLERANCE
    _, expected = layer(x, layer.module.init_state(2, LENGTH))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for result, reference in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert result.dtype == reference.dtype
        assert rel_err(result, reference) < TOLERANCE


def test_packed_documents_are_run_alone(layer):
    """Two rows of three documents each. The first goes on from a state, and the state returned is the last one's.

    A document alone is a row of its own: what came before its state, itself, what goes on from its state, and padding.
    """
    before, x, cotangent, after = (np.asarray(tokens(n, seed=seed)) for seed, n in enumerate((4, LENGTH, LENGTH, 5)))
    borders = ([0, 4, 8, LENGTH], [0, 5, 9, LENGTH])
    ids = np.asarray([[sum(t >= border for border in row[1:-1]) % 2 for t in range(LENGTH)] for row in borders])
    _, state = layer(before)
    y, state, gradient = layer.with_gradient(x, cotangent, state, ids)
    y_after, _ = layer(after, state)

    documents = [(row, *ends) for row in range(2) for ends in itertools.pairwise(borders[row])]
    rows, cotangents = np.zeros((2, len(documents), LENGTH, HIDDEN), np.float32)
    places = []
    for i, (row, start, stop) in enumerate(documents):
        pieces = [before[row][: 4 * (start == 0)], x[row, start:stop], after[row][: 5 * (stop == LENGTH)]]
        place = slice(len(pieces[0]), len(pieces[0]) + stop - start)
        rows[i, : sum(map(len, pieces))] = np.concatenate(pieces)
        cotangents[i, place] = cotangent[row, start:stop]
        places.append(place)
    y_alone, _, gradient_alone = layer.with_gradient(rows, cotangents)

    for i, ((row, start, stop), place) in enumerate(zip(documents, places, strict=True)):
        assert rel_err(y[row, start:stop], y_alone[i, place]) < TOLERANCE
        assert rel_err(gradient[row, start:stop], gradient_alone[i, place]) < TOLERANCE
        if stop == LENGTH:
            assert rel_err(y_after[row], y_alone[i, place.stop : place.stop + 5]) < TOLERANCE


def test_large_inputs_stay_finite(layer):
    """They close gates and saturate the softmax."""
    x, cotangent = tokens(LENGTH, batch_size=6), tokens(LENGTH, batch_size=6, seed=1)
    y, state, gradient = layer.with_gradient(1000 * x, cotangent)
    for result in (y, gradient, *jax.tree.leaves(state)):
        assert np.isfinite(result).all()


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16(name):
    layer, x = Layer(name, dtype=jnp.bfloat16), tokens(LENGTH).astype(jnp.bfloat16)
    y, state = layer(x, layer.module.init_state(2, LENGTH))
    assert y.dtype == jnp.bfloat16
    assert rel_err(y, define(layer, x)) < 3e-2
    chex.assert_trees_all_equal_shapes_and_dtypes(state, layer.module.init_state(2, LENGTH))
    if name != "softmax":
        leaves = [(jax.tree_util.keystr(path), x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(state)]
        kinds = {dtype for path, dtype in leaves if ".convolutions" not in path}
        assert jnp.dtype(jnp.float32) in kinds and kinds <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
