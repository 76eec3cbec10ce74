"""Causal depthwise convolution over a few tokens, on arrays."""

import jax.numpy as jnp

from gsa_jax.ops.arguments import check_array, check_segment_ids, document_starts


def short_convolution(x, kernel, *, initial_state=None, segment_ids=None):
    """y[t] = Σ_{i<W} kernel[W-1-i] ⊙ x[t-i], within a document (arXiv 2312.00752, section 3.4).

    Args:
      x: [B, T, C].
      kernel: [W, C], of x's dtype.
      initial_state: the W - 1 inputs before x, [B, W-1, C], of x's first document; zeros by default.
      segment_ids: integers [B, T]; where the id changes a document begins that sees nothing before it.

    Returns:
      (y [B, T, C], the last W - 1 inputs [B, W-1, C], zeros in place of those that are not of x's last document).

    Raises:
      TypeError, ValueError: an argument has the wrong dtype or shape; the message names it.
    """
    check(x, kernel, initial_state=initial_state, segment_ids=segment_ids)
    batch_size, length, num_channels = x.shape
    before = kernel.shape[0] - 1
    if initial_state is None:
        initial_state = jnp.zeros((batch_size, before, num_channels), x.dtype)
    inputs = jnp.concatenate([initial_state, x], axis=1)
    if segment_ids is None:
        return sum(kernel[i] * inputs[:, i : i + length] for i in range(before + 1)), inputs[:, length:]

    document = jnp.cumsum(document_starts(segment_ids), axis=1)
    document = jnp.pad(document, ((0, 0), (before, 0)))
    same = (document[:, i : i + length] == document[:, before:] for i in range(before + 1))
    taps = (jnp.where(is_same[..., None], kernel[i] * inputs[:, i : i + length], 0) for i, is_same in enumerate(same))
    in_last_document = document[:, length:] == document[:, -1:]
    return sum(taps), jnp.where(in_last_document[..., None], inputs[:, length:], 0)


def check(x, kernel, *, initial_state=None, segment_ids=None):
    """Raises unless these are arguments of `short_convolution`."""
    check_array("x", x, dict.fromkeys("BTC"))
    batch_size, length, num_channels = x.shape
    check_array("kernel", kernel, {"W": None, "C": num_channels})
    check_segment_ids(segment_ids, {"B": batch_size, "T": length})
    shape = {"B": batch_size, "W-1": kernel.shape[0] - 1, "C": num_channels}
    if initial_state is not None and shape["W-1"]:
        check_array("initial_state", initial_state, shape)
    elif initial_state is not None and jnp.shape(initial_state) != tuple(shape.values()):  # empty, for `check_array`
        got = list(jnp.shape(initial_state))
        raise ValueError(f"initial_state must have shape [B, W-1, C] = {list(shape.values())}, got {got}")
    for name, array in (("kernel", kernel), ("initial_state", initial_state)):
        if array is not None and array.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {array.dtype}")
