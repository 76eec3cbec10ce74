"""Gated Slot Attention and its relatives in JAX."""

import importlib

__all__ = ["generation", "layers", "models", "ops", "sharding", "training"]


def __getattr__(name):
    """The modules, imported when they are first asked for: the ops need none of the others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
