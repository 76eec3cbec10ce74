"""Causal softmax attention on arrays, the mixer of Transformers."""

import jax
import jax.numpy as jnp
from jax import lax

from gsa_jax.ops.arguments import check_array, check_qkv, check_segment_ids, document_starts

SCORES_AT_ONCE = 2**27
"""Scores of queries with keys that `stretch_attention` computes at a time: 0.5 GiB of float32."""


def softmax_attention(q, k, v, *, window=None, segment_ids=None):
    """out[t] = Σ_s softmax_s(q[t]·k[s] / sqrt(K)) v[s], where s runs over the tokens that token t sees.

    Args:
      q: queries [B, T, H, K]. H is a multiple of G; query heads h with the same h // (H/G) share keys and values.
      k, v: keys and values [B, T, G, K].
      window: how many tokens a token sees, itself included; all before it by default.
      segment_ids: integers [B, T]; where the id changes a document begins that sees nothing before it.

    Returns:
      out [B, T, H, K] in q's dtype.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value; the message names it.
    """
    check(q, k, v, window=window, segment_ids=segment_ids)
    if segment_ids is None:
        window = None if window is None else (window - 1, 0)
        return attention(q, k, v, is_causal=True, local_window_size=window)
    positions = jnp.arange(q.shape[1])
    document = _documents(segment_ids)
    mask = _sees(positions, positions, window) & _same(document, document)
    return attention(q, k, v, mask=mask[:, None])


def check(q, k, v, *, window=None, segment_ids=None):
    """Raises unless these are arguments of `softmax_attention`."""
    leading, num_groups, key_size, _ = check_qkv(q, k, v)
    check_array("v", v, leading | {"G": num_groups, "K": key_size})
    check_segment_ids(segment_ids, leading)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")


def stretch_attention(q, k, v, *, offset, first_key, window=None, segment_ids=None):
    """`softmax_attention` of a stretch of T tokens that stands among the S whose keys are given.

    Args:
      q: queries [B, T, H, K].
      k, v: keys and values [B, S, G, K].
      offset: which of the S tokens is the first of the T.
      first_key: the position of the first of the S tokens in the sequence; what is before 0 is not seen.
      window: as for `softmax_attention`.
      segment_ids: of the S tokens, [B, S].

    The queries are taken in blocks of about `SCORES_AT_ONCE` scores, which the backward pass computes again.
    """
    batch_size, length, num_heads, _ = q.shape
    keys = jnp.arange(k.shape[1])
    document = jnp.zeros((batch_size, k.shape[1]), int) if segment_ids is None else _documents(segment_ids)

    @jax.checkpoint
    def attend(block):
        q, queries, query_document = block
        mask = (keys + first_key >= 0) & _sees(queries, keys, window) & _same(query_document.T, document)
        return attention(q.swapaxes(0, 1), k, v, mask=mask[:, None]).swapaxes(0, 1)

    blocks = 1
    while batch_size * num_heads * (length // blocks) * k.shape[1] > SCORES_AT_ONCE and length % (2 * blocks) == 0:
        blocks *= 2
    own = lax.dynamic_slice_in_dim(document, offset, length, axis=1)
    by_token = (q.swapaxes(0, 1), offset + jnp.arange(length), own.T)
    out = lax.map(attend, jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), by_token))
    return out.reshape(length, *out.shape[2:]).swapaxes(0, 1)


def attention(q, k, v, **options):
    """`jax.nn.dot_product_attention`; of float16 in float32 where a platform has no float16 products."""

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, **options)

    def wide(*arrays):
        return plain(*(x.astype(jnp.float32) for x in arrays)).astype(q.dtype)

    return lax.platform_dependent(q, k, v, cuda=plain, default=wide) if q.dtype == jnp.float16 else plain(q, k, v)


def _documents(segment_ids):
    """[B, T]: which document of its row a token is of, in order."""
    return jnp.cumsum(document_starts(segment_ids), axis=1)


def _sees(queries, keys, window):
    """[T, S] bool: causal, and within a window if there is one."""
    distance = queries[:, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _same(query_document, key_document):
    """[B, T, S] bool, from [B, T] and [B, S]."""
    return query_document[:, :, None] == key_document[:, None]
