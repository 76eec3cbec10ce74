"""Rotary position embedding."""

import jax.numpy as jnp


def rotate(x, positions, theta=10000.0):
    """Rotates the pairs (x[i], x[i + K/2]) of heads x [B, T, H, K] by positions [B or 1, T] · theta^(-2i/K)
    (RoPE, arXiv 2104.09864, section 3.2), in float32; returns x's dtype. Raises ValueError for odd K."""
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary embedding needs an even head size, got {size}")
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
