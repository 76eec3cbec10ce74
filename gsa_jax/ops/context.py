"""Long sequences cut over devices: what each part of a sequence needs to know of the parts before it.

The functions here run inside a `jax.shard_map`. Along its mesh axis `axis_name` every device holds an equally long part
of each row, in order. They take and return what their namesakes of `gsa_jax.ops` do, tokens of the part only, and the
results are those of the whole row on one device: a part begins with the state that the parts before it leave behind.

A part does to a state of a recurrence what one token does, a gate and a write,

    H' = diag(kept) H + added        kept = Π_t a[t]        added = Σ_t (w[t] ⊙ Π_{s>t} a[s]) x[t]ᵀ

and neither depends on queries or reads. So the parts exchange (kept, added) in one all-gather, M (D + 1) numbers a head
where D = K + V for both memories of Gated Slot Attention, each device applies those of the parts before its own, and
the op runs on the part from there. The backward pass has one reduce-scatter. All factors are in [0, 1], products of
gates that are computed as exponentials of sums of log decays: no decay is too strong.

`added` is one product of matrices, what a forward pass spends on its states, and all that a cut sequence costs beside
the exchange. A document that begins in a part, its first token included, makes kept = 0.

Initial states are the same on all devices of the axis, and so are the states returned, those after the row's last
token: the last device sends its own around, unless nobody uses them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gsa_jax.ops import abc, convolution, linear_attention, slot_attention, softmax
from gsa_jax.ops.arguments import state_dtype
from gsa_jax.ops.dot import dot


def gated_slot_attention(
    q, k, v, log_decay, write=None, *, initial_state=None, segment_ids=None, axis_name="context", **options
):
    """`gsa_jax.ops.gated_slot_attention` of this device's part, [B, T/n, ...], of sequences [B, T, ...]."""
    slot_attention.check(q, k, v, log_decay, write, initial_state=initial_state, segment_ids=segment_ids, **options)
    state = slot_attention.first_state(q, k, v, log_decay, write, initial_state, segment_ids)
    gates = log_decay.astype(state_dtype(q, log_decay))
    strength = slot_attention.write_strength(gates) if write is None else write
    state = slot_attention.SlotState(*_entering(state, gates, strength, (k, v), segment_ids, axis_name))
    out, state = slot_attention.gated_slot_attention(
        q, k, v, log_decay, write, initial_state=state, segment_ids=segment_ids, **options
    )
    return out, _of_last_part(state, axis_name)


def gated_linear_attention(q, k, v, log_decay, *, initial_state=None, segment_ids=None, axis_name="context", **options):
    """`gsa_jax.ops.gated_linear_attention` of this device's part, [B, T/n, ...], of sequences [B, T, ...]."""
    linear_attention.check(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids, **options)
    state = linear_attention.first_state(q, k, v, log_decay, initial_state, segment_ids)
    gates = log_decay.astype(state_dtype(q, log_decay))
    (state,) = _entering((state,), gates, k, (v,), segment_ids, axis_name)
    out, state = linear_attention.gated_linear_attention(
        q, k, v, log_decay, initial_state=state, segment_ids=segment_ids, **options
    )
    return out, _of_last_part(state, axis_name)


def _entering(states, log_decay, write, written, segment_ids, axis_name):
    """The states [B, G, M, D] that enter this device's part, from those that enter the first."""
    if segment_ids is not None:
        starts = _document_starts(segment_ids, axis_name)
        log_decay = jnp.where(starts[:, :, None, None], -jnp.inf, log_decay)
    kept, added = _part(log_decay, write, written)
    parts = lax.all_gather(jnp.concatenate([kept, *added], axis=-1), axis_name)

    def apply(state, part):
        return part[..., :1] * state + part[..., 1:]

    state = _fold(apply, jnp.concatenate(states, axis=-1), parts, axis_name)
    if segment_ids is not None:
        state = jnp.where(starts[:, 0, None, None, None], 0, state)
    return jnp.split(state, [x.shape[-1] for x in states[:-1]], axis=-1)


def _part(log_decay, write, written):
    """What this part does to the states: kept [B, G, M, 1], and added [B, G, M, D] for each of `written`."""
    sums = lax.cumsum(log_decay, axis=1, reverse=True)
    after = jnp.concatenate([sums[:, 1:], jnp.zeros_like(sums[:, :1])], axis=1)
    key = write * jnp.exp(after)
    added = [dot(_heads_first(key.astype(x.dtype)).mT, _heads_first(x)) for x in written]
    kept = jnp.broadcast_to(jnp.exp(sums[:, 0, :, :, None]), (*added[0].shape[:-1], 1))
    return kept, added


def _heads_first(x):
    """[B, T, G, D] -> [B, G, T, D]."""
    return x.swapaxes(1, 2)


def abc_log_decay(write_logits, *, initial_normalizer=None, segment_ids=None, axis_name="context"):
    """`gsa_jax.ops.abc_log_decay` of this device's part, [B, T/n, G, M], of sequences [B, T, G, M].

    The parts exchange the logsumexp of the write logits of their last documents, and whether those began in the part.
    """
    abc.check(write_logits, initial_normalizer=initial_normalizer, segment_ids=segment_ids)
    normalizer = abc.first_normalizer(write_logits, initial_normalizer)
    logits = write_logits.astype(normalizer.dtype)
    starts = jnp.zeros(logits.shape[:2], bool)
    if segment_ids is not None:
        starts = _document_starts(segment_ids, axis_name)
    starts_after = lax.cumsum(starts.astype(jnp.int32), axis=1, reverse=True) - starts
    added = jax.nn.logsumexp(logits, axis=1, where=(starts_after == 0)[:, :, None, None])
    kept = jnp.where(starts.any(axis=1)[:, None, None], -jnp.inf, jnp.zeros_like(added))
    parts = lax.all_gather(jnp.stack([kept, added]), axis_name)
    normalizer = _fold(lambda z, part: abc.logaddexp(z + part[0], part[1]), normalizer, parts, axis_name)
    normalizer = jnp.where(starts[:, :1, None], -jnp.inf, normalizer)
    log_decay, normalizer = abc.abc_log_decay(logits, initial_normalizer=normalizer, segment_ids=segment_ids)
    return log_decay, _of_last_part(normalizer, axis_name)


def short_convolution(x, kernel, *, initial_state=None, segment_ids=None, axis_name="context"):
    """`gsa_jax.ops.short_convolution` of this device's part, [B, T/n, C], of sequences [B, T, C].

    A device passes its last W - 1 tokens on to the next. Raises a ValueError if it has fewer.
    """
    convolution.check(x, kernel, initial_state=initial_state, segment_ids=segment_ids)
    length, before = x.shape[1], kernel.shape[0] - 1
    if length < before:
        raise ValueError(f"a part of a sequence must have the {before} tokens that the next one needs, got {length}")
    _, last = convolution.short_convolution(x, kernel, segment_ids=segment_ids)
    state = _from_left(last, jnp.zeros_like(last) if initial_state is None else initial_state, axis_name)
    if segment_ids is not None:
        starts = _document_starts(segment_ids, axis_name)
        state = jnp.where(starts[:, :1, None], 0, state)
    y, state = convolution.short_convolution(x, kernel, initial_state=state, segment_ids=segment_ids)
    return y, _of_last_part(state, axis_name)


def softmax_attention(q, k, v, *, window=None, segment_ids=None, axis_name="context"):
    """`gsa_jax.ops.softmax_attention` of this device's part, [B, T/n, ...], of sequences [B, T, ...].

    Keys and values come from all devices, in one all-gather; where the tokens that a part sees before its own fit into
    one part, a window, they come from the device to the left.
    """
    softmax.check(q, k, v, window=window, segment_ids=segment_ids)
    length, position = q.shape[1], lax.axis_index(axis_name) * q.shape[1]
    if window is None or window - 1 > length:
        seen = functools.partial(lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
        offset, first_key = position, 0
    else:
        seen = functools.partial(_with_tokens_before, count=window - 1, axis_name=axis_name)
        offset, first_key = window - 1, position - (window - 1)
    keys, values = jnp.split(seen(jnp.concatenate([k, v], axis=-1)), 2, axis=-1)
    ids = None if segment_ids is None else seen(segment_ids)
    return softmax.stretch_attention(
        q, keys, values, offset=offset, first_key=first_key, window=window, segment_ids=ids
    )


# What passes between devices


def _document_starts(segment_ids, axis_name):
    """As `gsa_jax.ops.arguments.document_starts` of the whole rows: where a document begins, [B, T/n] bool."""
    before = _from_left(segment_ids[:, -1:], segment_ids[:, :1], axis_name)
    return segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)


def _from_left(x, first, axis_name):
    """What the device to the left has; the first device gets `first`."""
    last = lax.axis_size(axis_name) - 1
    from_left = lax.ppermute(x, axis_name, [(i, i + 1) for i in range(last)])
    return jnp.where(lax.axis_index(axis_name) == 0, first, from_left)


def _with_tokens_before(x, count, axis_name):
    """This device's tokens [B, T/n, ...] after the last `count` of the device to the left; zeros on the first."""
    last = x[:, x.shape[1] - count :]
    return jnp.concatenate([_from_left(last, jnp.zeros_like(last), axis_name), x], axis=1)


def _fold(apply, state, parts, axis_name):
    """The state that enters this device's part: `apply(state, part)` with those before it, one after the other."""
    for i in range(lax.axis_size(axis_name) - 1):
        after = apply(state, jax.tree.map(lambda x, i=i: x[i], parts))
        state = jnp.where(i < lax.axis_index(axis_name), after, state)
    return state


def _of_last_part(state, axis_name):
    """The state that the last device has, on all."""
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, 0), axis_name), state)
