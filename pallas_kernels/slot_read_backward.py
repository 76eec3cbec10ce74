"""Gradient of Gated Slot Attention's read in the queries, and of its softmax: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

VALUE_STAGES, KEY_STAGES = 2, 3
"""steps of the loops over channels that are in flight, of three and of two tiles each"""
OUT, P, PARTS = range(decays.LEVELS, decays.LEVELS + 3)
"""scratch tiles behind the six of the loops, which are also those of the factors of the levels"""


def slot_read_backward(d_out, k, v, parts, write, keys, values, p, *, scale, interpret=None):
    """Gradients of one chunk's read, from that of its output; `slot_read` says what is what.

        dA'_ij = do_i·v_j
        dp_i = prod(a[first..i]) ⊙ Vmem do_i  +  Σ_{j<=i} dA'_ij w_j ⊙ D_ij
        ds_i = scale · p_i ⊙ (dp_i - p_i·dp_i)                      (of the logits before they are scaled)
        B_ij = Σ_m ds_im w_jm D_ijm
        dq_i = Kmemᵀ (prod(a[first..i]) ⊙ ds_i)  +  Σ_{j<=i} B_ij k_j

    Args:
      d_out: [B, T, H, V]; p: [B, T, H, 64]; the others as for `slot_read`.

    Returns:
      dq [B, T, H, K], and [B, T, H, 64] each: dA', prod(a) ⊙ Vmem do, ds, B, prod(a) ⊙ ds, prod(a) ⊙ p.
    """
    batch_size, length, num_heads, value_size = d_out.shape
    num_groups, key_size = k.shape[2:]
    num_parts, dtype = parts.shape[0], k.dtype
    key_steps, value_steps = key_size // SIZE, value_size // SIZE
    WRITE = PARTS + (1 if write is None else num_parts)  # a derived one comes when the log decays are used up
    operands = (d_out, k, v, keys, values, parts, p) + (() if write is None else (write,))

    def body(chunk, pool, constants, arrived, d_out_ref, k_ref, v_ref, keys_ref, values_ref, parts_ref, p_ref, *refs):
        write_refs, outputs = refs[: len(operands) - 7], refs[len(operands) - 7 :]
        dq_ref, d_scores_ref, d_before_ref, ds_ref, b_ref, key_ref, value_ref = outputs
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        parts = [pool.at[PARTS + i] for i in range(num_parts)]

        def request_value(step):
            if step < value_steps:
                columns, slot = pl.ds(step * SIZE, SIZE), step % VALUE_STAGES
                barrier = arrived[f"value{slot}"]
                plgpu.copy_gmem_to_smem(d_out_ref.at[b, tokens, h, columns], pool.at[3 * slot], barrier)
                plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, g, columns], pool.at[3 * slot + 1], barrier)
                plgpu.copy_gmem_to_smem(values_ref.at[b, g, n, :, columns], pool.at[3 * slot + 2], barrier)

        def request_key(step):
            if step < key_steps:
                columns, slot = pl.ds(step * SIZE, SIZE), step % KEY_STAGES
                barrier = arrived[f"key{slot}"]
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, columns], pool.at[2 * slot], barrier)
                plgpu.copy_gmem_to_smem(keys_ref.at[b, g, n, :, columns], pool.at[2 * slot + 1], barrier)

        def save(ref, x):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pool[OUT] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(pool.at[OUT], ref.at[b, tokens, h])

        for step in range(VALUE_STAGES):
            request_value(step)
        for i in range(num_parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g], parts[i], arrived["gates"])
        plgpu.copy_gmem_to_smem(p_ref.at[b, tokens, h], pool.at[P], arrived["gates"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g], pool.at[WRITE], arrived["gates"])

        def read_values(d_scores, d_before):
            for step in range(value_steps):
                slot = step % VALUE_STAGES
                plgpu.barrier_wait(arrived[f"value{slot}"])
                plgpu.wgmma(d_scores, pool.at[3 * slot], tiles.transposed(pool.at[3 * slot + 1]))
                plgpu.wgmma(d_before, pool.at[3 * slot], tiles.transposed(pool.at[3 * slot + 2]))
                plgpu.wgmma_wait(0)
                request_value(step + VALUE_STAGES)
            return d_scores[...], d_before[...]

        accumulator = plgpu.ACC(SQUARE, jnp.float32)
        d_scores, d_before = pl.run_scoped(read_values, accumulator, accumulator)
        plgpu.barrier_wait(arrived["gates"])
        save(d_scores_ref, d_scores)
        own, d_scores = decays.own(d_scores), d_scores.astype(dtype)
        strength = tiles.load(pool.at[WRITE]) if write_refs else decays.write_strength(decays.log_decay(parts))
        decays.store_factors(pool, constants, parts, strength)
        through = decays.gates_product(constants.at[decays.THROUGH], parts)
        dp = d_before * through
        save(d_before_ref, dp)
        save(value_ref, tiles.load(pool.at[P]) * through)
        # The parts of the log decays are not needed any more.
        pool[PARTS], pool[WRITE] = through.astype(dtype), strength.astype(dtype)
        plgpu.commit_smem()
        dp = decays.sums(own, d_scores, pool, constants, tiles.load(pool.at[WRITE]), dp)
        p = tiles.load(pool.at[P])
        ds = scale * p * (dp - tiles.along_rows((p * dp).sum(axis=1)))
        save(ds_ref, ds)
        b_scores = decays.scores(ds, pool, constants, tiles.load(pool.at[WRITE]))
        save(b_ref, b_scores)
        ds *= tiles.load(pool.at[PARTS])
        save(key_ref, ds)
        ds = ds.astype(dtype)

        plgpu.commit_smem()
        for step in range(KEY_STAGES):
            request_key(step)
        for step in range(key_steps):
            slot, dq = step % KEY_STAGES, pool.at[(WRITE, OUT)[step % 2]]
            plgpu.barrier_wait(arrived[f"key{slot}"])
            result = tiles.product((b_scores, pool.at[2 * slot]), (ds, pool.at[2 * slot + 1]))
            request_key(step + KEY_STAGES)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            dq[...] = result.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq, dq_ref.at[b, tokens, h, pl.ds(step * SIZE, SIZE)])

    per_token = (batch_size, length, num_heads, SIZE)
    return tiles.chunk_kernel(
        "slot_read_backward",
        body,
        ((batch_size, length, num_heads, key_size), dtype),
        *[(per_token, dtype)] * 6,
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=WRITE + 1,
        constants=decays.THROUGH + 1,
        arrivals={
            **{f"value{slot}": 3 for slot in range(VALUE_STAGES)},
            **{f"key{slot}": 2 for slot in range(KEY_STAGES)},
            "gates": num_parts + 1 + (write is not None),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), *operands)
