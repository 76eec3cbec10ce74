"""Gradient of Gated Slot Attention's read in the queries, and of its softmax: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE

VALUE_STAGES, KEY_TILES = 3, 8
"""in flight of the loops over channels: steps of three tiles, and tiles"""
OUT, WRITE, SCORES, PARTS, REST = range(KEY_TILES, KEY_TILES + 5)
"""scratch tiles: the first loop's last one, then those behind the loops'"""


def slot_read_backward(d_out, k, v, parts, mild, write, keys, values, p, *, scale, interpret=None):
    """Gradients of one chunk's read, from that of its output; `slot_read` says what is what.

        dA'_ij = do_i·v_j
        dp_i = prod(a[first..i]) ⊙ Vmem do_i  +  Σ_{j<=i} dA'_ij w_j ⊙ D_ij
        ds_i = scale · p_i ⊙ (dp_i - p_i·dp_i)                      (of the logits before they are scaled)
        B_ij = Σ_m ds_im w_jm D_ijm
        dq_i = Kmemᵀ (prod(a[first..i]) ⊙ ds_i)  +  Σ_{j<=i} B_ij k_j

    Args:
      d_out: [B, T, H, V]; p: [B, T, H, 64]; the others as for `slot_read`.

    Returns:
      dq [B, T, H, K], and [B, T, H, 64] each: dA' for j <= i, prod(a) ⊙ Vmem do, ds, B, prod(a) ⊙ ds, prod(a) ⊙ p.
    """
    batch_size, length, num_heads, value_size = d_out.shape
    num_groups, key_size = k.shape[2:]
    num_parts, dtype = parts.shape[0], k.dtype
    gates = (decays.level_tiles(dtype), mild, parts) + (() if write is None else (write,))

    def body(chunk, pool, constants, arrived, d_out_ref, k_ref, v_ref, keys_ref, values_ref, p_ref, *refs):
        (levels_ref, mild_ref, parts_ref, *write_refs), outputs = refs[: len(gates)], refs[len(gates) :]
        dq_ref, d_scores_ref, d_before_ref, ds_ref, b_ref, key_ref, value_ref = outputs
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        out, written, scores = (pool.at[i] for i in (OUT, WRITE, SCORES))
        parts, rest = [pool.at[PARTS + i] for i in range(num_parts)], pool.at[REST]
        reader = parts[0]  # once the log decays are used up

        def save(ref, x, tile=out):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, ref.at[b, tokens, h])

        start_values, finish_values = columns.inner_products(
            [
                lambda channels: d_out_ref.at[b, tokens, h, channels],
                lambda channels: v_ref.at[b, tokens, g, channels],
                lambda channels: values_ref.at[b, g, n, :, channels],
            ],
            [(0, 1), (0, 2)],
            value_size,
            pool,
            VALUE_STAGES,
            arrived["value"],
        )
        start_keys, finish_keys = columns.add_products(
            [scores, reader],
            [
                lambda channels: k_ref.at[b, tokens, g, channels],
                lambda channels: keys_ref.at[b, g, n, :, channels],
            ],
            lambda channels: dq_ref.at[b, tokens, h, channels],
            key_size,
            pool,
            (0, KEY_TILES),
            (OUT, 2),
            arrived["key"],
        )

        for i, part in enumerate(parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g], part, arrived["gates"])
        plgpu.copy_gmem_to_smem(p_ref.at[b, tokens, h], scores, arrived["gates"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g], written, arrived["gates"])
        start_values()
        mild = mild_ref[b, g, n, 0] > 0
        plgpu.barrier_wait(arrived["gates"])
        p = tiles.load(scores)
        levels = decays.Levels(levels_ref, parts, pool, 0 + mild_ref[b, g, n, 0], arrived)
        pairs = decays.Pairs(mild, levels, written, constants, derived=not write_refs, rest=rest)

        d_scores, dp = finish_values()
        pl.when(mild)(start_keys)
        save(d_scores_ref, pairs.causal(d_scores), scores)
        dp *= pairs.through
        save(d_before_ref, dp)
        dp += pairs.sums(scores)
        save(value_ref, p * pairs.through)
        # p was rounded: divided by its sum, so that a gradient common to all slots cancels.
        ds = scale * p * (dp - tiles.along_rows((p * dp).sum(axis=1) / p.sum(axis=1)))
        save(ds_ref, ds)
        save(b_ref, pairs.causal(pairs.scores(ds)), scores)
        save(key_ref, ds * pairs.through, reader)
        pl.when(~mild)(start_keys)
        finish_keys()

    per_token = (batch_size, length, num_heads, SIZE)
    return tiles.chunk_kernel(
        "slot_read_backward",
        body,
        ((batch_size, length, num_heads, key_size), dtype),
        *[(per_token, dtype)] * 6,
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=REST + 1,
        constants=1,
        arrivals={
            "value": (VALUE_STAGES, 3),
            "key": (KEY_TILES, 1),
            **decays.Levels.ARRIVALS,
            "gates": num_parts + 1 + (write is not None),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), d_out, k, v, keys, values, p, *gates)
