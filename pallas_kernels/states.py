"""States between chunks: the recurrence over whole chunks, forward in time and, for gradients, backward."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.sizes import choose, multiprocessors
from pallas_kernels.tiles import ROWS, SIZE, SQUARE

STAGES = 3
"""chunks in flight"""
SHORTEST_SEGMENT = 8
"""chunks in a segment, at least"""
FEWEST_SEGMENTS = 5
"""with fewer, reading everything twice costs more than the shorter recurrence saves"""
PROGRAMS = 2
"""blocks that a multiprocessor runs at once; more segments would not help"""


def chunk_states(x, key, kept, initial, *, other=None, reverse=False, interpret=None):
    """The state before each chunk and the one after the last; with `reverse`, time runs backward.

        H[c+1] = diag(kept[c]) H[c] + Σ_{j in chunk c} key_j ⊗ x_j

    A long sequence of few heads goes in segments, side by side: what each adds to a state, then the states between the
    segments, then the states between the chunks of each.

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
    batch_size, num_heads, num_slots, width = initial.shape
    programs = batch_size * num_heads * (num_slots // SIZE) * (width // _block(width))
    name = "chunk_states_reverse" if reverse else "chunk_states"
    initial = states_of_segments(name, x, key, kept, initial, programs, reverse=reverse)
    states, last, *dots = _segments(x, key, kept, initial, other=other, reverse=reverse)
    return states, last[:, :, 0 if reverse else -1], *dots


def states_of_segments(name, x, key, kept, initial, programs, reverse=False):
    """The states [B, H, S, M, D] that enter S segments of cdiv(N, S) chunks, the first ones in time first.

    Args:
      name: of the kernel that goes on from there.
      x, key, kept, initial, reverse: as for `chunk_states`.
      programs: blocks that walk through each segment.
    """
    num_chunks = kept.shape[2]
    rule = most_segments(num_chunks, programs)
    options = (2**i for i in range(pl.cdiv(num_chunks, SHORTEST_SEGMENT).bit_length()))
    num_segments = choose(f"{name} segments", (programs, num_chunks, *initial.shape[2:]), rule, options)
    initial = initial[:, :, None]
    if num_segments == 1:
        return initial
    num_segments = pl.cdiv(num_chunks, pl.cdiv(num_chunks, num_segments))  # without empty ones
    segment = pl.cdiv(num_chunks, num_segments)
    padded = jnp.pad(kept, ((0, 0), (0, 0), (0, -num_chunks % segment), (0, 0)), constant_values=1.0)
    by_segment = padded.reshape(*kept.shape[:2], num_segments, segment, kept.shape[3])
    before_others = (*initial.shape[:2], num_segments - 1, *initial.shape[3:])
    zeros = jnp.broadcast_to(jnp.zeros_like(initial), before_others)
    (added,) = _segments(x, key, kept, zeros, reverse=reverse, skip=_forgotten(by_segment, reverse))
    return _between_segments(added, by_segment.prod(axis=3), initial, reverse)


def most_segments(num_chunks, programs):
    """Into how many segments so many chunks go by the rule, 1 if that does not pay, `programs` as above."""
    most = min(pl.cdiv(num_chunks, SHORTEST_SEGMENT), PROGRAMS * multiprocessors() // programs)
    return most if most >= FEWEST_SEGMENTS else 1


def _forgotten(kept, reverse):
    """How many chunks of each segment, the first in time, leave nothing in any slot at its end.

    Args:
      kept: [B, G, S, chunks, M].

    Returns:
      int32 [B, G, S]
    """
    logs = jnp.log(jnp.maximum(kept, jnp.finfo(jnp.float32).tiny))
    left = lax.cumsum(logs, axis=3, reverse=not reverse) - logs
    return jnp.sum(left.max(axis=-1) < decays.STRONGEST, axis=3, dtype=jnp.int32)


def _between_segments(added, kept, initial, reverse):
    """The states [B, H, S, M, D] that enter the segments, from what each but the last one in time adds and all keep.

    In log2(S) steps, each of which doubles the segments that are counted: so few are quickly compiled.
    """
    num_segments = kept.shape[2]

    def later(x, by):
        """x so many segments later in time, zeros where there is none."""
        before, after = (by, num_segments - by - x.shape[2])[:: -1 if reverse else 1]
        config = [(before, after, 0) if axis == 2 else (0, 0, 0) for axis in range(x.ndim)]
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    kept = later(jnp.repeat(kept, added.shape[1] // kept.shape[1], axis=1)[..., None], 1)
    states, counted = later(initial, 0) + later(added, 1), 1
    while counted < num_segments:
        states, kept = states + kept * later(states, counted), kept * later(kept, counted)
        counted *= 2
    return states


def _block(width):
    """Channels of the states that one warpgroup carries."""
    return 128 if width % 128 == 0 else 64


@functools.partial(jax.jit, static_argnames=("reverse", "interpret"))  # equal kernels are lowered and compiled once
def _segments(x, key, kept, initial, *, other=None, reverse=False, skip=None, interpret=None):
    """`chunk_states` of S segments, each from its own initial state [B, H, S, M, D].

    With `skip`, [B, G, S + 1], no states but the last ones, of those segments that another follows in time, and without
    so many of each one's chunks, the first in time.
    """
    only_added = skip is not None
    num_heads, num_slots, width = x.shape[2], key.shape[-1], x.shape[-1]
    batch_size, num_groups, num_chunks, _ = kept.shape
    block, num_segments = _block(width), initial.shape[2]
    segment = pl.cdiv(num_chunks, num_segments + only_added)
    num_blocks = width // block
    optional = [skip, other]
    leaving = 1 if other is None else 2  # copies of a step to memory

    def body(x_ref, key_ref, kept_ref, initial_ref, *refs):
        refs = list(refs)
        skip_refs, other_refs = ([refs.pop(0)] if array is not None else [] for array in optional)
        last_ref, states_refs, dots_refs = refs[0], refs[1:2], refs[2:]
        bh, m, d, s = (lax.axis_index(name) for name in ("bh", "m", "d", "s"))
        b, h = lax.div(bh, num_heads), lax.rem(bh, num_heads)
        g = lax.div(h, num_heads // num_groups)
        in_time = s + (only_added and reverse)
        skipped = sum(ref[b, g, in_time] for ref in skip_refs)
        first = in_time * segment + (0 if reverse else skipped)
        steps = lax.min(num_chunks - first, segment - skipped)
        rows, columns = pl.ds(m * SIZE, SIZE), pl.ds(d * block, block)

        def chunk(step):
            return first + (steps - 1 - step if reverse else step)

        def initial_state(full, arrived):
            plgpu.copy_gmem_to_smem(initial_ref.at[b, h, s, rows, columns], full, arrived)
            plgpu.barrier_wait(arrived)
            state = tiles.load(full)
            plgpu.commit_smem()
            return state

        def all_chunks(state, xs, keys, kepts, outs, others, dots, arrived):
            def request(step, slot):
                n = chunk(step)
                tokens = pl.ds(n * SIZE, SIZE)
                plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, h, columns], xs.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(key_ref.at[b, tokens, h, rows], keys.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(kept_ref.at[b, g, n, rows], kepts.at[slot], arrived.at[slot])
                for ref in other_refs:
                    plgpu.copy_gmem_to_smem(ref.at[b, g, n, rows, columns], others.at[slot], arrived.at[slot])

            def one_chunk(step, state):
                slot, out, n = lax.rem(step, STAGES), lax.rem(step, 2), chunk(step)
                plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)

                @pl.when((step > 0) & (step + STAGES - 1 < steps))
                def _():
                    request(step + STAGES - 1, lax.rem(step + STAGES - 1, STAGES))

                if states_refs:
                    outs[out] = state.astype(outs.dtype)
                plgpu.barrier_wait(arrived.at[slot])
                kept = tiles.along_rows(plgpu.load(kepts.at[slot], layout=ROWS), block)
                if other_refs:
                    dots[out] = (state * tiles.load(others.at[slot])).sum(axis=1)
                plgpu.commit_smem()
                for ref in states_refs:
                    plgpu.copy_smem_to_gmem(outs.at[out], ref.at[b, h, n, rows, columns])
                for ref in dots_refs:
                    plgpu.copy_smem_to_gmem(dots.at[out], ref.at[b, h, n, d, rows])
                state *= kept

                def write(acc):
                    plgpu.wgmma(acc, tiles.transposed(keys.at[slot]), xs.at[slot])
                    plgpu.wgmma_wait(0)

                return pl.run_state(write)(plgpu.ACC.init(state))

            for step in range(STAGES):
                pl.when(step < steps)(functools.partial(request, step, step))
            state = lax.fori_loop(0, steps, one_chunk, state)
            plgpu.wait_smem_to_gmem(0)
            return state

        def last_state(state, full):
            tiles.leave(state, full, last_ref.at[b, h, s, rows, columns])
            plgpu.wait_smem_to_gmem(0)

        # One after another, in the same shared memory.
        full = plgpu.SMEM((SIZE, block), jnp.float32)
        state = pl.run_scoped(initial_state, full, plgpu.Barrier())
        state = pl.run_scoped(
            functools.partial(all_chunks, state),
            plgpu.SMEM((STAGES, SIZE, block), x.dtype),
            plgpu.SMEM((STAGES, *SQUARE), x.dtype),
            plgpu.SMEM((STAGES, SIZE), jnp.float32),
            plgpu.SMEM((2, SIZE, block), x.dtype) if states_refs else None,
            plgpu.SMEM((STAGES, SIZE, block), x.dtype) if other_refs else None,
            plgpu.SMEM((2, SIZE), jnp.float32) if other_refs else None,
            plgpu.Barrier(num_arrivals=3 + len(other_refs), num_barriers=STAGES),
        )
        pl.run_scoped(functools.partial(last_state, state), full)

    outputs = [((batch_size, num_heads, num_segments, num_slots, width), jnp.float32)]
    if not only_added:
        outputs.append(((batch_size, num_heads, num_chunks, num_slots, width), x.dtype))
    if other is not None:
        outputs.append(((batch_size, num_heads, num_chunks, num_blocks, num_slots), jnp.float32))
    last, *others = tiles.kernel(
        "chunk_states" + "_reversed" * reverse,
        body,
        *outputs,
        grid={"bh": batch_size * num_heads, "s": num_segments, "m": num_slots // SIZE, "d": num_blocks},
        interpret=interpret,
    )(x, key, kept, initial, *(array for array in optional if array is not None))
    return (last,) if only_added else (others[0], last, *others[1:])
