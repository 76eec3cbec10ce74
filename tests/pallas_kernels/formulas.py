"""What the kernels of Gated Slot Attention compute, in float64 NumPy; names and layouts are those of the kernels.

Arrays travel by chunks, [B, H, N, 64, D], where heads of a group are repeated: `by_chunks` takes a kernel's operand
there, `by_tokens` brings a result back.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 64


def by_chunks(x, num_heads):
    """[B, T, G, D] -> [B, H, N, 64, D] in float64, zeros behind the last token."""
    x = np.repeat(np.asarray(x, np.float64), num_heads // x.shape[2], axis=2)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % SIZE), (0, 0), (0, 0)))
    return np.moveaxis(x.reshape(x.shape[0], -1, SIZE, *x.shape[2:]), 3, 1)


def by_tokens(x, length):
    """[B, H, N, 64, D] -> [B, T, H, D]"""
    return np.moveaxis(x, 1, 3).reshape(x.shape[0], -1, x.shape[1], x.shape[-1])[:, :length]


def per_head(x, num_heads):
    """[B, G, N, ...] -> [B, H, N, ...] in float64."""
    return np.repeat(np.asarray(x, np.float64), num_heads // x.shape[1], axis=1)


def write_strength(log_decay):
    return -np.expm1(log_decay)


def through(log_decay):
    """The gates' product from the chunk's start through each token."""
    return np.exp(np.cumsum(log_decay, axis=-2))


def chunk_gates(log_decay, write):
    """(the write key at its chunk's end, the product of a chunk's gates)"""
    since = np.cumsum(log_decay, axis=-2)
    return write * np.exp(since[..., -1:, :] - since), np.exp(since[..., -1, :])


def chunk_states(x, key, kept, initial):
    """(the state before each chunk, the one after the last)"""
    state, states = np.asarray(initial, np.float64), []
    for n in range(x.shape[2]):
        states.append(state)
        state = kept[:, :, n, :, None] * state + np.einsum("bhjm,bhjd->bhmd", key[:, :, n], x[:, :, n])
    return np.stack(states, 2), state


def memory_read(x, key, kept, initial, scores, reader):
    """(out, the state after the last chunk, those before each chunk)"""
    states, last = chunk_states(x, key, kept, initial)
    return scores @ x + reader @ states, last, states


def slot_softmax(q, k, log_decay, write, keys, scale, num_slots):
    """(prod(a) ⊙ p, the scores of v, q·k for j <= i, prod(a) ⊙ Kmem q, p)"""
    scores = np.einsum("...ik,...jk->...ij", q, k)
    before = through(log_decay) * np.einsum("...ik,...mk->...im", q, keys)
    logits = scale * (before + np.einsum("...ij,...ijm->...im", scores, _weights(log_decay, write)))
    logits[..., num_slots:] = -np.inf
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    value_scores = np.einsum("...im,...ijm->...ij", p, _weights(log_decay, write))
    return through(log_decay) * p, value_scores, np.tril(scores), before, p


def slot_softmax_backward(d_out, v, log_decay, write, values, p, scale):
    """(A, dS, prod(a) ⊙ ds, prod(a) ⊙ p, prod(a) ⊙ Vmem do, ds)"""
    d_scores = np.einsum("...iv,...jv->...ij", d_out, v)
    before = through(log_decay) * np.einsum("...iv,...mv->...im", d_out, values)
    dp = before + np.einsum("...ij,...ijm->...im", d_scores, _weights(log_decay, write))
    ds = scale * p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    key_scores = np.einsum("...im,...ijm->...ij", ds, _weights(log_decay, write))
    return key_scores, np.tril(d_scores), through(log_decay) * ds, through(log_decay) * p, before, ds


def write_backward(memories, key):
    """(dkey, dx for every memory)"""
    d_key = sum(np.einsum("...md,...jd->...jm", d_state, x) for x, _, _, d_state in memories)
    return d_key, *(np.einsum("...ij,...id->...jd", s, y) + key @ d_state for _, y, s, d_state in memories)


def gates_backward(reads, log_decay, write, d_key, d_kept):
    """(gradient of the log decays, with `write` also that of the write strengths), by autodiff of what they enter."""

    def value(log_decay, write):
        write = -jnp.expm1(log_decay) if write is None else write
        since = jnp.cumsum(log_decay, axis=-2)
        steps = since[..., :, None, :] - since[..., None, :, :]
        weights = jnp.where(_NOT_LATER, write[..., None, :, :] * jnp.exp(jnp.where(_NOT_LATER, steps, 0)), 0)
        result = jnp.vdot(d_key, write * jnp.exp(since[..., -1:, :] - since)) + jnp.vdot(d_kept, since[..., -1, :])
        for scores, before, dy in reads:
            result += jnp.vdot(dy, before * jnp.exp(since - jax.lax.stop_gradient(since)))
            result += jnp.einsum("...im,...ij,...ijm->", dy, scores, weights)
        return result

    with jax.enable_x64(True):
        given = (log_decay,) if write is None else (log_decay, write)
        return jax.grad(lambda given: value(*given, *[None] * (2 - len(given))))(given)


_NOT_LATER = np.tril(np.ones((SIZE, SIZE), bool))[..., None]
"""[i, j, 1]: whether j <= i"""


def _weights(log_decay, write):
    """w_jm D_ijm for j <= i, else 0: [..., i, j, m]"""
    since = np.cumsum(log_decay, axis=-2)
    steps = np.where(_NOT_LATER, since[..., :, None, :] - since[..., None, :, :], -np.inf)
    return write[..., None, :, :] * np.exp(steps)
