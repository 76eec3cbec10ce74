"""What stands around the mixers, against its definition in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.layers import RMSNorm, ShortConvolution, SwiGLU, lower_bounds, swiglu_size
from gsa_jax.layers.feature_maps import FEATURE_MAPS
from gsa_jax.layers.linear import linear
from gsa_jax.layers.rotary import rotate
from tests.helpers import rel_err
from tests.layers import definitions
from tests.layers.cases import HIDDEN, TOLERANCE, float64, tokens


def test_swiglu():
    layer, x = SwiGLU(HIDDEN, 24, rngs=nnx.Rngs(0)), tokens(5)
    assert rel_err(layer(x), definitions.swiglu(float64(layer), np.asarray(x, np.float64))) < TOLERANCE
    assert SwiGLU(HIDDEN, rngs=nnx.Rngs(0)).up.kernel.shape == (HIDDEN, 256)


@pytest.mark.parametrize(("hidden_size", "size"), [(96, 256), (97, 512), (1024, 2816), (2048, 5632), (2560, 6912)])
def test_swiglu_size(hidden_size, size):
    assert swiglu_size(hidden_size) == size


@pytest.mark.parametrize("magnitude", [1e-4, 1, 1e4])
def test_rms_norm(magnitude):
    layer, x = RMSNorm(HIDDEN, epsilon=1e-6, rngs=nnx.Rngs(0)), magnitude * tokens(5)
    layer.scale[...] = jnp.linspace(-1, 2, HIDDEN)
    assert rel_err(layer(x), definitions.rms_norm(np.asarray(x, np.float64), float64(layer), 1e-6)) < 1e-6


def test_rms_norm_in_bfloat16_computes_in_float32():
    x = 3 + tokens(5).astype(jnp.bfloat16)
    exact = definitions.rms_norm(np.asarray(x, np.float64), {"scale": 1})
    y = RMSNorm(HIDDEN, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2.0**-8)  # rounded once, at the end


@pytest.mark.parametrize("float32_out", [False, True])
def test_a_row_alone_is_multiplied_as_the_first_of_a_pair_but_on_cpus(float32_out):
    layer = linear(HIDDEN, 24, (None, None), dtype=jnp.bfloat16, float32_out=float32_out, rngs=nnx.Rngs(0))
    x = tokens(3)[:1]
    for row in (x[:, 0], x[:, 1:2], x[0, 2]):
        y = layer(row)
        assert y.dtype == (jnp.float32 if float32_out else jnp.bfloat16) and y.shape == (*row.shape[:-1], 24)
        np.testing.assert_allclose(np.ravel(y), np.ravel(layer(jnp.stack([row, row]))[0]), rtol=2.0**-7, atol=1e-6)
        for platform, paired in (("cpu", False), ("cuda", True)):
            lowered = jax.jit(layer).trace(row).lower(lowering_platforms=(platform,)).as_text()
            assert (f"tensor<2x{HIDDEN}xbf16>" in lowered) is paired


@pytest.mark.parametrize("width", [1, 3, 4])
def test_short_convolution(width):
    layer, x = ShortConvolution(HIDDEN, width, rngs=nnx.Rngs(0)), tokens(6)
    y, state = layer(x)
    for row, expected in zip(y, np.asarray(x, np.float64), strict=True):
        assert rel_err(row, definitions.short_convolution(expected, float64(layer)["kernel"])) < 1e-6
    np.testing.assert_array_equal(state, x[:, 6 - (width - 1) :])


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_rotate(theta):
    x = tokens(40).reshape(2, 40, 2, -1)
    for row, expected in zip(rotate(x, jnp.arange(40)[None], theta), np.asarray(x, np.float64), strict=True):
        assert rel_err(row, definitions.rotate(expected, theta)) < 1e-5


def test_rotated_products_depend_on_the_distance_only():
    q, k = tokens(1).reshape(2, 1, 2, -1), tokens(1, seed=1).reshape(2, 1, 2, -1)

    def product(q_position, k_position):
        return jnp.sum(rotate(q, jnp.asarray([[q_position]])) * rotate(k, jnp.asarray([[k_position]])), axis=-1)

    assert rel_err(product(900, 893), product(7, 0)) < 1e-4
    assert rel_err(product(0, 7), product(7, 0)) > 1e-2


@pytest.mark.parametrize("name", definitions.FEATURE_MAPS)
def test_feature_maps(name):
    assert FEATURE_MAPS.keys() == definitions.FEATURE_MAPS.keys()
    x = np.linspace(-4, 4, 41)
    assert rel_err(FEATURE_MAPS[name](jnp.asarray(x, jnp.float32)), definitions.FEATURE_MAPS[name](x)) < 1e-6


def test_lower_bounds():
    logits = np.random.default_rng(0).normal(size=(4, 3))
    shares = np.stack([definitions.softmax(column) for column in logits.T], axis=1)
    expected = np.cumsum(shares, axis=0) - shares[0]
    bounds = lower_bounds(jnp.asarray(logits, jnp.float32))
    assert rel_err(bounds, expected) < 1e-6
    assert not bounds[0].any() and (jnp.diff(bounds, axis=0) > 0).all() and (bounds < 1).all()


def test_the_empty_state_of_layers_in_a_stack():
    stack = nnx.vmap(lambda rngs: ShortConvolution(HIDDEN, 4, rngs=rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
    assert stack.init_state(2).shape == (2, 3, HIDDEN)
