"""What the kernels of this package share: tiles, products of tiles, one warpgroup a chunk.

A tile is 64 tokens or slots, the rows of one wgmma instruction, by 64 channels, in shared memory; in registers it is
one float32 array spread over a warpgroup. All names here speak of one tile.
"""

import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

SIZE = 64
"""rows and columns of a tile; tokens in a chunk"""
SQUARE = (SIZE, SIZE)
SHARED_MEMORY = 220 * 1024
"""bytes of tiles in a block, at most: an H100's 227 KiB, less barriers and scratch of reductions"""
MOST_WARPGROUPS = 2
"""in a block: a thread then has 255 registers; with three, 168, and some kernels spill"""

REGISTERS = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""one number a row"""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""one number a column"""


def scratch(shape, dtype=jnp.float32):
    """An array in shared memory; tiles of two-byte numbers as wgmma reads them."""
    swizzled = (plgpu.TilingTransform((8, SIZE)), plgpu.SwizzleTransform(128))
    is_operand = len(shape) >= 2 and jnp.dtype(dtype).itemsize == 2
    return plgpu.SMEM(shape, dtype, transforms=swizzled if is_operand else ())


def load(ref):
    """From shared memory to registers, in float32."""
    return plgpu.load(ref, layout=REGISTERS).astype(jnp.float32)


def transposed(ref):
    return ref.transpose((1, 0))


def product(*pairs):
    """Σ x @ y over the pairs, in float32 registers; x in registers or shared memory, y in shared memory."""

    def accumulate(acc):
        for x, y in pairs:
            plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))


def along_rows(x, columns=SIZE):
    """[rows] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def along_columns(x, rows=SIZE):
    """[columns] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def row_and_column():
    """(row, column) of every element, int32 [SIZE, SIZE] each.

    The rows hide from the compiler, behind a zero it can't know, which elements of a mask are constant: ptxas 13.0
    computes constant operands of a wgmma anew, in registers from which an earlier wgmma may still be reading.
    """
    row, column = (plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=REGISTERS) for axis in (0, 1))
    return row + unknown_zero(), column


@plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(SQUARE, jnp.int32, layout=REGISTERS))
def unknown_zero(_):
    """Zeros, from the number of the multiprocessor, of which the compiler doesn't know that it is below 2^24."""
    code = "{ .reg .u32 number; mov.u32 number, %smid; shr.u32 $0, number, 24; }"
    zero = llvm.inline_asm(ir.IntegerType.get_signless(32), [], code, "=r", has_side_effects=False)
    return mgpu.FragmentedArray.splat(zero, SQUARE, layout=REGISTERS.to_mgpu(), is_signed=True)


def kernel(name, body, *outputs, grid, interpret=None, **threads):
    """`plgpu.kernel` over a grid given as a dictionary, slowest axis first; outputs as (shape, dtype)."""

    body.__name__ = name  # as profiles show it

    def call(*operands):
        # Inside a shard_map the outputs vary over the mesh axes over which any operand does.
        kind = max((jax.typeof(x).manual_axis_type for x in operands), key=lambda kind: len(kind.varying))
        return plgpu.kernel(
            body,
            out_type=tuple(jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in outputs),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
            interpret=interpret,
            **threads,
        )(*operands)

    return call


def chunk_kernel(name, body, *outputs, shape, memory, arrivals, interpret=None):
    """A kernel whose every warpgroup does one chunk of one head: `body((b, h, n), memory, barriers, *refs)`.

    Args:
      body: gets the chunk's batch entry, head and number, its own shared memory and barriers by name, and the
        references to operands and outputs.
      outputs: (shape, dtype) each.
      shape: (batch size, number of heads, number of chunks).
      memory: name -> (shape, dtype) of an array in shared memory.
      arrivals: name -> how many copies a barrier waits for.
    """
    total, (_, num_heads, num_chunks) = math.prod(shape), shape
    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in memory.values())
    warpgroups = min(MOST_WARPGROUPS, SHARED_MEMORY // size)

    def every_warpgroup(*refs):
        warpgroup = lax.axis_index("warpgroup")
        index = lax.axis_index("block") * warpgroups + warpgroup

        def scoped(memory, barriers):
            @pl.when(index < total)
            def _():
                n, bh = lax.rem(index, num_chunks), lax.div(index, num_chunks)
                body(
                    (lax.div(bh, num_heads), lax.rem(bh, num_heads), n),
                    {name: ref.at[warpgroup] for name, ref in memory.items()},
                    {name: ref.at[warpgroup] for name, ref in barriers.items()},
                    *refs,
                )

        pl.run_scoped(
            scoped,
            {name: scratch((warpgroups, *shape), dtype) for name, (shape, dtype) in memory.items()},
            {name: plgpu.Barrier(num_arrivals=n, num_barriers=warpgroups) for name, n in arrivals.items()},
            collective_axes="warpgroup",
        )

    return kernel(
        name,
        every_warpgroup,
        *outputs,
        grid={"block": pl.cdiv(total, warpgroups)},
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
    )
