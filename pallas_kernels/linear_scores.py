"""Gated linear attention inside chunks: which tokens read which, and how they read the state that enters."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

AHEAD = 2
"""blocks of K that are asked for before they are needed"""
LEAVING, LEVELS, REST, BLOCKS = 0, 0, 2, 5
"""Scratch tiles: two that results leave by, which with three more are also the levels', one of them where gates are not
mild only; then those of the blocks."""


def linear_scores(q, k, parts, mild, *, scale, residuals, interpret=None):
    """How a memory is to be read.

        S_ij = scale · Σ_m q_im k_jm D_ijm                                          for j <= i
        o_i = Hᵀ (scale · prod(a[first..i]) ⊙ q_i)  +  Σ_{j<=i} S_ij v_j            by `memory_read`

    Args:
      q: [B, T, H, K], two-byte; K is a multiple of 64, 64 channels are called a block.
      k: [B, T, G, K].
      parts, mild: [P, B, T, G, K] and [B, G, N, K / 64], log decays from `gates.chunk_gates`.
      residuals: whether to return what only the backward pass needs.

    Returns:
      scale · prod(a) ⊙ q [B, T, H, K], S [B, T, H, 64] by the tokens of the chunk, with `residuals` also what rounding
      took from S.
    """
    batch_size, length, num_heads, key_size = q.shape
    per_head, num_chunks = num_heads // k.shape[2], mild.shape[2]
    num_parts, dtype = parts.shape[0], q.dtype
    num_blocks, per_block = key_size // SIZE, 2 + num_parts
    ahead = min(AHEAD, num_blocks)

    def body(turn, pool, constants, arrived, q_ref, k_ref, levels_ref, mild_ref, parts_ref, reader_ref, *scores_refs):
        b, h, n = turn.chunk
        tokens = pl.ds(n * SIZE, SIZE)

        def tiles_of(number):
            """The scratch tiles of a warpgroup's block of that number, and their barrier."""
            slot = lax.rem(number, ahead)
            query, key, *parts = (pool.at[BLOCKS + per_block * slot + i] for i in range(per_block))
            return query, key, parts, arrived["block"](slot)

        def request(chunk, block, number):
            b, h, n = chunk
            g, here, channels = lax.div(h, per_head), pl.ds(n * SIZE, SIZE), pl.ds(block * SIZE, SIZE)
            query, key, parts, barrier = tiles_of(number)
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, h, channels], query, barrier)
            plgpu.copy_gmem_to_smem(k_ref.at[b, here, g, channels], key, barrier)
            for i, part in enumerate(parts):
                plgpu.copy_gmem_to_smem(parts_ref.at[i, b, here, g, channels], part, barrier)

        def request_ahead(block):
            """The block that comes `ahead` blocks later, of this chunk or of the next."""
            number, later = first + block + ahead, block + ahead
            pl.when(later < num_blocks)(lambda: request(turn.chunk, later, number))
            pl.when((later >= num_blocks) & ~turn.is_last)(lambda: request(turn.following, later - num_blocks, number))

        def leave(tile, x, ref):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tiles.leave(x, tile, ref)

        def one_block(block, scores):
            query, key, parts, barrier = tiles_of(first + block)
            mild = mild_ref[b, lax.div(h, per_head), n, block] > 0
            plgpu.barrier_wait(barrier)
            pl.when(~mild)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
            levels = decays.Levels(levels_ref, parts, pool, LEVELS, arrived)
            pairs = decays.Pairs(mild, levels, key, pool.at[REST], constants, derived=False)
            x = tiles.load(query)
            scores += pairs.scores(x, exact=True)
            reader = scale * x * pairs.through
            leave(pool.at[LEAVING + lax.rem(block, 2)], reader, reader_ref.at[b, tokens, h, pl.ds(block * SIZE, SIZE)])
            request_ahead(block)
            return scores

        first = turn.step * num_blocks

        @pl.when(turn.step == 0)
        def _():
            for block in range(ahead):
                request(turn.chunk, block, block)

        scores = lax.fori_loop(0, num_blocks, one_block, jnp.zeros(SQUARE, jnp.float32))
        scores = decays.causal_parts(scale * scores, constants.at[decays.THROUGH], dtype)
        for number, (part, ref) in enumerate(zip(scores, scores_refs, strict=False), num_blocks):
            leave(pool.at[LEAVING + number % 2], part, ref.at[b, tokens, h])

    return tiles.chunk_kernel(
        "linear_scores",
        body,
        *[((batch_size, length, num_heads, size), dtype) for size in (key_size, *[SIZE] * (1 + residuals))],
        shape=(batch_size, num_heads, num_chunks),
        dtype=dtype,
        tiles=BLOCKS + ahead * per_block,
        constants=1,
        width=key_size,
        arrivals={"block": (ahead, per_block), **decays.Levels.ARRIVALS},
        interpret=interpret,
    )(decays.constant_tiles(dtype), q, k, decays.level_tiles(dtype), mild, parts)
