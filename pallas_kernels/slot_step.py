"""Gated Slot Attention for one token, as a decoding model calls it: the memories are written and read where they are.

Both kernels only move states: a block of one warpgroup has 64 channels of one group's memory in registers, from which
it reads and to which it writes, with no shared memory. All channels of the keys take part in a logit: hence two.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import arguments, tiles
from pallas_kernels.tiles import SIZE, along_columns, along_rows

MOST_SLOTS = 128
"""slots M that registers hold, for 64 channels"""
MOST_ROWS = 8
"""B up to which these kernels are taken: measured at 1, faster than what XLA makes, and at 16, no faster"""
ROWS_IN_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((8, SIZE), (SIZE // 4,), (4,))), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1
)
"""How threads share [M, 64] for sums over its rows: a warp has 16 columns of all of them."""


def misfit(q, k, v, log_decay):
    """Why the kernels can't take such arguments of one token, or should not, None if they can."""
    batch_size, num_slots = q.shape[0], log_decay.shape[-1]
    if batch_size > MOST_ROWS:
        return f"B must be at most {MOST_ROWS} for a single token, got B={batch_size}"
    if num_slots % SIZE or num_slots > MOST_SLOTS:
        return f"M must be {SIZE} or {MOST_SLOTS} for a single token, got M={num_slots}"
    return arguments.misfit(q, k, v)


def gated_slot_attention_step(q, k, v, log_decay, write, keys, values, *, scale):
    """One token of the op, from and to states: (out, keys, values).

        Kmem ← diag(a) Kmem + w ⊗ k,    logits = scale · Kmem q         by the first kernel
        Vmem ← diag(a) Vmem + w ⊗ v,    out = Vmemᵀ softmax(logits)     by the second

    XLA lets go of the old states, where nothing else reads them, and the new ones take their place.

    Args:
      q: [B, H, K], bfloat16 or float16, K and V multiples of 64.
      k, v: [B, G, K], [B, G, V] of the same dtype.
      log_decay: [B, G, M], M 64 or 128.
      write: [B, G, M], or None for 1 - exp(log_decay).
      keys, values: [B, G, M, K], [B, G, M, V] in float32.
    """
    arrays = [x for x in (q, k, v, log_decay, write, keys, values) if x is not None]

    @jax.custom_batching.custom_vmap
    def step(*arrays):
        q, k, v, log_decay, *write, keys, values = tiles.vary_alike(*arrays)
        return _step(q, k, v, [log_decay, *write], keys, values, scale)

    @step.def_vmap
    def _(size, batched, *arrays):
        each = (
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        )
        results = step(*(x.reshape(-1, *x.shape[2:]) for x in each))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * 3

    return step(*arrays)


def _step(q, k, v, gates, keys, values, scale):
    batch_size, num_heads, key_size = q.shape
    num_groups, num_slots, value_size = *keys.shape[1:3], v.shape[-1]
    per_head = num_heads // num_groups
    # Side by side in one array, as XLA makes each array for a kernel by a kernel of its own.
    token = [q.reshape(batch_size, num_groups, -1), k, v, *gates]
    token = jnp.concatenate([x.astype(jnp.float32) for x in token], axis=-1)
    key_at, value_at, gates_at = per_head * key_size, (per_head + 1) * key_size, (per_head + 1) * key_size + value_size

    def written(token, state, columns, x_at, layout):
        """The new state at those columns, in registers and in its place."""

        def load(ref, axis):
            return plgpu.load(ref, layout=layout.reduce(1 - axis), optimized=False)

        decay, *strength = (
            along_rows(load(token.at[pl.ds(gates_at + i * num_slots, num_slots)], 0)) for i in range(len(gates))
        )
        strength = strength[0] if strength else -expm1(decay)
        x = along_columns(load(token.at[pl.ds(x_at + columns.start, SIZE)], 1), num_slots)
        old = plgpu.load(state.at[:, columns], layout=layout, optimized=False)
        state[:, columns] = new = jnp.exp(decay) * old + strength * x
        return new

    def write_keys(token_ref, keys_ref, logits_ref):
        b, g, d = (lax.axis_index(name) for name in ("b", "g", "d"))
        layout = tiles.REGISTERS
        new = written(token_ref.at[b, g], keys_ref.at[b, g], pl.ds(d * SIZE, SIZE), key_at, layout)
        for i in range(per_head):
            query = token_ref.at[b, g, pl.ds(i * key_size + d * SIZE, SIZE)]
            query = along_columns(plgpu.load(query, layout=layout.reduce(0), optimized=False), num_slots)
            logits_ref[b, g * per_head + i, d] = (new * query).sum(axis=1)

    def read_values(token_ref, logits_ref, values_ref, out_ref):
        b, g, d = (lax.axis_index(name) for name in ("b", "g", "d"))
        columns, layout = pl.ds(d * SIZE, SIZE), ROWS_IN_A_WARP
        new = written(token_ref.at[b, g], values_ref.at[b, g], columns, value_at, layout)
        for i in range(per_head):
            h = g * per_head + i
            parts = (logits_ref.at[b, h, part] for part in range(key_size // SIZE))
            logits = sum(plgpu.load(part, layout=layout.reduce(1), optimized=False) for part in parts)
            logits = along_rows(scale * logits)
            p = jnp.exp(logits - along_columns(logits.max(axis=0), num_slots))
            out_ref[b, h, columns] = ((p * new).sum(axis=0) / p.sum(axis=0)).astype(out_ref.dtype)

    def run(name, body, output, width, state, *operands):
        grid = {"b": batch_size, "g": num_groups, "d": width // SIZE}
        state = jax.new_ref(state)
        (result,) = tiles.kernel(name, body, output, grid=grid)(*operands, in_place=[state])
        return result, jax.freeze(state)

    logits = ((batch_size, num_heads, key_size // SIZE, num_slots), jnp.float32)
    logits, keys = run("slot_step_keys", write_keys, logits, key_size, keys, token)
    out = ((batch_size, num_heads, value_size), v.dtype)
    out, values = run("slot_step_values", read_values, out, value_size, values, token, logits)
    return out, keys, values


def expm1(x):
    """exp(x) - 1 for x <= 0, to float32's precision."""
    series = functools.reduce(lambda series, n: 1 + x / n * series, range(7, 1, -1), 1.0)
    return jnp.where(x > -0.3, x * series, jnp.exp(x) - 1)
