"""Gradients of gated linear attention in queries, keys and gates: all chunks and all blocks of K side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE

STAGES = 2
"""steps of the loop over channels of V in flight, of four tiles each"""
LEVELS, WORK, REST = 0, (5, 6), 7
"""Scratch tiles of the loop, once it is over: the levels', of which the first stage's may be for the next turn already;
two to work in; what rounding takes from the scores."""
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
        query, key, scores, rest = (pool.at[i] for i in (QUERY, KEY, SCORES, REST))
        work = [pool.at[i] for i in WORK]
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
        scores[...], rest[...] = decays.causal_parts(scale * d_scores, through, dtype)
        gradients = scale * dq, dk
        d_log_decay, dq, dk = lax.cond(
            mild,
            lambda: of_pairs(query, key, (scores, rest), parts, constants, work, *gradients),
            lambda: of_pairs_by_halving(query, key, (scores, rest), levels, constants, work, *gradients),
        )
        d_log_decay += tiles.along_columns(plgpu.load(kept, layout=tiles.COLUMNS))

        here = b, tokens, h, block
        tiles.leave(dq, query, dq_ref.at[here])
        follow(~mild)
        tiles.leave(dk, key, dk_ref.at[here])
        for part, tile, ref in zip(tiles.two_parts(d_log_decay, dtype), work, d_log_decay_refs, strict=False):
            tiles.leave(part, tile, ref.at[here])

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


def of_pairs(query, key, scores, parts, constants, work, dq, dk):
    """Gradients of log decays, queries and keys, from those of queries and keys before decay; for mild gates."""
    through, after = constants.at[decays.THROUGH], constants.at[decays.AFTER]

    def cumulative():  # once more rather than in registers
        return decays.window_sum(through, parts)

    def pull(scores, factors):
        """Σ_j A_ij f_j"""
        tiles.store_parts(factors, work)
        plgpu.commit_smem()
        result = tiles.product(*tiles.of_parts(scores, work))
        plgpu.commit_smem()
        return result

    dq = (dq + pull(scores, tiles.load(key) * jnp.exp(-cumulative()))) * jnp.exp(cumulative())
    change = tiles.load(query) * dq
    scores = tuple(map(tiles.transposed, scores))
    pulled = pull(scores, tiles.load(query) * jnp.exp(cumulative()))
    change -= tiles.load(key) * (pulled * jnp.exp(-cumulative()))
    d_log_decay = tiles.sums(through, change, work)
    dk *= decays.gates_product(after, parts)
    d_log_decay += tiles.sums(after, tiles.load(key) * dk, work)
    return d_log_decay, dq, dk + pulled * jnp.exp(-cumulative())


def of_pairs_by_halving(query, key, scores, levels, constants, work, dq, dk):
    """As `of_pairs`, for any gates.

    At one level a row is either a query's, in a later half, or a key's, in an earlier half: x_i = f_i ⊙ (q_i or k_i)
    with the factor f. Either way the pairs of the level pull at it by y_i = Σ_j (dS + dSᵀ)_ij x_j, scale being in dS:
    f ⊙ y is the gradient of that query or key, x ⊙ y that of log f.
    """
    through, after = constants.at[decays.THROUGH], constants.at[decays.AFTER]
    dq *= decays.gates_product(through, levels.parts)
    dk *= decays.gates_product(after, levels.parts)
    d_log_decay = tiles.sums(through, tiles.load(query) * dq, work)
    d_log_decay += tiles.sums(after, tiles.load(key) * dk, work)
    across, pulled, dtype = (levels.free[0], work[0]), (levels.free[1], work[1]), query.dtype

    def one_level(index, factor, gradients):
        d_log_decay, dq, dk = gradients
        later = decays.in_later_half(index)
        tiles.store_parts(factor * jnp.where(later, tiles.load(query), tiles.load(key)), pulled)
        for tile, part in zip(across, scores, strict=True):
            tile[...] = levels.at(index, tiles.load(part, dtype))
        plgpu.commit_smem()
        y = tiles.product(*tiles.of_parts(across, pulled), *tiles.of_parts(map(tiles.transposed, across), pulled))
        plgpu.commit_smem()
        d_log_decay += tiles.sums(levels.window(index), tiles.load_parts(pulled) * y, pulled)
        y *= factor
        return d_log_decay, dq + jnp.where(later, y, 0.0), dk + jnp.where(later, 0.0, y)

    d_log_decay, dq, dk = levels.fold(one_level, (d_log_decay, dq, dk))
    own = sum(levels.own(tiles.load(part)) for part in scores)
    return d_log_decay, dq + own * tiles.load(key), dk + own * tiles.load(query)
