"""A memory that is read as it is written: chunk after chunk, its state in registers."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.sizes import choose
from pallas_kernels.states import states_of_segments
from pallas_kernels.tiles import COLUMNS, SHARED_MEMORY, SIZE, SQUARE, transposed

MOST_SLOTS = 256
"""that one warpgroup's registers hold, for 64 channels"""
MOST_STAGES = 4
"""chunks in flight"""
FEWEST_PROGRAMS = 128
"""blocks that nearly fill the card: with fewer, warpgroups rather go into blocks of their own"""
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def memory_read(x, key, kept, initial, scores, reader, *, states=False, interpret=None):
    """Every token's sum over its own chunk and the state that enters it.

        o_i = H[c]ᵀ reader_i + Σ_{j in chunk c} scores_ij x_j
        H[c+1] = diag(kept[c]) H[c] + Σ_{j in chunk c} key_j ⊗ x_j

    Args:
      x: [B, T, G, D], D a multiple of 64, two-byte.
      key: [B, T, G, M] of x's dtype, M a multiple of 64.
      kept: [B, G, N, M] float32, N = ceil(T / 64).
      initial: [B, G, M, D] float32.
      scores: one or more, to be added up, [B, T, H, 64] by the tokens of the chunk, of x's dtype, H a multiple of G.
      reader: [B, T, H, M], of x's dtype.
      states: whether to return these too.

    Returns:
      (out [B, T, H, D] in x's dtype, the last state [B, G, M, D] in float32), with `states` also H as it enters the
      chunks, [B, G, N, M, D] in x's dtype.
    """

    def of_slots(first):
        slots = slice(first, first + MOST_SLOTS)
        return _memory_read(
            *(x, key[..., slots], kept[..., slots], initial[..., slots, :]),
            *([jnp.zeros_like(scores[0])] if first else scores, reader[..., slots]),
            states=states,
            interpret=interpret,
        )

    outs, *others = zip(*map(of_slots, range(0, key.shape[-1], MOST_SLOTS)), strict=True)
    if len(outs) == 1:
        return outs[0], *(other[0] for other in others)
    out = sum(out.astype(jnp.float32) for out in outs).astype(x.dtype)
    return out, *(jnp.concatenate(other, axis=-2) for other in others)


def _memory_read(x, key, kept, initial, scores, reader, *, states, interpret):
    """`memory_read` of at most `MOST_SLOTS` slots."""
    batch_size, length, num_heads, num_slots = reader.shape
    num_groups, width = x.shape[2:]
    num_chunks, dtype, per_head = kept.shape[2], x.dtype, num_heads // num_groups
    num_blocks, num_columns = num_slots // SIZE, width // SIZE
    total = batch_size * num_heads * num_columns
    name = "memory_read_states" if states else "memory_read"
    # which counts programs of 128 channels
    initial = states_of_segments(name, x, key, kept, initial, pl.cdiv(total, 2))
    num_segments = initial.shape[2]
    segment = pl.cdiv(num_chunks, num_segments)
    warpgroups = _warpgroups(name, total * num_segments, num_columns, num_blocks, segment)
    leaving = min(num_blocks, 2) if states else 1  # tiles that results leave by
    num_scores = len(scores)
    stages = _stages(warpgroups, num_blocks, num_scores, leaving)

    def body(x_ref, key_ref, kept_ref, initial_ref, reader_ref, *refs):
        scores_refs, (out_ref, last_ref, *states_refs) = refs[:num_scores], refs[num_scores:]
        bh, d, s, warpgroup = (lax.axis_index(name) for name in ("bh", "d", "s", "warpgroup"))
        b, h = lax.div(bh, num_heads), lax.rem(bh, num_heads)
        g, first = lax.div(h, per_head), s * segment
        steps = lax.min(num_chunks - first, segment)
        of_group = lax.rem(h, per_head) == 0  # the one of its heads that returns its states

        def columns(warpgroup):
            return pl.ds((d * warpgroups + warpgroup) * SIZE, SIZE)

        own = columns(warpgroup)

        def initial_state(full, arrived):
            full, arrived = full.at[warpgroup], arrived.at[warpgroup]
            plgpu.copy_gmem_to_smem(initial_ref.at[b, g, s, :, own], full, arrived)
            plgpu.barrier_wait(arrived)
            state = plgpu.layout_cast(plgpu.load(transposed(full), layout=TRANSPOSED), tiles.REGISTERS)
            plgpu.commit_smem()
            return state

        def all_chunks(state, xs, keys, readers, scores, kepts, leaving, arrived, consumed):
            leaving = leaving.at[warpgroup]

            def request(step, slot):
                n = first + step
                tokens, barrier = pl.ds(n * SIZE, SIZE), arrived.at[slot]
                for number in range(warpgroups):
                    plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, g, columns(number)], xs.at[slot, number], barrier)
                plgpu.copy_gmem_to_smem(reader_ref.at[b, tokens, h], readers.at[slot], barrier)
                for number, ref in enumerate(scores_refs):
                    plgpu.copy_gmem_to_smem(ref.at[b, tokens, h], scores.at[slot, number], barrier)
                plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, g], keys.at[slot], barrier)
                plgpu.copy_gmem_to_smem(kept_ref.at[b, g, n], kepts.at[slot], barrier)

            def save_state(n, state, first):
                """Two blocks of slots, as many as there are tiles to leave by."""
                blocks = range(first, min(first + 2, num_blocks))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for block in blocks:
                    store_transposed(leaving.at[block - first], state[:, block * SIZE : (block + 1) * SIZE])
                plgpu.commit_smem()
                for block in blocks:
                    rows = pl.ds(block * SIZE, SIZE)
                    plgpu.copy_smem_to_gmem(leaving.at[block - first], states_refs[0].at[b, g, n, rows, own])

            def one_chunk(step, state):
                slot, n = lax.rem(step, stages), first + step
                two_byte = state.astype(dtype)
                if states:
                    pl.when(of_group)(lambda: save_state(n, two_byte, 0))
                plgpu.barrier_wait(arrived.at[slot])
                written = transposed(xs.at[slot, warpgroup])

                def write(acc):
                    plgpu.wgmma(acc, written, keys.at[slot])
                    plgpu.wgmma_wait(0)

                in_chunk = [(written, transposed(scores.at[slot, number])) for number in range(num_scores)]
                out = tiles.product((two_byte, transposed(readers.at[slot])), *in_chunk)
                if states and num_blocks > 2:  # by the same tiles, whose copies had the time of the products
                    pl.when(of_group)(lambda: save_state(n, two_byte, 2))
                state *= tiles.along_columns(plgpu.load(kepts.at[slot], layout=COLUMNS))
                state = pl.run_state(write)(plgpu.ACC.init(state))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store_transposed(leaving.at[0], out.astype(dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(leaving.at[0], out_ref.at[b, pl.ds(n * SIZE, SIZE), h, own])

                @pl.when(step + stages < steps)
                def _():
                    plgpu.barrier_arrive(consumed.at[slot])

                    @pl.when(warpgroup == 0)
                    def _():
                        plgpu.barrier_wait(consumed.at[slot])
                        request(step + stages, slot)

                return state

            @pl.when(warpgroup == 0)
            def _():
                for step in range(stages):
                    pl.when(step < steps)(functools.partial(request, step, step))

            state = lax.fori_loop(0, steps, one_chunk, state)
            plgpu.wait_smem_to_gmem(0)
            return state

        def last_state(state, full):
            full = full.at[warpgroup]
            store_transposed(full, state)
            plgpu.commit_smem()

            @pl.when(of_group)
            def _():
                plgpu.copy_smem_to_gmem(full, last_ref.at[b, g, s, :, own])
                plgpu.wait_smem_to_gmem(0)

        # One after another, in the same shared memory: a scope begins when all warpgroups have left the one before.
        full = plgpu.SMEM((warpgroups, num_slots, SIZE), jnp.float32)
        scoped = functools.partial(pl.run_scoped, collective_axes="warpgroup")
        state = scoped(initial_state, full, plgpu.Barrier(num_barriers=warpgroups))
        state = scoped(
            functools.partial(all_chunks, state),
            plgpu.SMEM((stages, warpgroups, *SQUARE), dtype),
            plgpu.SMEM((stages, SIZE, num_slots), dtype),
            plgpu.SMEM((stages, SIZE, num_slots), dtype),
            plgpu.SMEM((stages, num_scores, *SQUARE), dtype),
            plgpu.SMEM((stages, num_slots), jnp.float32),
            plgpu.SMEM((warpgroups, leaving, *SQUARE), dtype),
            plgpu.Barrier(num_arrivals=3 + num_scores + warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        )
        scoped(functools.partial(last_state, state), full)

    outputs = [((batch_size, length, num_heads, width), dtype), (initial.shape, jnp.float32)]
    if states:
        outputs.append(((batch_size, num_groups, num_chunks, num_slots, width), dtype))
    out, last, *saved = tiles.kernel(
        "memory_read",
        body,
        *outputs,
        grid={"bh": batch_size * num_heads, "s": num_segments, "d": num_columns // warpgroups},
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
    )(x, key, kept, initial, reader, *scores)
    return out, last[:, :, -1], *saved


def store_transposed(tile, x):
    """Leaves xᵀ in a tile of shared memory, from registers."""
    transposed(tile)[...] = plgpu.layout_cast(x, TRANSPOSED)


def _warpgroups(name, total, num_columns, num_blocks, segment):
    """Warpgroups of a block, each with its 64 of the channels; they share what all channels need."""
    most = 4 if num_blocks == 1 else 2  # a thread then has 128 registers or 255
    options = [n for n in (1, 2, 4) if n <= most and num_columns % n == 0]
    rule = max((n for n in options if total // n >= FEWEST_PROGRAMS), default=1)
    return choose(f"{name} warpgroups", (total, num_columns, num_blocks, segment), rule, options)


def _stages(warpgroups, num_blocks, num_scores, leaving):
    """As many chunks in flight as fit in shared memory."""
    tile = 2 * SIZE * SIZE
    in_flight = (warpgroups + 2 * num_blocks + num_scores) * tile + 4 * SIZE * num_blocks
    return min(MOST_STAGES, (SHARED_MEMORY - warpgroups * leaving * tile) // in_flight)
