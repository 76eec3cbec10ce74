"""Gates of layers that compute in bfloat16: log decays add up over thousands of tokens, so they are not rounded."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.layers import HGRN2, HGRN2Config, lower_bounds
from gsa_jax.ops import sharded
from tests.layers.cases import VARIANTS, tokens

RECURRENCES = {
    "gsa": "gated_slot_attention",
    "abc": "gated_slot_attention",
    "gla": "gated_linear_attention",
    "hgrn2": "gated_linear_attention",
    "hgrn2-bounded": "gated_linear_attention",
}
"""What the gated layers hand their log decays to."""


def log_decay(name, x):
    """The log decay in a layer that computes in x's dtype and whose matrices are bfloat16 numbers."""
    layer = VARIANTS[name].build(dtype=x.dtype, implementation="scan")
    parameters = nnx.state(layer)
    nnx.update(layer, jax.tree.map(lambda p: jnp.float32(jnp.bfloat16(p)) if p.ndim == 2 else p, parameters))
    function = RECURRENCES[name]
    with mock.patch.object(sharded, function, wraps=getattr(sharded, function)) as recurrence:
        layer(x, **dict(VARIANTS[name].inputs))
    return recurrence.call_args.args[3]


@pytest.mark.parametrize("name", RECURRENCES)
def test_bfloat16_rounds_what_is_multiplied_and_no_gate(name):
    x = tokens(9).astype(jnp.bfloat16)
    rounded, exact = log_decay(name, x), log_decay(name, x.astype(jnp.float32))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, rtol=1e-5)


def test_hgrn2_forgets_exactly_where_its_gate_is_open():
    logits, bound = jnp.asarray([-30.0, 0.0, 12.0, 16.0]), 0.9
    layer = HGRN2(128, HGRN2Config(expand_ratio=128), rngs=nnx.Rngs(0))
    forget = layer.log_forget(logits, bound)[0]
    share = 1 / (1 + np.exp(np.asarray(logits, np.float64)))
    np.testing.assert_allclose(forget, np.log1p(-(1 - bound) * share), rtol=1e-5)


def test_lower_bounds_stay_below_one_whatever_the_parameters_dtype():
    logits = 3 * jax.random.normal(jax.random.key(0), (24, 512), jnp.bfloat16)
    bounds = lower_bounds(logits)
    assert bounds.dtype == jnp.float32 and jnp.max(bounds) < 1 and jnp.min(bounds) == 0
