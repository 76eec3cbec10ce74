"""Gradients of gated linear attention in queries, keys and gates: all chunks and all blocks of K side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE

STAGES = 2
"""steps of the loop over channels of V in flight, of four tiles each"""
LEVELS, EARLIER, X, Y, LATER = 0, 4, 5, 6, 7
"""scratch tiles of the loop, once it is over; the first stage's are for the levels or already for the next turn"""
SCORES, QUERY, KEY, PARTS = 8, 9, 10, 11
"""those behind the loop's"""


def linear_read_backward(d_out, q, k, v, parts, mild, states, d_states, d_kept, *, scale, out_dtype, interpret=None):
    """Gradients of one chunk's read and writes in 64 channels of K, a block; `linear_scores` says what is what.

        dS_ij = do_i·v_j
        dq_i = scale · (prod(a[first..i]) ⊙ H do_i  +  Σ_{j<=i} dS_ij k_j ⊙ D_ij)
        dk_j = prod(a[j+1..last]) ⊙ dH v_j  +  scale · Σ_{i>=j} dS_ij q_i ⊙ D_ij

    Every factor of a gate in here is the exponential of a sum of log decays: the gradients of these sums are formed and
    added up over time; `gates_backward` says how that is exact.

    Args:
      d_out: [B, T, H, V]; v: [B, T, G, V]; q, k, parts and mild as for `linear_scores`.
      states: [B, G, N, K, V], as they enter the chunks.
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
    num_chunks, num_blocks = states.shape[2], key_size // SIZE

    def body(turn, pool, constants, arrived, kept, *refs):
        (d_out_ref, q_ref, k_ref, v_ref, states_ref, d_states_ref), refs = refs[:6], refs[6:]
        levels_ref, mild_ref, parts_ref, d_kept_ref, dq_ref, dk_ref, *d_log_decay_refs = refs

        def split(chunk):
            b, h, nm = chunk
            n, m = lax.div(nm, num_blocks), lax.rem(nm, num_blocks)
            return b, h, lax.div(h, num_heads // num_groups), n, m, pl.ds(n * SIZE, SIZE), pl.ds(m * SIZE, SIZE)

        def products(chunk):
            b, h, g, n, _, tokens, block = split(chunk)
            arrays = [
                lambda channels: d_out_ref.at[b, tokens, h, channels],
                lambda channels: v_ref.at[b, tokens, g, channels],
                lambda channels: states_ref.at[b, g, n, block, channels],
                lambda channels: d_states_ref.at[b, h, n, block, channels],
            ]
            return columns.inner_products(arrays, [(0, 1), (0, 2), (1, 3)], value_size, pool, STAGES, arrived["step"])

        b, h, g, n, m, tokens, block = split(turn.chunk)
        query, key, scores, x, y = (pool.at[i] for i in (QUERY, KEY, SCORES, X, Y))
        parts, through = [pool.at[PARTS + i] for i in range(num_parts)], constants.at[decays.THROUGH]
        levels = decays.Levels(levels_ref, parts, pool, LEVELS, arrived)
        finish, follow = columns.over_turns(turn, products, early=1)
        plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, block], query, arrived["block"])
        plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, g, block], key, arrived["block"])
        plgpu.copy_gmem_to_smem(d_kept_ref.at[b, h, n, block], kept, arrived["block"])
        for i in range(num_parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g, block], parts[i], arrived["block"])
        mild = mild_ref[b, g, n, m] > 0

        d_scores, dq, dk = finish()
        follow(mild)
        plgpu.barrier_wait(arrived["block"])
        scores[...] = decays.causal(scale * d_scores, through, dtype)
        dq *= scale * decays.gates_product(through, parts)
        dk *= decays.gates_product(constants.at[decays.AFTER], parts)
        x[...] = (tiles.load(query) * dq).astype(dtype)
        y[...] = (tiles.load(key) * dk).astype(dtype)
        plgpu.commit_smem()
        d_log_decay = tiles.product((tiles.transposed(through), x), (tiles.transposed(constants.at[decays.AFTER]), y))
        gradients = d_log_decay, dq, dk
        work = [pool.at[i] for i in (LATER, EARLIER, X, Y)]
        d_log_decay, dq, dk = lax.cond(
            mild,
            lambda: of_pairs(query, key, scores, parts, through, work, gradients),
            lambda: of_pairs_by_halving(query, key, scores, levels, x, gradients),
        )
        d_log_decay += tiles.along_columns(plgpu.load(kept, layout=tiles.COLUMNS))

        here = b, tokens, h, block
        tiles.leave(dq, query, dq_ref.at[here])
        follow(~mild)
        tiles.leave(dk, key, dk_ref.at[here])
        for tile, ref in zip((x, y), d_log_decay_refs, strict=False):
            tiles.leave(d_log_decay, tile, ref.at[here])
            d_log_decay -= d_log_decay.astype(dtype).astype(jnp.float32)

    per_token = (batch_size, length, num_heads, key_size)
    dq, dk, *d_log_decay = tiles.chunk_kernel(
        "linear_read_backward",
        body,
        *[(per_token, dtype)] * (2 + num_outputs),
        shape=(batch_size, num_heads, num_chunks * num_blocks),
        dtype=dtype,
        tiles=PARTS + num_parts,
        constants=2,
        width=value_size,
        arrivals={"block": 3 + num_parts, "step": (STAGES, 4), **decays.Levels.ARRIVALS},
        floats=[(SIZE,)],
        interpret=interpret,
    )(
        decays.constant_tiles(dtype),
        *(d_out, q, k, v, states, d_states),
        *(decays.level_tiles(dtype), mild, parts, d_kept),
    )
    return dq, dk, sum(part.astype(out_dtype) for part in d_log_decay)


def of_pairs(query, key, scores, parts, through, work, gradients):
    """Adds to the gradients of log decays, queries and keys what comes from pairs of tokens; for mild gates."""
    (later, earlier, high, low), dtype = work, query.dtype
    d_log_decay, dq, dk = gradients
    cumulative = decays.window_sum(through, parts)
    later[...] = (tiles.load(query) * jnp.exp(cumulative)).astype(dtype)
    earlier[...] = (tiles.load(key) * jnp.exp(-cumulative)).astype(dtype)
    plgpu.commit_smem()
    d_later = tiles.product((scores, earlier))
    d_earlier = tiles.product((tiles.transposed(scores), later))
    dq += jnp.exp(cumulative) * d_later
    dk += jnp.exp(-cumulative) * d_earlier
    change = tiles.load(later) * d_later - tiles.load(earlier) * d_earlier
    high[...] = change.astype(dtype)
    low[...] = (change - change.astype(dtype).astype(jnp.float32)).astype(dtype)
    plgpu.commit_smem()
    return d_log_decay + tiles.product(*((tiles.transposed(through), part) for part in (high, low))), dq, dk


def of_pairs_by_halving(query, key, scores, levels, product, gradients):
    """As `of_pairs`, for any gates.

    At one level a row is either a query's, in a later half, or a key's, in an earlier half: x_i = f_i ⊙ (q_i or k_i)
    with the factor f. Either way the pairs of the level pull at it by y_i = Σ_j (dS + dSᵀ)_ij x_j, scale being in dS:
    f ⊙ y is the gradient of that query or key, x ⊙ y that of log f.
    """
    (across, pulled), dtype = levels.free, query.dtype

    def one_level(index, factor, gradients):
        d_log_decay, dq, dk = gradients
        later = decays.in_later_half(index)
        pulled[...] = (factor * jnp.where(later, tiles.load(query), tiles.load(key))).astype(dtype)
        across[...] = levels.at(index, tiles.load(scores, dtype))
        plgpu.commit_smem()
        y = tiles.product((across, pulled), (tiles.transposed(across), pulled))
        product[...] = (tiles.load(pulled) * y).astype(dtype)
        plgpu.commit_smem()
        y *= factor
        dq, dk = dq + jnp.where(later, y, 0.0), dk + jnp.where(later, 0.0, y)
        return d_log_decay + tiles.product((tiles.transposed(levels.window(index)), product)), dq, dk

    d_log_decay, dq, dk = levels.fold(one_level, gradients)
    own = levels.own(tiles.load(scores))
    return d_log_decay, dq + own * tiles.load(key), dk + own * tiles.load(query)
