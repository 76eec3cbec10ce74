"""These tests compile much and compute little, so they leave out most of XLA's optimizations."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def fast_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
