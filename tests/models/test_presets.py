"""Presets and configurations: parameter counts by the papers' formulas, and what is refused."""

import math
import resource

import jax
import pytest
from flax import nnx

from gsa_jax.layers import MIXERS
from gsa_jax.models import PRESETS, ModelConfig, abstract_model, count_parameters, preset
from tests.models.cases import PAIRS, config

SIZES = {"340m": (1024, 24, 4), "1.3b": (2048, 24, 4), "2.7b": (2560, 32, 5), "7b": (4096, 32, 8)}
"""Hidden size, layers, heads of GSA and GLA."""
NAMED = {
    "340m": (340e6, 385e6),
    "1.3b": (0.9 * 1.3e9, 1.1 * 1.4e9),
    "2.7b": (0.95 * 2.7e9, 1.05 * 2.7e9),
    "7b": (0.95 * 7e9, 1.05 * 7e9),
}
"""Between what a size's parameters must be to deserve the name."""


def mixer_parameters(mixer, d, heads):
    """Parameters of one mixer with its norm, by hand."""
    return {
        "gsa": 4 * d * d + d * heads * 64 + d,
        "abc": 4 * d * d + d * heads * 64 + d,
        "gla": 2 * d * (d // 2) + 3 * d * d + 16 * d + 16 * (d // 2) + d // 2 + d // heads,
        "hgrn2": 4 * d * d + d,
        "retention": 2 * d * d + 3 * d * (2 * d) + 2 * 256,  # heads of 256, whose values are twice as wide
        "linear": 4 * d * d + d // heads,
        "softmax": 4 * d * d,
    }[mixer]


def mlp_width(mixer, d):
    """256·ceil(round(d·4·2/3)/256); retention, twice as large, takes that of half the hidden size."""
    return 256 * math.ceil(round((d // 2 if mixer == "retention" else d) * 4 * 2 / 3) / 256)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_parameters_at_the_named_sizes(mixer, size):
    d, layers, heads = SIZES[size]
    block = mixer_parameters(mixer, d, heads) + 3 * d * mlp_width(mixer, d) + 2 * d
    extra = layers * d if mixer == "hgrn2" else 0  # the lower bounds
    expected = 2 * 32000 * d + layers * block + d + extra
    total, multiplied = count_parameters(preset(f"{mixer}-{size}"))
    assert (total, multiplied) == (expected, expected - 32000 * d)
    smallest, largest = NAMED[size]
    assert smallest <= total <= largest


def test_parameters_of_the_tiny_preset():
    d, vocabulary = 128, 257
    block = 4 * d * d + d * 2 * 32 + d + 3 * d * 512 + 2 * d
    expected = vocabulary * d + 4 * block + d
    assert count_parameters(preset("tiny")) == (expected, expected)  # the tied head is multiplied


def test_every_mixer_has_its_presets():
    names = {"tiny"} | {f"tiny-{mixer}" for mixer in MIXERS} | {f"{mixer}-{size}" for mixer in MIXERS for size in SIZES}
    assert set(PRESETS) == names
    assert preset("tiny") == preset("tiny-gsa")
    for mixer in MIXERS:
        assert count_parameters(preset(f"tiny-{mixer}"))[0] < 2e6
        assert preset(f"tiny-{mixer}").mixers == preset(f"{mixer}-1.3b").mixers == (mixer,)


def test_counting_allocates_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total, _ = count_parameters(preset("gsa-2.7b"))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 4 * total / 50
    leaves = jax.tree.leaves(nnx.state(abstract_model(preset("gsa-2.7b"))))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


@pytest.mark.parametrize("name", PAIRS)
def test_counts_are_those_of_the_arrays(name):
    small = config(PAIRS[name], mlp_size=0)
    leaves = jax.tree.leaves(nnx.state(abstract_model(small)))
    assert count_parameters(small)[0] == sum(x.size for x in leaves)
    tied = config(PAIRS[name], tie_embeddings=True)
    table = tied.vocab_size * tied.hidden_size
    untied = count_parameters(config(PAIRS[name]))
    assert count_parameters(tied) == (untied[0] - table, untied[1])


def test_every_mixer_is_in_a_pair():
    assert {mixer for pair in PAIRS.values() for mixer in pair} == set(MIXERS)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError) as error:
        preset("gsa-70b")
    assert "'gsa-70b'" in str(error.value) and all(name in str(error.value) for name in PRESETS)
    with pytest.raises(ValueError) as error:
        ModelConfig(mixers=("gsa", "mamba"))
    assert "'mamba'" in str(error.value) and all(name in str(error.value) for name in MIXERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 3, "mixers": ("gsa", "softmax")}, r"num_layers=3, mixers=\('gsa', 'softmax'\)"),
        ({"mixers": ()}, r"mixers=\(\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": -1}, "hidden_size must be at least 1, got -1"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"mlp_size": -1}, "mlp_size must be at least 0, got -1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive and finite, got 0.0"),
        ({"remat": "dot"}, "remat must be one of none, dots, full, got 'dot'"),
        ({"implementation": "triton"}, "implementation must be scan, chunked, pallas or None, got 'triton'"),
        ({"mixers": "gsa"}, "mixers must be a tuple of names, got 'gsa'"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)
