"""Gated Slot Attention's softmax over slots: the read of the key memory, all chunks side by side."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import decays, slots, tiles
from pallas_kernels.tiles import SIZE


def slot_softmax(source, parts, mild, write, *, scale, num_slots, residuals=False, interpret=None):
    """How the value memory is to be read, from the key memory's states that enter the chunks.

        p_i = softmax(scale · (prod(a[first..i]) ⊙ Kmem q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij))
        S_ij = Σ_m p_im w_jm D_ijm                                                              for j <= i
        o_i = Vmemᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} S_ij v_j                             by `memory_read`

    Args:
      source: of q·k and Kmem q: `slots.multiplied(q, k, states)` or `slots.added(products)`.
      parts, mild: [P, B, T, G, M] and [B, G, N, M / 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, M] or None for 1 - exp(log decay).
      num_slots: how many slots count; the others are padding.
      residuals: whether to return what the backward pass wants, too.

    Returns:
      (prod(a) ⊙ p [B, T, H, M], S [B, T, H, 64] by the tokens of the chunk), with `residuals` also (what rounding took
      from S, q·k for j <= i like S, prod(a) ⊙ Kmem q and p [B, T, H, M] as `tiles.pack_probabilities` has it).
    """

    def rest(chunk, reader_ref, value_scores_ref, *residual_refs):
        here, pairs, scores, leaving = chunk.here, chunk.pairs, chunk.scores, chunk.leaving
        qk, logits = chunk.products
        scores[...] = pairs[0].causal(qk)
        logits = [x * of_block.through for x, of_block in zip(logits, pairs, strict=True)]
        plgpu.commit_smem()
        if residual_refs:
            taken_ref, qk_ref, before_ref, p_ref = residual_refs
            plgpu.copy_smem_to_gmem(scores, qk_ref.at[here])
            for block, x in zip(chunk.blocks, logits, strict=True):
                leaving.save(x, before_ref.at[*here, block.slots])
        logits = [x + of_block.sums(scores) for x, of_block in zip(logits, pairs, strict=True)]
        p = softmax([decays.LOG2_E * scale * x for x in logits], num_slots)
        value_scores = sum(of_block.scores(x) for x, of_block in zip(p, pairs, strict=True))
        value_scores, taken = pairs[0].causal_parts(value_scores)
        leaving.save(value_scores, value_scores_ref.at[here])
        if residual_refs:
            leaving.save(taken, taken_ref.at[here])
        chunk.gates_done()
        for block, x, of_block in zip(chunk.blocks, p, pairs, strict=True):
            leaving.save(x * of_block.through, reader_ref.at[*here, block.slots])
            if residual_refs:
                leaving.save(tiles.pack_probabilities(x, p_ref.dtype), p_ref.at[*here, block.slots])

    padded = parts.shape[-1]
    outputs = [padded, SIZE] + [SIZE, SIZE, padded, padded] * residuals
    return slots.row_read("slot_softmax", rest, source, parts, mild, write, outputs=outputs, interpret=interpret)


def softmax(logits, num_slots):
    """2^x over its sum along rows, for x in blocks of 64 slots, of which the first `num_slots` count; in registers."""
    _, m = tiles.row_and_column()
    counts = [min(num_slots - first, SIZE) for first in range(0, SIZE * len(logits), SIZE)]
    logits = [x if count == SIZE else jnp.where(m < count, x, -1e30) for x, count in zip(logits, counts, strict=True)]
    largest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in logits])
    p = [jnp.exp2(x - tiles.along_rows(largest)) for x in logits]
    total = sum(x.sum(axis=1) for x in p)
    return [x * tiles.along_rows(1 / total) for x in p]
