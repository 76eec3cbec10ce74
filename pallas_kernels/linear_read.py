"""Gated linear attention's read: all chunks side by side, everything between q and out of a chunk on chip."""

import functools
import operator

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

VALUE_TILES = 7
"""of the loop over the values in flight"""
OUT, RING, SCORES, READERS = 0, 1, 1 + VALUE_TILES, 2 + VALUE_TILES
"""scratch tiles; of those of the loop, the first four are also the levels', the last ones a block's k and log decays"""


def linear_read(q, k, v, parts, mild, states, *, scale, residuals=False, interpret=None):
    """out [B, T, H, V] from the states that enter the chunks.

        S_ij = scale · Σ_m q_im k_jm D_ijm                                          for j <= i
        o_i = Hᵀ (scale · prod(a[first..i]) ⊙ q_i)  +  Σ_{j<=i} S_ij v_j

    Args:
      q: [B, T, H, K], two-byte; K and V are multiples of 64, 64 channels of K are called a block.
      k, v: [B, T, G, K], [B, T, G, V].
      parts, mild: [P, B, T, G, K] and [B, G, N, K / 64], log decays from `gates.chunk_gates`.
      states: [B, G, N, K, V], H as it enters the chunks.
      residuals: whether to return what the backward pass wants.

    Returns:
      (out,), with `residuals` (out, S [B, T, H, 64] by the tokens of the chunk, scale · prod(a) ⊙ q [B, T, H, K]).
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    num_blocks = key_size // SIZE
    EARLY = VALUE_TILES - 1 - num_parts  # of the loop's tiles, free from the start

    def body(turn, pool, constants, arrived, q_ref, k_ref, v_ref, levels_ref, mild_ref, parts_ref, states_ref, *refs):
        out_ref, *residual_refs = refs
        b, h, n = turn.chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        keys, *parts = (pool.at[RING + i] for i in range(EARLY, VALUE_TILES))
        levels = decays.Levels(levels_ref, parts, pool, 0, arrived)
        scores, readers = pool.at[SCORES], [pool.at[READERS + block] for block in range(num_blocks)]

        def rows_of_state(block):
            return lambda channels: states_ref.at[b, g, n, pl.ds(block * SIZE, SIZE), channels]

        start_values, finish_values = columns.add_products(
            [scores, *readers],
            [lambda channels: v_ref.at[b, tokens, g, channels], *map(rows_of_state, range(num_blocks))],
            lambda channels: out_ref.at[b, tokens, h, channels],
            value_size,
            pool,
            (RING, VALUE_TILES),
            (OUT, 1),
            arrived["values"],
        )

        def request(block):
            @pl.when(block < num_blocks)
            def _():
                here, barrier = pl.ds(block * SIZE, SIZE), arrived["block"]
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, here], pool.at[READERS + block], barrier)
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, here], keys, barrier)
                for i, part in enumerate(parts):
                    plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g, here], part, barrier)

        def one_block(block, scores):
            plgpu.barrier_wait(arrived["block"])
            reader = pool.at[READERS + block]
            pairs = decays.Pairs(mild, levels, keys, constants, derived=False)
            query = tiles.load(reader)
            scores += pairs.scores(query)
            reader[...] = (scale * query * pairs.through).astype(dtype)
            plgpu.commit_smem()
            request(block + 1)
            return scores

        request(jnp.int32(0))
        mild = functools.reduce(operator.and_, [mild_ref[b, g, n, block] > 0 for block in range(num_blocks)])
        pl.when(mild)(lambda: start_values(last=EARLY))
        result = scale * lax.fori_loop(0, num_blocks, one_block, jnp.zeros(SQUARE, jnp.float32))
        scores[...] = decays.causal(result, constants.at[decays.THROUGH], dtype)
        plgpu.commit_smem()
        pl.when(~mild)(lambda: start_values(last=EARLY))
        start_values(first=EARLY)
        if residual_refs:
            scores_ref, reading_ref = residual_refs
            plgpu.copy_smem_to_gmem(scores, scores_ref.at[b, tokens, h])
            for block, reader in enumerate(readers):
                plgpu.copy_smem_to_gmem(reader, reading_ref.at[b, tokens, h, pl.ds(block * SIZE, SIZE)])
        finish_values()

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
        constants=1,
        arrivals={"block": 2 + num_parts, "values": (VALUE_TILES, 1), **decays.Levels.ARRIVALS},
        interpret=interpret,
    )(decays.constant_tiles(dtype), q, k, v, decays.level_tiles(dtype), mild, parts, states)
