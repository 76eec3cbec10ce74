"""Gradient of Gated Slot Attention's read in the queries, and of its softmax: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels import columns, decays, slots, tiles
from pallas_kernels.tiles import SIZE


def slot_read_backward(d_out, k, v, parts, mild, write, keys, values, p, *, scale, interpret=None):
    """Gradients of one chunk's read, from that of its output; `slot_read` says what is what.

        dA'_ij = do_i·v_j
        dp_i = prod(a[first..i]) ⊙ Vmem do_i  +  Σ_{j<=i} dA'_ij w_j ⊙ D_ij
        ds_i = scale · p_i ⊙ (dp_i - p_i·dp_i)                      (of the logits before they are scaled)
        B_ij = Σ_m ds_im w_jm D_ijm
        dq_i = Kmemᵀ (prod(a[first..i]) ⊙ ds_i)  +  Σ_{j<=i} B_ij k_j

    Args:
      d_out: [B, T, H, V]; p: [B, T, H, M]; the others as for `slot_read`.

    Returns:
      dq [B, T, H, K]; dA' for j <= i and B [B, T, H, 64], by the tokens of the chunk; and [B, T, H, M] each:
      prod(a) ⊙ Vmem do, ds, prod(a) ⊙ ds, prod(a) ⊙ p.
    """
    batch_size, length, num_heads, value_size = d_out.shape
    num_groups, key_size = k.shape[2:]
    num_parts, dtype = parts.shape[0], k.dtype
    gates = (decays.level_tiles(dtype), mild, parts) + (() if write is None else (write,))
    num_slots = keys.shape[3]
    scratch = slots.scratch(num_slots)
    blocks = [block.slots for block in scratch.blocks]

    def body(chunk, pool, constants, arrived, d_out_ref, k_ref, v_ref, keys_ref, values_ref, p_ref, *refs):
        (levels_ref, mild_ref, parts_ref, *write_refs), outputs = refs[: len(gates)], refs[len(gates) :]
        dq_ref, d_scores_ref, b_ref, d_before_ref, ds_ref, key_ref, value_ref = outputs
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        out, scores = pool.at[scratch.out], pool.at[scratch.scores]
        readers = [pool.at[block.parts] for block in scratch.blocks]  # once the log decays are used up

        def save(ref, x, tile, *block):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, ref.at[b, tokens, h, *block])

        def rows_of(ref):
            return lambda block: lambda channels: ref.at[b, g, n, block, channels]

        start_values, finish_values = columns.inner_products(
            [
                lambda channels: d_out_ref.at[b, tokens, h, channels],
                lambda channels: v_ref.at[b, tokens, g, channels],
                *map(rows_of(values_ref), blocks),
            ],
            [(0, 1 + i) for i in range(1 + len(blocks))],
            value_size,
            pool,
            slots.STAGES,
            arrived["value"],
        )
        start_keys, finish_keys = columns.add_products(
            [scores, *readers],
            [lambda channels: k_ref.at[b, tokens, g, channels], *map(rows_of(keys_ref), blocks)],
            lambda channels: dq_ref.at[b, tokens, h, channels],
            key_size,
            pool,
            (0, scratch.ring),
            (scratch.out, 2),
            arrived["key"],
        )

        slots.request_gates(scratch, pool, parts_ref, write_refs, (b, tokens, g), arrived)
        for block in scratch.blocks:
            plgpu.copy_gmem_to_smem(p_ref.at[b, tokens, h, block.slots], pool.at[block.p], arrived["gates"])
        start_values()
        pairs = slots.pairs(
            scratch, pool, num_parts, levels_ref, mild_ref, (b, g, n), constants, arrived, derived=not write_refs
        )
        p = [tiles.load(pool.at[block.p]) for block in scratch.blocks]

        d_scores, *dp = finish_values()
        pl.when(pairs[0].mild)(start_keys)
        save(d_scores_ref, pairs[0].causal(d_scores), scores)
        for i, block in enumerate(blocks):
            dp[i] *= pairs[i].through
            save(d_before_ref, dp[i], out, block)
            dp[i] += pairs[i].sums(scores)
            save(value_ref, p[i] * pairs[i].through, out, block)
        # p was rounded: divided by its sum, so that a gradient common to all slots cancels.
        mean = sum((x * dx).sum(axis=1) for x, dx in zip(p, dp, strict=True)) / sum(x.sum(axis=1) for x in p)
        ds = [scale * x * (dx - tiles.along_rows(mean)) for x, dx in zip(p, dp, strict=True)]
        for block, dx in zip(blocks, ds, strict=True):
            save(ds_ref, dx, out, block)
        b_scores = sum(of_block.scores(dx) for dx, of_block in zip(ds, pairs, strict=True))
        save(b_ref, pairs[0].causal(b_scores), scores)
        for block, reader, dx, of_block in zip(blocks, readers, ds, pairs, strict=True):
            save(key_ref, dx * of_block.through, reader, block)
        pl.when(~pairs[0].mild)(start_keys)
        finish_keys()

    per_token = batch_size, length, num_heads
    return tiles.chunk_kernel(
        "slot_read_backward",
        body,
        *[((*per_token, size), dtype) for size in (key_size, SIZE, SIZE, *[num_slots] * 4)],
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=scratch.total,
        constants=1,
        arrivals={
            "value": (slots.STAGES, 2 + len(blocks)),
            "key": (scratch.ring, 1),
            **decays.Levels.ARRIVALS,
            "gates": len(blocks) * (num_parts + 1 + (write is not None)),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), d_out, k, v, keys, values, p, *gates)
