"""Gradients of gated linear attention in queries, keys and gates: all chunks and all blocks of K side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

STAGES = 2
"""steps of the loop over channels of V that are in flight"""
PARTS = 4 * STAGES
"""scratch tiles behind those of the loop"""


def linear_read_backward(d_out, q, k, v, parts, states, d_states, d_kept, *, scale, out_dtype, interpret=None):
    """Gradients of one chunk's read and writes in 64 channels of K, a block; `linear_read` says what is what.

        dS_ij = do_i·v_j
        dq_i = scale · (prod(a[first..i]) ⊙ H do_i  +  Σ_{j<=i} dS_ij k_j ⊙ D_ij)
        dk_j = prod(a[j+1..last]) ⊙ dH v_j  +  scale · Σ_{i>=j} dS_ij q_i ⊙ D_ij

    Every factor of a gate in here is the exponential of a sum of log decays: the gradients of these sums are formed and
    added up over time.

    Args:
      d_out: [B, T, H, V]; q, k, v, parts and states as for `linear_read`.
      d_states: [B, H, N, K, V], gradient of the states that leave the chunks.
      d_kept: [B, H, N, K] float32, gradient of the sum of a chunk's log decays through the states between chunks.
      out_dtype: of the gradient of the log decays.

    Returns:
      dq, dk and the gradient of the log decays, [B, T, H, K] each.
    """
    batch_size, length, num_heads, key_size = q.shape
    num_groups, value_size = v.shape[2:]
    num_parts, dtype = parts.shape[0], q.dtype
    num_outputs = decays.num_parts(out_dtype, dtype)
    num_chunks, num_blocks, num_steps = states.shape[2], key_size // SIZE, value_size // SIZE
    last = (num_steps - 1) % STAGES
    QUERY, KEY, X, XY = (i for i in range(PARTS) if i // 4 != last)  # tiles that the loop's last step leaves free
    MIRRORED, DQ, DK, _ = (i for i in range(PARTS) if i // 4 == last)

    def body(chunk, pool, constants, arrived, kept, *refs):
        d_out_ref, q_ref, k_ref, v_ref, parts_ref, states_ref, d_states_ref, d_kept_ref = refs[:8]
        dq_ref, dk_ref, *d_log_decay_refs = refs[8:]
        b, h, n = *chunk[:2], lax.div(chunk[2], num_blocks)
        block = pl.ds(lax.rem(chunk[2], num_blocks) * SIZE, SIZE)
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        query, key = pool.at[QUERY], pool.at[KEY]
        parts = [pool.at[PARTS + i] for i in range(num_parts)]

        def request(step):
            if step < num_steps:
                columns, slot = pl.ds(step * SIZE, SIZE), step % STAGES
                sources = (
                    d_out_ref.at[b, tokens, h, columns],
                    v_ref.at[b, tokens, g, columns],
                    states_ref.at[b, g, n, block, columns],
                    d_states_ref.at[b, h, n, block, columns],
                )
                for i, source in enumerate(sources):
                    plgpu.copy_gmem_to_smem(source, pool.at[4 * slot + i], arrived[f"step{slot}"])

        for step in range(STAGES):
            request(step)
        plgpu.copy_gmem_to_smem(d_kept_ref.at[b, h, n, block], kept.at[0], arrived["block"])
        for i in range(num_parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g, block], parts[i], arrived["block"])

        def through_values(d_scores, mirrored, d_before, d_key):
            for step in range(num_steps):
                slot = step % STAGES
                if step == num_steps - 1:
                    plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, block], query, arrived["block"])
                    plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, block], key, arrived["block"])
                plgpu.barrier_wait(arrived[f"step{slot}"])
                d_out, v, state, d_state = (pool.at[4 * slot + i] for i in range(4))
                plgpu.wgmma(d_scores, d_out, tiles.transposed(v))
                plgpu.wgmma(mirrored, v, tiles.transposed(d_out))
                plgpu.wgmma(d_before, d_out, tiles.transposed(state))
                plgpu.wgmma(d_key, v, tiles.transposed(d_state))
                plgpu.wgmma_wait(0)
                request(step + STAGES)
            i, j = tiles.row_and_column()
            own = scale * jnp.where(i == j, d_scores[...], 0.0).sum(axis=1)
            return own, scale * jnp.where(j < i, d_scores[...], mirrored[...]), scale * d_before[...], d_key[...]

        def put(slot, x):
            pool[slot] = x.astype(dtype)

        own, mirrored, dq, dk = pl.run_scoped(through_values, *[plgpu.ACC(SQUARE, jnp.float32)] * 4)
        plgpu.barrier_wait(arrived["block"])
        plgpu.commit_smem()
        put(MIRRORED, mirrored)
        dq *= decays.gates_product(constants.at[decays.THROUGH], parts)
        dk *= decays.gates_product(constants.at[decays.AFTER], parts)
        put(X, tiles.load(query) * dq)
        put(XY, tiles.load(key) * dk)
        plgpu.commit_smem()
        d_log_decay = tiles.product(
            (tiles.transposed(constants.at[decays.THROUGH]), pool.at[X]),
            (tiles.transposed(constants.at[decays.AFTER]), pool.at[XY]),
        )
        plgpu.commit_smem()
        dq += tiles.along_rows(own) * tiles.load(key)
        dk += tiles.along_rows(own) * tiles.load(query)
        d_log_decay, dq, dk = through_levels(
            query, key, pool.at[MIRRORED], (pool.at[X], pool.at[XY]), parts, constants, (d_log_decay, dq, dk)
        )

        d_log_decay += tiles.along_columns(plgpu.load(kept.at[0], layout=tiles.COLUMNS))
        put(DQ, dq)
        put(DK, dk)
        for tile, _ in zip((X, XY), d_log_decay_refs, strict=False):
            put(tile, d_log_decay)
            d_log_decay -= d_log_decay.astype(dtype).astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(pool.at[DQ], dq_ref.at[b, tokens, h, block])
        plgpu.copy_smem_to_gmem(pool.at[DK], dk_ref.at[b, tokens, h, block])
        for tile, ref in zip((X, XY), d_log_decay_refs, strict=False):
            plgpu.copy_smem_to_gmem(pool.at[tile], ref.at[b, tokens, h, block])

    per_token = (batch_size, length, num_heads, key_size)
    dq, dk, *d_log_decay = tiles.chunk_kernel(
        "linear_read_backward",
        body,
        *[(per_token, dtype)] * (2 + num_outputs),
        shape=(batch_size, num_heads, num_chunks * num_blocks),
        dtype=dtype,
        tiles=PARTS + num_parts,
        constants=decays.AFTER + 1,
        vectors=1,
        arrivals={**{f"step{slot}": 4 for slot in range(STAGES)}, "block": 3 + num_parts},
        interpret=interpret,
    )(decays.constant_tiles(dtype, mirrored=True), d_out, q, k, v, parts, states, d_states, d_kept)
    return dq, dk, sum(part.astype(out_dtype) for part in d_log_decay)


def through_levels(query, key, mirrored, work, parts, constants, gradients):
    """Adds what comes from pairs of tokens to the gradients of the log decays, queries and keys.

    At one level a row is either a query's, in a later half, or a key's, in an earlier half: x_i = f_i ⊙ (q_i or k_i)
    with the factor f. Either way the pairs of the level pull at it by y_i = Σ_j (dS + dSᵀ)_ij x_j, scale being in dS:
    f ⊙ y is the gradient of that query or key, x ⊙ y that of log f.
    """
    dtype, (pulled, product) = query.dtype, work
    mirrored = tiles.load(mirrored, dtype)

    def one_level(index, gradients):
        d_log_decay, dq, dk = gradients
        window, later = constants.at[decays.WINDOWS + index], decays.in_later_half(index)
        factor = decays.gates_product(window, parts)
        pulled[...] = (factor * jnp.where(later, tiles.load(query), tiles.load(key))).astype(dtype)
        plgpu.commit_smem()
        y = tiles.product((decays.at_level(index, constants, mirrored), pulled))
        product[...] = (tiles.load(pulled) * y).astype(dtype)
        plgpu.commit_smem()
        y *= factor
        dq, dk = dq + jnp.where(later, y, 0.0), dk + jnp.where(later, 0.0, y)
        return d_log_decay + tiles.product((tiles.transposed(window), product)), dq, dk

    return decays.each_level(one_level, gradients)
