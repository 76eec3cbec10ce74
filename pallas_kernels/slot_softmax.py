"""Gated Slot Attention's softmax over slots: the read of the key memory, all chunks side by side."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, slots, tiles
from pallas_kernels.tiles import SIZE


def slot_softmax(q, k, parts, mild, write, keys, *, scale, num_slots, residuals=False, interpret=None):
    """How the value memory is to be read, from the key memory's states that enter the chunks.

        p_i = softmax(scale · (prod(a[first..i]) ⊙ Kmem q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij))
        S_ij = Σ_m p_im w_jm D_ijm                                                              for j <= i
        o_i = Vmemᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} S_ij v_j                             by `memory_read`

    Args:
      q: [B, T, H, K], two-byte; K is a multiple of 64.
      k: [B, T, G, K].
      parts, mild: [P, B, T, G, M] and [B, G, N, M / 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, M] or None for 1 - exp(log decay).
      keys: [B, G, N, M, K], the states that enter the chunks; M is a multiple of 64.
      num_slots: how many slots count; the others are padding.
      residuals: whether to return what the backward pass wants, too.

    Returns:
      (S [B, T, H, 64] by the tokens of the chunk, prod(a) ⊙ p [B, T, H, M]), with `residuals` also (q·k for j <= i like
      S, prod(a) ⊙ Kmem q and p [B, T, H, M]).
    """
    batch_size, length, num_heads, key_size = q.shape
    per_head = num_heads // k.shape[2]
    num_parts, dtype = parts.shape[0], q.dtype
    padded_slots = keys.shape[3]
    scratch = slots.scratch(padded_slots)
    blocks = [block.slots for block in scratch.blocks]

    def body(turn, pool, constants, arrived, q_ref, k_ref, keys_ref, levels_ref, mild_ref, parts_ref, *refs):
        write_refs, refs = refs[: write is not None], refs[write is not None :]
        value_scores_ref, reader_ref, *residual_refs = refs
        b, h, n = turn.chunk
        here = b, pl.ds(n * SIZE, SIZE), h
        scores, leaving = pool.at[scratch.scores], slots.Leaving(scratch, pool)

        def products(chunk):
            b, h, n = chunk
            g, tokens = lax.div(h, per_head), pl.ds(n * SIZE, SIZE)
            arrays = [
                lambda channels: q_ref.at[b, tokens, h, channels],
                lambda channels: k_ref.at[b, tokens, g, channels],
                *(lambda channels, block=block: keys_ref.at[b, g, n, block, channels] for block in blocks),
            ]
            pairs = [(0, 1 + i) for i in range(1 + len(blocks))]
            return columns.inner_products(arrays, pairs, key_size, pool, slots.STAGES, arrived["step"])

        def request_gates(chunk):
            b, h, n = chunk
            group = b, pl.ds(n * SIZE, SIZE), lax.div(h, per_head)
            slots.request_gates(scratch, pool, parts_ref, write_refs, group, arrived)

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

        qk, *logits = finish()
        pl.when(mild & ~turn.is_last)(lambda: start_following(**early))
        scores[...] = pairs[0].causal(qk)
        logits = [x * of_block.through for x, of_block in zip(logits, pairs, strict=True)]
        plgpu.commit_smem()
        if residual_refs:
            qk_ref, before_ref, p_ref = residual_refs
            plgpu.copy_smem_to_gmem(scores, qk_ref.at[here])
            for block, x in zip(blocks, logits, strict=True):
                leaving.save(x, before_ref.at[*here, block])
        logits = [x + of_block.sums(scores) for x, of_block in zip(logits, pairs, strict=True)]
        p = softmax([decays.LOG2_E * scale * x for x in logits], num_slots)
        value_scores = sum(of_block.scores(x) for x, of_block in zip(p, pairs, strict=True))
        leaving.save(pairs[0].causal(value_scores), value_scores_ref.at[here])

        @pl.when(~turn.is_last)
        def _():
            request_gates(turn.following)
            pl.when(~mild)(lambda: start_following(**early))

        for block, x, of_block in zip(blocks, p, pairs, strict=True):
            leaving.save(x * of_block.through, reader_ref.at[*here, block])
            if residual_refs:
                leaving.save(x, p_ref.at[*here, block])

    sizes = [SIZE, padded_slots] + [SIZE, padded_slots, padded_slots] * residuals
    return tiles.chunk_kernel(
        "slot_softmax",
        body,
        *[((batch_size, length, num_heads, size), dtype) for size in sizes],
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=scratch.total,
        constants=1,
        arrivals={
            "step": (slots.STAGES, 2 + len(blocks)),
            **decays.Levels.ARRIVALS,
            "gates": len(blocks) * (num_parts + (write is not None)),
        },
        interpret=interpret,
    )(
        decays.constant_tiles(dtype),
        *(q, k, keys, decays.level_tiles(dtype), mild, parts),
        *(() if write is None else (write,)),
    )


def softmax(logits, num_slots):
    """2^x over its sum along rows, for x in blocks of 64 slots, of which the first `num_slots` count; in registers."""
    _, m = tiles.row_and_column()
    counts = [min(num_slots - first, SIZE) for first in range(0, SIZE * len(logits), SIZE)]
    logits = [x if count == SIZE else jnp.where(m < count, x, -1e30) for x, count in zip(logits, counts, strict=True)]
    largest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in logits])
    p = [jnp.exp2(x - tiles.along_rows(largest)) for x in logits]
    total = sum(x.sum(axis=1) for x in p)
    return [x * tiles.along_rows(1 / total) for x in p]
