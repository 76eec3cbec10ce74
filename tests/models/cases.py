"""Small models, compiled for tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.layers import (
    GatedLinearAttentionConfig,
    GatedSlotAttentionConfig,
    HGRN2Config,
    LinearAttentionConfig,
    RetentionConfig,
    SoftmaxAttentionConfig,
)
from gsa_jax.models import LanguageModel, ModelConfig

VOCABULARY = 41
PAIRS = {
    "gsa-softmax": ("gsa", "softmax"),
    "hgrn2-gsa": ("hgrn2", "gsa"),
    "retention-abc": ("retention", "abc"),
    "linear-gla": ("linear", "gla"),
}
"""The mixers of the tests' models, by name; together they have every mixer."""


def config(mixers, **settings):
    """Two repeats of the mixers at the smallest sizes, convolutions included."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_layers": 2 * len(mixers),
        "mlp_size": 24,
        "implementation": "scan",  # compiles fastest
        "gsa": GatedSlotAttentionConfig(num_heads=2, num_slots=5, conv_size=3),
        "abc": GatedSlotAttentionConfig(num_heads=2, num_slots=5),
        "gla": GatedLinearAttentionConfig(num_heads=2),
        "hgrn2": HGRN2Config(expand_ratio=8),
        "retention": RetentionConfig(num_heads=2),
        "linear": LinearAttentionConfig(num_heads=2),
        "softmax": SoftmaxAttentionConfig(num_heads=2),
    }
    return ModelConfig(mixers=mixers, **defaults | settings)


def model(config, **options):
    """A model with every parameter drawn at random, those included that begin as zeros or ones."""
    built = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), nnx.state(built))
    nnx.update(built, drawn)
    return built


def token_ids(length, batch_size=2, seed=0):
    """Random token ids [B, T]."""
    return jnp.asarray(np.random.default_rng(seed).integers(VOCABULARY, size=(batch_size, length)), jnp.int32)
