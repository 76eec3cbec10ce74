"""Elementwise maps of queries and keys, by name."""

import jax

FEATURE_MAPS = {
    "swish": jax.nn.swish,
    "relu": jax.nn.relu,
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}


def feature_map(name):
    """The map of that name; raises a ValueError that lists the known ones."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {name!r}")
    return FEATURE_MAPS[name]
