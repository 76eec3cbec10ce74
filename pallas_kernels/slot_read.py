"""Gated Slot Attention's read: all chunks side by side, everything between q and out of a chunk on chip."""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, slots, tiles
from pallas_kernels.tiles import SIZE


def slot_read(q, k, v, parts, mild, write, keys, values, *, scale, num_slots, residuals=False, interpret=None):
    """out [B, T, H, V] from the states that enter the chunks.

        p_i = softmax(scale · (prod(a[first..i]) ⊙ Kmem q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij))
        o_i = Vmemᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} (Σ_m p_im w_jm D_ijm) v_j

    Args:
      q: [B, T, H, K], two-byte; K and V are multiples of 64.
      k, v: [B, T, G, K], [B, T, G, V].
      parts, mild: [P, B, T, G, M] and [B, G, N, M / 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, M] or None for 1 - exp(log decay).
      keys, values: [B, G, N, M, K], [B, G, N, M, V], the states that enter the chunks; M is a multiple of 64.
      num_slots: how many slots count; the others are padding.
      residuals: whether to return what the backward pass wants.

    Returns:
      (out,), with `residuals` (out, q·k for j <= i [B, T, H, 64], the scores of v [B, T, H, 64], p [B, T, H, M],
      prod(a) ⊙ Kmem q [B, T, H, M]), the second and third by the tokens of the chunk.
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    gates = (decays.level_tiles(dtype), mild, parts) + (() if write is None else (write,))
    padded_slots = keys.shape[3]
    scratch = slots.scratch(padded_slots)
    blocks = [block.slots for block in scratch.blocks]

    def body(chunk, pool, constants, arrived, q_ref, k_ref, v_ref, keys_ref, values_ref, *refs):
        (levels_ref, mild_ref, parts_ref, *write_refs), outputs = refs[: len(gates)], refs[len(gates) :]
        out_ref, *residual_refs = outputs
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        out, scores = pool.at[scratch.out], pool.at[scratch.scores]
        readers = [pool.at[block.parts] for block in scratch.blocks]  # once the log decays are used up

        def save(index, tile, *block):
            if residual_refs:
                plgpu.copy_smem_to_gmem(tile, residual_refs[index].at[b, tokens, h, *block])

        def save_blocks(index, xs):
            """Leaves the first block in `out`, to be committed and saved."""
            for block, x in reversed(list(zip(blocks, xs, strict=True))):
                out[...] = x.astype(dtype)
                if residual_refs and block is not blocks[0]:
                    plgpu.commit_smem()
                    save(index, out, block)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def rows_of(ref):
            return lambda block: lambda channels: ref.at[b, g, n, block, channels]

        start_keys, finish_keys = columns.inner_products(
            [
                lambda channels: q_ref.at[b, tokens, h, channels],
                lambda channels: k_ref.at[b, tokens, g, channels],
                *map(rows_of(keys_ref), blocks),
            ],
            [(0, 1 + i) for i in range(1 + len(blocks))],
            key_size,
            pool,
            slots.STAGES,
            arrived["key"],
        )
        start_values, finish_values = columns.add_products(
            [scores, *readers],
            [lambda channels: v_ref.at[b, tokens, g, channels], *map(rows_of(values_ref), blocks)],
            lambda channels: out_ref.at[b, tokens, h, channels],
            value_size,
            pool,
            (0, scratch.ring),
            (scratch.out, 2),
            arrived["value"],
        )

        slots.request_gates(scratch, pool, parts_ref, write_refs, (b, tokens, g), arrived)
        start_keys()
        pairs = slots.pairs(
            scratch, pool, num_parts, levels_ref, mild_ref, (b, g, n), constants, arrived, derived=not write_refs
        )

        qk, *logits = finish_keys()
        pl.when(pairs[0].mild)(start_values)
        scores[...] = pairs[0].causal(qk)
        logits = [x * of_block.through for x, of_block in zip(logits, pairs, strict=True)]
        save_blocks(3, logits)
        plgpu.commit_smem()
        save(0, scores)
        save(3, out, blocks[0])
        logits = [x + of_block.sums(scores) for x, of_block in zip(logits, pairs, strict=True)]
        p = softmax([decays.LOG2_E * scale * x for x in logits], num_slots)
        value_scores = sum(of_block.scores(x) for x, of_block in zip(p, pairs, strict=True))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        save_blocks(2, p)
        scores[...] = pairs[0].causal(value_scores)
        for reader, x, of_block in zip(readers, p, pairs, strict=True):
            reader[...] = (x * of_block.through).astype(dtype)
        plgpu.commit_smem()
        pl.when(~pairs[0].mild)(start_values)
        save(2, out, blocks[0])
        save(1, scores)
        finish_values()

    outputs = [((batch_size, length, num_heads, value_size), dtype)]
    if residuals:
        sizes = SIZE, SIZE, padded_slots, padded_slots
        outputs += [((batch_size, length, num_heads, size), dtype) for size in sizes]
    return tiles.chunk_kernel(
        "slot_read",
        body,
        *outputs,
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=scratch.total,
        constants=1,
        arrivals={
            "key": (slots.STAGES, 2 + len(blocks)),
            "value": (scratch.ring, 1),
            **decays.Levels.ARRIVALS,
            "gates": len(blocks) * (num_parts + (write is not None)),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), q, k, v, keys, values, *gates)


def softmax(logits, num_slots):
    """2^x over its sum along rows, for x in blocks of 64 slots, of which the first `num_slots` count; in registers."""
    _, m = tiles.row_and_column()
    counts = [min(num_slots - first, SIZE) for first in range(0, SIZE * len(logits), SIZE)]
    logits = [x if count == SIZE else jnp.where(m < count, x, -1e30) for x, count in zip(logits, counts, strict=True)]
    largest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in logits])
    p = [jnp.exp2(x - tiles.along_rows(largest)) for x in logits]
    total = sum(x.sum(axis=1) for x in p)
    return [x * tiles.along_rows(1 / total) for x in p]
