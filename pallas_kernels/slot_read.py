"""Gated Slot Attention's read: all chunks side by side, everything between q and out of a chunk on chip."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE

KEY_STAGES, VALUE_TILES = 3, 8
"""in flight of the loops over channels: steps of three tiles, and tiles"""
OUT, WRITE, SCORES, PARTS, REST = range(VALUE_TILES, VALUE_TILES + 5)
"""scratch tiles: the first loop's last one, then those behind the loops'"""


def slot_read(q, k, v, parts, mild, write, keys, values, *, scale, num_slots, residuals=False, interpret=None):
    """out [B, T, H, V] from the states that enter the chunks.

        p_i = softmax(scale · (prod(a[first..i]) ⊙ Kmem q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij))
        o_i = Vmemᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} (Σ_m p_im w_jm D_ijm) v_j

    Args:
      q: [B, T, H, K], two-byte; K and V are multiples of 64.
      k, v: [B, T, G, K], [B, T, G, V].
      parts, mild: [P, B, T, G, 64] and [B, G, N, 1], log decays from `gates.chunk_gates`.
      write: [B, T, G, 64] or None for 1 - exp(log decay).
      keys, values: [B, G, N, 64, K], [B, G, N, 64, V], the states that enter the chunks.
      num_slots: how many slots count; the others are padding.
      residuals: whether to return what the backward pass wants.

    Returns:
      (out,), with `residuals` (out, q·k for j <= i [B, T, H, 64], the scores of v [B, T, H, 64], p [B, T, H, 64],
      prod(a) ⊙ Kmem q [B, T, H, 64]), the second and third by the tokens of the chunk.
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    gates = (decays.level_tiles(dtype), mild, parts) + (() if write is None else (write,))

    def body(chunk, pool, constants, arrived, q_ref, k_ref, v_ref, keys_ref, values_ref, *refs):
        (levels_ref, mild_ref, parts_ref, *write_refs), outputs = refs[: len(gates)], refs[len(gates) :]
        out_ref, *residual_refs = outputs
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        out, written, scores = (pool.at[i] for i in (OUT, WRITE, SCORES))
        parts, rest = [pool.at[PARTS + i] for i in range(num_parts)], pool.at[REST]
        reader = parts[0]  # once the log decays are used up

        def save(index, tile):
            if residual_refs:
                plgpu.copy_smem_to_gmem(tile, residual_refs[index].at[b, tokens, h])

        start_keys, finish_keys = columns.inner_products(
            [
                lambda channels: q_ref.at[b, tokens, h, channels],
                lambda channels: k_ref.at[b, tokens, g, channels],
                lambda channels: keys_ref.at[b, g, n, :, channels],
            ],
            [(0, 1), (0, 2)],
            key_size,
            pool,
            KEY_STAGES,
            arrived["key"],
        )
        start_values, finish_values = columns.add_products(
            [scores, reader],
            [
                lambda channels: v_ref.at[b, tokens, g, channels],
                lambda channels: values_ref.at[b, g, n, :, channels],
            ],
            lambda channels: out_ref.at[b, tokens, h, channels],
            value_size,
            pool,
            (0, VALUE_TILES),
            (OUT, 2),
            arrived["value"],
        )

        for i, part in enumerate(parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g], part, arrived["gates"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g], written, arrived["gates"])
        start_keys()
        mild = mild_ref[b, g, n, 0] > 0
        plgpu.barrier_wait(arrived["gates"])
        levels = decays.Levels(levels_ref, parts, pool, 0 + mild_ref[b, g, n, 0], arrived)
        pairs = decays.Pairs(mild, levels, written, constants, derived=not write_refs, rest=rest)

        qk, logits = finish_keys()
        pl.when(mild)(start_values)
        scores[...] = pairs.causal(qk)
        logits *= pairs.through
        out[...] = logits.astype(dtype)
        plgpu.commit_smem()
        save(0, scores)
        save(3, out)
        logits = decays.LOG2_E * scale * (logits + pairs.sums(scores))
        if num_slots < SIZE:
            _, m = tiles.row_and_column()
            logits = jnp.where(m < num_slots, logits, -1e30)
        p = jnp.exp2(logits - tiles.along_rows(logits.max(axis=1)))
        p *= tiles.along_rows(1 / p.sum(axis=1))
        value_scores = pairs.scores(p)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out[...] = p.astype(dtype)
        scores[...] = pairs.causal(value_scores)
        reader[...] = (p * pairs.through).astype(dtype)
        plgpu.commit_smem()
        pl.when(~mild)(start_values)
        save(2, out)
        save(1, scores)
        finish_values()

    outputs = [((batch_size, length, num_heads, value_size), dtype)]
    if residuals:
        outputs += [((batch_size, length, num_heads, SIZE), dtype)] * 4
    return tiles.chunk_kernel(
        "slot_read",
        body,
        *outputs,
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=REST + 1,
        constants=1,
        arrivals={
            "key": (KEY_STAGES, 3),
            "value": (VALUE_TILES, 1),
            **decays.Levels.ARRIVALS,
            "gates": num_parts + (write is not None),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), q, k, v, keys, values, *gates)
