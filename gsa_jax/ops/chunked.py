"""The chunked form: the recurrences of `scan.py` as matrix products, in plain XLA for CPUs, TPUs and any GPU.

A sequence is cut into chunks of C tokens. The states that enter the chunks come first (`write_chunks`); then all chunks
are read side by side. With a[s] the forget gates and i, j tokens of one chunk,

    rows     y_i = prod(a[first..i]) ⊙ H q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij               (`read_rows`)
    columns  o_i = Hᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} (Σ_m p_im w_jm D_ijm) v_j        (`read_columns`)
    state    H' = prod(a[first..last]) ⊙ H + Σ_j (w_j ⊙ prod(a[j+1..last])) x_jᵀ              (`write_chunks`)

where D_ij = prod(a[j+1..i]) is what is left at token i of what was written at token j.

The difficulty is D: with G the cumulative log decay, D_ij = exp(G_i) exp(-G_j) would be two matrix factors, but the
second overflows once a chunk forgets more than exp(88). Here a chunk is halved again and again instead: the pair
j < i parts at exactly one level, where j is in the earlier and i in the later half of one block, and about the border
between the halves

    D_ij = prod(a[border..i]) · prod(a[j+1..border-1])

has two factors in [0, 1]. Their logarithms are sums that never cancel, so that every log decay <= 0, -inf included, is
exact in values and gradients without a special case. CPUs multiply the gates themselves, as the scan does: one
exponential each, and one rounding.

Layout inside this file: queries [B, G, N, R, C, ·] and everything written [B, G, N, 1, C, ·], N chunks side by side.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsa_jax.ops.dot import dot


class Decays(NamedTuple):
    """Products of forget gates inside each chunk, [..., C, M] unless noted; all in [0, 1]."""

    halves: list
    """for block sizes 2, 4, ..., C: (the later halves' products since the border, the earlier halves' products until
    it), each [..., C / block, block / 2, M]"""
    since_start: jax.Array
    """through each token, from the chunk's first on"""
    until_end: jax.Array
    """after each token, through the chunk's last"""


def gated_slot_attention(q, k, v, log_decay, write, *, scale, initial_state, chunk_size=None):
    """GSA: write both memories, read Kmem's rows by q, read Vmem's columns by the softmax."""

    def chunks(states, q, k, v, log_decay, write):
        decays = chunk_decays(log_decay)
        (keys, values), states = write_chunks(states, decays, write, (k, v))
        p = jax.nn.softmax(scale * read_rows(q, k, write, decays, keys), axis=-1)
        return states, read_columns(p, write, v, decays, values)

    return _over_sequence(chunks, tuple(initial_state), (q, k, v, log_decay, write), chunk_size, v.dtype)


def gated_linear_attention(q, k, v, log_decay, *, scale, initial_state, chunk_size=None):
    """GLA: write the one state, read its columns by q."""

    def chunks(states, q, k, v, log_decay):
        decays = chunk_decays(log_decay)
        (values,), states = write_chunks(states, decays, k, (v,))
        return states, read_columns(scale * q.astype(log_decay.dtype), k, v, decays, values)

    out, (state,) = _over_sequence(chunks, (initial_state,), (q, k, v, log_decay), chunk_size, v.dtype)
    return out, state


def chunk_decays(log_decay):
    """`Decays` of log_decay [..., C, M]."""
    if jax.default_backend() == "cpu":
        return _products_of_gates(log_decay)
    return jax.tree.map(jnp.exp, _sums_by_products(log_decay))


@jax.custom_jvp
def _products_of_gates(log_decay):
    return _by_doubling(operator.mul, jnp.exp(log_decay), jnp.ones_like(log_decay))


@_products_of_gates.defjvp
def _products_of_gates_jvp(log_decay, tangent):
    """A product's derivative is the product times the sum of its logarithms' derivatives."""
    decays = _products_of_gates(*log_decay)
    sums = _by_doubling(operator.add, *tangent, jnp.zeros_like(*tangent))
    return decays, jax.tree.map(jnp.multiply, decays, sums)


def _by_doubling(combine, since_start, until_end):
    """`Decays` from those of blocks of one token: a block's come from its halves', one after the other."""
    halves, half = [], 1
    while half < since_start.shape[-2]:
        (earlier_since, since), (until, later_until) = _halves(since_start, half), _halves(until_end, half)
        halves.append((since, until))
        since_start = _join(earlier_since, combine(since, earlier_since[..., -1:, :]))
        until_end = _join(combine(until, since[..., -1:, :]), later_until)
        # A kernel a level: XLA would fuse them all, and compute each level's again for every level above it.
        since_start, until_end = lax.optimization_barrier((since_start, until_end))
        half *= 2
    return Decays(halves, since_start, until_end)


def _sums_by_products(log_decay):
    """The logarithms of `Decays`: every sum a product with a triangle of ones, for matrix units."""
    log_decay = jnp.maximum(log_decay, -1000.0)  # exp(-1000) = 0, while 0 * -inf in a product would be NaN
    halves, half = [], 1
    while half < log_decay.shape[-2]:
        earlier, later = _halves(log_decay, half)
        halves.append((_masked_sums(_up_to(half), later), _masked_sums(_after(half), earlier)))
        half *= 2
    return Decays(halves, _masked_sums(_up_to(half), log_decay), _masked_sums(_after(half), log_decay))


def _up_to(size):
    return np.tril(np.ones((size, size), np.float32))


def _after(size):
    return np.triu(np.ones((size, size), np.float32), 1)


def _masked_sums(mask, x):
    """Σ_j mask_ij x_j, [..., C, M]; for a few rows as additions, else as a product that keeps float32's precision."""
    if len(mask) < 8:
        zero = jnp.zeros_like(x[..., 0, :])
        return jnp.stack([sum((x[..., j, :] for j in np.flatnonzero(row)), zero) for row in mask], axis=-2)
    mask = jnp.broadcast_to(mask.astype(x.dtype), (*x.shape[:-2], *mask.shape))
    return jnp.matmul(mask, x, precision=lax.Precision.HIGHEST)


def write_chunks(states, decays, write, written):
    """The states [B, G, M, D] that enter each chunk, [B, G, N, 1, M, D], and those after the last chunk.

    `states` and `written` are tuples: everything written with the same key and gates goes through one scan. The states
    are carried in float32 and handed to the chunks as factors of matrix products, in the dtype of `written`.
    """
    dtype = written[0].dtype
    key = (write * decays.until_end).astype(dtype).mT
    added = [dot(key, x)[:, :, :, 0] for x in written]
    kept = decays.since_start[:, :, :, 0, -1, :, None]

    def next_chunk(states, chunk):
        kept, added = chunk
        entering = [state.astype(dtype) for state in states]
        return [kept * state + new for state, new in zip(states, added, strict=True)], entering

    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (kept, added))
    last, entering = lax.scan(next_chunk, list(states), by_chunk, unroll=16)
    return [jnp.moveaxis(state, 0, 2)[:, :, :, None] for state in entering], tuple(last)


def read_rows(q, k, write, decays, state):
    """Every token's H q, [B, G, N, R, C, M], from the state entering the chunk and the tokens written in it."""
    before = decays.since_start * dot(q, state.mT)
    return before + decayed_sums(dot(q, k.mT), write, decays, q.dtype)


def read_columns(p, write, v, decays, state):
    """Every token's Hᵀ p, [B, G, N, R, C, V], from the state entering the chunk and the tokens written in it."""
    before = dot((p * decays.since_start).astype(v.dtype), state, out_dtype=v.dtype)
    return before + dot(decayed_scores(p, write, decays, v.dtype).astype(v.dtype), v, out_dtype=v.dtype)


def decayed_scores(p, write, decays, dtype):
    """Σ_m p_im w_jm D_ijm for j <= i, else 0: [..., C, C] in float32, from p and w [..., C, M]; products in `dtype`."""
    scores = jnp.sum(p * write, axis=-1, dtype=decays.since_start.dtype)[..., None, None]
    for since, until in decays.halves:
        half = since.shape[-2]
        later, earlier = _halves(p, half)[1] * since, _halves(write, half)[0] * until
        across = _block_dot(later, earlier.mT, dtype)
        first, second = scores[..., 0::2, :, :], scores[..., 1::2, :, :]
        scores = jnp.concatenate(
            [
                jnp.concatenate([first, jnp.zeros_like(first)], axis=-1),
                jnp.concatenate([across, second], axis=-1),
            ],
            axis=-2,
        )
    return scores[..., 0, :, :]


def decayed_sums(scores, write, decays, dtype):
    """Σ_{j<=i} A_ij w_jm D_ijm: [..., C, M] in float32, from A [..., C, C] and w [..., C, M]; products in `dtype`."""
    blocks = scores[..., None, :, :]
    sums = 0
    for since, until in reversed(decays.halves):
        half = since.shape[-2]
        across = _block_dot(blocks[..., half:, :half], _halves(write, half)[0] * until, dtype) * since
        sums += _join(jnp.zeros_like(across), across)
        blocks = jnp.stack([blocks[..., :half, :half], blocks[..., half:, half:]], axis=-3)
        blocks = blocks.reshape(*blocks.shape[:-4], -1, half, half)
    return sums + blocks[..., 0] * write


def _over_sequence(chunks, states, arrays, chunk_size, dtype):
    """Runs `chunks(states, *arrays) -> (states, out)` over a sequence, [B, T, G, ...] in and out.

    `chunks` sees arrays cut into chunks. A platform that is best served by a small working set gets the chunks in
    spans, one after another, recomputed in the backward pass; the others get the whole sequence at once.
    """
    length = arrays[0].shape[1]
    chunk_size, span = _tiling(length, chunk_size)
    num_spans = -(-length // span)
    if padding := num_spans * span - length:
        # Apart from what reads it: XLA for GPUs can search for hours for tiles of padding fused with halves of chunks.
        ends = [(0, 0), (0, padding)]
        arrays = lax.optimization_barrier([jnp.pad(x, ends + [(0, 0)] * (x.ndim - 2)) for x in arrays])

    def one_span(states, arrays):
        states, out = chunks(states, *(_to_chunks(x, chunk_size) for x in arrays))
        return states, _from_chunks(out.astype(dtype))

    if num_spans == 1:
        states, out = one_span(states, arrays)
    else:
        spans = [jnp.moveaxis(x.reshape(x.shape[0], num_spans, span, *x.shape[2:]), 1, 0) for x in arrays]
        states, out = lax.scan(jax.checkpoint(one_span), states, spans)
        out = jnp.moveaxis(out, 0, 1).reshape(out.shape[1], num_spans * span, *out.shape[3:])
    return out[:, :length], states


def _tiling(length, chunk_size):
    """(chunk size, span) in tokens for a sequence of that length on the default backend, as measured (NOTES.md)."""
    on_cpu = jax.default_backend() == "cpu"
    chunk_size = chunk_size or min(32 if on_cpu else 128, 1 << (length - 1).bit_length())
    num_chunks = -(-length // chunk_size)
    num_spans = -(-num_chunks * chunk_size // 128) if on_cpu else 1
    return chunk_size, -(-num_chunks // num_spans) * chunk_size


def _to_chunks(x, chunk_size):
    """[B, T, G, R, D] -> [B, G, N, R, C, D]; [B, T, G, D] likewise with R = 1."""
    x = x if x.ndim == 5 else x[:, :, :, None]
    batch_size, length, *rest = x.shape
    return x.reshape(batch_size, length // chunk_size, chunk_size, *rest).transpose(0, 3, 1, 4, 2, 5)


def _from_chunks(x):
    """[B, G, N, R, C, D] -> [B, T, G, R, D]."""
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _halves(x, half):
    """The earlier and later halves of the blocks of 2·half tokens: [..., C, M] -> twice [..., C/(2·half), half, M]."""
    blocks = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _join(earlier, later):
    """The inverse of `_halves`."""
    blocks = jnp.stack([earlier, later], axis=-3)
    return blocks.reshape(*blocks.shape[:-4], -1, blocks.shape[-1])


def _block_dot(x, y, dtype):
    """x @ y of the blocks of one level; but for CPUs, those too small for matrix units are multiplied and summed."""
    if jax.default_backend() != "cpu" and min(x.shape[-2], y.shape[-2], y.shape[-1]) < 8:
        return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)
    return dot(x.astype(dtype), y.astype(dtype))
