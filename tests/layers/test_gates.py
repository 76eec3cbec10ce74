"""Gates of layers that compute in bfloat16: log decays add up over thousands of tokens, so they are not rounded."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
