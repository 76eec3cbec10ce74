"""Sampling text from a language model."""

from gsa_jax.generation.generate import generate, stream
from gsa_jax.generation.sampling import SamplingConfig, sample

__all__ = ["SamplingConfig", "generate", "sample", "stream"]
