"""Products of arrays in memory that are wider than a tile, 64 channels at a time.

Both functions work in a ring of tiles in shared memory, the first ones of a pool. The steps are loops: unrolled they
would be long code, which has to be fetched anew for every chunk.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import SIZE, SQUARE, leave, load_parts, transposed


def _channels(step):
    return pl.ds(step * SIZE, SIZE)


def _in_flight(arrays, num_steps, pool, stages, arrived):
    """Tiles of several arrays on their way to shared memory, those of a step together.

    Returns:
      (tile, request, start): the tile of an array at a stage; a function that asks for those of a step; `start`, as
      `inner_products` returns it.
    """

    def tile(slot, number):
        return pool.at[len(arrays) * slot + number]

    def request(step, slot):
        for number, array in enumerate(arrays):
            plgpu.copy_gmem_to_smem(array(step), tile(slot, number), arrived(slot))

    def start(first=0, last=stages):
        for step in range(first, min(last, num_steps)):
            request(step, step)

    return tile, request, start


def inner_products(arrays, pairs, width, pool, stages, arrived):
    """Σ_c x_ic y_jc over all channels c, float32 in registers, for each pair (x, y).

    In two functions, so that other work can go in between.

    Args:
      arrays: functions that give the reference to some channels of an array, [64, 64] each.
      pairs: two numbers of arrays each.
      width: how many channels, a multiple of 64.
      pool: tiles of shared memory, of which the first len(arrays) · stages are used.
      stages: how many steps are in flight.
      arrived: gives one barrier for a number below `stages`, for len(arrays) copies.

    Returns:
      (start, finish): one asks for the first channels, from which to which stage it takes, all unless told; the other
      does the rest.
    """
    num_steps = width // SIZE
    arrays = [lambda step, array=array: array(_channels(step)) for array in arrays]
    tile, request, start = _in_flight(arrays, num_steps, pool, stages, arrived)

    def accumulate(*accumulators):
        def one_step(step, _):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(arrived(slot))
            for accumulator, (x, y) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, tile(slot, x), transposed(tile(slot, y)))
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()
            pl.when(step + stages < num_steps)(lambda: request(step + stages, slot))

        lax.fori_loop(0, num_steps, one_step, None)
        return tuple(accumulator[...] for accumulator in accumulators)

    def finish():
        return pl.run_scoped(accumulate, *[plgpu.ACC(SQUARE, jnp.float32)] * len(pairs))

    return start, finish


def sums(arrays, results, num_parts, pool, stages, arrived):
    """Σ_p Σ_i arrays[i](p), float32 in registers, for each of the results, which name the i of theirs.

    In two functions, as `inner_products`, by whose names the other arguments go.

    Args:
      arrays: functions that give the reference to a part of an array, [64, 64] each.
      num_parts: how many parts there are.
    """
    tile, request, start = _in_flight(arrays, num_parts, pool, stages, arrived)

    def finish():
        totals = [0.0] * len(results)
        for part in range(num_parts):
            slot = part % stages
            plgpu.barrier_wait(arrived(slot))
            found = [load_parts([tile(slot, i) for i in numbers]) for numbers in results]
            plgpu.commit_smem()
            if part + stages < num_parts:
                request(part + stages, slot)
            totals = [total + x for total, x in zip(totals, found, strict=True)]
        return totals

    return start, finish


def over_turns(turn, products, early):
    """The `inner_products` of a `Turn`, of whose first channels the turn before may have asked for some.

    Args:
      products: a function from a chunk to its `inner_products`.
      early: stages that the turn before asks for.

    Returns:
      (finish, follow): `follow(where)` asks for those of the following turn, if there is one, where that is true. It is
      to be called once the tiles of these stages are free.
    """
    start, finish = products(turn.chunk)
    start_following, _ = products(turn.following)
    pl.when(turn.step == 0)(lambda: start(last=early))
    start(first=early)

    def follow(where):
        pl.when(where & ~turn.is_last)(lambda: start_following(last=early))

    return finish, follow


def add_products(tiles, arrays, out, width, pool, ring, arrived):
    """out = Σ (Σ tiles[i]) @ arrays[i], from float32 sums.

    Args:
      tiles: for each array one or more of [64, 64], in shared memory.
      arrays, width: as for `inner_products`.
      out: such a function for the result.
      pool: tiles of shared memory: the first `ring`, at least two, for what is in flight, the next for results.
      arrived: gives one barrier for each number in the ring, for one copy.
    """
    num_steps = width // SIZE
    at_once = ring >= 2 * len(tiles)  # the tiles of the next steps are asked for together: fewer barriers

    def request(step, i, slot):
        plgpu.copy_gmem_to_smem(arrays[i](_channels(step)), pool.at[slot], arrived(slot))

    def request_later(step, i):
        """The tile that comes `ring` tiles after tile i of a step."""
        steps, later = divmod(i + ring, len(tiles))
        slot = lax.rem(step * len(tiles) + i, ring)
        pl.when(step + steps < num_steps)(lambda: request(step + steps, later, slot))

    def one_step(step, _):
        def accumulate(acc):
            for i, factors in enumerate(tiles):
                slot = lax.rem(step * len(tiles) + i, ring)
                plgpu.barrier_wait(arrived(slot))
                for tile in factors:
                    plgpu.wgmma(acc, tile, pool.at[slot])
                if i and not at_once:
                    plgpu.wgmma_wait(1)
                    plgpu.commit_smem()
                    request_later(step, i - 1)
            return acc[...]

        result = pl.run_scoped(accumulate, plgpu.ACC(SQUARE, jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(0 if at_once else len(tiles) - 1, len(tiles)):
            request_later(step, i)
        leave(result, pool.at[ring], out(_channels(step)))

    for number in range(min(ring, num_steps * len(tiles))):
        request(*divmod(number, len(tiles)), number)
    lax.fori_loop(0, num_steps, one_step, None)
