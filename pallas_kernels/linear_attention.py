"""Gated linear attention on Hopper GPUs: the kernels strung together, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.arguments import over_heads, pad_tokens, to_first_head
from pallas_kernels.gates import chunk_gates
from pallas_kernels.linear_read_backward import linear_read_backward
from pallas_kernels.linear_scores import linear_scores
from pallas_kernels.linear_write_backward import linear_write_backward
from pallas_kernels.memory_read import memory_read
from pallas_kernels.states import chunk_states
from pallas_kernels.tiles import vary_alike

LARGEST_KEY = 832
"""channels of K whose tiles of one chunk fit in shared memory, in the backward pass"""


def misfit(q, k, v):
    """Why the kernels can't take such arguments, None if they can."""
    if k.shape[-1] > LARGEST_KEY:
        return f"K must be at most {LARGEST_KEY}, got K={k.shape[-1]}"
    return arguments.misfit(q, k, v)


def gated_linear_attention(q, k, v, log_decay, state, *, scale):
    """The op of `gsa_jax.ops.gated_linear_attention`, from and to a state: (out, state).

    Args:
      q: [B, T, H, K], bfloat16 or float16, K and V multiples of 64, K at most 832.
      k, v: [B, T, G, K], [B, T, G, V] of the same dtype.
      log_decay: [B, T, G, K], or [B, T, G, 1] for one gate per head.
      state: that the first token finds, [B, G, K, V] in float32.
    """
    out, state = _attention(*vary_alike(*pad_tokens(q, k, v, log_decay), state), scale)
    return out[:, : q.shape[1]], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, log_decay, state, scale):
    return _forward(q, k, v, log_decay, state, scale, residuals=False)[0]


def _forward(q, k, v, log_decay, state, scale, residuals=True):
    parts, key, kept, mild = chunk_gates(jnp.broadcast_to(log_decay, k.shape), k, q.dtype)
    reading, *scores = linear_scores(q, k, parts, mild, scale=scale, residuals=residuals)
    out, last, *states = memory_read(v, key, kept, state, scores[:1], reading, states=residuals)
    like_gates = jnp.zeros(log_decay.shape[-1], log_decay.dtype)
    return (out, last), (q, k, v, like_gates, (parts, key, kept, mild), states, (reading, scores))


def _backward(scale, saved, cotangents):
    q, k, v, like_gates, (parts, key, kept, mild), (states,), (reading, scores) = saved
    d_out, d_last = cotangents
    per_head = q.shape[2] // k.shape[2]
    one_gate = like_gates.size == 1
    gates_dtype = jnp.float32 if one_gate or per_head > 1 else like_gates.dtype

    d_states, d_first, dot = chunk_states(
        d_out, reading, kept, to_first_head(d_last, per_head), other=states, reverse=True
    )
    d_kept = jnp.repeat(kept, per_head, axis=1) * dot.sum(3)
    dv = linear_write_backward(d_out, *scores, key, d_states)
    dq, dk, d_log_decay = linear_read_backward(
        d_out, q, k, v, parts, mild, states, d_states, d_kept, scale=scale, out_dtype=gates_dtype
    )
    sum_heads = functools.partial(over_heads, per_head=per_head)
    d_log_decay = sum_heads(d_log_decay, 2)
    if one_gate:
        d_log_decay = d_log_decay.sum(-1, keepdims=True)
    return (
        dq,
        sum_heads(dk, 2),
        sum_heads(dv, 2),
        d_log_decay.astype(like_gates.dtype),
        sum_heads(d_first, 1),
    )


_attention.defvjp(_forward, _backward)
