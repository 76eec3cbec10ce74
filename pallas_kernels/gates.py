"""Gates of whole chunks: what is left of each token's write at the end of its chunk, and what a chunk keeps."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays, tiles
from pallas_kernels.tiles import SIZE, SQUARE

KEY, PARTS, WRITE = 0, 1, 3
"""scratch tiles: of the write key, of log decays in parts or in two turns, of write strengths in two turns, if given"""


def chunk_gates(log_decay, write, dtype, interpret=None):
    """Prepares the gates for the other kernels.

    Args:
      log_decay: [B, T, G, M], M a multiple of 64.
      write: [B, T, G, M] in `dtype`, or None for 1 - exp(log_decay).
      dtype: of the products that follow.

    Returns:
      parts [P, B, T, G, M] in `dtype`, whose sum is the log decay, clamped; P = `decays.num_parts`
      the write key at its chunk's end, w ⊙ prod(gates after the token), [B, T, G, M] in `dtype`
      the product of each chunk's gates, [B, G, N, M] in float32
      which chunks' gates are mild, int32 [B, G, N, M / 64]
    """
    num_parts = decays.num_parts(log_decay.dtype, dtype)
    if num_parts == 2:
        log_decay = log_decay.astype(jnp.float32)
    batch_size, length, num_groups, num_slots = log_decay.shape
    num_chunks, num_blocks = pl.cdiv(length, SIZE), num_slots // SIZE
    operands = (log_decay,) if write is None else (log_decay, write)
    given = write is not None

    def body(turn, pool, constants, arrived, kept, lowest, *refs):
        wide, refs = refs[: num_parts - 1], refs[num_parts - 1 :]
        log_decay_ref, *write_refs, parts_ref, key_ref, kept_ref, mild_ref = refs

        def arriving(step):
            """Where log decays and write strengths of a turn arrive, and their barrier."""
            slot = lax.rem(step, 2)
            log_decays = wide[0].at[slot] if wide else pool.at[PARTS + slot]
            return log_decays, pool.at[WRITE + slot], arrived["all"](slot)

        def split(chunk):
            b, gm, n = chunk
            g, m = lax.div(gm, num_blocks), lax.rem(gm, num_blocks)
            return b, g, n, m, (b, pl.ds(n * SIZE, SIZE), g, pl.ds(m * SIZE, SIZE))

        def request(chunk, step):
            *_, here = split(chunk)
            log_decays, written, barrier = arriving(step)
            plgpu.copy_gmem_to_smem(log_decay_ref.at[here], log_decays, barrier)
            for ref in write_refs:
                plgpu.copy_gmem_to_smem(ref.at[here], written, barrier)

        pl.when(turn.step == 0)(lambda: request(turn.chunk, turn.step))
        pl.when(~turn.is_last)(lambda: request(turn.following, turn.step + 1))
        b, g, n, m, here = split(turn.chunk)
        key, ones = pool.at[KEY], constants.at[decays.ALL]
        log_decays, written, barrier = arriving(turn.step)
        parts = [pool.at[PARTS + i] for i in range(num_parts)] if wide else [log_decays]
        plgpu.barrier_wait(barrier)
        rest = log_decay = jnp.maximum(tiles.load(log_decays), decays.STRONGEST)
        for part in parts:
            part[...] = rest.astype(dtype)
            rest -= rest.astype(dtype).astype(jnp.float32)
        plgpu.commit_smem()
        for i, part in enumerate(parts):
            plgpu.copy_smem_to_gmem(part, parts_ref.at[(i, *here)])
        strength = tiles.load(written) if write_refs else decays.write_strength(log_decay)
        key[...] = (strength * decays.gates_product(constants.at[decays.AFTER], parts)).astype(dtype)
        # Products with ones, since sums over the rows of a tile would go through memory that warpgroups share.
        kept[...] = jnp.exp(tiles.product(*((tiles.transposed(part), ones) for part in parts)).max(axis=1))
        lowest[...] = tiles.product(*((ones, part) for part in parts)).min(axis=1)
        plgpu.commit_smem()
        is_mild = lowest[0] >= decays.mildest(length - n * SIZE, dtype)
        mild_ref[b, g, n, m] = is_mild.astype(jnp.int32)
        plgpu.copy_smem_to_gmem(key, key_ref.at[here])
        plgpu.copy_smem_to_gmem(kept, kept_ref.at[b, g, n, pl.ds(m * SIZE, SIZE)])

    parts, key, kept, mild = tiles.chunk_kernel(
        "chunk_gates",
        body,
        ((num_parts, *log_decay.shape), dtype),
        (log_decay.shape, dtype),
        ((batch_size, num_groups, num_chunks, num_slots), jnp.float32),
        ((batch_size, num_groups, num_chunks, num_blocks), jnp.int32),
        shape=(batch_size, num_groups * num_blocks, num_chunks),
        dtype=dtype,
        tiles=PARTS + 2 * (1 + given),
        constants=3,
        floats=[(SIZE,), (SIZE,), *[(2, *SQUARE)] * (num_parts - 1)],
        arrivals={"all": (2, 1 + given)},
        warpgroups=4,
        interpret=interpret,
    )(decays.constant_tiles(dtype), *operands)
    return parts, key, kept, mild
