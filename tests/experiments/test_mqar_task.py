"""The MQAR generator against every property of its definition (arXiv:2312.04927)."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.mqar.task import IGNORE, generate


@st.composite
def settings(draw):
    """Arguments of `generate`: smallest and largest legal values included."""
    num_pairs = draw(st.integers(1, 12))
    return dict(
        rng=draw(st.integers(0, 2**32 - 1)),
        num_examples=draw(st.integers(1, 5)),
        num_pairs=num_pairs,
        length=4 * num_pairs + 2 * draw(st.integers(0, 20)),
        vocab_size=2 * num_pairs + 2 + draw(st.integers(0, 100)),
        power=draw(st.floats(-3, 3)),
        random_non_queries=draw(st.booleans()),
    )


def query_positions(inputs, targets, num_pairs):
    """Where each pair is asked for, in the context's order: int [n, N]."""
    values = inputs[:, 1 : 2 * num_pairs : 2]
    hits = targets[:, None, :] == values[:, :, None]
    assert (hits.sum(-1) == 1).all()
    return hits.argmax(-1)


def assert_drawn_from(probabilities, counts):
    """The counts of a categorical variable fit its probabilities (chi-square test)."""
    probabilities = np.asarray(probabilities, np.float64)
    assert probabilities.sum() == pytest.approx(1)
    assert stats.chisquare(counts, probabilities * np.sum(counts)).pvalue > 1e-3


def count_rows(rows, among):
    """How often each element of `among`, a list of tuples, is a row of `rows`; every row has to be one of them."""
    index = {row: i for i, row in enumerate(among)}
    return np.bincount([index[tuple(row)] for row in rows.tolist()], minlength=len(among))


@given(settings())
def test_shapes_and_dtypes(kwargs):
    inputs, targets = generate(**kwargs)
    assert inputs.shape == targets.shape == (kwargs["num_examples"], kwargs["length"])
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.min() >= 0 and inputs.max() < kwargs["vocab_size"]


@given(settings())
def test_context_holds_distinct_keys_and_values_of_their_halves(kwargs):
    inputs, _ = generate(**kwargs)
    context, half = 2 * kwargs["num_pairs"], kwargs["vocab_size"] // 2
    keys, values = inputs[:, 0:context:2], inputs[:, 1:context:2]
    assert keys.min() >= 1 and keys.max() < half
    assert values.min() >= half and values.max() < kwargs["vocab_size"]
    for tokens in (keys, values):
        assert all(len(set(row)) == kwargs["num_pairs"] for row in tokens.tolist())


@given(settings())
def test_every_key_is_asked_for_once_and_labelled_with_its_value(kwargs):
    inputs, targets = generate(**kwargs)
    num_pairs = kwargs["num_pairs"]
    assert ((targets != IGNORE).sum(axis=1) == num_pairs).all()
    positions = query_positions(inputs, targets, num_pairs)  # finds each value once among the targets
    assert (np.take_along_axis(inputs, positions, axis=1) == inputs[:, 0 : 2 * num_pairs : 2]).all()


@given(settings())
def test_queries_stand_behind_the_context_at_even_distances(kwargs):
    _, targets = generate(**kwargs)
    positions = np.nonzero(targets != IGNORE)[1]
    assert (positions >= 2 * kwargs["num_pairs"]).all() and (positions % 2 == 0).all()


@given(settings())
def test_filler_is_zero_and_random_filler_changes_nothing_else(kwargs):
    inputs, targets = generate(**kwargs | {"random_non_queries": False})
    filler = targets == IGNORE
    filler[:, : 2 * kwargs["num_pairs"]] = False
    assert (inputs[filler] == 0).all() and (inputs[~filler] > 0).all()
    noisy_inputs, noisy_targets = generate(**kwargs | {"random_non_queries": True})
    assert (noisy_inputs[~filler] == inputs[~filler]).all() and (noisy_targets == targets).all()


def test_keys_and_values_are_uniform_in_every_order():
    inputs, _ = generate(0, 20_000, 8, 2, vocab_size=13)
    for tokens, choices in ((inputs[:, [0, 2]], range(1, 6)), (inputs[:, [1, 3]], range(6, 13))):
        pairs = list(permutations(choices, 2))
        assert_drawn_from(np.full(len(pairs), 1 / len(pairs)), count_rows(tokens, pairs))


@pytest.mark.parametrize("power", [0.01, 1.0, 2.5])
def test_places_are_drawn_one_after_the_other(power):
    """Every ordered triple of places against its exact probability under drawing without replacement."""
    num_pairs, space = 3, 6
    inputs, targets = generate(1, 40_000, 2 * (num_pairs + space), num_pairs, power=power)
    places = query_positions(inputs, targets, num_pairs) // 2 - num_pairs
    p = np.arange(1, space + 1.0) ** (power - 1)
    p /= p.sum()
    triples = list(permutations(range(space), num_pairs))
    exact = [p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in triples]
    assert_drawn_from(exact, count_rows(places, triples))


def test_places_agree_with_numpys_choice_at_a_length_of_the_paper():
    num_examples, length, num_pairs = 10_000, 128, 8
    space = (length - 2 * num_pairs) // 2
    inputs, targets = generate(2, num_examples, length, num_pairs)
    places = query_positions(inputs, targets, num_pairs) // 2 - num_pairs
    p = np.arange(1, space + 1.0) ** (0.01 - 1)
    p /= p.sum()
    rng = np.random.default_rng(3)
    choices = np.array([rng.choice(space, num_pairs, replace=False, p=p) for _ in range(num_examples)])
    assert_drawn_from(p, np.bincount(places[:, 0], minlength=space))
    for ours, theirs in ((places[:, 0], choices[:, 0]), (places[:, -1], choices[:, -1]), (places, choices)):
        counts = np.stack([np.bincount(x.ravel(), minlength=space) for x in (ours, theirs)])
        assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_the_last_place_is_the_last_but_one_token():
    """With as many places as pairs all of them are taken, from 2N to T - 2."""
    _, targets = generate(0, 10, 32, 8)
    assert (np.nonzero(targets != IGNORE)[1].reshape(10, 8) == np.arange(16, 32, 2)).all()


def test_random_filler_is_uniform_over_the_whole_vocabulary():
    num_pairs, vocab_size = 2, 12
    inputs, targets = generate(4, 5_000, 16, num_pairs, vocab_size=vocab_size, random_non_queries=True)
    filler = inputs[:, 2 * num_pairs :][targets[:, 2 * num_pairs :] == IGNORE]
    assert_drawn_from(np.full(vocab_size, 1 / vocab_size), np.bincount(filler, minlength=vocab_size))


def test_a_seed_fixes_the_examples_and_a_generator_goes_on():
    def same(a, b):
        return all((x == y).all() for x, y in zip(a, b, strict=True))

    first = generate(5, 20, 64, 4, random_non_queries=True)
    assert same(first, generate(5, 20, 64, 4, random_non_queries=True))
    assert not same(first, generate(6, 20, 64, 4, random_non_queries=True))
    rng = np.random.default_rng(5)
    assert same(first, generate(rng, 20, 64, 4, random_non_queries=True))
    assert not same(first, generate(rng, 20, 64, 4, random_non_queries=True))


@pytest.mark.parametrize("power", [-300.0, 300.0])
def test_extreme_powers_fill_from_one_end(power):
    inputs, targets = generate(0, 10, 512, 2, power=power)
    places = query_positions(inputs, targets, 2) // 2 - 2
    assert (places[:, 0] == (0 if power < 0 else 253)).mean() > 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_examples=0), r"num_examples is 0: it must be at least 1"),
        (dict(num_pairs=0), r"num_pairs is 0: it must be at least 1"),
        (dict(length=65), r"length is 65: it must be even and at least 4 \* num_pairs = 16"),
        (dict(length=14), r"length is 14: it must be even and at least 4 \* num_pairs = 16"),
        (dict(vocab_size=9), r"num_pairs is 4: it must be at most vocab_size // 2 - 1 = 3"),
        (dict(power=float("nan")), r"power is nan: it must be finite"),
    ],
)
def test_arguments_out_of_bounds_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(**dict(rng=0, num_examples=2, length=64, num_pairs=4) | wrong)
