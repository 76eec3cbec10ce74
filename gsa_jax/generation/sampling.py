"""Drawing the next token from logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """divides the logits; 0 takes the most likely token"""
    top_k: int | None = None
    """draw among the k most likely tokens"""
    top_p: float | None = None
    """draw among the fewest most likely tokens that hold this much probability (and what ties with the last of them)"""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sample(logits, key, config):
    """Draws one token per row: logits [B, vocab] -> tokens [B] int32."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def keep_top_k(logits, k):
    """-inf for all but the k largest logits (and what ties with the k-th)."""
    smallest_kept = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def keep_top_p(logits, p):
    """-inf for all but the nucleus: the fewest largest logits whose probability reaches p (arXiv 1904.09751)."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(descending, axis=-1)
    needed = jnp.cumsum(probability, axis=-1) - probability < p
    needed |= p >= 1  # where float32 sums may reach 1 before the last token
    smallest_kept = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)
