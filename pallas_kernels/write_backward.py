"""Gradients of what was written, keys and values, and of the write key at its chunk's end: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.tiles import SIZE, SQUARE

STAGES = 2
"""steps of the loops over channels that are in flight"""
SCORES, KEY, OUT = range(3 * STAGES, 3 * STAGES + 3)
"""scratch tiles behind those of the loops"""


def write_backward(memories, key, interpret=None):
    """Gradients of one chunk's writes, from those of its scores and of the states it leaves.

        dx_j = Σ_{i>=j} S_ij y_i  +  dHᵀ key_j          for every memory
        dkey_j = Σ_memories dH x_j

    Args:
      memories: a sequence of (x [B, T, G, D] written, y [B, T, H, D] that multiplies the scores, S [B, T, H, 64] the
        scores i by the tokens j of the chunk, dH [B, H, N, 64, D] the gradient of the state that leaves the chunk).
      key: [B, T, G, 64], the write key at its chunk's end.

    Returns:
      (dkey [B, T, H, 64], dx [B, T, H, D] for every memory)
    """
    batch_size, length, num_heads, _ = memories[0][1].shape
    num_groups, dtype = key.shape[2], key.dtype
    steps = [(index, step) for index, (x, *_) in enumerate(memories) for step in range(x.shape[-1] // SIZE)]
    operands = [array for memory in memories for array in memory] + [key]

    def body(chunk, pool, _, arrived, *refs):
        inputs, (d_key_ref, *dx_refs) = refs[: len(operands)], refs[len(operands) :]
        *memory_refs, key_ref = inputs
        memory_refs = [memory_refs[4 * index : 4 * index + 4] for index in range(len(memories))]
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)

        def request(number):
            if number < len(steps):
                (index, step), slot = steps[number], number % STAGES
                x_ref, y_ref, _, state_ref = memory_refs[index]
                columns, barrier = pl.ds(step * SIZE, SIZE), arrived[f"step{slot}"]
                plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, g, columns], pool.at[3 * slot], barrier)
                plgpu.copy_gmem_to_smem(y_ref.at[b, tokens, h, columns], pool.at[3 * slot + 1], barrier)
                plgpu.copy_gmem_to_smem(state_ref.at[b, h, n, :, columns], pool.at[3 * slot + 2], barrier)

        plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, g], pool.at[KEY], arrived["key"])
        for number in range(STAGES):
            request(number)

        def accumulate(d_key):
            for number, (index, step) in enumerate(steps):
                slot = number % STAGES
                if step == 0:
                    scores_ref = memory_refs[index][2]
                    plgpu.copy_gmem_to_smem(scores_ref.at[b, tokens, h], pool.at[SCORES], arrived["scores"])
                    plgpu.barrier_wait(arrived["scores"])
                if number == 0:
                    plgpu.barrier_wait(arrived["key"])
                plgpu.barrier_wait(arrived[f"step{slot}"])
                plgpu.wgmma(d_key, pool.at[3 * slot], tiles.transposed(pool.at[3 * slot + 2]))
                dx = tiles.product(
                    (tiles.transposed(pool.at[SCORES]), pool.at[3 * slot + 1]), (pool.at[KEY], pool.at[3 * slot + 2])
                )
                plgpu.wgmma_wait(0)
                request(number + STAGES)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pool[OUT] = dx.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(pool.at[OUT], dx_refs[index].at[b, tokens, h, pl.ds(step * SIZE, SIZE)])
            return d_key[...]

        d_key = pl.run_scoped(accumulate, plgpu.ACC(SQUARE, jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pool[OUT] = d_key.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(pool.at[OUT], d_key_ref.at[b, tokens, h])

    return tiles.chunk_kernel(
        "write_backward",
        body,
        ((batch_size, length, num_heads, SIZE), dtype),
        *[((batch_size, length, num_heads, x.shape[-1]), dtype) for x, *_ in memories],
        shape=(batch_size, num_heads, memories[0][3].shape[2]),
        dtype=dtype,
        tiles=OUT + 1,
        constants=0,
        arrivals={**{f"step{slot}": 3 for slot in range(STAGES)}, "scores": 1, "key": 1},
        interpret=interpret,
    )(jnp.zeros((1, *SQUARE), dtype), *operands)
