"""Forget gates inside a chunk, by halving.

As in `gsa_jax.ops.chunked`: a chunk of 64 tokens is halved again and again; the pair of tokens j < i parts at exactly
one level, where j is in the earlier and i in the later half of one block, and the product of the gates between them is

    D_ij = prod(a[border..i]) · prod(a[j+1..border-1]),

a row's factor times a column's, both in [0, 1]. The logarithms of a level's factors are one product of a constant
matrix of zeros and ones with the log decays: no difference is ever taken, so that any decay is exact.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import SIZE, along_rows, load, product, row_and_column, transposed

LEVELS = 6
"""of halves of 32, 16, 8, 4, 2 and 1 tokens"""
STRONGEST = -80.0
"""Log decays are clamped here: exp(-80) = 2e-35 does not show beside anything in float32."""
PARTS_DTYPE = jnp.bfloat16


def num_parts(dtype):
    """How many bfloat16 parts hold a log decay: bfloat16 one, else two, 16 bits."""
    return 1 if dtype == jnp.bfloat16 else 2


def log_decay(parts):
    """The log decays of a chunk, float32 in registers, from their parts, tiles in shared memory."""
    return sum(load(part) for part in parts)


def write_strength(log_decay):
    """1 - exp(log_decay), without cancellation for gates close to one."""
    series = -log_decay * (1 + log_decay * (1 / 2 + log_decay * (1 / 6)))
    return jnp.where(log_decay > -0.03, series, 1 - jnp.exp(log_decay))


def through(parts):
    """The gates' product from the chunk's start through each token, float32."""
    i, _ = row_and_column()
    return jnp.exp(_window_sums(jnp.zeros_like(i), i + 1, parts))


def after(parts):
    """The gates' product after each token until the chunk's end, float32."""
    i, _ = row_and_column()
    return jnp.exp(_window_sums(i + 1, jnp.full_like(i, SIZE), parts))


def level(half, parts):
    """A level's factors, float32: of rows in later halves since the border, of those in earlier halves until it."""
    i, _ = row_and_column()
    later, border = in_later_half(half), (i & -2 * half) + half
    return jnp.exp(_window_sums(jnp.where(later, border, i + 1), jnp.where(later, i + 1, border), parts))


def d_through(gradient):
    """Gradient of the log decays from that of `through`'s logarithm, a tile in shared memory; float32."""
    i, _ = row_and_column()
    return _window_sums(i, jnp.full_like(i, SIZE), [gradient])


def d_after(gradient):
    """Gradient of the log decays from that of `after`'s logarithm."""
    i, _ = row_and_column()
    return _window_sums(jnp.zeros_like(i), i, [gradient])


def d_level(half, gradient):
    """Gradient of the log decays from that of `level`'s logarithm."""
    i, _ = row_and_column()
    later, start = in_later_half(half), i & -half
    return _window_sums(jnp.where(later, i, start), jnp.where(later, start + half, i), [gradient])


def in_later_half(half):
    i, _ = row_and_column()
    return (i & half) > 0


def parted(half):
    """[i, j] is whether the pair parts at this level, for j < i: whether their highest differing bit is `half`."""
    i, j = row_and_column()
    return ((i ^ half) ^ j) < half


def each_level(body, initial):
    """Folds `result = body(level, half, result)` over the levels; a loop, since unrolled levels don't fit registers."""

    def step(index, result):
        return body(index, lax.shift_right_logical(SIZE // 2, index), result)

    return lax.fori_loop(0, LEVELS, step, initial)


def _window_sums(start, stop, terms):
    """Σ of the terms of tokens start_i .. stop_i - 1, float32; every term is the sum of tiles in shared memory."""
    _, j = row_and_column()
    window = jnp.where((j >= start) & (j < stop), 1.0, 0.0).astype(terms[0].dtype)
    return product(*((window, term) for term in terms))


def store_factors(factors, parts, write):
    """Leaves each level's factors in shared memory [levels, SIZE, SIZE], those of earlier halves times the write."""

    def store(index, half, _):
        factor = level(half, parts)
        factors[index] = jnp.where(in_later_half(half), factor, write * factor).astype(factors.dtype)

    each_level(store, None)


def own_and_earlier(scores, dtype):
    """A_ii [SIZE] and, for j < i, A_ij [SIZE, SIZE] in `dtype`: scores as `sums` takes them."""
    i, j = row_and_column()
    return jnp.where(i == j, scores, 0.0).sum(axis=1), jnp.where(j < i, scores, 0.0).astype(dtype)


def sums(own, earlier, factors, write, initial):
    """initial + Σ_{j<=i} A_ij w_jm D_ijm: float32 [SIZE, SIZE] from A as `own_and_earlier`, factors and w."""

    def add(index, half, result):
        across = jnp.where(parted(half), earlier, jnp.zeros_like(earlier))
        return result + load(factors.at[index]) * product((across, factors.at[index]))

    return each_level(add, initial + along_rows(own) * write)


def scores(p, factors, write):
    """Σ_m p_im w_jm D_ijm for j <= i, else 0: float32 [SIZE, SIZE] from p in registers, factors and w."""
    i, j = row_and_column()
    own = (p * write).sum(axis=1)

    def add(index, half, result):
        later = (p * load(factors.at[index])).astype(factors.dtype)
        # Right for the pairs that part here, wrong for those that part at smaller halves, which overwrite it.
        return jnp.where((i ^ j) < 2 * half, product((later, transposed(factors.at[index]))), result)

    result = each_level(add, jnp.zeros_like(p))
    return jnp.where(j < i, result, jnp.where(i == j, along_rows(own), 0.0))
