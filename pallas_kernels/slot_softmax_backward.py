"""Gradient of Gated Slot Attention's softmax over slots and of the value memory's read: all chunks side by side."""

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels import slots, tiles
from pallas_kernels.tiles import SIZE


def slot_softmax_backward(d_out, v, parts, mild, write, values, p, *, scale, interpret=None):
    """How the key memory is to be read for the gradient of the queries; `slot_softmax` says what is what.

        dS_ij = do_i·v_j                                                    for j <= i
        dp_i = prod(a[first..i]) ⊙ Vmem do_i  +  Σ_{j<=i} dS_ij w_j ⊙ D_ij
        ds_i = scale · p_i ⊙ (dp_i - p_i·dp_i)                              (of the logits before they are scaled)
        A_ij = Σ_m ds_im w_jm D_ijm                                         for j <= i
        dq_i = Kmemᵀ (prod(a[first..i]) ⊙ ds_i)  +  Σ_{j<=i} A_ij k_j       by `memory_read`

    Args:
      d_out: [B, T, H, V]; p: [B, T, H, M], packed; v: [B, T, G, V]; values: [B, G, N, M, V], the states that enter the
        chunks; the others as for `slot_softmax`.

    Returns:
      A, what rounding took from it, and dS [B, T, H, 64], by the tokens of the chunk; and [B, T, H, M] each:
      prod(a) ⊙ ds, prod(a) ⊙ p, prod(a) ⊙ Vmem do, ds.
    """

    def rest(chunk, scores_ref, taken_ref, d_scores_ref, key_ref, value_ref, d_before_ref, ds_ref):
        here, pairs, scores, leaving = chunk.here, chunk.pairs, chunk.scores, chunk.leaving
        d_scores, dp = chunk.products
        p = [tiles.load_probabilities(tile) for tile in chunk.beside]
        scores[...] = pairs[0].causal(d_scores)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores, d_scores_ref.at[here])
        for i, block in enumerate(chunk.blocks):
            dp[i] *= pairs[i].through
            leaving.save(dp[i], d_before_ref.at[*here, block.slots])
            dp[i] += pairs[i].sums(scores)
            leaving.save(p[i] * pairs[i].through, value_ref.at[*here, block.slots])
        # p was rounded: divided by its sum, so that a gradient common to all slots cancels.
        mean = sum((x * dx).sum(axis=1) for x, dx in zip(p, dp, strict=True)) / sum(x.sum(axis=1) for x in p)
        ds = [scale * x * (dx - tiles.along_rows(mean)) for x, dx in zip(p, dp, strict=True)]
        key_scores = sum(of_block.scores(dx, exact=True) for dx, of_block in zip(ds, pairs, strict=True))
        for part, ref in zip(pairs[0].causal_parts(key_scores), (scores_ref, taken_ref), strict=True):
            leaving.save(part, ref.at[here])
        chunk.gates_done()
        for block, dx, of_block in zip(chunk.blocks, ds, pairs, strict=True):
            leaving.save(dx * of_block.through, key_ref.at[*here, block.slots])
            leaving.save(dx, ds_ref.at[*here, block.slots])

    num_slots = values.shape[3]
    return slots.row_read(
        "slot_softmax_backward",
        rest,
        slots.multiplied(d_out, v, values),
        *(parts, mild, write),
        outputs=[SIZE] * 3 + [num_slots] * 4,
        beside=p,
        interpret=interpret,
    )
