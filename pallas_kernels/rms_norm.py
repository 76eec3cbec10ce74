"""RMSNorm on Hopper GPUs, forward and backward: every array is read or written once, a row by a warpgroup."""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.tiles import along_columns, along_rows

COLUMNS = 512
"""The width is a multiple of it: 128 threads with 16 bytes of float32 each."""
WIDEST = 4096
"""columns that a warpgroup holds in registers"""
FORWARD, BACKWARD = 10, 5
"""blocks of one warpgroup that a multiprocessor has registers for at width 2048"""
FORWARD_SWISH, BACKWARD_SWISH = 8, 4
FEWEST = 528
"""rows, four for each multiprocessor, below which a kernel of its own is not worth its start"""


def misfit(x):
    """Why the kernels can't take x [..., D], None if they can."""
    *leading, width = x.shape
    num_rows = math.prod(leading)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if width % COLUMNS or width > WIDEST:
        return f"the width must be a multiple of {COLUMNS} up to {WIDEST}, got {width}"
    if num_rows % _rows_at_once(width) or num_rows < FEWEST:
        return f"there must be {FEWEST} rows at least, a multiple of {_rows_at_once(width)}, got {num_rows}"
    return None


def rms_norm(x, scale, *, epsilon, swish=False):
    """scale ⊙ h / sqrt(mean(h²) + epsilon), with h = x, or swish(x), for x [..., D] and scale [D] in float32."""
    return _norm(*tiles.vary_alike(x, scale), epsilon, swish)


def rms_norm_of_sum(x, update, scale, *, epsilon):
    """(x + update, its norm); for an update of None x itself. What comes back for the two is added up in the kernel."""
    return _norm_of_sum(*tiles.vary_alike(x, update, scale), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x, scale, epsilon, swish):
    (out,) = _forward(x, None, scale, epsilon, swish)
    return out


def _norm_forward(x, scale, epsilon, swish):
    return _norm(x, scale, epsilon, swish), (x, scale)


def _norm_backward(epsilon, swish, saved, d_out):
    return _backward(*saved, d_out, None, epsilon, swish)


_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_of_sum(x, update, scale, epsilon):
    *total, out = _forward(x, update, scale, epsilon, False)
    return (*total, out) if total else (x, out)


def _sum_forward(x, update, scale, epsilon):
    total, out = _norm_of_sum(x, update, scale, epsilon)
    return (total, out), (total, scale, update is None)


def _sum_backward(epsilon, saved, cotangents):
    total, scale, no_update = saved
    d_total, d_out = cotangents
    dx, d_scale = _backward(total, scale, d_out, d_total, epsilon, False)
    return dx, None if no_update else dx, d_scale


_norm_of_sum.defvjp(_sum_forward, _sum_backward)


def _forward(x, update, scale, epsilon, swish):
    """(the norm,) or, with an update, (the sum, the norm)"""

    def body(rows, _, scale, x_ref, *refs):
        x = _load(x_ref, rows)
        *update_refs, out_ref = refs
        if update_refs:
            update_ref, total_ref = update_refs
            total_ref[rows] = total = (x + _load(update_ref, rows)).astype(dtype)
            x = total.astype(jnp.float32)
        h = x * lax.logistic(x) if swish else x
        out_ref[rows] = (h * _inverse_size(h, epsilon) * scale()).astype(dtype)

    dtype = x.dtype
    operands = (x,) if update is None else (x, update)
    return _row_kernel(
        "rms_norm", body, scale, operands, num_outputs=len(operands), occupancy=FORWARD_SWISH if swish else FORWARD
    )


def _backward(x, scale, d_out, d_total, epsilon, swish):
    """Gradients of x and scale: with n = h / sqrt(mean(h²) + epsilon) and g = scale ⊙ d_out,

    dh = d_total + (g - n mean(n ⊙ g)) / sqrt(mean(h²) + epsilon);   d_scale = Σ n ⊙ d_out over the rows
    """

    def body(rows, d_scale, scale, x_ref, d_out_ref, *refs):
        *d_total_refs, dx_ref = refs
        x, d_out = _load(x_ref, rows), _load(d_out_ref, rows)
        sigmoid = lax.logistic(x) if swish else None
        h = x * sigmoid if swish else x
        inverse = _inverse_size(h, epsilon)
        n, g = h * inverse, scale() * d_out
        dx = (g - n * along_rows((n * g).sum(axis=1) / width, width)) * inverse
        if swish:
            dx *= sigmoid + h * (1 - sigmoid)
        dx_ref[rows] = sum((_load(ref, rows) for ref in d_total_refs), dx).astype(dtype)
        return d_scale + n * d_out

    dtype, width = x.dtype, x.shape[-1]
    operands = (x, d_out) if d_total is None else (x, d_out, d_total)
    dx, d_scale = _row_kernel(
        "rms_norm_backward",
        body,
        scale,
        operands,
        num_outputs=1,
        sums=True,
        occupancy=BACKWARD_SWISH if swish else BACKWARD,
    )
    return dx, d_scale.sum((0, 1))


def _row_kernel(name, body, scale, operands, *, num_outputs, occupancy, sums=False):
    """A kernel over all rows of arrays [..., D]; with `sums` it adds up [D] in float32 besides, in parts.

    `body(rows, sums, scale, *refs)` does some rows, `rows`, of operands and outputs, references to [all rows, D], and
    returns the sums with theirs added; `scale()` is the scale in each row.
    """
    shape, dtype = operands[0].shape, operands[0].dtype
    width, num_rows = shape[-1], operands[0].size // shape[-1]
    at_once = _rows_at_once(width)
    turns = num_rows // at_once
    blocks = min(tiles.multiprocessors() * occupancy, turns)

    def every_block(scale_ref, *refs):
        block = lax.axis_index("block")

        def scale():
            return along_columns(plgpu.load(scale_ref, layout=_layout(width).reduce(0), optimized=False), at_once)

        def some_rows(turn, so_far):
            return body(pl.ds((block + turn * blocks) * at_once, at_once), so_far, scale, *rows_refs)

        *rows_refs, sums_ref = refs if sums else (*refs, None)
        start = plgpu.layout_cast(jnp.zeros((at_once, width), jnp.float32), _layout(width)) if sums else None
        total = lax.fori_loop(0, (turns - block + blocks - 1) // blocks, some_rows, start)
        if sums:
            sums_ref[block] = total

    outputs = [((num_rows, width), dtype)] * num_outputs + [((blocks, at_once, width), jnp.float32)] * sums
    operands = (scale, *(x.reshape(num_rows, width) for x in operands))
    results = tiles.kernel(name, every_block, *outputs, grid={"block": blocks})(*operands)
    return tuple(x.reshape(shape) for x in results[:num_outputs]) + tuple(results[num_outputs:])


def _rows_at_once(width):
    """How many rows a warpgroup does at a time: 12 numbers and more for each thread."""
    return max(1, 2048 // width)


def _layout(width):
    """How threads share rows [rows at once, width]: neighbours have neighbouring columns, every thread has all rows."""
    tiling = plgpu.Tiling(((_rows_at_once(width), COLUMNS), (COLUMNS // 4,), (COLUMNS // 128,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _load(ref, rows):
    return plgpu.load(ref.at[rows], layout=_layout(ref.shape[-1]), optimized=False).astype(jnp.float32)


def _inverse_size(h, epsilon):
    """1 / sqrt(mean(h²) + epsilon) of each row, along it"""
    width = h.shape[1]
    return along_rows(lax.rsqrt((h * h).sum(axis=1) / width + epsilon), width)
