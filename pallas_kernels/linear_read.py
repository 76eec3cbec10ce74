"""Gated linear attention's read: all chunks side by side, everything between q and out of a chunk on chip."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

FACTORS, KEYS, PARTS = 0, 2, 3
"""scratch tiles: two for the factors of the levels in turn, then a block's keys and the parts of its log decays; the
loop over the values uses `columns.NUM_TILES` of them again"""


def linear_read(q, k, v, parts, states, *, scale, residuals=False, interpret=None):
    """out [B, T, H, V] from the states that enter the chunks.

        S_ij = scale · Σ_m q_im k_jm D_ijm                                          for j <= i
        o_i = Hᵀ (scale · prod(a[first..i]) ⊙ q_i)  +  Σ_{j<=i} S_ij v_j

    Args:
      q: [B, T, H, K], two-byte; K and V are multiples of 64, 64 channels of K are called a block.
      k, v: [B, T, G, K], [B, T, G, V].
      parts: [P, B, T, G, K], log decays from `gates.chunk_gates`.
      states: [B, G, N, K, V], H as it enters the chunks.
      residuals: whether to return what the backward pass wants.

    Returns:
      (out,), with `residuals` (out, S [B, T, H, 64] by the tokens of the chunk, scale · prod(a) ⊙ q [B, T, H, K]).
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    num_blocks = key_size // SIZE
    SCORES, READERS = PARTS + num_parts, PARTS + num_parts + 1

    def body(chunk, pool, constants, arrived, q_ref, k_ref, v_ref, parts_ref, states_ref, out_ref, *residual_refs):
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        parts = [pool.at[PARTS + i] for i in range(num_parts)]

        def request(block):
            @pl.when(block < num_blocks)
            def _():
                here, barrier = pl.ds(block * SIZE, SIZE), arrived["block"]
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, here], pool.at[READERS + block], barrier)
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, here], pool.at[KEYS], barrier)
                for i, part in enumerate(parts):
                    plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g, here], part, barrier)

        def one_block(block, scores):
            plgpu.barrier_wait(arrived["block"])
            reader = pool.at[READERS + block]
            scores += decayed_scores(reader, pool.at[KEYS], parts, constants, pool)
            through = decays.gates_product(constants.at[decays.THROUGH], parts)
            reader[...] = (scale * tiles.load(reader) * through).astype(dtype)
            plgpu.commit_smem()
            request(block + 1)
            return scores

        request(jnp.int32(0))
        scores = lax.fori_loop(0, num_blocks, one_block, jnp.zeros(SQUARE, jnp.float32))
        pool[SCORES] = (scale * scores).astype(dtype)
        plgpu.commit_smem()
        if residual_refs:
            scores_ref, reading_ref = residual_refs
            plgpu.copy_smem_to_gmem(pool.at[SCORES], scores_ref.at[b, tokens, h])
            for block in range(num_blocks):
                here = pl.ds(block * SIZE, SIZE)
                plgpu.copy_smem_to_gmem(pool.at[READERS + block], reading_ref.at[b, tokens, h, here])

        def rows_of_state(block):
            return lambda channels: states_ref.at[b, g, n, pl.ds(block * SIZE, SIZE), channels]

        columns.add_products(
            [pool.at[SCORES + i] for i in range(1 + num_blocks)],
            [lambda channels: v_ref.at[b, tokens, g, channels], *map(rows_of_state, range(num_blocks))],
            lambda channels: out_ref.at[b, tokens, h, channels],
            value_size // SIZE,
            [pool.at[i] for i in range(columns.NUM_TILES)],
            arrived,
        )

    outputs = [((batch_size, length, num_heads, value_size), dtype)]
    if residuals:
        outputs += [((batch_size, length, num_heads, size), dtype) for size in (SIZE, key_size)]
    return tiles.chunk_kernel(
        "linear_read",
        body,
        *outputs,
        shape=(batch_size, num_heads, states.shape[2]),
        dtype=dtype,
        tiles=READERS + num_blocks,
        constants=decays.THROUGH + 1,
        arrivals={"block": 2 + num_parts, **columns.ARRIVALS},
        interpret=interpret,
    )(decays.constant_tiles(dtype), q, k, v, parts, states)


def decayed_scores(q, k, parts, constants, pool):
    """Σ_m q_im k_jm D_ijm for j <= i, else 0: float32 [SIZE, SIZE] from tiles in shared memory.

    The factors of the levels, which nothing else wants, take turns in two tiles of the pool.
    """
    i, j = tiles.row_and_column()
    own = (tiles.load(q) * tiles.load(k)).sum(axis=1)

    def add(index, result):
        factor = decays.gates_product(constants.at[decays.WINDOWS + index], parts).astype(q.dtype)
        earlier = pool.at[FACTORS + lax.rem(index, 2)]
        earlier[...] = tiles.load(k, q.dtype) * factor
        plgpu.commit_smem()
        across = tiles.product((tiles.load(q, q.dtype) * factor, tiles.transposed(earlier)))
        # Right for the pairs that part here, wrong for those that part at smaller halves, which overwrite it.
        half = lax.shift_right_logical(SIZE // 2, index)
        return jnp.where((i ^ j) < 2 * half, across, result)

    result = decays.each_level(add, jnp.zeros(SQUARE, jnp.float32))
    return jnp.where(j < i, result, jnp.where(i == j, tiles.along_rows(own), 0.0))
