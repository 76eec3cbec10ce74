"""Sampling: what is kept, and how often it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gsa_jax.generation import SamplingConfig, sample
from gsa_jax.generation.sampling import keep_top_k, keep_top_p

SIZE = 7
distinct_logits = st.lists(st.integers(-60, 60), min_size=SIZE, max_size=SIZE, unique=True).map(
    lambda x: np.asarray(x, np.float32) / 8
)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def assert_keeps(kept, logits, tokens):
    """The tokens' logits are as they were, the others are -inf."""
    expected = np.full(SIZE, -np.inf)
    expected[list(tokens)] = logits[list(tokens)]
    np.testing.assert_array_equal(kept, expected)


@given(distinct_logits, st.integers(1, SIZE + 2))
def test_top_k_keeps_the_k_largest(logits, k):
    assert_keeps(keep_top_k(jnp.asarray(logits), k), logits, np.argsort(-logits)[:k])


@given(distinct_logits, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_hold_p(logits, p):
    order = np.argsort(-logits)
    held = np.cumsum(softmax(logits)[order])
    assume(np.abs(held - p).min() > 1e-5)
    assert_keeps(keep_top_p(jnp.asarray(logits), p), logits, order[: np.argmax(held > p) + 1])


def test_a_top_p_of_one_keeps_all():
    logits = np.asarray([20, 0, 0, -1, 3, 4, -20], np.float32)
    assert_keeps(keep_top_p(jnp.asarray(logits), 1.0), logits, range(SIZE))


def test_ties_with_the_last_one_kept_are_kept():
    logits = np.asarray([1, 0, 2, 1, 0, 0, 1], np.float32)
    assert_keeps(keep_top_k(jnp.asarray(logits), 2), logits, [0, 2, 3, 6])


def test_rows_are_cut_each_by_itself():
    logits = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)
    for cut in (lambda x: keep_top_k(x, 3), lambda x: keep_top_p(x, 0.6)):
        np.testing.assert_array_equal(cut(jnp.asarray(logits)), np.stack([cut(jnp.asarray(row)) for row in logits]))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (SamplingConfig(), range(SIZE)),
        (SamplingConfig(temperature=0.5), range(SIZE)),
        (SamplingConfig(temperature=3.0), range(SIZE)),
        (SamplingConfig(top_k=3), [0, 2, 4]),
        (SamplingConfig(top_k=1), [2]),
        (SamplingConfig(top_k=SIZE + 1, top_p=1.0), range(SIZE)),
        (SamplingConfig(top_p=0.6), [0, 2]),
        (SamplingConfig(top_p=1e-6), [2]),
        (SamplingConfig(top_k=3, top_p=0.9), [0, 2, 4]),
        (SamplingConfig(temperature=0.2, top_p=0.9), [2]),  # the temperature comes before the cut
    ],
    ids=str,
)
def test_frequencies_are_the_softmax_of_what_is_kept(config, tokens):
    """Probabilities at temperature 1: 0.26, 0.04, 0.42, 0.02, 0.16, 0.03, 0.06; within five standard deviations."""
    logits = np.asarray([1.5, -0.3, 2.0, -1.0, 1.0, -0.6, 0.1], np.float32)
    kept = np.full(SIZE, -np.inf)
    kept[list(tokens)] = logits[list(tokens)] / config.temperature
    probabilities, draws = softmax(kept), 20_000
    drawn = sample(jnp.broadcast_to(logits, (draws, SIZE)), jax.random.key(0), config)
    assert drawn.dtype == jnp.int32
    frequencies = np.bincount(drawn, minlength=SIZE) / draws
    bound = 5 * np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= bound).all()


@given(distinct_logits, st.sampled_from([None, 2]), st.sampled_from([None, 0.5]))
def test_temperature_zero_takes_the_most_likely(logits, top_k, top_p):
    config = SamplingConfig(temperature=0, top_k=top_k, top_p=top_p)
    assert sample(jnp.asarray(logits)[None], jax.random.key(0), config) == np.argmax(logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
