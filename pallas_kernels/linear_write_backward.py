"""Gradient of gated linear attention in the values: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, tiles
from pallas_kernels.tiles import SIZE, SQUARE

OUT = 4
"""the scratch tile behind those of the loop over channels in flight"""


def linear_write_backward(d_out, scores, rest, key, d_states, interpret=None):
    """dv_j = Σ_{i>=j} S_ij do_i  +  dHᵀ key_j, [B, T, H, V].

    Args:
      d_out: [B, T, H, V], two-byte; K and V are multiples of 64.
      scores, rest: S [B, T, H, 64], by the tokens of the chunk, and what rounding took from it.
      key: [B, T, G, K], the keys at their chunk's end.
      d_states: [B, H, N, K, V], gradient of the states that leave the chunks.
    """
    batch_size, length, num_heads, value_size = d_out.shape
    num_groups, key_size = key.shape[2:]
    num_blocks, dtype = key_size // SIZE, d_out.dtype

    def body(turn, pool, _, arrived, d_out_ref, scores_ref, rest_ref, key_ref, d_states_ref, dv_ref):
        b, h, n = turn.chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        scores, *keys = ([pool.at[OUT + 1 + i] for i in range(2)], *([pool.at[OUT + 3 + i]] for i in range(num_blocks)))
        blocks = [pl.ds(block * SIZE, SIZE) for block in range(num_blocks)]
        for ref, tile in zip((scores_ref, rest_ref), scores, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, h], tile, arrived["left"])
        for block, (tile,) in zip(blocks, keys, strict=True):
            plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, g, block], tile, arrived["left"])
        plgpu.barrier_wait(arrived["left"])

        def rows_of_state(block):
            return lambda channels: d_states_ref.at[b, h, n, block, channels]

        columns.add_products(
            [list(map(tiles.transposed, scores)), *keys],
            [lambda channels: d_out_ref.at[b, tokens, h, channels], *map(rows_of_state, blocks)],
            lambda channels: dv_ref.at[b, tokens, h, channels],
            value_size,
            pool,
            OUT,
            arrived["values"],
        )

    (dv,) = tiles.chunk_kernel(
        "linear_write_backward",
        body,
        ((batch_size, length, num_heads, value_size), dtype),
        shape=(batch_size, num_heads, d_states.shape[2]),
        dtype=dtype,
        tiles=OUT + 3 + num_blocks,
        constants=0,
        width=value_size,
        arrivals={"left": 2 + num_blocks, "values": (OUT, 1)},
        interpret=interpret,
    )(jnp.zeros((1, *SQUARE), dtype), d_out, scores, rest, key, d_states)
    return dv
