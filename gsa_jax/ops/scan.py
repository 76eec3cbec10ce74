"""The definition: gated recurrences as `jax.lax.scan` over tokens. Slow, short, and the oracle of every test.

A recurrence is a write and a read. All mixers of this library write alike,

    H[t] = diag(exp(g[t])) H[t-1] + w[t] ⊗ x[t]            H: [M, D]

and differ in the read: across the rows (`read_rows`: one number for each of the M rows) or along them
(`read_columns`: a weighted sum of the M rows).

Layout inside this file: queries [B, T, G, R, ·] (R query heads share one of the G states), everything that is
written [B, T, G, ·], states [B, G, M, D].
"""

import jax
import jax.numpy as jnp
from jax import lax


def write(state, log_decay, key, value):
    """diag(exp(g)) H + w ⊗ x for one token: state [B,G,M,D], log_decay [B,G,M or 1], key [B,G,M], value [B,G,D]."""
    return jnp.exp(log_decay)[..., None] * state + key[..., :, None] * value[..., None, :]


def read_rows(state, query):
    """H q: the product of the query [B,G,R,D] with every row of the state [B,G,M,D]; returns [B,G,R,M]."""
    return jnp.einsum("bgmd,bgrd->bgrm", state, query, precision=lax.Precision.HIGHEST)


def read_columns(state, query):
    """Hᵀ p: the rows of the state [B,G,M,D] summed with the weights [B,G,R,M]; returns [B,G,R,D]."""
    return jnp.einsum("bgmd,bgrm->bgrd", state, query, precision=lax.Precision.HIGHEST)


def recurrence(read, state, queries, log_decays, keys, values):
    """Scans over the tokens, a write and then a read at each. Returns (reads [B, T, ...], last state)."""

    def token(state, inputs):
        query, log_decay, key, value = (x.astype(state.dtype) for x in inputs)
        state = write(state, log_decay, key, value)
        return state, read(state, query)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (queries, log_decays, keys, values))
    state, reads = lax.scan(token, state, tokens)
    return jnp.moveaxis(reads, 0, 1), state


def gated_slot_attention(q, k, v, log_decay, write, *, scale, initial_state):
    """GSA as two scans joined by a softmax (arXiv 2409.07146, section 3): Kmem is read by q, Vmem by the softmax."""
    keys, values = initial_state
    logits, keys = recurrence(read_rows, keys, q, log_decay, write, k)
    p = jax.nn.softmax(scale * logits, axis=-1)
    out, values = recurrence(read_columns, values, p, log_decay, write, v)
    return out.astype(v.dtype), (keys, values)


def gated_linear_attention(q, k, v, log_decay, *, scale, initial_state):
    """GLA as one scan (arXiv 2312.06635, equation 3)."""
    out, state = recurrence(read_columns, initial_state, q, log_decay, k, v)
    return (scale * out).astype(v.dtype), state
