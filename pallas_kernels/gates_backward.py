"""Gradients of the gates and of the write strength of Gated Slot Attention: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE

SCORES, DY, WORK, D_KEY, WRITE, PARTS = 0, 2, 4, 6, 10, 11
"""scratch tiles: of the reads, of intermediate results, the first with prod(a) ⊙ H x and the gradient of the write key
until they are used, of the write strength, of the log decays"""


def gates_backward(reads, parts, mild, write, d_key, d_kept, *, out_dtype, interpret=None):
    """Gradients of the log decays and of the write strengths, from two reads of states written with the same gates.

    Each read is y_i = prod(a[first..i]) ⊙ H x_i + Σ_{j<=i} A_ij w_j ⊙ D_ij, and dy its gradient. Every factor in it is
    the exponential of a sum of log decays: here the gradients of these sums are formed and added up over time.

    Where gates are mild, a pair pulls at G_i with the very number that it pulls with at -G_j, since both are products
    of the same factors, each of two two-byte parts. So what cancels in the sum over time does so to float32's
    precision; the sum takes two parts as well.

    Args:
      reads: two of (A, for j <= i and by the tokens of the chunk [B, T, H, 64], prod(a) ⊙ H x, dy [B, T, H, M]); dy of
        the second one are probabilities, packed by `tiles.pack_probabilities`.
      parts, mild: [P, B, T, G, M] and [B, G, N, M / 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, M], or None for 1 - exp(log decay), whose gradient then is in that of the log decays.
      d_key: [B, T, H, M], gradient of the write key at its chunk's end.
      d_kept: [B, H, N, M] float32, gradient of the sum of a chunk's log decays through the states between chunks.
      out_dtype: of the gradient of the log decays.

    Returns:
      (gradient of the log decays [B, T, H, M],), with `write` also that of the write strengths, in its dtype.
    """
    batch_size, length, num_heads, num_slots = d_key.shape
    num_blocks = num_slots // SIZE
    num_parts, num_groups = parts.shape[0], parts.shape[3]
    num_outputs, given = decays.num_parts(out_dtype, d_key.dtype), write is not None
    (scores, before, dy), dtype = zip(*reads, strict=True), d_key.dtype
    operands = [*scores, *dy, *before, d_key, decays.level_tiles(dtype), mild, parts, d_kept] + [write] * given

    def body(turn, pool, constants, arrived, kept, *refs):
        per_head, (levels_ref, mild_ref, parts_ref, d_kept_ref, *write_refs) = refs[:7], refs[7 : len(operands)]
        d_log_decay_refs, d_write_refs = refs[len(operands) :][:num_outputs], refs[len(operands) + num_outputs :]
        b, hm, n = turn.chunk
        h, m = lax.div(hm, num_blocks), lax.rem(hm, num_blocks)
        g, tokens, slots = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE), pl.ds(m * SIZE, SIZE)
        parts, written = [pool.at[PARTS + i] for i in range(num_parts)], pool.at[WRITE]
        work, through = [pool.at[WORK + i] for i in range(5)], constants.at[decays.THROUGH]
        levels = decays.Levels(levels_ref, parts, pool, WORK + 1, arrived)
        for i, ref in enumerate(per_head):
            here = (b, tokens, h) if i < 2 else (b, tokens, h, slots)  # scores are by tokens
            plgpu.copy_gmem_to_smem(ref.at[here], pool.at[i], arrived["all"])
        for i, part in enumerate(parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g, slots], part, arrived["all"])
        plgpu.copy_gmem_to_smem(d_kept_ref.at[b, h, n, slots], kept, arrived["all"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g, slots], written, arrived["all"])
        mild = mild_ref[b, g, n, m] > 0
        plgpu.barrier_wait(arrived["all"])

        def reads(r):
            """Tiles of a read's scores and of prod(a) ⊙ H x and dy, and dy in registers."""
            dy = pool.at[DY + r]
            value = lax.cond(r == 0, lambda: tiles.load(dy), lambda: tiles.load_probabilities(dy))
            return pool.at[SCORES + r], (pool.at[WORK + r], dy), value

        def strength():
            return tiles.load(written) if given else decays.write_strength(tiles.load_parts(parts))

        def through_key(d_log_decay, d_write):
            """Adds what comes through the write key, the gates until the chunk's end."""
            d_strength = decays.gates_product(constants.at[decays.AFTER], parts) * tiles.load(pool.at[D_KEY])
            d_log_decay += tiles.sums(constants.at[decays.AFTER], strength() * d_strength, work[:2])
            return d_log_decay, d_write + d_strength

        def by_halving():
            written[...] = strength().astype(dtype)
            since_start = sum(tiles.load(before) * dy for _, (before, _), dy in map(reads, range(2)))
            gradients = through_key(tiles.sums(through, since_start, work[:2]), 0.0)
            return of_pairs_by_halving(reads, levels, written, pool.at[WORK], *gradients)

        d_log_decay, d_write = lax.cond(
            mild,
            lambda: through_key(*of_pairs(reads, strength, parts, through, factors=work[3:], work=work[:2])),
            by_halving,
        )
        d_log_decay += tiles.along_columns(plgpu.load(kept, layout=tiles.COLUMNS))
        if not given:
            d_log_decay -= jnp.exp(tiles.load_parts(parts)) * d_write
        for i, ref in enumerate(d_log_decay_refs):
            tiles.leave(d_log_decay, pool.at[i], ref.at[b, tokens, h, slots])
            d_log_decay -= d_log_decay.astype(dtype).astype(jnp.float32)
        for ref in d_write_refs:
            tiles.leave(d_write, pool.at[WORK], ref.at[b, tokens, h, slots])

    outputs = tiles.chunk_kernel(
        "gates_backward",
        body,
        *[(d_key.shape, dtype)] * (num_outputs + given),
        shape=(batch_size, num_heads * num_blocks, d_kept.shape[2]),
        dtype=dtype,
        tiles=PARTS + num_parts,
        constants=2,
        floats=[(SIZE,)],
        arrivals={"all": 8 + num_parts + given, **decays.Levels.ARRIVALS},
        interpret=interpret,
    )(decays.constant_tiles(dtype), *operands)
    d_log_decay = sum(part.astype(out_dtype) for part in outputs[:num_outputs])
    return d_log_decay, *outputs[num_outputs:]


def of_pairs(reads, strength, parts, through, *, factors, work):
    """Gradients of log decays and write strengths, but for what comes through the write key; for mild gates.

    Overwrites dy and prod(a) ⊙ H x of the reads. Before anything else, as it takes the most registers.
    """

    def cumulative():  # once more rather than in registers
        return decays.window_sum(through, parts)

    tiles.store_parts(strength() * jnp.exp(-cumulative()), factors)

    def one_read(r, carry):
        d_later, d_earlier = carry
        scores, later, dy = reads(r)
        d_later += tiles.load(later[0]) * dy
        tiles.store_parts(dy * jnp.exp(cumulative()), later)
        plgpu.commit_smem()
        d_later += tiles.load_parts(later) * tiles.product(*((scores, part) for part in factors))
        d_earlier += tiles.product(*((tiles.transposed(scores), part) for part in later))
        return d_later, d_earlier

    zeros = jnp.zeros(tiles.SQUARE, jnp.float32)
    d_later, d_earlier = lax.fori_loop(0, 2, one_read, (zeros, zeros))
    plgpu.commit_smem()
    change = d_later - tiles.load_parts(factors) * d_earlier
    return tiles.sums(through, change, work), jnp.exp(-cumulative()) * d_earlier


def of_pairs_by_halving(reads, levels, write, later, d_log_decay, d_write):
    """As `of_pairs`, for any gates."""
    (across, factors), dtype = levels.free, write.dtype

    def one_level(index, factor, carry):
        d_log_decay, d_write = carry

        def written():  # once more rather than in registers
            return jnp.where(decays.in_later_half(index), factor, tiles.load(write) * factor)

        d_later, d_earlier = 0.0, 0.0
        for scores, _, dy in map(reads, range(2)):
            across[...] = levels.at(index, tiles.load(scores, dtype))
            read = 0.0
            for part in range(2):  # one after the other by the same tiles: there are no more
                factors[...] = tiles.two_parts(written(), dtype)[part]
                later[...] = tiles.two_parts(factor * dy, dtype)[part]
                plgpu.commit_smem()
                read += tiles.product((across, factors))
                d_earlier += tiles.product((tiles.transposed(across), later))
                plgpu.commit_smem()
            d_later += dy * read
        # d_later is zero in earlier halves, d_earlier in later ones.
        change = written() * (d_later + d_earlier)
        return d_log_decay + tiles.sums(levels.window(index), change, (across, later)), d_write + factor * d_earlier

    d_log_decay, d_write = levels.fold(one_level, (d_log_decay, d_write))
    for scores, _, dy in map(reads, range(2)):
        d_write += levels.own(tiles.load(scores)) * dy
    return d_log_decay, d_write
