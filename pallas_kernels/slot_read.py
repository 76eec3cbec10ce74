"""Gated Slot Attention's read: all chunks side by side, everything between q and out of a chunk on chip."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

KEY_STAGES, VALUE_STAGES = 2, 3
"""steps of the loops over channels that are in flight, of three and of two tiles each"""
OUT, WRITE, PARTS = decays.LEVELS, decays.LEVELS + 1, decays.LEVELS + 2
"""scratch tiles behind the six of the loops, which are also those of the factors of the levels"""


def slot_read(q, k, v, parts, write, keys, values, *, scale, num_slots, residuals=False, interpret=None):
    """out [B, T, H, V] from the states that enter the chunks.

        p_i = softmax(scale · (prod(a[first..i]) ⊙ Kmem q_i  +  Σ_{j<=i} (q_i·k_j) w_j ⊙ D_ij))
        o_i = Vmemᵀ (prod(a[first..i]) ⊙ p_i)  +  Σ_{j<=i} (Σ_m p_im w_jm D_ijm) v_j

    Args:
      q: [B, T, H, K], two-byte; K and V are multiples of 64.
      k, v: [B, T, G, K], [B, T, G, V].
      parts: [P, B, T, G, 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, 64] or None for 1 - exp(log decay).
      keys, values: [B, G, N, 64, K], [B, G, N, 64, V], the states that enter the chunks.
      num_slots: how many slots count; the others are padding.
      residuals: whether to return what the backward pass wants.

    Returns:
      (out,), with `residuals` (out, q·k [B, T, H, 64], the scores of v [B, T, H, 64], p [B, T, H, 64],
      prod(a) ⊙ Kmem q [B, T, H, 64]), the second and third by the tokens of the chunk.
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    key_steps, value_steps = key_size // SIZE, value_size // SIZE
    operands = (q, k, v, keys, values, parts) + (() if write is None else (write,))

    def body(chunk, pool, constants, arrived, q_ref, k_ref, v_ref, keys_ref, values_ref, parts_ref, *refs):
        write_refs, (out_ref, *residual_refs) = refs[: len(operands) - 6], refs[len(operands) - 6 :]
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        parts = [pool.at[PARTS + i] for i in range(num_parts)]

        def request_key(step):
            if step < key_steps:
                columns, slot = pl.ds(step * SIZE, SIZE), step % KEY_STAGES
                barrier = arrived[f"key{slot}"]
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, columns], pool.at[3 * slot], barrier)
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, columns], pool.at[3 * slot + 1], barrier)
                plgpu.copy_gmem_to_smem(keys_ref.at[b, g, n, :, columns], pool.at[3 * slot + 2], barrier)

        def request_value(step):
            if step < value_steps:
                columns, slot = pl.ds(step * SIZE, SIZE), step % VALUE_STAGES
                barrier = arrived[f"value{slot}"]
                plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, g, columns], pool.at[2 * slot], barrier)
                plgpu.copy_gmem_to_smem(values_ref.at[b, g, n, :, columns], pool.at[2 * slot + 1], barrier)

        def save(index, x):
            if residual_refs:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pool[OUT] = x.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(pool.at[OUT], residual_refs[index].at[b, tokens, h])

        for step in range(KEY_STAGES):
            request_key(step)
        for i in range(num_parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g], parts[i], arrived["gates"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g], pool.at[WRITE], arrived["gates"])

        def read_keys(scores, before):
            for step in range(key_steps):
                slot = step % KEY_STAGES
                plgpu.barrier_wait(arrived[f"key{slot}"])
                plgpu.wgmma(scores, pool.at[3 * slot], tiles.transposed(pool.at[3 * slot + 1]))
                plgpu.wgmma(before, pool.at[3 * slot], tiles.transposed(pool.at[3 * slot + 2]))
                plgpu.wgmma_wait(0)
                request_key(step + KEY_STAGES)
            return scores[...], before[...]

        accumulator = plgpu.ACC(SQUARE, jnp.float32)
        scores, logits = pl.run_scoped(read_keys, accumulator, accumulator)
        plgpu.barrier_wait(arrived["gates"])
        save(0, scores)
        own, scores = decays.own(scores), scores.astype(dtype)
        strength = tiles.load(pool.at[WRITE]) if write_refs else decays.write_strength(decays.log_decay(parts))
        decays.store_factors(pool, constants, parts, strength)
        through = decays.gates_product(constants.at[decays.THROUGH], parts)
        logits *= through
        save(3, logits)
        # The parts of the log decays are not needed any more.
        pool[PARTS], pool[WRITE] = through.astype(dtype), strength.astype(dtype)
        plgpu.commit_smem()
        logits = scale * decays.sums(own, scores, pool, constants, tiles.load(pool.at[WRITE]), logits)
        if num_slots < SIZE:
            _, m = tiles.row_and_column()
            logits = jnp.where(m < num_slots, logits, -1e30)
        p = jnp.exp(logits - tiles.along_rows(logits.max(axis=1)))
        p *= tiles.along_rows(1 / p.sum(axis=1))
        save(2, p)
        scores = decays.scores(p, pool, constants, tiles.load(pool.at[WRITE]))
        save(1, scores)
        p = (p * tiles.load(pool.at[PARTS])).astype(dtype)

        plgpu.commit_smem()
        for step in range(VALUE_STAGES):
            request_value(step)
        for step in range(value_steps):
            slot, out = step % VALUE_STAGES, pool.at[(WRITE, OUT)[step % 2]]
            plgpu.barrier_wait(arrived[f"value{slot}"])
            o = tiles.product((scores, pool.at[2 * slot]), (p, pool.at[2 * slot + 1]))
            request_value(step + VALUE_STAGES)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out[...] = o.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[b, tokens, h, pl.ds(step * SIZE, SIZE)])

    outputs = [((batch_size, length, num_heads, value_size), dtype)]
    if residuals:
        outputs += [((batch_size, length, num_heads, SIZE), dtype)] * 4
    return tiles.chunk_kernel(
        "slot_read",
        body,
        *outputs,
        shape=(batch_size, num_heads, keys.shape[2]),
        dtype=dtype,
        tiles=PARTS + num_parts,
        constants=decays.THROUGH + 1,
        arrivals={
            **{f"key{slot}": 3 for slot in range(KEY_STAGES)},
            **{f"value{slot}": 2 for slot in range(VALUE_STAGES)},
            "gates": num_parts + (write is not None),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), *operands)
