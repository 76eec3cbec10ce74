"""What the layers must compute: the papers' equations in float64 NumPy, token by token.

Independent of the library on purpose: nothing is imported from it. Every mixer is a function (parameters, x [T, D],
config) -> y [T, D]; parameters are the layer's, as nested dictionaries. Grouped heads are repeated heads.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swish(x):
    return x * sigmoid(x)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


FEATURE_MAPS = {
    "swish": swish,
    "relu": lambda x: np.maximum(x, 0),
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "identity": lambda x: x,
}


def rms_norm(x, parameters, epsilon=1e-5):
    return parameters["scale"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def swiglu(parameters, x):
    gate, up, down = (parameters[name]["kernel"] for name in ("gate", "up", "down"))
    return (swish(x @ gate) * (x @ up)) @ down


def short_convolution(x, kernel):
    """y[t] = swish(Σ_i kernel[W-1-i] x[t-i]), zeros before the first token."""
    width = len(kernel)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(min(width, t + 1)):
            y[t] += kernel[width - 1 - i] * x[t - i]
    return swish(y)


def rotate(x, theta):
    """The pairs (x[i], x[i + K/2]) of [T, H, K] as complex numbers, turned by t · theta^(-2i/K)."""
    length, _, size = x.shape
    angles = np.arange(length)[:, None] * theta ** (-2 * np.arange(size // 2) / size)
    turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def slot_attention(parameters, x, config):
    """a = sigmoid(W_a x)^(1/tau); memories a ⊙ old + (1 - a) ⊗ new; read by a softmax over the slots."""
    q, k, v = _slot_projections(parameters, x, config)
    gate = _heads(sigmoid(x @ parameters["gate"]["kernel"]) ** (1 / config.damping), config)
    out = np.zeros_like(v)
    for h in range(config.num_heads):
        keys = values = np.zeros((config.num_slots, 1))
        for t, a in enumerate(gate[:, h, :, None]):
            keys = a * keys + (1 - a) * k[t, h]
            values = a * values + (1 - a) * v[t, h]
            out[t, h] = softmax(keys @ q[t, h]) @ values
    return _slot_out(parameters, out)


def abc(parameters, x, config):
    """A slot holds the mean of the tokens so far, weighted with e^s: no recurrence."""
    q, k, v = _slot_projections(parameters, x, config)
    logits = _heads(x @ parameters["gate"]["kernel"], config)
    out = np.zeros_like(v)
    for h in range(config.num_heads):
        for t in range(len(x)):
            share = np.stack([softmax(slot) for slot in logits[: t + 1, h].T])
            out[t, h] = softmax(share @ k[: t + 1, h] @ q[t, h]) @ share @ v[: t + 1, h]
    return _slot_out(parameters, out)


def gated_linear_attention(parameters, x, config):
    """a = sigmoid(W_2 W_1 x + b)^(1/tau), K wide."""
    up = parameters["gate_up"]
    logits = x @ parameters["gate_down"]["kernel"] @ up["kernel"] + up["bias"]
    gate = _heads(sigmoid(logits) ** (1 / config.damping), config)
    return _linear_out(parameters, x, _linear_read(*_projections(parameters, x, config), gate))


def retention(parameters, x, config):
    """Head g forgets at the rate 1 - 2^(-5-g); queries and keys are rotated."""
    q, k, v = _projections(parameters, x, config)
    num_groups = config.num_kv_heads or config.num_heads
    rates = np.repeat(1 - 2.0 ** (-5 - np.arange(num_groups)), config.num_heads // num_groups)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    return _linear_out(parameters, x, _linear_read(q, k, v, np.broadcast_to(rates[:, None], k.shape)))


def linear_attention(parameters, x, config):
    """Nothing is forgotten."""
    q, k, v = _projections(parameters, x, config)
    phi = FEATURE_MAPS[config.feature_map]
    return _linear_out(parameters, x, _linear_read(phi(q), phi(k), v, np.ones_like(k)))


def hgrn2(parameters, x, config, lower_bound=0.0):
    """f = bound + (1 - bound) sigmoid(W_f x); the key is 1 - f; the norm is over the full width."""
    q, forget, v = (x @ parameters[name]["kernel"] for name in ("q", "forget", "input"))
    forget = lower_bound + (1 - lower_bound) * sigmoid(forget)
    q, k, v, gate = (y.reshape(len(x), -1, config.expand_ratio) for y in (swish(q), 1 - forget, v, forget))
    out = _linear_read(q, k, v, gate).reshape(len(x), -1)
    return rms_norm(out, parameters["norm"]) @ parameters["out"]["kernel"]


def softmax_attention(parameters, x, config):
    """Rotated queries and keys; a token sees itself and the `window - 1` before it."""
    q, k, v = _projections(parameters, x, config)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    out = np.zeros_like(v)
    for h in range(config.num_heads):
        for t in range(len(x)):
            seen = slice(max(0, t + 1 - (config.window or t + 1)), t + 1)
            out[t, h] = softmax(k[seen, h] @ q[t, h] / np.sqrt(q.shape[-1])) @ v[seen, h]
    return out.reshape(len(x), -1) @ parameters["out"]["kernel"]


MIXERS = {
    "gsa": slot_attention,
    "abc": abc,
    "gla": gated_linear_attention,
    "hgrn2": hgrn2,
    "retention": retention,
    "linear": linear_attention,
    "softmax": softmax_attention,
}


def _heads(x, config):
    """[T, G·D] -> [T, H, D], each of the G repeated for its query heads."""
    num_groups = getattr(config, "num_kv_heads", None) or config.num_heads
    return np.repeat(x.reshape(len(x), num_groups, -1), config.num_heads // num_groups, axis=1)


def _projections(parameters, x, config):
    """q, k, v [T, H, ·], after their short convolutions."""
    projections = parameters["projections"]
    q, k, v = (x @ projections[name]["kernel"] for name in "qkv")
    if config.conv_size:
        kernels = [projections["convolutions"][i]["kernel"] for i in range(3)]
        q, k, v = (short_convolution(y, kernel) for y, kernel in zip((q, k, v), kernels, strict=True))
    return q.reshape(len(x), config.num_heads, -1), _heads(k, config), _heads(v, config)


def _slot_projections(parameters, x, config):
    q, k, v = _projections(parameters, x, config)
    phi = FEATURE_MAPS[config.feature_map]
    return phi(q), phi(k), swish(v)


def _slot_out(parameters, out):
    """W_o RMSNorm(swish(o)), the norm over the full width."""
    return rms_norm(swish(out.reshape(len(out), -1)), parameters["norm"]) @ parameters["out"]["kernel"]


def _linear_read(q, k, v, gate):
    """H[t] = diag(a) H[t-1] + k ⊗ v; out = Hᵀ q / sqrt(K)."""
    out = np.zeros_like(v)
    for h in range(q.shape[1]):
        state = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(q)):
            state = gate[t, h][:, None] * state + np.outer(k[t, h], v[t, h])
            out[t, h] = state.T @ q[t, h] / np.sqrt(k.shape[-1])
    return out


def _linear_out(parameters, x, out):
    """W_o (RMSNorm(o) ⊙ swish(W_g x)), the norm over each head; without W_g no gate."""
    out = rms_norm(out, parameters["norm"]).reshape(len(x), -1)
    if parameters.get("output_gate"):
        out = out * swish(x @ parameters["output_gate"]["kernel"])
    return out @ parameters["out"]["kernel"]
