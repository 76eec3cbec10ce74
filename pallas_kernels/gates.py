"""Gates of whole chunks: what is left of each token's write at the end of its chunk, and what a chunk keeps."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE


def chunk_gates(log_decay, write, dtype, interpret=None):
    """Prepares the gates for the other kernels.

    Args:
      log_decay: [B, T, G, M], M a multiple of 64.
      write: [B, T, G, M] in `dtype`, or None for 1 - exp(log_decay).
      dtype: of the products that follow.

    Returns:
      parts [P, B, T, G, M] in bfloat16, whose sum is the log decay, clamped; P as `decays.num_parts`
      the write key at its chunk's end, w ⊙ prod(gates after the token), [B, T, G, M] in `dtype`
      the product of each chunk's gates, [B, G, N, M] in float32
    """
    batch_size, length, num_groups, num_slots = log_decay.shape
    num_chunks, num_parts = pl.cdiv(length, SIZE), decays.num_parts(log_decay.dtype)
    operands = (log_decay,) if write is None else (log_decay, write)

    def body(chunk, memory, arrived, log_decay_ref, *refs):
        *write_refs, parts_ref, key_ref, kept_ref = refs
        b, gm, n = chunk
        g, slots = lax.div(gm, num_slots // SIZE), pl.ds(lax.rem(gm, num_slots // SIZE) * SIZE, SIZE)
        here = (b, pl.ds(n * SIZE, SIZE), g, slots)
        gates, (*parts, ones) = memory["gates"], [memory["parts"].at[i] for i in range(num_parts + 1)]
        plgpu.copy_gmem_to_smem(log_decay_ref.at[here], gates, arrived["all"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[here], memory["write"], arrived["all"])
        plgpu.barrier_wait(arrived["all"])
        log_decay = rest = jnp.maximum(tiles.load(gates), decays.STRONGEST)
        for part in parts:
            part[...] = rest.astype(decays.PARTS_DTYPE)
            rest -= rest.astype(decays.PARTS_DTYPE).astype(jnp.float32)
        ones[...] = jnp.ones_like(log_decay).astype(ones.dtype)
        plgpu.commit_smem()
        for i, part in enumerate(parts):
            plgpu.copy_smem_to_gmem(part, parts_ref.at[(i, *here)])
        strength = tiles.load(memory["write"]) if write_refs else decays.write_strength(log_decay)
        memory["key"][...] = (strength * decays.after(parts)).astype(dtype)
        # A product with ones, since sums over the rows of a tile would go through memory that warpgroups share.
        total = tiles.product(*((tiles.transposed(part), ones) for part in parts))
        memory["kept"][...] = jnp.exp(total.max(axis=1))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory["key"], key_ref.at[here])
        plgpu.copy_smem_to_gmem(memory["kept"], kept_ref.at[b, g, n, slots])
        plgpu.wait_smem_to_gmem(0)

    memory = {
        "gates": (SQUARE, log_decay.dtype),
        "parts": ((num_parts + 1, *SQUARE), decays.PARTS_DTYPE),
        "key": (SQUARE, dtype),
        "kept": ((SIZE,), jnp.float32),
    }
    if write is not None:
        memory["write"] = (SQUARE, write.dtype)
    return tiles.chunk_kernel(
        "chunk_gates",
        body,
        ((num_parts, *log_decay.shape), decays.PARTS_DTYPE),
        (log_decay.shape, dtype),
        ((batch_size, num_groups, num_chunks, num_slots), jnp.float32),
        shape=(batch_size, num_groups * (num_slots // SIZE), num_chunks),
        memory=memory,
        arrivals={"all": len(operands)},
        interpret=interpret,
    )(*operands)
