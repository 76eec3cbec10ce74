"""Cross-entropy of the next token, without ever holding the logits of all tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gsa_jax.ops.dot import dot
from gsa_jax.sharding import BATCH, constrain, token_axes, without_single_devices

LOGITS_AT_ONCE = 2**27
"""Logits computed at a time, unless a chunk size is given: 0.5 GiB of float32."""


def next_token_loss(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums of -log softmax(logits(hidden))[target] over the tokens under `mask`, and their number.

    The logits are computed for a chunk of every row at a time, so memory holds [B, chunk_size, vocab] of them. Their
    gradient follows at once, where one is wanted: the backward pass has no logits to compute again, only to scale. What
    `logits` closes over gets its gradient summed over chunks in its own dtype, that of the parameters.

    Args:
      logits: the model's head, [B, t, D] -> [B, t, vocab] for any t.
      hidden: [B, T, D], any floating dtype.
      targets: [B, T] int, in [0, vocab).
      mask: [B, T] bool, False where there is no loss.
      chunk_size: tokens of a row at a time; by default as many as make `LOGITS_AT_ONCE` logits.

    Returns:
      The sum in nats, float32 scalar, and the count, int32 scalar.
    """
    batch, length, _ = hidden.shape
    if chunk_size is None:
        vocab = jax.eval_shape(logits, hidden).shape[-1]
        chunk_size = max(1, LOGITS_AT_ONCE // (batch * vocab))
    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)

    xs = [_split(x, chunks, chunk_size) for x in (hidden, targets, mask)]
    logits, parameters = jax.closure_convert(logits, xs[0][0])
    total = _sum_over_chunks(logits, parameters, *xs)
    return total, jnp.sum(mask, dtype=jnp.int32)


def sharded_next_token_loss(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` of a head [D, vocab], each device over the tokens that it has.

    The mesh in context says which those are (`jax.set_mesh`). The head is gathered once, and once its gradient is
    summed over the devices: left to itself XLA would do both for every chunk of tokens.
    """

    def total(head, hidden, targets, mask):
        return next_token_loss(lambda hidden: dot(hidden, head.astype(hidden.dtype)), hidden, targets, mask)

    def total_of_all(head, *tokens):
        return jax.lax.psum(total(jax.lax.pcast(head, axes, to="varying"), *tokens), axes)

    axes = token_axes()
    if not axes:
        return total(head, hidden, targets, mask)
    # Axes of one device stay out: XLA for GPUs can't sum over those alone where it splits the heads by itself.
    tokens = without_single_devices(BATCH, jax.sharding.get_abstract_mesh())
    over_tokens = jax.shard_map(
        total_of_all, in_specs=(P(), tokens, tokens, tokens), out_specs=P(), axis_names=set(axes)
    )
    return over_tokens(constrain(head, None, "vocab"), hidden, targets, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(logits, parameters, hidden, targets, mask):
    """The loss of chunks [N, B, t, ...], from logits(hidden of a chunk, *parameters)."""

    def add_chunk(total, chunk):
        return total + _chunk_loss(logits, parameters, *chunk), None

    return jax.lax.scan(add_chunk, _zero(hidden), (hidden, targets, mask))[0]


def _sum_and_gradients(logits, parameters, hidden, targets, mask):
    loss_and_gradients = jax.value_and_grad(functools.partial(_chunk_loss, logits), (0, 1))

    def add_chunk(sums, chunk):
        loss, (d_parameters, d_hidden) = loss_and_gradients(parameters, *chunk)
        return jax.tree.map(jnp.add, sums, (loss, d_parameters)), d_hidden

    zeros = _zero(hidden), jax.tree.map(jnp.zeros_like, parameters)
    (total, d_parameters), d_hidden = jax.lax.scan(add_chunk, zeros, (hidden, targets, mask))
    return total, (d_parameters, d_hidden)


def _scale_gradients(logits, gradients, cotangent):
    scaled = jax.tree.map(lambda gradient: (cotangent * gradient).astype(gradient.dtype), gradients)
    return *scaled, None, None


_sum_over_chunks.defvjp(_sum_and_gradients, _scale_gradients)


def _chunk_loss(logits, parameters, hidden, targets, mask):
    return jnp.sum(_cross_entropy(logits(hidden, *parameters), targets), where=mask)


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
