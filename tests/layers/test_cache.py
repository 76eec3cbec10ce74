"""Softmax attention's cache: what it keeps, what it drops, and that its shape stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.layers import SoftmaxAttentionConfig
from tests.helpers import rel_err
from tests.layers.cases import HIDDEN, TOLERANCE, Variant, tokens

X = tokens(14)


def attention(window=None):
    """The same layer but for its window."""
    return Variant("softmax", SoftmaxAttentionConfig(num_heads=2, window=window)).build()


@jax.jit
def call(layer, x, cache=None, segment_ids=None):
    return layer(x, cache, segment_ids)


@jax.jit
def decode(layer, x, cache):
    """`step` token by token inside one scan, which holds the cache's shape to what it was."""
    cache, y = jax.lax.scan(lambda cache, token: layer.step(token, cache)[::-1], cache, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), cache


@pytest.mark.parametrize(("max_length", "window", "kept"), [(14, None, 14), (5, None, 5), (9, 4, 4), (3, 6, 3)])
def test_of_a_fixed_length_is_a_window_when_full(max_length, window, kept):
    layer = attention(window)
    y, cache = decode(layer, X, layer.init_state(2, max_length))
    assert cache.keys.shape == cache.values.shape == (2, kept, 2, HIDDEN // 2)
    np.testing.assert_array_equal(cache.length, [kept, kept])
    assert cache.position == 14
    assert rel_err(y, call(attention(window=kept), X)[0]) < TOLERANCE


def test_of_a_fixed_length_is_a_window_for_whole_sequences_too():
    cache, pieces = attention().init_state(2, 5), []
    for piece in (X[:, :3], X[:, 3:]):
        y, cache = call(attention(), piece, cache)
        pieces.append(y)
    assert cache.keys.shape[1] == 5
    assert rel_err(jnp.concatenate(pieces, axis=1), call(attention(window=5), X)[0]) < TOLERANCE


def test_without_a_length_grows_up_to_the_window():
    for window, sizes in ((None, [4, 8, 12]), (6, [4, 6, 6])):
        layer, cache = attention(window), None
        for start, size in zip((0, 4, 8), sizes, strict=True):
            _, cache = call(layer, X[:, start : start + 4], cache)
            assert cache.keys.shape[1] == size
            np.testing.assert_array_equal(cache.length, [size, size])


def test_holds_the_last_document_only():
    ids = np.asarray([[0] * 14, [0] * 9 + [1] * 5])
    _, cache = call(attention(), X, attention().init_state(2, 14), ids)
    np.testing.assert_array_equal(cache.length, [14, 5])


def test_empty_is_no_cache():
    layer, empty = attention(), attention().init_state(2)
    assert empty.keys.shape[1] == 0
    assert rel_err(call(layer, X, empty)[0], call(layer, X)[0]) < TOLERANCE
