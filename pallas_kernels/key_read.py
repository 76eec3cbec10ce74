"""The key memory of Gated Slot Attention, read as it is written: chunk after chunk, its state in registers."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.sizes import choose, multiprocessors
from pallas_kernels.states import most_segments, states_of_segments
from pallas_kernels.tiles import ROWS, SIZE, SQUARE, transposed

WARPGROUPS = 4
"""of a block, each with 64 of its channels"""
BLOCK = WARPGROUPS * SIZE
STAGES = 2
"""chunks in flight"""
FEWEST_BLOCKS = 0.75
"""a multiprocessor: with fewer blocks than that, reading all chunks side by side is faster"""
TILES = 3
"""of one chunk's products: logits in two parts, scores"""


def pays(q, key):
    """Whether `key_read` and a softmax of its products are faster than states and a softmax that reads them.

    Only where nobody wants the states: with them the two ways take the same time.
    """
    batch_size, length, num_heads, width = q.shape
    num_slots, num_chunks = key.shape[-1], pl.cdiv(length, SIZE)
    if num_slots != SIZE or width % BLOCK:
        return False
    blocks = batch_size * num_heads * (width // BLOCK)
    enough = blocks * most_segments(num_chunks, 2 * blocks) >= FEWEST_BLOCKS * multiprocessors()
    return bool(choose("key_read", (batch_size * num_heads, num_chunks, width), int(enough), (0, 1)))


def key_read(q, k, key, kept, initial, *, interpret=None):
    """What queries find in the state that enters their chunk, and in the tokens of their chunk.

        x_im = Σ_d H[c]_md q_id,    s_ij = Σ_d q_id k_jd
        H[c+1] = diag(kept[c]) H[c] + Σ_{j in chunk c} key_j ⊗ k_j

    Every block sums over its 256 channels d; the sums over blocks are left to the reader.

    Args:
      q: [B, T, H, K], K a multiple of 256, two-byte.
      k: [B, T, G, K] of the same dtype, H a multiple of G.
      key: [B, T, G, 64], too.
      kept: [B, G, N, 64] float32, N = ceil(T / 64).
      initial: [B, G, 64, K] float32.

    Returns:
      (products [3 · K / 256, B, T, H, 64] in q's dtype: for every block x in two parts that are to be added up, and s;
      the last state [B, G, 64, K] in float32)
    """
    batch_size, length, num_heads, width = q.shape
    num_groups, num_chunks, dtype = k.shape[2], kept.shape[2], q.dtype
    per_head, num_blocks = num_heads // num_groups, width // BLOCK
    initial = states_of_segments("key_read", k, key, kept, initial, 2 * batch_size * num_heads * num_blocks)
    num_segments = initial.shape[2]
    segment = pl.cdiv(num_chunks, num_segments)

    def body(q_ref, k_ref, key_ref, kept_ref, initial_ref, products_ref, last_ref):
        bh, d, s, warpgroup = (lax.axis_index(name) for name in ("bh", "d", "s", "warpgroup"))
        b, h = lax.div(bh, num_heads), lax.rem(bh, num_heads)
        g, first = lax.div(h, per_head), s * segment
        steps = lax.min(num_chunks - first, segment)
        of_group = lax.rem(h, per_head) == 0  # the one of its heads that returns its state

        def columns(warpgroup):
            return pl.ds(d * BLOCK + warpgroup * SIZE, SIZE)

        own = columns(warpgroup)

        def initial_state(full, arrived):
            full, arrived = full.at[warpgroup], arrived.at[warpgroup]
            plgpu.copy_gmem_to_smem(initial_ref.at[b, g, s, :, own], full, arrived)
            plgpu.barrier_wait(arrived)
            state = tiles.load(full)
            plgpu.commit_smem()
            return state

        def all_chunks(state, qs, ks, keys, kepts, states, leaving, arrived, consumed, stored, free):
            def request(step, slot):
                n, barrier = first + step, arrived.at[slot]
                tokens = pl.ds(n * SIZE, SIZE)
                for number in range(WARPGROUPS):
                    plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, columns(number)], qs.at[slot, number], barrier)
                    plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, columns(number)], ks.at[slot, number], barrier)
                plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, g], keys.at[slot], barrier)
                plgpu.copy_gmem_to_smem(kept_ref.at[b, g, n], kepts.at[slot], barrier)

            def read(qs, slot, others):
                """A product of the chunk's queries with other rows, over the block's channels."""

                def accumulate(acc):
                    def one_step(i, _):
                        plgpu.wgmma(acc, qs.at[slot, i], transposed(others.at[i]))
                        plgpu.wgmma_wait(0)

                    lax.fori_loop(0, WARPGROUPS, one_step, None)
                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC(SQUARE, jnp.float32))

            def save(leaving, arrays, numbers, n):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for x, number in zip(arrays, numbers, strict=True):
                    leaving[number] = x
                plgpu.commit_smem()
                for number in numbers:
                    ref = products_ref.at[TILES * d + number, b, pl.ds(n * SIZE, SIZE), h]
                    plgpu.copy_smem_to_gmem(leaving.at[number], ref)

            def one_chunk(step, state, qs=qs, ks=ks, states=states, leaving=leaving):
                qs, ks, states, leaving = (tiles.anew(x, step) for x in (qs, ks, states, leaving))
                slot, n = lax.rem(step, STAGES), first + step
                pl.when(step > 0)(lambda: plgpu.barrier_wait(free))
                states[warpgroup] = state.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(stored)

                plgpu.barrier_wait(arrived.at[slot])

                def write(acc):
                    plgpu.wgmma(acc, transposed(keys.at[slot]), ks.at[slot, warpgroup])
                    plgpu.wgmma_wait(0)

                def read_states():
                    plgpu.barrier_wait(stored)
                    x = read(qs, slot, states)
                    pl.when(step + 1 < steps)(lambda: plgpu.barrier_arrive(free))
                    return x

                def read_others():
                    return lax.cond(
                        warpgroup == WARPGROUPS - 1,
                        lambda: read(qs, slot, ks.at[slot]),
                        lambda: plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), tiles.REGISTERS),
                    )

                found = lax.cond(warpgroup == 0, read_states, read_others)
                state *= tiles.along_rows(plgpu.load(kepts.at[slot], layout=ROWS))
                state = pl.run_state(write)(plgpu.ACC.init(state))

                @pl.when(step + STAGES < steps)
                def _():
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(consumed.at[slot])

                    @pl.when(warpgroup == 1)
                    def _():
                        plgpu.barrier_wait(consumed.at[slot])
                        request(step + STAGES, slot)

                pl.when(warpgroup == 0)(lambda: save(leaving, tiles.two_parts(found, dtype), (0, 1), n))
                pl.when(warpgroup == WARPGROUPS - 1)(lambda: save(leaving, [found.astype(dtype)], (2,), n))
                return state

            @pl.when(warpgroup == 1)
            def _():
                for step in range(STAGES):
                    pl.when(step < steps)(functools.partial(request, step, step))

            state = lax.fori_loop(0, steps, one_chunk, state)
            plgpu.wait_smem_to_gmem(0)
            return state

        def last_state(state, full):
            full = full.at[warpgroup]
            full[...] = state
            plgpu.commit_smem()

            @pl.when(of_group)
            def _():
                plgpu.copy_smem_to_gmem(full, last_ref.at[b, g, s, :, own])
                plgpu.wait_smem_to_gmem(0)

        # One after another, in the same shared memory: a scope begins when all warpgroups have left the one before.
        full = plgpu.SMEM((WARPGROUPS, *SQUARE), jnp.float32)
        scoped = functools.partial(pl.run_scoped, collective_axes="warpgroup")
        state = scoped(initial_state, full, plgpu.Barrier(num_barriers=WARPGROUPS))
        state = scoped(
            functools.partial(all_chunks, state),
            plgpu.SMEM((STAGES, WARPGROUPS, *SQUARE), dtype),
            plgpu.SMEM((STAGES, WARPGROUPS, *SQUARE), dtype),
            plgpu.SMEM((STAGES, *SQUARE), dtype),
            plgpu.SMEM((STAGES, SIZE), jnp.float32),
            plgpu.SMEM((WARPGROUPS, *SQUARE), dtype),
            plgpu.SMEM((TILES, *SQUARE), dtype),
            plgpu.Barrier(num_arrivals=2 * WARPGROUPS + 2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(),
        )
        scoped(functools.partial(last_state, state), full)

    products, last = tiles.kernel(
        "key_read",
        body,
        ((TILES * num_blocks, batch_size, length, num_heads, SIZE), dtype),
        (initial.shape, jnp.float32),
        grid={"bh": batch_size * num_heads, "s": num_segments, "d": num_blocks},
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        interpret=interpret,
    )(q, k, key, kept, initial)
    return products, last[:, :, -1]
