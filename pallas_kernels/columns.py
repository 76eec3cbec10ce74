"""Sums of products of tiles with wide arrays in memory, 64 columns at a time."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.tiles import SIZE, SQUARE

STAGES = 3
"""tiles of the wide arrays in flight"""
NUM_TILES = STAGES + 1
"""tiles of shared memory to work in: those in flight and one on its way out"""
ARRIVALS = {f"columns{slot}": 1 for slot in range(STAGES)}


def add_products(tiles, wide, out, num_steps, work, arrived):
    """out = Σ tiles[i] @ wide[i], for float32 sums.

    Args:
      tiles: [64, 64] each, in shared memory.
      wide: functions that give the reference to some columns of an array in memory, [64, 64] each.
      out: one such function for the result.
      num_steps: how often 64 columns.
      work: NUM_TILES tiles in shared memory, free to use.
      arrived: the barriers of `ARRIVALS`.
    """

    def columns(step):
        return pl.ds(step * SIZE, SIZE)

    def request(number):
        step, i = divmod(number, len(tiles))
        if step < num_steps:
            slot = number % STAGES
            plgpu.copy_gmem_to_smem(wide[i](columns(step)), work[slot], arrived[f"columns{slot}"])

    def one_step(step):
        def accumulate(acc):
            for i, tile in enumerate(tiles):
                number = step * len(tiles) + i
                slot = number % STAGES
                plgpu.barrier_wait(arrived[f"columns{slot}"])
                plgpu.wgmma(acc, tile, work[slot])
                plgpu.wgmma_wait(0)
                request(number + STAGES)
            return acc[...]

        return pl.run_scoped(accumulate, plgpu.ACC(SQUARE, jnp.float32))

    for number in range(STAGES):
        request(number)
    for step in range(num_steps):
        result, leaving = one_step(step), work[STAGES]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        leaving[...] = result.astype(leaving.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(leaving, out(columns(step)))
