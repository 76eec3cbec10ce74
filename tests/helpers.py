"""What many tests share."""

import numpy as np


def rel_err(x, ref) -> float:
    """How far `x` is from `ref`: ||x - ref|| / ||ref|| over all entries, in float64.

    Where `ref` is all zero there is nothing to compare with and the answer is ||x||. A NaN or an infinity on either
    side gives NaN or infinity, which no `<` bound lets pass.

    Args:
      x: array of any floating dtype, bfloat16 included.
      ref: array of the same shape.

    Raises:
      ValueError: the shapes differ (nothing is broadcast).
    """
    x, ref = np.asarray(x, np.float64), np.asarray(ref, np.float64)
    if x.shape != ref.shape:
        raise ValueError(f"x has shape {x.shape}, ref has shape {ref.shape}: they must be equal")
    norm = np.linalg.norm(ref.ravel())
    return float(np.linalg.norm((x - ref).ravel()) / (norm if norm > 0 else 1.0))
