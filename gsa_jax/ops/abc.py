"""ABC's gate: attention with bounded-memory control as Gated Slot Attention."""

import jax
import jax.numpy as jnp
from jax import lax

from gsa_jax.ops.arguments import check_array, check_segment_ids, document_starts, state_dtype, zero_state


def abc_log_decay(write_logits, *, initial_normalizer=None, segment_ids=None):
    """The log decay that turns Gated Slot Attention into ABC (arXiv 2110.02488; GSA paper, section 2).

    ABC writes token t with the share of exp(s[t]) in all write logits so far. With the running normalizer
    z[t] = logsumexp(s[0..t]) that is the gate exp(z[t-1] - z[t]) and the write strength exp(s[t] - z[t]). The two add
    up to one, so it is Gated Slot Attention with its default write strength and

        log_decay[t] = log_sigmoid(z[t-1] - s[t])

    Args:
      write_logits: s, [B, T, G, M], floating.
      initial_normalizer: z before the first token, [B, G, M]; by default -inf, nothing written yet.
      segment_ids: integers [B, T]; every document begins with an empty normalizer.

    Returns:
      (log_decay [B, T, G, M] in float32, z after the last token [B, G, M]: pass it on with the `SlotState`).

    Raises:
      TypeError, ValueError: an argument has the wrong dtype or shape; the message names it.
    """
    check(write_logits, initial_normalizer=initial_normalizer, segment_ids=segment_ids)
    initial_normalizer = first_normalizer(write_logits, initial_normalizer)
    logits = write_logits.astype(initial_normalizer.dtype)
    batch_size, length = logits.shape[:2]
    starts = jnp.zeros((batch_size, length), bool) if segment_ids is None else document_starts(segment_ids)
    starts = jnp.broadcast_to(starts[:, :, None, None], logits.shape)
    _, normalizers = lax.associative_scan(_append, (starts, logits), axis=1)
    in_first_document = lax.cummax(starts.astype(jnp.int32), axis=1) == 0
    initial = initial_normalizer[:, None]
    normalizers = jnp.where(in_first_document, logaddexp(initial, normalizers), normalizers)
    before = jnp.concatenate([initial, normalizers[:, :-1]], axis=1)
    return _log_share_kept(jnp.where(starts, -jnp.inf, before), logits), normalizers[:, -1]


def check(write_logits, *, initial_normalizer=None, segment_ids=None):
    """Raises unless these are arguments of `abc_log_decay`."""
    check_array("write_logits", write_logits, dict.fromkeys("BTGM"))
    sizes = dict(zip("BTGM", write_logits.shape, strict=True))
    check_segment_ids(segment_ids, {name: sizes[name] for name in "BT"})
    if initial_normalizer is not None:
        check_array("initial_normalizer", initial_normalizer, {name: sizes[name] for name in "BGM"})


def first_normalizer(write_logits, initial_normalizer):
    """The normalizer that the first token finds, from arguments of `abc_log_decay`."""
    dtype = state_dtype(write_logits)
    if initial_normalizer is None:
        batch_size, _, *slots = write_logits.shape
        return zero_state((batch_size, *slots), dtype, like=write_logits) - jnp.inf
    return initial_normalizer.astype(dtype)


def abc_log_decay_step(write_logits, normalizer):
    """One token of `abc_log_decay`: write_logits and normalizer [B, G, M]; returns (log_decay, the new normalizer).

    Raises:
      TypeError, ValueError: an argument has the wrong dtype or shape; the message names it.
    """
    check_array("write_logits", write_logits, dict.fromkeys("BGM"))
    check_array("normalizer", normalizer, dict(zip("BGM", write_logits.shape, strict=True)))
    logits = write_logits.astype(state_dtype(write_logits))
    return _log_share_kept(normalizer, logits), logaddexp(normalizer, logits)


def logaddexp(x, y):
    """log(e^x + e^y), with gradients of zero where both are -inf."""
    empty = (x == -jnp.inf) & (y == -jnp.inf)
    return jnp.where(empty, -jnp.inf, jnp.logaddexp(jnp.where(empty, 0, x), y))


def _append(left, right):
    """Normalizers of two neighbouring stretches, each (does a document start in it, logsumexp since that start)."""
    (left_start, left_sum), (right_start, right_sum) = left, right
    return left_start | right_start, jnp.where(right_start, right_sum, logaddexp(left_sum, right_sum))


def _log_share_kept(normalizer, logits):
    """log(e^z / (e^z + e^s)); -inf where nothing was written before, with a gradient of zero there."""
    empty = normalizer == -jnp.inf
    kept = jax.nn.log_sigmoid(jnp.where(empty, 0, normalizer) - logits)
    return jnp.where(empty, -jnp.inf, kept)
