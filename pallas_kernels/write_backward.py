"""Gradients of what was written, keys and values, and of the write key at its chunk's end: all chunks side by side."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import slots, tiles
from pallas_kernels.tiles import SIZE, SQUARE

STAGES = 3
"""steps of the loops over channels that are in flight, of two tiles and one for every 64 slots"""


def write_backward(memories, key, interpret=None):
    """Gradients of one chunk's writes, from those of its scores and of the states it leaves.

        dx_j = Σ_{i>=j} S_ij y_i  +  dHᵀ key_j          for every memory
        dkey_j = Σ_memories dH x_j

    Args:
      memories: a sequence of (x [B, T, G, D] written, y [B, T, H, D] that multiplies the scores, S [B, T, H, 64] the
        scores i by the tokens j of the chunk, what rounding took from S, dH [B, H, N, M, D] the gradient of the state
        that leaves the chunk).
      key: [B, T, G, M], the write key at its chunk's end.

    Returns:
      (dkey [B, T, H, M], dx [B, T, H, D] for every memory)
    """
    batch_size, length, num_heads, _ = memories[0][1].shape
    num_groups, num_slots = key.shape[2:]
    blocks, dtype = slots.ranges(num_slots), key.dtype
    per_step = 2 + len(blocks)
    # Scratch tiles behind those of the loops: the key, two parts of one memory's scores, two for results.
    KEY = STAGES * per_step
    SCORES = KEY + len(blocks)
    num_steps = [x.shape[-1] // SIZE for x, *_ in memories]
    operands = [array for memory in memories for array in memory] + [key]
    OUT = SCORES + 2

    def body(turn, pool, _, arrived, *refs):
        (*memory_refs, key_ref), (d_key_ref, *dx_refs) = refs[: len(operands)], refs[len(operands) :]
        memory_refs = [memory_refs[5 * index : 5 * index + 5] for index in range(len(memories))]
        b, h, n = turn.chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)

        scores = pool.at[SCORES], pool.at[SCORES + 1]

        def request_scores(index):
            for ref, tile in zip(memory_refs[index][2:4], scores, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h], tile, arrived["scores"])

        def request(index, step, slot):
            x_ref, y_ref, _, _, state_ref = memory_refs[index]
            columns, barrier = pl.ds(step * SIZE, SIZE), arrived["step"](slot)
            sources = [x_ref.at[b, tokens, g, columns], y_ref.at[b, tokens, h, columns]]
            sources += [state_ref.at[b, h, n, block, columns] for block in blocks]
            for i, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(source, pool.at[per_step * slot + i], barrier)

        def request_later(index, step, slot):
            """The step that comes `STAGES` steps later, of the same memory or of the next."""
            here = step + STAGES < num_steps[index]
            pl.when(here)(lambda: request(index, step + STAGES, slot))
            if index + 1 < len(memories):
                there = step + STAGES - num_steps[index]
                pl.when(~here & (there < num_steps[index + 1]))(lambda: request(index + 1, there, slot))

        for i, block in enumerate(blocks):
            plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, g, block], pool.at[KEY + i], arrived["key"])
        request_scores(0)
        for number, (index, step) in enumerate(first_steps):
            request(index, step, number)

        def one_step(index, d_key, step, _):
            number = sum(num_steps[:index]) + step
            slot = lax.rem(number, STAGES)
            x, y, *d_state = (pool.at[per_step * slot + i] for i in range(per_step))
            plgpu.barrier_wait(arrived["step"](slot))
            for accumulator, rows in zip(d_key, d_state, strict=True):
                plgpu.wgmma(accumulator, x, tiles.transposed(rows))
            through_state = [(pool.at[KEY + i], rows) for i, rows in enumerate(d_state)]
            dx = tiles.product(*((tiles.transposed(part), y) for part in scores), *through_state)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            request_later(index, step, slot)
            out = dx_refs[index].at[b, tokens, h, pl.ds(step * SIZE, SIZE)]
            tiles.leave(dx, pool.at[OUT + lax.rem(number, 2)], out)

        def accumulate(*d_key):
            plgpu.barrier_wait(arrived["key"])
            for index in range(len(memories)):
                if index:  # all threads have met since the products with those of the memory before
                    request_scores(index)
                plgpu.barrier_wait(arrived["scores"])
                lax.fori_loop(0, num_steps[index], functools.partial(one_step, index, d_key), None)
            return tuple(accumulator[...] for accumulator in d_key)

        d_key = pl.run_scoped(accumulate, *[plgpu.ACC(SQUARE, jnp.float32)] * len(blocks))
        for number, (block, rows) in enumerate(zip(blocks, d_key, strict=True), sum(num_steps)):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tiles.leave(rows, pool.at[OUT + number % 2], d_key_ref.at[b, tokens, h, block])

    first_steps = [(index, step) for index, steps in enumerate(num_steps) for step in range(steps)][:STAGES]
    return tiles.chunk_kernel(
        "write_backward",
        body,
        ((batch_size, length, num_heads, num_slots), dtype),
        *[((batch_size, length, num_heads, x.shape[-1]), dtype) for x, *_ in memories],
        shape=(batch_size, num_heads, memories[0][-1].shape[2]),
        dtype=dtype,
        tiles=OUT + 2,
        constants=0,
        width=sum(x.shape[-1] for x, *_ in memories),
        arrivals={"step": (STAGES, per_step), "scores": 2, "key": len(blocks)},
        interpret=interpret,
    )(jnp.zeros((1, *SQUARE), dtype), *operands)
