"""States between chunks: the recurrence over whole chunks, forward in time and, for gradients, backward."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.tiles import ROWS, SIZE, SQUARE

STAGES = 3
"""chunks in flight"""


def chunk_states(x, key, kept, initial, *, other=None, reverse=False, interpret=None):
    """The state before each chunk and the one after the last; with `reverse`, time runs backward.

        H[c+1] = diag(kept[c]) H[c] + Σ_{j in chunk c} key_j ⊗ x_j

    Args:
      x: [B, T, H, D], D a multiple of 64, two-byte.
      key: [B, T, H, M] of x's dtype, M a multiple of 64.
      kept: [B, G, N, M] float32, N = ceil(T / 64), H a multiple of G.
      initial: [B, H, M, D] float32.
      other: [B, G, N, M, D] of x's dtype or None.
      reverse: from the last chunk to the first.

    Returns:
      (states [B, H, N, M, D] in x's dtype, the last state [B, H, M, D] in float32); with `other` also the sums over
      channels of states ⊙ other, [B, H, N, D / block, M] in float32, in parts that are to be added up.
    """
    batch_size, length, num_heads, width = x.shape
    num_slots, num_groups, num_chunks = key.shape[-1], *kept.shape[1:3]
    block = min(width, 128 if width % 128 == 0 else 64)
    num_blocks = width // block
    operands = (x, key, kept, initial) if other is None else (x, key, kept, initial, other)

    def body(x_ref, key_ref, kept_ref, initial_ref, *refs):
        other_refs, (states_ref, last_ref, *dots_refs) = refs[: len(operands) - 4], refs[len(operands) - 4 :]
        bh, m, d = (lax.axis_index(name) for name in ("bh", "m", "d"))
        b, h = lax.div(bh, num_heads), lax.rem(bh, num_heads)
        g = lax.div(h, num_heads // num_groups)
        rows, columns = pl.ds(m * SIZE, SIZE), pl.ds(d * block, block)

        def scoped(xs, keys, kepts, outs, full, others, dots, arrived, arrived_initial):
            def chunk(step):
                return num_chunks - 1 - step if reverse else step

            def request(step, slot):
                n = chunk(step)
                tokens = pl.ds(n * SIZE, SIZE)
                plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, h, columns], xs.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, h, rows], keys.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(kept_ref.at[b, g, n, rows], kepts.at[slot], arrived.at[slot])
                for ref in other_refs:
                    plgpu.copy_gmem_to_smem(ref.at[b, g, n, rows, columns], others.at[slot], arrived.at[slot])

            plgpu.copy_gmem_to_smem(initial_ref.at[b, h, rows, columns], full, arrived_initial)
            for step in range(min(STAGES, num_chunks)):
                request(jnp.int32(step), step)  # a number of its own would be checked against the length
            plgpu.barrier_wait(arrived_initial)

            def one_chunk(step, state):
                slot, out, n = lax.rem(step, STAGES), lax.rem(step, 2), chunk(step)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                outs[out] = state.astype(outs.dtype)
                plgpu.barrier_wait(arrived.at[slot])
                if other_refs:
                    dots[out] = (state * tiles.load(others.at[slot])).sum(axis=1)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(outs.at[out], states_ref.at[b, h, n, rows, columns])
                for ref in dots_refs:
                    plgpu.copy_smem_to_gmem(dots.at[out], ref.at[b, h, n, d, rows])
                kept = plgpu.load(kepts.at[slot], layout=ROWS)
                state = state * tiles.along_rows(kept, block)

                def write(acc):
                    plgpu.wgmma(acc, tiles.transposed(keys.at[slot]), xs.at[slot])
                    plgpu.wgmma_wait(0)

                state = pl.run_state(write)(plgpu.ACC.init(state))

                @pl.when(step + STAGES < num_chunks)
                def _():
                    request(step + STAGES, slot)

                return state

            state = lax.fori_loop(0, num_chunks, one_chunk, tiles.load(full))
            plgpu.wait_smem_to_gmem(0)
            full[...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(full, last_ref.at[b, h, rows, columns])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            tiles.scratch((STAGES, SIZE, block), x.dtype),
            tiles.scratch((STAGES, *SQUARE), x.dtype),
            plgpu.SMEM((STAGES, SIZE), jnp.float32),
            tiles.scratch((2, SIZE, block), x.dtype),
            tiles.scratch((SIZE, block)),
            tiles.scratch((STAGES, SIZE, block), x.dtype) if other_refs else None,
            plgpu.SMEM((2, SIZE), jnp.float32) if other_refs else None,
            plgpu.Barrier(num_arrivals=3 + len(other_refs), num_barriers=STAGES),
            plgpu.Barrier(),
        )

    outputs = [
        ((batch_size, num_heads, num_chunks, num_slots, width), x.dtype),
        ((batch_size, num_heads, num_slots, width), jnp.float32),
    ]
    if other is not None:
        outputs.append(((batch_size, num_heads, num_chunks, num_blocks, num_slots), jnp.float32))
    return tiles.kernel(
        "chunk_states" + "_reversed" * reverse,
        body,
        *outputs,
        grid={"bh": batch_size * num_heads, "m": num_slots // SIZE, "d": num_blocks},
        interpret=interpret,
    )(*operands)
