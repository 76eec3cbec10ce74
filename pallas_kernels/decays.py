"""Forget gates inside a chunk: what is left at token i of what token j wrote, as matrix products.

    D_ij = prod(a[j+1..i])                                                            for j <= i

Mild gates leave a chunk in one step. With G_i, the sum of the chunk's log decays through token i,

    D_ij = exp(G_i) · exp(-G_j),

a row's factor times a column's. Neither leaves the range of bfloat16, and a sum of so few and small logarithms is exact
in float32. A chunk is mild where each slot's log decays sum up to no less than -1 a token.

Other gates go by halving, as in `gsa_jax.ops.chunked`: a chunk of 64 tokens is halved again and again; the pair j < i
parts at exactly one level, where j is in the earlier and i in the later half of one block, and

    D_ij = prod(a[border..i]) · prod(a[j+1..border-1]),

both in [0, 1]. The logarithms of a level's factors are one product of a matrix of zeros and ones, the level's window,
with the log decays: no difference is ever taken, so that any decay is exact.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.tiles import (
    SIZE,
    SQUARE,
    along_rows,
    load,
    load_parts,
    of_parts,
    product,
    row_and_column,
    store_parts,
    transposed,
    two_parts,
)

LEVELS = 6
"""of halves of 32, 16, 8, 4, 2 and 1 tokens"""
STRONGEST = -80.0
"""Log decays are clamped here: exp(-80) = 2e-35 does not show beside anything in float32."""
MILDEST_RATE = -1.0
"""a token's log decay, on the average of a chunk, with which it still counts as mild"""
LOG2_E = np.log2(np.e)
THROUGH, AFTER, ALL = 0, 1, 2
"""the constant tiles: windows [i, j] of the tokens j through i, of those after i, and of all"""


def constant_tiles(dtype):
    """[3, SIZE, SIZE]: the windows `THROUGH`, `AFTER` and `ALL`."""
    i, j = np.indices(SQUARE)
    return jnp.asarray(np.stack([j <= i, j > i, j == j]), dtype)


def level_tiles(dtype):
    """[7, SIZE, SIZE]: the levels' windows, and the level at which j < i part (6 for j = i, 12 for j > i)."""
    i, j = np.indices(SQUARE)
    parting = np.where(i == j, LEVELS, 2 * LEVELS)
    windows = []
    for index in range(LEVELS):
        half = SIZE >> (index + 1)
        later, same_half = i & half > 0, i // half == j // half
        windows.append(same_half & np.where(later, j <= i, j > i))
        parting[(i // (2 * half) == j // (2 * half)) & ~same_half & (j < i)] = index
    return jnp.asarray(np.stack([*windows, parting]), dtype)


def mildest(tokens, dtype):
    """The sum of log decays of so many tokens, the rest of a sequence, down to which a chunk's gates are mild.

    Args:
      dtype: of the factors: float16 holds exp(-8) to full precision, but not exp(-64).
    """
    return MILDEST_RATE * lax.min(tokens, SIZE if dtype == jnp.bfloat16 else 8).astype(jnp.float32)


def num_parts(log_decay_dtype, dtype):
    """How many two-byte parts hold a log decay: its own dtype one, others two."""
    return 1 if log_decay_dtype == dtype else 2


def write_strength(log_decay):
    """1 - exp(log_decay), without cancellation for gates close to one."""
    return jnp.where(log_decay > -0.01, -log_decay * (1 + log_decay / 2), 1 - jnp.exp(log_decay))


def window_sum(window, parts):
    """The sum of the log decays in each token's window, float32: of the tokens j where window [i, j] is 1."""
    return product(*((window, part) for part in parts))


def gates_product(window, parts):
    """The product of the gates in each token's window, float32."""
    return jnp.exp(window_sum(window, parts))


def causal(scores, window, dtype):
    """A_ij where j <= i, else 0: in `dtype` from float32 registers and the tile `THROUGH`'s."""
    if dtype == jnp.bfloat16:
        scores = scores.astype(dtype)  # two numbers an instruction; float16 might overflow where j > i
    return (scores * load(window, scores.dtype)).astype(dtype)


def causal_parts(scores, window, dtype):
    """Two parts of A_ij where j <= i, else 0; as `causal`."""
    if dtype == jnp.bfloat16:
        return tuple(part * load(window, dtype) for part in two_parts(scores, dtype))
    return two_parts(scores * load(window), dtype)


class Pairs:
    """The pairs of tokens of one chunk and 64 slots, for sums with w_jm D_ijm.

    Attributes:
      through: prod(a[first..i]) at token i, float32 in registers.
    """

    def __init__(self, mild, levels, write, rest, constants, *, derived):
        """
        Args:
          mild: whether the chunk is, a scalar.
          levels: a `Levels`, whose tiles are free whenever sums are formed, unless the chunk is mild.
          write: a tile that holds w, or that is free if `derived`; from now on it belongs to this object.
          rest: a tile for what rounding takes from the factors of mild gates, which a softmax would make larger; it may
            hold the second part of the log decays, or be one of the levels'.
          constants: `constant_tiles`.
          derived: whether w is 1 - exp(log decay).
        """
        self.mild, self.levels, self.write, self.window = mild, levels, write, constants.at[THROUGH]
        self.factors = write, rest
        cumulative = LOG2_E * window_sum(self.window, levels.parts)
        self.through = jnp.exp2(cumulative)
        strength = write_strength(load_parts(levels.parts)) if derived else load(write)
        strength = lax.cond(mild, lambda: strength * jnp.exp2(-cumulative), lambda: strength)
        write[...], taken = two_parts(strength, write.dtype)
        plgpu.commit_smem()

        @pl.when(mild)
        def _():
            rest[...] = taken

        plgpu.commit_smem()

    def sums(self, scores):
        """Σ_{j<=i} A_ij w_jm D_ijm: float32 [SIZE, SIZE] from a tile that holds A_ij for j <= i, else 0."""

        def at_once():
            return self.through * product(*((scores, factor) for factor in self.factors))

        return lax.cond(self.mild, at_once, lambda: self.levels.sums(scores, self.write))

    def scores(self, p, *, exact=False):
        """Σ_m p_im w_jm D_ijm for j <= i, anything finite else: float32 [SIZE, SIZE] from p in registers.

        Args:
          exact: whether p's factors go in two parts too, and the levels'. Roundings of a p of both signs, GLA's queries
            or a gradient, show in full; those of a softmax, all positive, average out.
        """

        def at_once():
            factors = tuple(map(transposed, self.factors))
            if exact:
                return product(*of_parts(two_parts(p * self.through, self.write.dtype), factors))
            reading = (p * self.through).astype(self.write.dtype)
            return product(*((reading, factor) for factor in factors))

        return lax.cond(self.mild, at_once, lambda: self.levels.scores(p, self.write, exact=exact))

    def causal(self, scores):
        """A_ij where j <= i, else 0: two-byte, from float32 in registers."""
        return causal(scores, self.window, self.write.dtype)

    def causal_parts(self, scores):
        """Two parts of it."""
        return causal_parts(scores, self.window, self.write.dtype)


class Levels:
    """The six levels of one chunk, for any gates; slower than all pairs at once."""

    NUM_TILES = 5
    """of shared memory to work in"""
    ARRIVALS = {"parting": 1, "window": 1}
    """barriers"""

    def __init__(self, tiles_ref, parts, pool, first, arrived):
        """
        Args:
          tiles_ref: reference to `level_tiles` in memory, from where they come one by one.
          parts: of the log decays, tiles.
          pool, first: `NUM_TILES` tiles to work in from that number on.
          arrived: barriers, those of `ARRIVALS` among them.
        """
        self.tiles_ref, self.parts, self.arrived = tiles_ref, parts, arrived
        self.free, self.parting = (pool.at[first], pool.at[first + 1]), pool.at[first + 2]
        self.window = lambda index: pool.at[first + 3 + lax.rem(index, 2)]

    def fold(self, body, initial):
        """Folds `result = body(index, factor, result)` over the levels: a loop: unrolled, they don't fit registers.

        `factor` are those of a level's rows in later halves and of its columns in earlier ones, float32 in registers.
        Two tiles, `free`, are the body's.
        """

        def request(index):
            plgpu.copy_gmem_to_smem(self.tiles_ref.at[index], self.window(index), self.arrived["window"])

        def one_level(index, result):
            plgpu.commit_smem()
            plgpu.barrier_wait(self.arrived["window"])
            pl.when(index + 1 < LEVELS)(lambda: request(index + 1))
            return body(index, gates_product(self.window(index), self.parts), result)

        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(self.tiles_ref.at[LEVELS], self.parting, self.arrived["parting"])
        request(jnp.int32(0))
        plgpu.barrier_wait(self.arrived["parting"])
        return lax.fori_loop(0, LEVELS, one_level, initial)

    def at(self, index, scores):
        """A_ij of the pairs j < i that part at a level, A_ii at level `LEVELS`, else 0; scores in registers."""
        distance = load(self.parting, scores.dtype) - jnp.asarray(index, scores.dtype)
        return scores - scores * jnp.minimum(distance * distance, jnp.ones((), scores.dtype))

    def own(self, scores):
        """A_ii, along rows."""
        return along_rows(self.at(LEVELS, scores).sum(axis=1))

    def sums(self, scores, write):
        """Σ_{j<=i} A_ij w_jm D_ijm: float32 [SIZE, SIZE] from tiles that hold A and w."""
        factors, across = self.free

        def add(index, factor, result):
            factors[...] = jnp.where(in_later_half(index), factor, load(write) * factor).astype(factors.dtype)
            across[...] = self.at(index, load(scores, scores.dtype))
            plgpu.commit_smem()
            return result + factor * product((across, factors))

        result = self.fold(add, jnp.zeros(SQUARE, jnp.float32))
        return result + self.own(load(scores)) * load(write)

    def scores(self, p, write, *, exact):
        """Σ_m p_im w_jm D_ijm for j <= i, else 0: float32 [SIZE, SIZE] from p in registers and a tile that holds w."""
        factors, dtype = self.free, write.dtype

        def add(index, factor, result):
            written = jnp.where(in_later_half(index), factor, load(write) * factor)
            if exact:
                store_parts(written, factors)
                plgpu.commit_smem()
                across = product(*of_parts(two_parts(p * factor, dtype), map(transposed, factors)))
            else:
                factors[0][...] = written.astype(dtype)
                plgpu.commit_smem()
                across = product(((p * factor).astype(dtype), transposed(factors[0])))
            return result + self.at(index, across)

        result = self.fold(add, jnp.zeros(SQUARE, jnp.float32))
        return result + self.at(LEVELS, along_rows((p * load(write)).sum(axis=1)))


def in_later_half(index):
    """Which rows are in later halves of a level, [SIZE, SIZE]."""
    i, _ = row_and_column()
    return (i & lax.shift_right_logical(SIZE // 2, index)) > 0
