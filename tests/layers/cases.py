"""The mixers the tests run, with every setting that changes what they compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.layers import (
    MIXERS,
    GatedLinearAttentionConfig,
    GatedSlotAttentionConfig,
    HGRN2Config,
    LinearAttentionConfig,
    RetentionConfig,
    SoftmaxAttentionConfig,
)

HIDDEN = 16
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
TOLERANCE = 2e-5


class Variant(NamedTuple):
    """A mixer's name, its config, and what it gets beside x."""

    mixer: str
    config: Any
    inputs: Any = ()

    def build(self, **options):
        """The layer with random parameters, those included that begin as zeros or ones."""
        layer = nnx.eval_shape(lambda: MIXERS[self.mixer](HIDDEN, self.config, rngs=nnx.Rngs(0), **options))
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), nnx.state(layer))
        nnx.update(layer, drawn)
        return layer


VARIANTS = {
    "gsa": Variant("gsa", GatedSlotAttentionConfig(num_heads=2, num_slots=5)),
    "gsa-grouped-conv4": Variant(
        "gsa", GatedSlotAttentionConfig(**GROUPED, num_slots=3, conv_size=4, expand_k=0.5, feature_map="relu")
    ),
    "abc": Variant("abc", GatedSlotAttentionConfig(num_heads=2, num_slots=5)),
    "abc-grouped-conv3": Variant(
        "abc", GatedSlotAttentionConfig(**GROUPED, num_slots=3, conv_size=3, expand_v=2, feature_map="identity")
    ),
    "gla": Variant("gla", GatedLinearAttentionConfig(num_heads=2)),
    "gla-grouped-conv3": Variant("gla", GatedLinearAttentionConfig(**GROUPED, conv_size=3, damping=2, gate_rank=3)),
    "hgrn2": Variant("hgrn2", HGRN2Config(expand_ratio=8)),
    "hgrn2-bounded": Variant("hgrn2", HGRN2Config(expand_ratio=4), {"lower_bound": np.linspace(0, 0.9, HIDDEN, "f")}),
    "retention": Variant("retention", RetentionConfig(**GROUPED, conv_size=4, rope_theta=100.0)),
    "linear": Variant("linear", LinearAttentionConfig(**GROUPED, conv_size=3, feature_map="swish")),
    "softmax": Variant("softmax", SoftmaxAttentionConfig(num_heads=2, conv_size=4, rope_theta=100.0)),
    "softmax-grouped-window": Variant("softmax", SoftmaxAttentionConfig(**GROUPED, window=3)),
}
"""By name; together they have every mixer."""


class Layer:
    """A variant's layer, its calls compiled.

    The two recurrences run in the implementation that a user gets, once each; all else runs in "scan", which compiles
    fastest.
    """

    def __init__(self, name, **options):
        self.variant = VARIANTS[name]
        self.module = self.variant.build(implementation=None if name in ("gsa", "gla") else "scan", **options)
        definition, self.parameters = nnx.split(self.module)
        inputs = dict(self.variant.inputs)

        @jax.jit
        def call(parameters, x, state, segment_ids):
            return nnx.merge(definition, parameters)(x, state, segment_ids, **inputs)

        @jax.jit
        def call_with_gradient(parameters, x, cotangent, state, segment_ids):
            module = nnx.merge(definition, parameters)
            y, pullback, state = jax.vjp(lambda x: module(x, state, segment_ids, **inputs), x, has_aux=True)
            return y, state, pullback(cotangent)[0]

        @jax.jit
        def steps(parameters, x, state):
            def step(state, token):
                return nnx.merge(definition, parameters).step(token, state, **inputs)[::-1]

            state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
            return y.swapaxes(0, 1), state

        self._call, self._call_with_gradient, self._steps = call, call_with_gradient, steps

    def __call__(self, x, state=None, segment_ids=None):
        """(y, state) of a whole sequence."""
        return self._call(self.parameters, x, state, segment_ids)

    def with_gradient(self, x, cotangent, state=None, segment_ids=None):
        """(y, state, gradient with respect to x)."""
        return self._call_with_gradient(self.parameters, x, cotangent, state, segment_ids)

    def steps(self, x, state):
        """(y, state) by `step`, token by token, inside one scan."""
        return self._steps(self.parameters, x, state)


def tokens(length, batch_size=2, seed=0):
    """Random inputs [B, T, D]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch_size, length, HIDDEN)), jnp.float32)


def float64(module):
    """The module's parameters as nested dictionaries of float64 NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(module)))
