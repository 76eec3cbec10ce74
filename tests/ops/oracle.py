"""What the ops must compute: the recurrences token by token in float64 NumPy, with hand-written gradients.

Independent of the library on purpose: nothing is imported from it, nothing is vectorized over tokens, batch entries or
heads. Arrays travel in dictionaries, {"q": [B, T, H, K], "k": [B, T, G, K], ...}; every function takes the inputs and
the cotangents of its outputs and returns (outputs, gradients by the inputs' names). Inputs left out have no gradient.
"""

import numpy as np


def slot_attention(arrays, cotangents, scale=1.0):
    """Gated Slot Attention: q, k, v, log_decay [, write] [, keys, values] -> out, keys, values (the memories)."""
    q, k, v, log_decay = (_float64(arrays[name]) for name in ("q", "k", "v", "log_decay"))
    write = _float64(arrays["write"]) if "write" in arrays else -np.expm1(log_decay)
    (batch_size, _, num_heads, key_size), (*_, num_groups, num_slots) = q.shape, log_decay.shape
    zeros = np.zeros((batch_size, num_groups, num_slots, key_size + v.shape[-1]))
    initial = {
        "keys": _float64(arrays.get("keys", zeros[..., :key_size])),
        "values": _float64(arrays.get("values", zeros[..., key_size:])),
    }
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "write": write, **initial}
    gradients = {name: np.zeros_like(x) for name, x in inputs.items()}
    outputs = {
        "out": np.zeros((*q.shape[:3], v.shape[-1])),
        "keys": 0 * initial["keys"],
        "values": 0 * initial["values"],
    }
    d_out, d_keys, d_values = (_float64(cotangents[name]) for name in ("out", "keys", "values"))

    for b, g in np.ndindex(batch_size, num_groups):
        gate = log_decay[b, :, g], write[b, :, g]
        keys = _states(initial["keys"][b, g], *gate, k[b, :, g])
        values = _states(initial["values"][b, g], *gate, v[b, :, g])
        outputs["keys"][b, g], outputs["values"][b, g] = keys[-1], values[-1]
        d_keys_read, d_values_read = np.zeros_like(keys[1:]), np.zeros_like(values[1:])
        for h in _heads_of_group(g, num_heads, num_groups):
            for t in range(q.shape[1]):
                p = _softmax(scale * keys[t + 1] @ q[b, t, h])
                outputs["out"][b, t, h] = values[t + 1].T @ p
                d_values_read[t] += np.outer(p, d_out[b, t, h])
                d_p = values[t + 1] @ d_out[b, t, h]
                d_logits = scale * p * (d_p - p @ d_p)
                d_keys_read[t] += np.outer(d_logits, q[b, t, h])
                gradients["q"][b, t, h] = keys[t + 1].T @ d_logits
        for memory, states, d_read, d_last, written in (
            ("keys", keys, d_keys_read, d_keys, "k"),
            ("values", values, d_values_read, d_values, "v"),
        ):
            pulled = _states_vjp(states, *gate, inputs[written][b, :, g], d_read, d_last[b, g])
            gradients[memory][b, g], d_log_decay, d_write, gradients[written][b, :, g] = pulled
            gradients["log_decay"][b, :, g] += d_log_decay
            gradients["write"][b, :, g] += d_write

    if "write" not in arrays:
        gradients["log_decay"] -= np.exp(log_decay) * gradients["write"]
    return outputs, {name: gradients[name] for name in arrays}


def linear_attention(arrays, cotangents, scale=None):
    """Gated linear attention: q, k, v, log_decay (K wide, or 1) [, state] -> out, state."""
    q, k, v, log_decay = (_float64(arrays[name]) for name in ("q", "k", "v", "log_decay"))
    (batch_size, length, num_heads, key_size), num_groups = q.shape, k.shape[2]
    scale = key_size**-0.5 if scale is None else scale
    initial = _float64(arrays.get("state", np.zeros((batch_size, num_groups, key_size, v.shape[-1]))))
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state": initial}
    gradients = {name: np.zeros_like(x) for name, x in inputs.items()}
    outputs = {"out": np.zeros((*q.shape[:3], v.shape[-1])), "state": 0 * initial}
    d_out, d_state = _float64(cotangents["out"]), _float64(cotangents["state"])

    for b, g in np.ndindex(batch_size, num_groups):
        gate = np.broadcast_to(log_decay[b, :, g], (length, key_size)), k[b, :, g]
        states = _states(initial[b, g], *gate, v[b, :, g])
        outputs["state"][b, g] = states[-1]
        d_read = np.zeros_like(states[1:])
        for h in _heads_of_group(g, num_heads, num_groups):
            for t in range(length):
                outputs["out"][b, t, h] = scale * states[t + 1].T @ q[b, t, h]
                d_read[t] += scale * np.outer(q[b, t, h], d_out[b, t, h])
                gradients["q"][b, t, h] = scale * states[t + 1] @ d_out[b, t, h]
        pulled = _states_vjp(states, *gate, v[b, :, g], d_read, d_state[b, g])
        gradients["state"][b, g], d_log_decay, gradients["k"][b, :, g], gradients["v"][b, :, g] = pulled
        one_per_head = log_decay.shape[-1] == 1
        gradients["log_decay"][b, :, g] = d_log_decay.sum(-1, keepdims=True) if one_per_head else d_log_decay

    return outputs, {name: gradients[name] for name in arrays}


def abc_gate(arrays, cotangents):
    """ABC (arXiv 2110.02488): write_logits [, normalizer] -> log_decay, write, normalizer z, the running logsumexp."""
    logits = _float64(arrays["write_logits"])
    empty = np.full(logits[:, 0].shape, -np.inf)
    normalizers = [_float64(arrays.get("normalizer", empty))]
    for t in range(logits.shape[1]):
        normalizers.append(np.logaddexp(normalizers[-1], logits[:, t]))
    normalizers = np.stack(normalizers, 1)
    log_decay, write = normalizers[:, :-1] - normalizers[:, 1:], np.exp(logits - normalizers[:, 1:])

    d_log_decay, d_write = _float64(cotangents["log_decay"]), _float64(cotangents["write"])
    d_logits, carry = np.zeros_like(logits), _float64(cotangents["normalizer"])
    for t in reversed(range(logits.shape[1])):
        kept = np.isfinite(log_decay[:, t])  # a gate of zero has no gradient
        d_gate = np.where(kept, d_log_decay[:, t], 0)
        carry = carry - d_gate - write[:, t] * d_write[:, t]
        d_logits[:, t] = write[:, t] * (d_write[:, t] + carry)
        carry = np.exp(log_decay[:, t]) * carry + d_gate
    outputs = {"log_decay": log_decay, "write": write, "normalizer": normalizers[:, -1]}
    gradients = {"write_logits": d_logits, "normalizer": carry}
    return outputs, {name: gradients[name] for name in arrays}


STATES = {slot_attention: ("keys", "values"), linear_attention: ("state",)}
"""The names of each function's states, among inputs, outputs, cotangents and gradients."""


def documents(function, arrays, cotangents, segment_ids, **options):
    """`function` of packed rows: every document on its own, in a call of its own.

    A row's first document gets the initial state, its last one gives the final state; the others have neither.
    """
    outputs, gradients = {}, {name: np.zeros(np.shape(x)) for name, x in arrays.items()}
    outputs["out"] = np.zeros(np.shape(cotangents["out"]))
    outputs |= {name: np.zeros(np.shape(cotangents[name])) for name in STATES[function]}
    length = np.shape(segment_ids)[1]
    for b, ids in enumerate(np.asarray(segment_ids)):
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), length]
        for start, stop in zip(borders[:-1], borders[1:], strict=True):
            row, tokens = slice(b, b + 1), (slice(b, b + 1), slice(start, stop))
            first, last = start == 0, stop == length
            place = {name: row if name in STATES[function] else tokens for name in (*arrays, "out")}
            alone = {name: x[place[name]] for name, x in arrays.items() if first or name not in STATES[function]}
            back = {"out": cotangents["out"][tokens]}
            back |= {name: cotangents[name][row] * (1 if last else 0) for name in STATES[function]}
            document_outputs, document_gradients = function(alone, back, **options)
            outputs["out"][tokens] = document_outputs["out"]
            if last:
                for name in STATES[function]:
                    outputs[name][row] = document_outputs[name]
            for name, gradient in document_gradients.items():
                gradients[name][place[name]] = gradient
    return outputs, gradients


def _states(state, log_decay, write, written):
    """H[-1], H[0], ..., H[T-1] of H[t] = diag(exp(log_decay[t])) H[t-1] + write[t] ⊗ written[t]: [T+1, M, D]."""
    states = [state]
    for t in range(len(log_decay)):
        states.append(np.exp(log_decay[t])[:, None] * states[-1] + np.outer(write[t], written[t]))
    return np.stack(states)


def _states_vjp(states, log_decay, write, written, d_read, d_last):
    """The reverse recurrence of `_states`, from the cotangents of every state read and of the last one."""
    d_state = d_last
    d_log_decay, d_write, d_written = np.zeros_like(log_decay), np.zeros_like(write), np.zeros_like(written)
    for t in reversed(range(len(log_decay))):
        d_state = d_state + d_read[t]
        gate = np.exp(log_decay[t])
        d_log_decay[t] = gate * np.sum(d_state * states[t], axis=-1)
        d_write[t], d_written[t] = d_state @ written[t], write[t] @ d_state
        d_state = gate[:, None] * d_state
    return d_state, d_log_decay, d_write, d_written


def _heads_of_group(group, num_heads, num_groups):
    per_group = num_heads // num_groups
    return range(group * per_group, (group + 1) * per_group)


def _softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def _float64(x):
    return np.asarray(x, np.float64)
