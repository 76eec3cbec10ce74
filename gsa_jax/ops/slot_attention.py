"""Gated Slot Attention on arrays: whole sequences and single tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gsa_jax.ops import chunked, pallas, scan
from gsa_jax.ops.arguments import (
    check_array,
    check_chunk_size,
    check_qkv,
    check_scale,
    check_segment_ids,
    forget_at_document_starts,
    group_heads,
    select,
    state_dtype,
    static_scale,
    ungroup_heads,
    zero_state,
)
from pallas_kernels import slot_step
from pallas_kernels.tiles import vary_alike

_IMPLEMENTATIONS = {
    "scan": scan.gated_slot_attention,
    "chunked": chunked.gated_slot_attention,
    "pallas": pallas.gated_slot_attention,
}


class SlotState(NamedTuple):
    """The two memories of Gated Slot Attention: M slots, each with a key row and a value row, in float32."""

    keys: jax.Array
    """Kmem, [B, G, M, K]"""
    values: jax.Array
    """Vmem, [B, G, M, V]"""


def gated_slot_attention(
    q,
    k,
    v,
    log_decay,
    write=None,
    *,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    implementation=None,
    chunk_size=None,
):
    """Gated Slot Attention over whole sequences (arXiv 2409.07146, section 3).

    A bounded memory of M slots is written and read at every token t:

        Kmem[t] = diag(a[t]) Kmem[t-1] + w[t] ⊗ k[t]          a[t] = exp(log_decay[t])
        Vmem[t] = diag(a[t]) Vmem[t-1] + w[t] ⊗ v[t]
        out[t]  = Vmem[t]ᵀ softmax(scale · Kmem[t] q[t])

    Differentiable in every floating input and in the initial state, in reverse mode; for float32 and float64, which are
    not for kernels, in forward mode too.

    Args:
      q: queries [B, T, H, K]. H is a multiple of G; query heads h with the same h // (H/G) read one memory.
      k: keys [B, T, G, K], of q's dtype.
      v: values [B, T, G, V], of q's dtype.
      log_decay: natural logarithm of the forget gate, [B, T, G, M], any values <= 0 including -inf ("forget all").
      write: write strength w [B, T, G, M]; by default 1 - exp(log_decay), computed without cancellation.
      scale: factor on the softmax logits, a number or an array of one.
      initial_state: `SlotState` that the first token finds; zeros by default.
      segment_ids: integers [B, T]. Where the id changes from one token to the next a new document begins with an
        empty memory; outputs and gradients of a document equal those of running it alone. The row's first document
        goes on from `initial_state`; the returned state belongs to the row's last document.
      implementation: "scan" (two `lax.scan`s over tokens, the definition), "chunked" (matrix products, any platform),
        "pallas" (kernels for Hopper GPUs: bfloat16 or float16, K and V multiples of 64, M at most 128) or None, the
        fastest that fits: for a single token `gated_slot_attention_step`. Where the process has several devices and
        `jax.set_mesh` set no mesh, XLA might have to spread a kernel over them, and None takes "chunked".
      chunk_size: tokens in a chunk of "chunked", a power of two; by default chosen for the platform. Changes speed
        and memory, not results.

    Returns:
      (out [B, T, H, V] in v's dtype, `SlotState` after the last token). Gates, states and softmax are float32, and
      so are all products for float32 inputs; lower-precision inputs are multiplied as they are and summed in float32,
      and a state is rounded to their dtype to be read: one beyond 65504, which a `write` can make, is inf to float16.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, or does not fit the implementation asked
        for; the message names it.
    """
    options = {"scale": scale, "initial_state": initial_state, "segment_ids": segment_ids, "chunk_size": chunk_size}
    check(q, k, v, log_decay, write, **options)
    q, scale = static_scale(q, scale)
    if implementation is not None or q.shape[1] > 1:
        misfit = pallas.slot_attention_misfit(q, k, v, log_decay, chunk_size)
        implementation = select(implementation, _IMPLEMENTATIONS, misfit, pallas.spreads())
    arrays = (q, k, v, log_decay, write, initial_state, segment_ids)
    return _run(*arrays, scale=scale, implementation=implementation, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "chunk_size"), inline=True)
def _run(q, k, v, log_decay, write, initial_state, segment_ids, *, scale, implementation, chunk_size):
    """The op by the implementation of that name, by `gated_slot_attention_step` for None. Compiled once, also where the
    caller compiles nothing."""
    state = first_state(q, k, v, log_decay, write, initial_state, segment_ids)
    if implementation is None:
        q, k, v, log_decay, write = (x if x is None else x[:, 0] for x in (q, k, v, log_decay, write))
        out, state = gated_slot_attention_step(q, k, v, log_decay, state, write, scale=scale)
        return out[:, None], state
    dtype, num_groups = state_dtype(q, log_decay), k.shape[2]
    run, options = _IMPLEMENTATIONS[implementation], {"scale": scale, "initial_state": state}
    if implementation == "pallas":
        out, state = run(q, k, v, log_decay, write, segment_ids=segment_ids, **options)
        return out, SlotState(*state)
    log_decay = log_decay.astype(dtype)
    write = write_strength(log_decay) if write is None else write
    log_decay = forget_at_document_starts(log_decay, segment_ids)
    if implementation == "chunked":
        options["chunk_size"] = chunk_size
    out, state = run(group_heads(q, num_groups), k, v, log_decay, write, **options)
    return ungroup_heads(out), SlotState(*state)


def check(q, k, v, log_decay, write=None, *, scale=1.0, initial_state=None, segment_ids=None, chunk_size=None, **_):
    """Raises unless these are arguments of `gated_slot_attention`."""
    leading, num_groups, key_size, value_size = check_qkv(q, k, v)
    check_array("log_decay", log_decay, leading | {"G": num_groups, "M": None})
    slots = {"G": num_groups, "M": log_decay.shape[-1]}
    if write is not None:
        check_array("write", write, leading | slots)
    check_segment_ids(segment_ids, leading)
    if initial_state is not None:
        _check_state("initial_state", initial_state, {"B": leading["B"]} | slots, key_size, value_size)
    check_chunk_size(chunk_size)
    check_scale(scale)


def first_state(q, k, v, log_decay, write, initial_state, segment_ids):
    """The `SlotState` that the first token finds, from arguments of `gated_slot_attention`."""
    dtype, shape = state_dtype(q, log_decay), (k.shape[0], k.shape[2], log_decay.shape[-1])
    if initial_state is None:
        state = (zero_state((*shape, x.shape[-1]), dtype, like=x) for x in (k, v))
    else:
        state = (x.astype(dtype) for x in initial_state)
    return SlotState(*vary_alike(*state, q, k, v, log_decay, write, segment_ids)[:2])


def gated_slot_attention_step(q, k, v, log_decay, state, write=None, *, scale=1.0):
    """One token of `gated_slot_attention`: the same equations for q [B, H, K], k [B, G, K], v [B, G, V],
    log_decay and write [B, G, M] and a `SlotState`. Returns (out [B, H, V] in v's dtype, the new `SlotState`).

    On Hopper GPUs kernels do it for up to 8 rows of bfloat16 or float16 with K and V multiples of 64 and M 64 or 128,
    differentiable in reverse mode only; else XLA.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype or shape; the message names it.
    """
    leading, num_groups, key_size, value_size = check_qkv(q, k, v, tokens=("B",))
    check_array("log_decay", log_decay, leading | {"G": num_groups, "M": None})
    slots = {"G": num_groups, "M": log_decay.shape[-1]}
    if write is not None:
        check_array("write", write, leading | slots)
    check_scale(scale)
    _check_state("state", state, leading | slots, key_size, value_size)
    dtype = state_dtype(q, log_decay)
    state = (x.astype(dtype) for x in state)
    step = _step
    if not pallas.spreads() and pallas.slot_step_misfit(q, k, v, log_decay) is None:
        step = _step_by_kernels
        q, scale = static_scale(q, scale)
    out, *state = step(scale, q, k, v, log_decay, write, *state)
    return out, SlotState(*state)


def _step(scale, q, k, v, log_decay, write, old_keys, old_values):
    """(out, keys, values)"""
    dtype = old_keys.dtype
    log_decay = log_decay.astype(dtype)
    if write is None:
        # Both in memory by one kernel, where XLA for GPUs would make two.
        log_decay, write = lax.optimization_barrier(jnp.stack([log_decay, write_strength(log_decay)]))
    write, key, query = (x.astype(dtype) for x in (write, k, group_heads(q, k.shape[1])))
    keys = scan.write(old_keys, log_decay, write, key)
    # The barrier has the new values in memory, where the read finds them: XLA for GPUs would compute them a second time
    # from the old ones, of which it first makes a copy.
    values = lax.optimization_barrier(scan.write(old_values, log_decay, write, v.astype(dtype)))
    # `keys` read from what it is made of: XLA for GPUs reads the old keys and writes the new ones in one kernel.
    decay, write = jnp.exp(log_decay)[:, :, None], write[:, :, None]
    logits = decay * scan.read_rows(old_keys, query) + write * scan.read_rows(key[:, :, None], query)
    p = jax.nn.softmax(scale * logits, axis=-1)
    return ungroup_heads(scan.read_columns(values, p).astype(v.dtype)), keys, values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step_by_kernels(scale, *arrays):
    """As `_step`, whose gradient it has."""
    return slot_step.gated_slot_attention_step(*arrays, scale=scale)


def _step_forward(scale, *arrays):
    return _step_by_kernels(scale, *arrays), arrays


def _step_backward(scale, arrays, cotangents):
    _, pullback = jax.vjp(functools.partial(_step, scale), *arrays)
    return pullback(tuple(cotangents))


_step_by_kernels.defvjp(_step_forward, _step_backward)


def write_strength(log_decay):
    """1 - exp(log_decay), exact also for gates close to one: what is forgotten is written (paper, section 3.1)."""
    return -jnp.expm1(log_decay)


def _check_state(name, state, slots, key_size, value_size):
    try:
        keys, values = state
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a SlotState(keys, values), got {type(state).__name__}") from error
    check_array(f"{name}.keys", keys, slots | {"K": key_size})
    check_array(f"{name}.values", values, slots | {"V": value_size})
