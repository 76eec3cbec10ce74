"""Gated Slot Attention on Hopper GPUs: the kernels strung together, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, key_read, slots
from pallas_kernels.arguments import over_heads, pad_tokens, to_first_head
from pallas_kernels.gates import chunk_gates
from pallas_kernels.gates_backward import gates_backward
from pallas_kernels.memory_read import memory_read
from pallas_kernels.slot_softmax import slot_softmax
from pallas_kernels.slot_softmax_backward import slot_softmax_backward
from pallas_kernels.states import chunk_states
from pallas_kernels.tiles import SIZE, vary_alike
from pallas_kernels.write_backward import write_backward

MOST_SLOTS = 128
"""slots M whose tiles of one chunk fit in shared memory"""


def misfit(q, k, v, log_decay):
    """Why the kernels can't take such arguments, None if they can."""
    if log_decay.shape[-1] > MOST_SLOTS:
        return f"M must be at most {MOST_SLOTS}, got M={log_decay.shape[-1]}"
    return arguments.misfit(q, k, v)


def gated_slot_attention(q, k, v, log_decay, write, keys, values, *, scale):
    """The op of `gsa_jax.ops.gated_slot_attention`, from and to states: (out, keys, values).

    Args:
      q: [B, T, H, K], bfloat16 or float16, K and V multiples of 64.
      k, v: [B, T, G, K], [B, T, G, V] of the same dtype.
      log_decay: [B, T, G, M], M at most 128.
      write: [B, T, G, M], or None for 1 - exp(log_decay), which then is never in memory.
      keys, values: the states that the first token finds, [B, G, M, K], [B, G, M, V] in float32.
    """
    length, num_slots = log_decay.shape[1], log_decay.shape[3]
    padding = -num_slots % SIZE
    q, k, v, log_decay, write = pad_tokens(q, k, v, log_decay, write)
    log_decay, write = (x if x is None else jnp.pad(x, ((0, 0),) * 3 + ((0, padding),)) for x in (log_decay, write))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (keys, values))
    arrays = vary_alike(q, k, v, log_decay, write, keys, values)
    out, keys, values = _attention(*arrays, scale, num_slots)
    return out[:, :length], keys[:, :, :num_slots], values[:, :, :num_slots]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, log_decay, write, keys, values, scale, num_slots):
    return _forward(q, k, v, log_decay, write, keys, values, scale, num_slots, residuals=False)[0]


def _forward(q, k, v, log_decay, write, keys, values, scale, num_slots, residuals=True):
    parts, key, kept, mild = chunk_gates(log_decay, write, q.dtype)
    key_states = None
    if not residuals and key_read.pays(q, key):
        products, last_keys = key_read.key_read(q, k, key, kept, keys)
        source = slots.added(products)
    else:
        key_states, last_keys = chunk_states(k, key, kept, keys)
        source = slots.multiplied(q, k, key_states)
    reading, scores, *read = slot_softmax(
        source, parts, mild, write, scale=scale, num_slots=num_slots, residuals=residuals
    )
    out, last_values, *value_states = memory_read(v, key, kept, values, [scores], reading, states=residuals)
    gates = (jnp.zeros((), log_decay.dtype), write, parts, key, kept, mild)
    saved = q, k, v, gates, keys, key_states, value_states, (scores, *read)
    return (out, last_keys, last_values), saved


def _backward(scale, num_slots, saved, cotangents):
    q, k, v, (like_log_decay, write, parts, key, kept, mild), keys, key_states, (value_states,), read = saved
    d_out, d_last_keys, d_last_values = cotangents
    *value_scores, key_scores, key_before, p = read
    num_groups = k.shape[2]
    per_head = q.shape[2] // num_groups
    gates_dtype = like_log_decay.dtype if per_head == 1 else jnp.float32

    *d_key_scores, d_value_scores, key_reading, value_reading, d_value_before, ds = slot_softmax_backward(
        d_out, v, parts, mild, write, value_states, p, scale=scale
    )
    dq, *_ = memory_read(k, key, kept, keys, d_key_scores, key_reading)
    d_keys, d_first_keys, keys_dot = chunk_states(
        q, key_reading, kept, to_first_head(d_last_keys, per_head), other=key_states, reverse=True
    )
    d_values, d_first_values, values_dot = chunk_states(
        d_out, value_reading, kept, to_first_head(d_last_values, per_head), other=value_states, reverse=True
    )
    d_kept = jnp.repeat(kept, per_head, axis=1) * (keys_dot.sum(3) + values_dot.sum(3))
    d_key, dk, dv = write_backward(((k, q, *d_key_scores, d_keys), (v, d_out, *value_scores, d_values)), key)
    d_log_decay, *d_write = gates_backward(
        ((key_scores, key_before, ds), (d_value_scores, d_value_before, p)),
        parts,
        mild,
        write,
        d_key,
        d_kept,
        out_dtype=gates_dtype,
    )
    sum_heads = functools.partial(over_heads, per_head=per_head)
    d_write = None if write is None else sum_heads(d_write[0], 2)
    return (
        dq,
        sum_heads(dk, 2),
        sum_heads(dv, 2),
        sum_heads(d_log_decay, 2).astype(like_log_decay.dtype),
        d_write,
        sum_heads(d_first_keys, 1),
        sum_heads(d_first_values, 1),
    )


_attention.defvjp(_forward, _backward)
