"""Gradient of Gated Slot Attention's softmax over slots and of the value memory's read: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels import columns, decays, slots, tiles
from pallas_kernels.tiles import SIZE


def slot_softmax_backward(d_out, v, parts, mild, write, values, p, *, scale, interpret=None):
    """How the key memory is to be read for the gradient of the queries; `slot_softmax` says what is what.

        dS_ij = do_i·v_j                                                    for j <= i
        dp_i = prod(a[first..i]) ⊙ Vmem do_i  +  Σ_{j<=i} dS_ij w_j ⊙ D_ij
        ds_i = scale · p_i ⊙ (dp_i - p_i·dp_i)                              (of the logits before they are scaled)
        A_ij = Σ_m ds_im w_jm D_ijm                                         for j <= i
        dq_i = Kmemᵀ (prod(a[first..i]) ⊙ ds_i)  +  Σ_{j<=i} A_ij k_j       by `memory_read`

    Args:
      d_out: [B, T, H, V]; p: [B, T, H, M]; v: [B, T, G, V]; values: [B, G, N, M, V], the states that enter the chunks;
        the others as for `slot_softmax`.

    Returns:
      A and dS [B, T, H, 64], by the tokens of the chunk; and [B, T, H, M] each: prod(a) ⊙ ds, prod(a) ⊙ p,
      prod(a) ⊙ Vmem do, ds.
    """
    batch_size, length, num_heads, value_size = d_out.shape
    per_head = num_heads // v.shape[2]
    num_parts, dtype = parts.shape[0], v.dtype
    num_slots = values.shape[3]
    scratch = slots.scratch(num_slots)
    blocks = [block.slots for block in scratch.blocks]

    def body(turn, pool, constants, arrived, d_out_ref, v_ref, values_ref, p_ref, levels_ref, mild_ref, *refs):
        (parts_ref, *write_refs), refs = refs[: 1 + (write is not None)], refs[1 + (write is not None) :]
        scores_ref, d_scores_ref, key_ref, value_ref, d_before_ref, ds_ref = refs
        b, h, n = turn.chunk
        here = b, pl.ds(n * SIZE, SIZE), h
        scores, leaving = pool.at[scratch.scores], slots.Leaving(scratch, pool)

        def products(chunk):
            b, h, n = chunk
            g, tokens = lax.div(h, per_head), pl.ds(n * SIZE, SIZE)
            arrays = [
                lambda channels: d_out_ref.at[b, tokens, h, channels],
                lambda channels: v_ref.at[b, tokens, g, channels],
                *(lambda channels, block=block: values_ref.at[b, g, n, block, channels] for block in blocks),
            ]
            pairs = [(0, 1 + i) for i in range(1 + len(blocks))]
            return columns.inner_products(arrays, pairs, value_size, pool, slots.STAGES, arrived["step"])

        def request_gates(chunk):
            b, h, n = chunk
            tokens = pl.ds(n * SIZE, SIZE)
            slots.request_gates(scratch, pool, parts_ref, write_refs, (b, tokens, lax.div(h, per_head)), arrived)
            for block in scratch.blocks:
                plgpu.copy_gmem_to_smem(p_ref.at[b, tokens, h, block.slots], pool.at[block.p], arrived["gates"])

        start, finish = products(turn.chunk)
        start_following, _ = products(turn.following)
        early = {"last": slots.STAGES - 1}

        @pl.when(turn.step == 0)
        def _():
            request_gates(turn.chunk)
            start(**early)

        start(first=slots.STAGES - 1)
        chunk = b, lax.div(h, per_head), n
        pairs = slots.pairs(
            scratch, pool, num_parts, levels_ref, mild_ref, chunk, constants, arrived, derived=not write_refs
        )
        mild = pairs[0].mild

        d_scores, *dp = finish()
        p = [tiles.load(pool.at[block.p]) for block in scratch.blocks]
        pl.when(mild & ~turn.is_last)(lambda: start_following(**early))
        scores[...] = pairs[0].causal(d_scores)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores, d_scores_ref.at[here])
        for i, block in enumerate(blocks):
            dp[i] *= pairs[i].through
            leaving.save(dp[i], d_before_ref.at[*here, block])
            dp[i] += pairs[i].sums(scores)
            leaving.save(p[i] * pairs[i].through, value_ref.at[*here, block])
        # p was rounded: divided by its sum, so that a gradient common to all slots cancels.
        mean = sum((x * dx).sum(axis=1) for x, dx in zip(p, dp, strict=True)) / sum(x.sum(axis=1) for x in p)
        ds = [scale * x * (dx - tiles.along_rows(mean)) for x, dx in zip(p, dp, strict=True)]
        key_scores = sum(of_block.scores(dx) for dx, of_block in zip(ds, pairs, strict=True))
        leaving.save(pairs[0].causal(key_scores), scores_ref.at[here])

        @pl.when(~turn.is_last)
        def _():
            request_gates(turn.following)
            pl.when(~mild)(lambda: start_following(**early))

        for block, dx, of_block in zip(blocks, ds, pairs, strict=True):
            leaving.save(dx * of_block.through, key_ref.at[*here, block])
            leaving.save(dx, ds_ref.at[*here, block])

    return tiles.chunk_kernel(
        "slot_softmax_backward",
        body,
        *[((batch_size, length, num_heads, size), dtype) for size in (SIZE, SIZE, *[num_slots] * 4)],
        shape=(batch_size, num_heads, values.shape[2]),
        dtype=dtype,
        tiles=scratch.total,
        constants=1,
        arrivals={
            "step": (slots.STAGES, 2 + len(blocks)),
            **decays.Levels.ARRIVALS,
            "gates": len(blocks) * (num_parts + 1 + (write is not None)),
        },
        interpret=interpret,
    )(
        decays.constant_tiles(dtype),
        *(d_out, v, values, p, decays.level_tiles(dtype), mild, parts),
        *(() if write is None else (write,)),
    )
