"""Cross-entropy of the next token, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp

from gsa_jax.ops.dot import dot
from gsa_jax.sharding import constrain, over_tokens

LOGITS_AT_ONCE = 2**27
"""Logits computed at a time, unless a chunk size is given: 0.5 GiB of float32."""


def next_token_loss(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array, *, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums of -log softmax(hidden @ head)[target] over the tokens under `mask`, and their number.

    The logits are computed for a chunk of every row at a time, so memory holds [B, chunk_size, vocab] of them. Their
    gradient follows at once, where one is wanted: the backward pass has no logits to compute again, only to scale.

    Args:
      head: [D, vocab], multiplied in the dtype of `hidden`; its gradient is summed over the chunks in float32.
      hidden: [B, T, D], any floating dtype.
      targets: [B, T] int, in [0, vocab).
      mask: [B, T] bool, False where there is no loss.
      chunk_size: tokens of a row at a time; by default as many as make `LOGITS_AT_ONCE` logits.

    Returns:
      The sum in nats, float32 scalar, and the count, int32 scalar.

    Raises:
      ValueError: `chunk_size` is less than 1.
    """
    batch, length, _ = hidden.shape
    if chunk_size is None:
        chunk_size = max(1, LOGITS_AT_ONCE // (batch * head.shape[1]))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)
    total = _sum_over_chunks(head, *(_split(x, chunks, chunk_size) for x in (hidden, targets, mask)))
    return total, jnp.sum(mask, dtype=jnp.int32)


def sharded_next_token_loss(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss`, each device over the tokens that it has.

    The mesh in context says which those are (`jax.set_mesh`). The head is gathered once, and once its gradient is
    summed over the devices: left to itself XLA would do both for every chunk of tokens.
    """
    tokens = {"hidden": hidden, "targets": targets, "mask": mask}
    return over_tokens(next_token_loss, constrain(head, None, "vocab"), total=True, **tokens)


@jax.custom_vjp
def _sum_over_chunks(head, hidden, targets, mask):
    """The loss of chunks [N, B, t, ...]."""

    def add_chunk(total, chunk):
        return total + _chunk_loss(head, *chunk), None

    return jax.lax.scan(add_chunk, _zero(hidden), (hidden, targets, mask))[0]


def _sum_and_gradients(head, hidden, targets, mask):
    loss_and_gradients = jax.value_and_grad(_chunk_loss, (0, 1))

    def add_chunk(sums, chunk):
        loss, (d_head, d_hidden) = loss_and_gradients(head, *chunk)
        return (sums[0] + loss, sums[1] + d_head), d_hidden

    zeros = _zero(hidden), jnp.zeros_like(head, jnp.promote_types(head.dtype, jnp.float32))
    (total, d_head), d_hidden = jax.lax.scan(add_chunk, zeros, (hidden, targets, mask))
    return total, (d_head.astype(head.dtype), d_hidden)


def _scale_gradients(gradients, cotangent):
    return *((cotangent * gradient).astype(gradient.dtype) for gradient in gradients), None, None


_sum_over_chunks.defvjp(_sum_and_gradients, _scale_gradients)


def _chunk_loss(head, hidden, targets, mask):
    return jnp.sum(_cross_entropy(dot(hidden, head.astype(hidden.dtype)), targets), where=mask)


def _zero(like):
    return jnp.zeros_like(like, jnp.float32, shape=())


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logsumexp(logits) - logits[target] in float32, [..., vocab] and [...] -> [...].

    The target's logit is picked by a comparison and a sum, which stay local when the vocabulary is sharded.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits, axis=-1, where=chosen)


def _split(x: jax.Array, chunks: int, chunk_size: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, chunk_size, ...], padded with zeros (or False) at the end."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, chunks * chunk_size - length)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(batch, chunks, chunk_size, *rest), 1, 0)
