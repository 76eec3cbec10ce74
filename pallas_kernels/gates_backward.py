"""Gradients of the gates and of the write strength of Gated Slot Attention: all chunks side by side."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

FACTORS, ACROSS, LATER = 0, 1, 2
"""work tiles; the first holds the first read's state part before, the second the second's, the third d_key"""


def gates_backward(reads, parts, write, d_key, d_kept, *, out_dtype, interpret=None):
    """Gradients of the log decays and of the write strengths, from two reads of states written with the same gates.

    Each read is y_i = prod(a[first..i]) ⊙ H x_i + Σ_{j<=i} A_ij w_j ⊙ D_ij, and dy its gradient. Every factor in it is
    the exponential of a sum of log decays: here the gradients of these sums are formed and added up over time.

    Args:
      reads: two of (A [B, T, H, 64] by the tokens of the chunk, prod(a) ⊙ H x [B, T, H, 64], dy [B, T, H, 64]).
      parts: [P, B, T, G, 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, 64], or None for 1 - exp(log decay), whose gradient then is in that of the log decays.
      d_key: [B, T, H, 64], gradient of the write key at its chunk's end.
      d_kept: [B, H, N, 64] float32, gradient of the sum of a chunk's log decays through the states between chunks.
      out_dtype: of the gradient of the log decays.

    Returns:
      (gradient of the log decays [B, T, H, 64],), with `write` also that of the write strengths, in its dtype.
    """
    batch_size, length, num_heads, _ = d_key.shape
    num_parts, num_groups = parts.shape[0], parts.shape[3]
    (scores, before, dy), dtype = zip(*reads, strict=True), d_key.dtype
    operands = [*scores, *dy, *before, d_key, parts, d_kept]
    if write is not None:
        operands.append(write)

    def body(chunk, memory, arrived, *refs):
        inputs, (d_log_decay_ref, *d_write_refs) = refs[: len(operands)], refs[len(operands) :]
        per_head, (parts_ref, d_kept_ref, *write_refs) = inputs[:7], inputs[7:]
        b, h, n = chunk
        g, tokens = lax.div(h, num_heads // num_groups), pl.ds(n * SIZE, SIZE)
        scores, dy, work = memory["scores"], memory["dy"], memory["work"]
        parts = [memory["parts"].at[i] for i in range(num_parts)]
        destinations = [scores.at[0], scores.at[1], dy.at[0], dy.at[1], *(work.at[i] for i in range(3))]
        for ref, destination in zip(per_head, destinations, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, h], destination, arrived["all"])
        for i in range(num_parts):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, b, tokens, g], parts[i], arrived["all"])
        plgpu.copy_gmem_to_smem(d_kept_ref.at[b, h, n], memory["kept"], arrived["all"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, g], memory["write"], arrived["all"])
        plgpu.barrier_wait(arrived["all"])

        def strength():
            return tiles.load(memory["write"]) if write_refs else decays.write_strength(decays.log_decay(parts))

        def put(slot, x):
            work[slot] = x.astype(dtype)

        until_end = decays.after(parts) * tiles.load(work.at[2])
        d_write = until_end
        for r in range(2):
            own, _ = decays.own_and_earlier(tiles.load(scores.at[r]), dtype)
            d_write += tiles.along_rows(own) * tiles.load(dy.at[r])
        put(0, sum(tiles.load(work.at[r]) * tiles.load(dy.at[r]) for r in range(2)))
        put(2, strength() * until_end)
        plgpu.commit_smem()
        d_log_decay = decays.d_through(work.at[0]) + decays.d_after(work.at[2])

        def one_level(_, half, carry):
            d_log_decay, d_write = carry
            factor = decays.level(half, parts)
            put(FACTORS, jnp.where(decays.in_later_half(half), factor, strength() * factor))
            later_part, earlier_part = 0.0, 0.0
            for r in range(2):
                _, earlier = decays.own_and_earlier(tiles.load(scores.at[r]), dtype)
                across = jnp.where(decays.parted(half), earlier, jnp.zeros_like(earlier))
                work[ACROSS] = across
                put(LATER, factor * tiles.load(dy.at[r]))
                plgpu.commit_smem()
                later_part += tiles.load(dy.at[r]) * tiles.product((across, work.at[FACTORS]))
                earlier_part += tiles.product((tiles.transposed(work.at[ACROSS]), work.at[LATER]))
            earlier_part *= factor
            put(ACROSS, factor * later_part + strength() * earlier_part)
            plgpu.commit_smem()
            return d_log_decay + decays.d_level(half, work.at[ACROSS]), d_write + earlier_part

        d_log_decay, d_write = decays.each_level(one_level, (d_log_decay, d_write))
        d_log_decay += tiles.along_columns(plgpu.load(memory["kept"], layout=tiles.COLUMNS))
        if not write_refs:
            d_log_decay -= jnp.exp(decays.log_decay(parts)) * d_write
        memory["out"][...] = d_log_decay.astype(out_dtype)
        put(0, d_write)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory["out"], d_log_decay_ref.at[b, tokens, h])
        for ref in d_write_refs:
            plgpu.copy_smem_to_gmem(work.at[0], ref.at[b, tokens, h])
        plgpu.wait_smem_to_gmem(0)

    per_token = (batch_size, length, num_heads, SIZE)
    memory = {
        "scores": ((2, *SQUARE), dtype),
        "dy": ((2, *SQUARE), dtype),
        "work": ((3, *SQUARE), dtype),
        "parts": ((num_parts, *SQUARE), decays.PARTS_DTYPE),
        "kept": ((SIZE,), jnp.float32),
        "out": (SQUARE, out_dtype),
    }
    outputs = [(per_token, out_dtype)]
    if write is not None:
        memory["write"] = (SQUARE, dtype)
        outputs.append((per_token, dtype))
    return tiles.chunk_kernel(
        "gates_backward",
        body,
        *outputs,
        shape=(batch_size, num_heads, d_kept.shape[2]),
        memory=memory,
        arrivals={"all": 8 + num_parts + (write is not None)},
        interpret=interpret,
    )(*operands)
