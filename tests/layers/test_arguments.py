"""Settings that don't fit are named, and parameters say what their axes are."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gsa_jax.layers import MIXERS, RMSNorm, SwiGLU
from gsa_jax.layers.mixer import head_size
from gsa_jax.layers.rotary import rotate
from tests.layers.cases import HIDDEN, VARIANTS
from tests.pallas_kernels.hopper import mesh

AXES = {"embed", "heads", "mlp", "vocab", None}


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        ("gsa", {"num_heads": 3}, "expand_k .* hidden_size=16, expand_k=1.0, heads=3"),
        ("gla", {"expand_v": 0.1}, "expand_v .* hidden_size=16, expand_v=0.1, heads=4"),
        (
            "softmax",
            {"num_heads": 5},
            "^hidden_size must be a multiple of .*, got hidden_size=16, heads=5",
        ),
        ("gsa", {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ("retention", {"num_kv_heads": 8}, "num_heads must be a multiple of num_kv_heads, got 4 and 8"),
        ("gsa", {"feature_map": "swich"}, "feature_map must be one of swish, relu, elu1, identity, got 'swich'"),
        ("linear", {"feature_map": "x"}, "feature_map must be one of"),
        ("hgrn2", {"expand_ratio": 5}, "hidden_size must be a multiple of expand_ratio, got 16, 5"),
        ("softmax", {"num_heads": 2, "window": 0}, "window must be at least 1, got 0"),
        ("gsa", {"damping": 0}, "damping must be positive and finite, got 0"),
        ("gsa", {"damping": float("nan")}, "damping must be positive and finite, got nan"),
        ("linear", {"expand_k": -0.5}, "expand_k must be positive and finite, got -0.5"),
    ],
)
def test_settings_that_do_not_fit(mixer, settings, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[mixer](HIDDEN, MIXERS[mixer].Config(**settings), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_number_of_a_config_is_checked(mixer):
    """The convolution may be left out; all else is at least 1, or positive."""
    for field in dataclasses.fields(MIXERS[mixer].Config):
        if field.type is not str:
            for value in (-1, 0)[: 1 if field.name == "conv_size" else 2]:
                with pytest.raises(ValueError, match=f"{field.name} must be .*, got {value}"):
                    MIXERS[mixer].Config(**{field.name: value})


@pytest.mark.parametrize("hidden_size", [0, -128])
def test_hgrn2_needs_a_head(hidden_size):
    with pytest.raises(ValueError, match=f"hidden_size must be a multiple of expand_ratio, got {hidden_size}, 128"):
        MIXERS["hgrn2"](hidden_size, rngs=nnx.Rngs(0))


def test_rotary_needs_pairs():
    with pytest.raises(ValueError, match="even head size, got 5"):
        rotate(jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_configs_are_frozen_and_have_defaults(mixer):
    config = MIXERS[mixer].Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 1
    hash(config)
    nnx.eval_shape(lambda: MIXERS[mixer](256, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", [*VARIANTS, "mlp", "norm"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_parameters_are_float32_and_name_their_axes(name, dtype):
    others = {"mlp": SwiGLU, "norm": RMSNorm}
    if name in others:
        layer = nnx.eval_shape(lambda: others[name](HIDDEN, dtype=dtype, rngs=nnx.Rngs(0)))
    else:
        layer = VARIANTS[name].build(dtype=dtype)
    parameters = jax.tree.leaves(nnx.state(layer), is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert parameters
    for parameter in parameters:
        assert isinstance(parameter, nnx.Param)
        assert parameter.dtype == jnp.float32
        axes = parameter.get_metadata()["axes"]
        assert len(axes) == parameter.ndim and set(axes) <= AXES


X = jnp.ones((1, 3, HIDDEN))
NO_STATE = r"^state must be (a \w+, as init_state makes it, or None|an array of shape .*), got "


@pytest.mark.parametrize(
    ("x", "state", "error", "message"),
    [
        (jnp.ones((1, 3, HIDDEN + 1)), None, ValueError, r"x must have shape \[B, T, D=16\] .*, got \[1, 3, 17\]"),
        (X[0], None, ValueError, r"x must have shape \[B, T, D=16\] .*, got \[3, 16\]"),
        (X.astype(int), None, TypeError, "x must be floating point, got dtype int32"),
        ([1.0], None, TypeError, r"x must be an array of shape \[B, T, D=16\], got list"),
        (X, 5, TypeError, NO_STATE + "int"),
        (X, (), TypeError, NO_STATE + "tuple"),
    ],
)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("axes", [{}, {"data": 2}])
def test_what_a_mixer_does_not_take_is_named(mixer, axes, x, state, error, message):
    layer = VARIANTS[mixer].build()
    with jax.sharding.use_abstract_mesh(mesh(**axes)), pytest.raises(error, match=message):
        layer(x, state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_a_step_does_not_take_is_named(mixer):
    layer = VARIANTS[mixer].build()
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\] .*, got \[1, 3, 16\]"):
        layer.step(X, layer.init_state(1))
    with pytest.raises(TypeError, match=r"x must be an array of shape \[B, D\], got list"):
        layer.step([1.0], layer.init_state(1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_of_other_rows_is_refused(mixer):
    layer = VARIANTS[mixer].build()
    with pytest.raises(ValueError, match=r"(state|normalizer).* must have shape \[B=1"):
        layer(X, layer.init_state(2))


@pytest.mark.parametrize("mixer", ["gsa", "abc", "gla", "retention", "linear"])
def test_a_plain_tuple_of_the_fields_is_a_state(mixer):
    layer = VARIANTS[mixer].build()
    _, state = layer(X)
    assert jnp.array_equal(layer(X, tuple(state))[0], layer(X, state)[0])


@pytest.mark.parametrize("lower_bound", [jnp.zeros((3, 1)), jnp.zeros(HIDDEN + 1)])
def test_lower_bounds_of_other_shapes_are_refused(lower_bound):
    with pytest.raises(ValueError, match=r"lower_bound must have shape \[\] or \[D\], got"):
        VARIANTS["hgrn2"].build()(X, lower_bound=lower_bound)


def test_a_cache_without_a_place_is_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1 or None, got 0"):
        VARIANTS["softmax"].build().init_state(1, max_length=0)


def test_head_sizes_may_be_rounded_products():
    """1600 times 1.1 is not 1760 to a computer."""
    assert head_size(1600, 4, expand_k=1.1) == 440


@pytest.mark.parametrize("mixer", MIXERS)
def test_segment_ids_are_checked_with_a_state_too(mixer):
    layer = VARIANTS[mixer].build()
    with pytest.raises(TypeError, match="segment_ids must hold integers, got dtype float32"):
        layer(X, layer.init_state(1), jnp.zeros((1, 3)))
    with pytest.raises(TypeError, match="^state must be"):
        layer(X, jnp.zeros((1, 3), int))  # segment ids in the place of the state
