"""The multi-query associative recall (MQAR) task: which value stood behind this key?

Defined by Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv:2312.04927. An example of length T with N pairs and N = 2 reads, where `.` is filler:

    position   0   1   2   3   4   5   6   7   8   9  10  11
    input      k1  v1  k2  v2  .   .   k2  .   k1  .   .   .
    target     -   -   -   -   -   -   v2  -   v1  -   -   -

The first 2N tokens, the context, tell the pairs. Behind it every key comes up once more, at an even distance from the
context's end, and the model is to answer with that key's value at that very position.
"""

import numpy as np

IGNORE = -100
"""The target at positions without a loss."""


def generate(
    rng: np.random.Generator | int,
    num_examples: int,
    length: int,
    num_pairs: int,
    *,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws independent MQAR examples.

    With T = `length`, N = `num_pairs` and V = `vocab_size`, in each example:

    - N distinct keys are drawn from [1, V // 2) and N distinct values from [V // 2, V), uniformly.
    - `inputs[:2N]` is k_1, v_1, ..., k_N, v_N.
    - There are S = (T - 2N) / 2 places for queries; place i = 0 .. S - 1 is position 2N + 2i. N distinct places are
      drawn one after the other, each time with P(i) proportional to (i + 1)^(power - 1) among those left. The j-th
      place drawn is key j's: there `inputs` holds k_j and `targets` holds v_j.
    - Every other position behind the context holds token 0, or with `random_non_queries` a token uniform on [0, V).
    - Every other target is `IGNORE`.

    Args:
      rng: generator, or the seed of a fresh one. The same seed and arguments give the same examples.
      num_examples: n >= 1.
      length: T, even and at least 4N.
      num_pairs: N, from 1 to V // 2 - 1, the number of keys there are.
      vocab_size: V.
      power: exponent of the power law, finite. Below 1 queries crowd behind the context, at 1 they spread evenly.
      random_non_queries: fill with random tokens in place of 0. Such a token can be a key or a value of the example.

    Returns:
      inputs: int32 [n, T], tokens in [0, V).
      targets: int32 [n, T], exactly N tokens a row, `IGNORE` elsewhere.

    Raises:
      ValueError: an argument is out of its bounds.
    """
    _check(num_examples, length, num_pairs, vocab_size, power)
    rng = np.random.default_rng(rng)
    num_keys = vocab_size // 2  # token 0 counted, though it is no key
    keys = 1 + _distinct(rng, num_examples, num_pairs, num_keys - 1)
    values = num_keys + _distinct(rng, num_examples, num_pairs, vocab_size - num_keys)
    context = 2 * num_pairs
    queries = context + 2 * _places(rng, num_examples, num_pairs, (length - context) // 2, power)

    inputs = np.zeros((num_examples, length), np.int32)
    if random_non_queries:
        inputs = rng.integers(vocab_size, size=inputs.shape, dtype=np.int32)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, queries, keys, axis=1)
    targets = np.full_like(inputs, IGNORE)
    np.put_along_axis(targets, queries, values, axis=1)
    return inputs, targets


def _check(num_examples: int, length: int, num_pairs: int, vocab_size: int, power: float) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}: it must be at least 1")
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}: it must be at least 1")
    if num_pairs > vocab_size // 2 - 1:
        raise ValueError(
            f"num_pairs is {num_pairs}: it must be at most vocab_size // 2 - 1 = {vocab_size // 2 - 1}, "
            f"the number of keys that vocab_size {vocab_size} holds"
        )
    if length % 2 or length < 4 * num_pairs:
        raise ValueError(f"length is {length}: it must be even and at least 4 * num_pairs = {4 * num_pairs}")
    if not np.isfinite(power):
        raise ValueError(f"power is {power}: it must be finite")


def _distinct(rng: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """In each row, `count` distinct integers of [0, size), every such sequence equally likely: int64 [rows, count].

    Floyd's sampling (Bentley and Floyd, "A sample of brilliance", CACM 30(9), 1987), all rows side by side, costs
    rows * count^2 however large `size` is. The set it draws is uniform, its order is not: hence the shuffle.
    """
    chosen = np.empty((count, rows), np.int64)
    for i, last in enumerate(range(size - count, size)):
        drawn = rng.integers(last, size=rows, endpoint=True)
        taken = (chosen[:i] == drawn).any(axis=0)
        chosen[i] = np.where(taken, last, drawn)
    return rng.permuted(chosen.T, axis=1)


def _places(rng: np.random.Generator, rows: int, count: int, size: int, power: float) -> np.ndarray:
    """In each row, `count` places of [0, size) in the order drawn: int64 [rows, count].

    Drawing one by one without replacement, P(i) proportional to p_i, as `rng.choice(size, count, replace=False, p=p)`
    does for one row, is distributed exactly like a race in which i arrives after an exponential time of rate p_i and
    the first `count` to arrive are the draws, in order. Minus the log of such a time is log p_i + Gumbel noise: that
    form, largest first, needs neither a normalised p nor one that fits a float.
    """
    log_p = (power - 1) * np.log(np.arange(1, size + 1))
    return np.argsort(-(log_p + rng.gumbel(size=(rows, size))), axis=1)[:, :count]
