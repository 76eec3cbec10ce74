"""Products of arrays in memory that are wider than a tile, 64 channels at a time.

Both functions work in a ring of tiles in shared memory and return two functions: `start` asks for the first channels,
`finish` does the rest, so that other work can go in between.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.tiles import SIZE, SQUARE, transposed


def arrivals(name, barriers, copies=1):
    """For `chunk_kernel`: so many barriers of that name, each for so many copies."""
    return {f"{name}{slot}": copies for slot in range(barriers)}


def channels(step):
    return pl.ds(step * SIZE, SIZE)


def inner_products(arrays, pairs, width, ring, arrived, name="inner"):
    """Σ_c x_ic y_jc over all channels c, float32 in registers, for each pair (x, y).

    Args:
      arrays: functions that give the reference to some channels of an array, [64, 64] each.
      pairs: two numbers of arrays each.
      width: how many channels, a multiple of 64.
      ring: tiles of shared memory, as many as there are arrays for every stage.
      arrived: barriers, those of `arrivals(name, stages, len(arrays))` among them.
    """
    stages, num_steps = len(ring) // len(arrays), width // SIZE
    slots = [ring[len(arrays) * slot : len(arrays) * (slot + 1)] for slot in range(stages)]

    def request(step):
        if step < num_steps:
            for array, tile in zip(arrays, slots[step % stages], strict=True):
                plgpu.copy_gmem_to_smem(array(channels(step)), tile, arrived[f"{name}{step % stages}"])

    def start():
        for step in range(stages):
            request(step)

    def accumulate(*accumulators):
        for step in range(num_steps):
            tiles = slots[step % stages]
            plgpu.barrier_wait(arrived[f"{name}{step % stages}"])
            for accumulator, (x, y) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, tiles[x], transposed(tiles[y]))
            plgpu.wgmma_wait(0)
            request(step + stages)
        return tuple(accumulator[...] for accumulator in accumulators)

    def finish():
        return pl.run_scoped(accumulate, *[plgpu.ACC(SQUARE, jnp.float32)] * len(pairs))

    return start, finish


def add_products(tiles, arrays, out, width, ring, leaving, arrived, name="add"):
    """out = Σ tiles[i] @ arrays[i], from float32 sums.

    Args:
      tiles: [64, 64] each, in shared memory.
      arrays, width: as for `inner_products`.
      out: such a function for the result.
      ring: tiles of shared memory, at least two.
      leaving: tiles of shared memory that results leave by.
      arrived: barriers, those of `arrivals(name, len(ring))` among them.
    """
    num_steps = width // SIZE

    def request(number):
        step, i = divmod(number, len(tiles))
        if step < num_steps:
            slot = number % len(ring)
            plgpu.copy_gmem_to_smem(arrays[i](channels(step)), ring[slot], arrived[f"{name}{slot}"])

    def start():
        for number in range(len(ring)):
            request(number)

    def one_step(step):
        first = step * len(tiles)

        def accumulate(acc):
            for number, tile in enumerate(tiles, first):
                slot = number % len(ring)
                plgpu.barrier_wait(arrived[f"{name}{slot}"])
                plgpu.wgmma(acc, tile, ring[slot])
                if number > first:
                    plgpu.wgmma_wait(1)
                    request(number - 1 + len(ring))
            return acc[...]

        result = pl.run_scoped(accumulate, plgpu.ACC(SQUARE, jnp.float32))
        request(first + len(tiles) - 1 + len(ring))
        return result

    def finish():
        for step in range(num_steps):
            result, tile = one_step(step), leaving[step % len(leaving)]
            plgpu.wait_smem_to_gmem(len(leaving) - 1, wait_read_only=True)
            tile[...] = result.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out(channels(step)))

    return start, finish
