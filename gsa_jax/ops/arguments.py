"""What the public functions of this package have in common: checking arguments, heads in groups, packed documents."""

import numbers

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import vary_alike


def state_dtype(*arrays):
    """float32, or float64 where an input is float64 (possible under jax_enable_x64 only)."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def check_array(name, x, shape, kind=jnp.floating):
    """Raises unless `x` is a floating array of that shape, or one of integers if `kind` is `jnp.integer`.

    `shape` maps dimension names to sizes, which other arguments fix; a size of None admits any.
    """
    expected = "[" + ", ".join(d if size is None else f"{d}={size}" for d, size in shape.items()) + "]"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array of shape {expected}, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, kind):
        expected = "be floating point" if kind is jnp.floating else "hold integers"
        raise TypeError(f"{name} must {expected}, got dtype {x.dtype}")
    fits = len(x.shape) == len(shape) and all(
        size is None or n == size for n, size in zip(x.shape, shape.values(), strict=True)
    )
    if not fits or 0 in x.shape:
        raise ValueError(f"{name} must have shape {expected} with no empty dimension, got {list(x.shape)}")


def check_qkv(q, k, v, *, tokens=("B", "T")):
    """Checks queries, keys and values against each other; `tokens` names the leading axes.

    Returns (leading sizes by name, G, K, V).
    """
    check_array("q", q, dict.fromkeys((*tokens, "H", "K")))
    *leading, num_heads, key_size = q.shape
    leading = dict(zip(tokens, leading, strict=True))
    check_array("k", k, leading | {"G": None, "K": key_size})
    num_groups = k.shape[-2]
    check_array("v", v, leading | {"G": num_groups, "V": None})
    if num_heads % num_groups:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v, got H={num_heads}, G={num_groups}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return leading, num_groups, key_size, v.shape[-1]


def check_segment_ids(segment_ids, leading):
    """Raises unless `segment_ids` is None or an integer array [B, T]."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, leading, jnp.integer)


def check_chunk_size(chunk_size):
    """Raises unless `chunk_size` is None or a power of two."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two or None, got {chunk_size!r}")


def check_scale(scale):
    """Raises unless `scale` is a real number, or an array of one."""
    real = isinstance(scale, int | float)
    if not real and getattr(scale, "shape", None) == ():
        real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
    if not real:
        raise TypeError(f"scale must be a number, got {scale!r}")


def static_scale(q, scale):
    """(q, scale) with a scale that is a number, as kernels are compiled for; an array of one is multiplied into q."""
    return (q, scale) if isinstance(scale, numbers.Real) else ((scale * q).astype(q.dtype), 1.0)


def select(implementation, implementations, misfit, only_if_named):
    """The name of the implementation to run: the one asked for, for None the fastest that fits.

    `misfit` says why "pallas" does not fit, or is None. With `only_if_named` None does not take it even so: XLA may
    have to spread the computation over several devices, which it can't do with a kernel. Raises if "pallas" is asked
    for and does not fit, and for names that are unknown.
    """
    if implementation is None:
        return "chunked" if misfit or only_if_named else "pallas"
    if implementation not in implementations:
        known = ", ".join(map(repr, implementations))
        raise ValueError(f"implementation must be one of {known} or None, got {implementation!r}")
    if implementation == "pallas" and misfit:
        raise ValueError(f"implementation='pallas': {misfit}")
    return implementation


def zero_state(shape, dtype, like):
    """A state of zeros, sharded inside `jax.shard_map` as the array `like` is.

    The barrier hides from XLA that they are constant: jaxlib 0.12.0 on CPUs returns memory that nothing wrote for some
    products with a broadcast constant (its `__ynn_fusion`).
    """
    return vary_alike(jax.lax.optimization_barrier(jnp.zeros(shape, dtype)), like)[0]


def group_heads(q, num_groups):
    """[..., H, K] -> [..., G, R, K]: the R = H / G query heads that read one state stand together."""
    return q.reshape(*q.shape[:-2], num_groups, q.shape[-2] // num_groups, q.shape[-1])


def ungroup_heads(out):
    """[..., G, R, V] -> [..., H, V]."""
    return out.reshape(*out.shape[:-3], out.shape[-3] * out.shape[-2], out.shape[-1])


def document_starts(segment_ids):
    """[B, T] bool: where a document begins that is not the row's first (that one goes on from the initial state)."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def forget_at_document_starts(log_decay, segment_ids):
    """Documents packed into one row don't see each other: a gate of exp(-inf) = 0 stands at each document's start."""
    if segment_ids is None:
        return log_decay
    return jnp.where(document_starts(segment_ids)[:, :, None, None], -jnp.inf, log_decay)
