"""Forget gates inside a chunk, by halving.

As in `gsa_jax.ops.chunked`: a chunk of 64 tokens is halved again and again; the pair of tokens j < i parts at exactly
one level, where j is in the earlier and i in the later half of one block, and the product of the gates between them is

    D_ij = prod(a[border..i]) · prod(a[j+1..border-1]),

a row's factor times a column's, both in [0, 1]. The logarithms of a level's factors are one product of a constant
matrix of zeros and ones, the level's window, with the log decays: no difference is ever taken, so that any decay is
exact. The windows are among the constant tiles that all warpgroups of a block share; so is the tile that says at which
level each pair parts, which masks scores in two-byte arithmetic, two numbers an instruction.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.tiles import SIZE, SQUARE, along_rows, load, product, row_and_column, transposed

LEVELS = 6
"""of halves of 32, 16, 8, 4, 2 and 1 tokens"""
STRONGEST = -80.0
"""Log decays are clamped here: exp(-80) = 2e-35 does not show beside anything in float32."""
PARTING, WINDOWS, THROUGH, AFTER = 0, 1, 1 + LEVELS, 2 + LEVELS
"""where the constant tiles are"""


def constant_tiles(dtype, mirrored=False):
    """[9, SIZE, SIZE]: the level at which the tokens j < i part, the levels' windows, `THROUGH`'s, `AFTER`'s.

    With `mirrored` the first tile holds also for j > i.
    """
    i, j = np.indices(SQUARE)
    parting = np.full(SQUARE, 2 * LEVELS)
    windows = []
    for index in range(LEVELS):
        half = SIZE >> (index + 1)
        later, same_half = i & half > 0, i // half == j // half
        windows.append(same_half & np.where(later, j <= i, j > i))
        parting[(i // (2 * half) == j // (2 * half)) & ~same_half & ((j < i) | mirrored)] = index
    return jnp.asarray(np.stack([parting, *windows, j <= i, j > i]), dtype)


def num_parts(log_decay_dtype, dtype):
    """How many two-byte parts hold a log decay: its own dtype one, others two."""
    return 1 if log_decay_dtype == dtype else 2


def log_decay(parts):
    """The log decays of a chunk, float32 in registers, from their parts, tiles in shared memory."""
    return sum(load(part) for part in parts)


def write_strength(log_decay):
    """1 - exp(log_decay), without cancellation for gates close to one."""
    series = -log_decay * (1 + log_decay * (1 / 2 + log_decay * (1 / 6)))
    return jnp.where(log_decay > -0.03, series, 1 - jnp.exp(log_decay))


def gates_product(window, parts):
    """The product of the gates in each token's window, float32: of the tokens j where window [i, j] is 1.

    Of `THROUGH`'s window it is the product from the chunk's start through the token, of `AFTER`'s that after the token
    until the chunk's end, of a level's the factors of its rows in later halves and of its columns in earlier halves.
    """
    return jnp.exp(product(*((window, part) for part in parts)))


def in_later_half(index):
    i, _ = row_and_column()
    return (i & lax.shift_right_logical(SIZE // 2, index)) > 0


def at_level(index, constants, x):
    """x_ij of the pairs that part at a level, else 0; x in two-byte registers."""
    distance = load(constants.at[PARTING], x.dtype) - lax.convert_element_type(index, x.dtype)
    return x - x * jnp.minimum(distance * distance, jnp.ones((), x.dtype))


def each_level(body, initial):
    """Folds `result = body(level, result)` over the levels; a loop, since unrolled levels don't fit registers."""
    return lax.fori_loop(0, LEVELS, body, initial)


def store_factors(factors, constants, parts, write):
    """Leaves each level's factors in shared memory [levels, SIZE, SIZE], those of earlier halves times the write."""

    def store(index, _):
        factor = gates_product(constants.at[WINDOWS + index], parts)
        factors[index] = jnp.where(in_later_half(index), factor, write * factor).astype(factors.dtype)

    each_level(store, None)


def own(scores):
    """A_ii: [SIZE] of scores in registers."""
    i, j = row_and_column()
    return jnp.where(i == j, scores, 0.0).sum(axis=1)


def sums(own, scores, factors, constants, write, initial):
    """initial + Σ_{j<=i} A_ij w_jm D_ijm: float32 [SIZE, SIZE] from A_ii, A in two-byte registers, factors and w."""

    def add(index, result):
        across = at_level(index, constants, scores)
        return result + load(factors.at[index]) * product((across, factors.at[index]))

    return each_level(add, initial + along_rows(own) * write)


def scores(p, factors, constants, write):
    """Σ_m p_im w_jm D_ijm for j <= i, else 0: two-byte [SIZE, SIZE] from p in float32 registers, factors and w."""
    dtype = factors.dtype
    i, j = row_and_column()
    own = along_rows((p * write).sum(axis=1)).astype(dtype)
    p = p.astype(dtype)

    def add(index, result):
        across = product((p * load(factors.at[index], dtype), transposed(factors.at[index])))
        return result + at_level(index, constants, across.astype(dtype))

    return jnp.where(i == j, own, each_level(add, jnp.zeros_like(p)))
