"""What the functions that string kernels together share: which arrays fit, padding, gradients of grouped heads."""

import jax.numpy as jnp

from pallas_kernels.tiles import SIZE


def misfit(q, k, v):
    """Why the kernels can't take such arrays, None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q, k and v must be bfloat16 or float16, got {q.dtype}"
    for name, size in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if size % SIZE:
            return f"{name} must be a multiple of {SIZE}, got {name}={size}"
    return None


def pad_tokens(*arrays):
    """[B, T, ...] each, or None, with T filled up to a multiple of 8: the memory engine copies tiles of 8 tokens."""
    return [x if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]


def to_first_head(x, per_head):
    """[B, G, ...] -> [B, H, ...]: the gradient of what the heads of a group share, once."""
    if per_head == 1:
        return x
    return jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, per_head - 1)) + ((0, 0),) * (x.ndim - 2)).reshape(
        x.shape[0], -1, *x.shape[2:]
    )


def over_heads(x, axis, *, per_head):
    """Sums the gradients of the heads of a group: [..., H, ...] -> [..., G, ...]."""
    if per_head == 1:
        return x
    split = x.reshape(*x.shape[:axis], -1, per_head, *x.shape[axis + 1 :])
    return split.sum(axis + 1, dtype=jnp.float32).astype(x.dtype)
