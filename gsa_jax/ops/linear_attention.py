"""Gated linear attention on arrays: whole sequences and single tokens."""

import functools

import jax

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
from pallas_kernels.tiles import vary_alike

_IMPLEMENTATIONS = {
    "scan": scan.gated_linear_attention,
    "chunked": chunked.gated_linear_attention,
    "pallas": pallas.gated_linear_attention,
}


def gated_linear_attention(
    q, k, v, log_decay, *, scale=None, initial_state=None, segment_ids=None, implementation=None, chunk_size=None
):
    """Gated linear attention over whole sequences (arXiv 2312.06635, equation 3).

        H[t]   = diag(exp(log_decay[t])) H[t-1] + k[t] ⊗ v[t]
        out[t] = scale · H[t]ᵀ q[t]

    With other gates and keys the same function is HGRN2 (k = 1 - f), RetNet (a constant gate per head), Mamba-2
    (a scalar gate per token and head) and linear attention (log_decay = 0). Differentiable as
    `gsa_jax.ops.gated_slot_attention`.

    Args:
      q: queries [B, T, H, K]. H is a multiple of G; query heads h with the same h // (H/G) read one state.
      k: keys [B, T, G, K], of q's dtype.
      v: values [B, T, G, V], of q's dtype.
      log_decay: natural logarithm of the forget gate, [B, T, G, K], or [B, T, G, 1] for one gate per head; any values
        <= 0 including -inf ("forget all").
      scale: factor on the output, a number or an array of one; K ** -0.5 by default.
      initial_state: the state [B, G, K, V] that the first token finds; zeros by default.
      segment_ids, implementation, chunk_size: as for `gsa_jax.ops.gated_slot_attention`; "pallas" takes any K up to
        832 that is a multiple of 64.

    Returns:
      (out [B, T, H, V] in v's dtype, state [B, G, K, V] after the last token). Gates and states are float32, and so
      are all products for float32 inputs; lower-precision inputs are multiplied as they are and summed in float32, and
      a state is rounded to their dtype to be read: where little is forgotten one may pass 65504, inf to float16.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, or does not fit the implementation asked
        for; the message names it.
    """
    options = {"scale": scale, "initial_state": initial_state, "segment_ids": segment_ids, "chunk_size": chunk_size}
    check(q, k, v, log_decay, **options)
    q, scale = static_scale(q, q.shape[-1] ** -0.5 if scale is None else scale)
    if implementation is not None or q.shape[1] > 1:
        misfit = pallas.linear_attention_misfit(q, k, v, chunk_size)
        implementation = select(implementation, _IMPLEMENTATIONS, misfit, pallas.spreads())
    arrays = (q, k, v, log_decay, initial_state, segment_ids)
    return _run(*arrays, scale=scale, implementation=implementation, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "chunk_size"), inline=True)
def _run(q, k, v, log_decay, initial_state, segment_ids, *, scale, implementation, chunk_size):
    """The op by the implementation of that name, by `gated_linear_attention_step` for None. Compiled once, also where
    the caller compiles nothing."""
    state = first_state(q, k, v, log_decay, initial_state, segment_ids)
    if implementation is None:
        out, state = gated_linear_attention_step(*(x[:, 0] for x in (q, k, v, log_decay)), state, scale=scale)
        return out[:, None], state
    dtype, num_groups = state_dtype(q, log_decay), k.shape[2]
    run, options = _IMPLEMENTATIONS[implementation], {"scale": scale, "initial_state": state}
    if implementation == "pallas":
        return run(q, k, v, log_decay, segment_ids=segment_ids, **options)
    if implementation == "chunked":
        options["chunk_size"] = chunk_size
    log_decay = forget_at_document_starts(log_decay.astype(dtype), segment_ids)
    out, state = run(group_heads(q, num_groups), k, v, log_decay, **options)
    return ungroup_heads(out), state


def check(q, k, v, log_decay, *, scale=None, initial_state=None, segment_ids=None, chunk_size=None, **_):
    """Raises unless these are arguments of `gated_linear_attention`."""
    leading, num_groups, key_size, value_size = check_qkv(q, k, v)
    _check_log_decay(log_decay, leading, num_groups, key_size)
    check_segment_ids(segment_ids, leading)
    if initial_state is not None:
        shape = {"B": leading["B"], "G": num_groups, "K": key_size, "V": value_size}
        check_array("initial_state", initial_state, shape)
    check_chunk_size(chunk_size)
    if scale is not None:
        check_scale(scale)


def first_state(q, k, v, log_decay, initial_state, segment_ids):
    """The state that the first token finds, from arguments of `gated_linear_attention`."""
    dtype = state_dtype(q, log_decay)
    if initial_state is None:
        state = zero_state((k.shape[0], *k.shape[2:], v.shape[-1]), dtype, like=k)
    else:
        state = initial_state.astype(dtype)
    return vary_alike(state, q, k, v, log_decay, segment_ids)[0]


def gated_linear_attention_step(q, k, v, log_decay, state, *, scale=None):
    """One token of `gated_linear_attention`: the same equations for q [B, H, K], k [B, G, K], v [B, G, V],
    log_decay [B, G, K or 1] and a state [B, G, K, V]. Returns (out [B, H, V] in v's dtype, the new state).

    Raises:
      TypeError, ValueError: an argument has the wrong dtype or shape; the message names it.
    """
    leading, num_groups, key_size, value_size = check_qkv(q, k, v, tokens=("B",))
    _check_log_decay(log_decay, leading, num_groups, key_size)
    check_array("state", state, leading | {"G": num_groups, "K": key_size, "V": value_size})
    dtype = state_dtype(q, log_decay)
    scale = key_size**-0.5 if scale is None else scale
    check_scale(scale)

    state = scan.write(state.astype(dtype), log_decay.astype(dtype), k.astype(dtype), v.astype(dtype))
    out = scale * scan.read_columns(state, group_heads(q, num_groups).astype(dtype))
    return ungroup_heads(out.astype(v.dtype)), state


def _check_log_decay(log_decay, leading, num_groups, key_size):
    per_head = getattr(log_decay, "shape", (0,))[-1:] == (1,)
    check_array("log_decay", log_decay, leading | {"G": num_groups, "K": 1 if per_head else key_size})
