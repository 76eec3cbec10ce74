"""What the kernels of this package share: tiles, products of tiles, one warpgroup a chunk.

A tile is 64 tokens or slots, the rows of one wgmma instruction, by 64 channels: two-byte numbers in shared memory, or
one array in the registers of a warpgroup. All functions here speak of one tile.

Shared memory is declared without transforms: Mosaic lays two-byte tiles out as wgmma reads them, in tiles of 8 rows
with 128 bytes swizzled, because of what is done with them. To state the same makes every access slower to lower.
"""

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sizes import choose, multiprocessors

SIZE = 64
"""rows and columns of a tile; tokens in a chunk"""
SQUARE = (SIZE, SIZE)
SHARED_MEMORY = 225 * 1024
"""bytes of tiles in a block, at most: an H100's 227 KiB, less barriers and scratch of reductions"""
WARPGROUPS = 2
"""in a block, unless told: a thread then has 255 registers; with three, 168, and most kernels spill"""
MOST_WARPGROUPS = 4
"""with which a thread still has 128"""

REGISTERS = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""one number a row"""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""one number a column"""


def anew(tiles, step):
    """The same tiles, but at addresses that depend on the step of a loop as far as the compiler can see.

    It would keep the addresses of all tiles in registers from step to step, some hundred, and spill what is computed.
    """
    zero = lax.shift_right_logical(step, 30)
    return tiles.at[pl.ds(zero, tiles.shape[0])]


def load(ref, dtype=jnp.float32):
    """From shared memory to registers."""
    return plgpu.load(ref, layout=REGISTERS).astype(dtype)


def leave(x, tile, ref):
    """From registers to a tile of shared memory, and on to `ref` in memory; it is under way when this returns."""
    tile[...] = x.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, ref)


def transposed(ref):
    return ref.transpose((1, 0))


def product(*pairs):
    """Σ x @ y over the pairs, in float32 registers; x in registers or shared memory, y in shared memory."""

    def accumulate(acc):
        for x, y in pairs:
            plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))


def two_parts(x, dtype):
    """x, float32 in registers, as a sum of two two-byte numbers: x rounded, and what rounding took."""
    rounded = _rounded(x, dtype)
    return rounded.astype(dtype), (x - rounded).astype(dtype)


def _rounded(x, dtype):
    """x as `dtype` can hold it, in float32: for bfloat16 by integer arithmetic, as conversions run at a fraction of its
    rate."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype).astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32) + 0x8000
    return lax.bitcast_convert_type(bits & ~0xFFFF, jnp.float32)


def pack_probabilities(p, dtype):
    """p in [0, 1], float32 in registers, as two-byte numbers of `dtype`: the bits of 2^15 p in float16, whose rounding
    of what is above 2e-9 is an eighth of bfloat16's."""
    return lax.bitcast_convert_type((2.0**15 * p).astype(jnp.float16), dtype)


def load_probabilities(ref):
    """From shared memory to registers, what `pack_probabilities` left."""
    bits = plgpu.load(ref, layout=REGISTERS)
    return 2.0**-15 * lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def sums(window, x, parts):
    """windowᵀ x: what comes from every token whose window, a row of the tile `window`, holds this one.

    Args:
      x: float32 in registers; it goes in two parts, by the tiles `parts`.
    """
    store_parts(x, parts)
    plgpu.commit_smem()
    result = product(*((transposed(window), part) for part in parts))
    plgpu.commit_smem()
    return result


def store_parts(x, parts):
    """From registers to shared memory, in two parts."""
    for part, tile in zip(two_parts(x, parts[0].dtype), parts, strict=True):
        tile[...] = part


def load_parts(parts):
    """From shared memory to registers, the sum of the parts."""
    return sum(map(load, parts))


def of_parts(x, y):
    """The pairs of a `product` x @ y from two parts of each; those of the second ones are too small to count."""
    (x, x_rest), (y, y_rest) = x, y
    return (x, y), (x, y_rest), (x_rest, y)


def along_rows(x, columns=SIZE):
    """[rows] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def along_columns(x, rows=SIZE):
    """[columns] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def row_and_column():
    """(row, column) of every element, int32 [SIZE, SIZE] each.

    Not for masks of wgmma's operands in registers: ptxas 13.0 computes elements that it knows to be constant anew, in
    registers from which an earlier wgmma may still be reading.
    """
    return tuple(plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=REGISTERS) for axis in (0, 1))


def vary_alike(*arrays):
    """Lets arrays, or None, vary over all the mesh axes of a `jax.shard_map` over which any of them does."""

    def varying(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*(varying(x) for x in arrays if x is not None))
    return [
        x if x is None or varying(x) == axes else lax.pcast(x, tuple(axes - varying(x)), to="varying") for x in arrays
    ]


def kernel(name, body, *outputs, grid, interpret=None, **threads):
    """`plgpu.kernel` over a grid given as a dictionary, slowest axis first; outputs as (shape, dtype).

    Mosaic would put a barrier before and after every store and before every copy; here the body has them, three times
    fewer. `plgpu.commit_smem` and `plgpu.wait_smem_to_gmem` are such: all threads of the warpgroup have come there. One
    has to lie between a product that reads a tile of shared memory and the store or the copy that overwrites it.

    What it returns takes the operands and, `in_place`, mutable arrays that the body reads and writes; they come behind.
    """
    body.__name__ = name  # as profiles show it

    def call(*operands, in_place=()):
        operands = vary_alike(*operands)
        run = plgpu.kernel(
            body,
            out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, reduction_scratch_bytes=1024, unsafe_no_auto_barriers=True
            ),
            interpret=interpret,
            **threads,
        )
        with jax.enable_x64(False):  # the integers of a body are of 32 bits
            results = run(*operands, *in_place)
        return vary_alike(*results, operands[0])[:-1]  # Mosaic forgets over which axes they vary

    return call


class Turn(NamedTuple):
    """A warpgroup's turn in its loop over chunks."""

    step: jax.Array
    """which of its turns, from 0"""
    chunk: tuple
    """(b, h, n): chunk n of head h of batch entry b"""
    following: tuple
    """the chunk of the next turn, unless this is the last"""
    is_last: jax.Array


def chunk_kernel(
    name,
    body,
    *outputs,
    shape,
    dtype,
    tiles,
    constants,
    arrivals,
    width=0,
    floats=(),
    warpgroups=WARPGROUPS,
    interpret=None,
):
    """A kernel whose every warpgroup does one chunk of one head after another.

    `body(turn, pool, constants, arrived, *refs)` does the chunk of a `Turn`, with scratch tiles [tiles, SIZE, SIZE] of
    its own, constant tiles [constants, SIZE, SIZE] that all share, and its barriers by name. Then come float32 scratch
    arrays of its own, of the shapes `floats`, and the references to operands and outputs. The first operand is the
    array whose first tiles are the constant ones.

    Args:
      outputs: (shape, dtype) each.
      shape: (batch size, number of heads, number of chunks).
      dtype: of the tiles.
      width: how many channels a chunk's loop goes over, if it has one.
      arrivals: name -> how many copies a barrier waits for, or (how many barriers there are of that name, the same).
      warpgroups: in a block, at most, unless the table of sizes has others.
    """
    total, (_, num_heads, num_chunks) = math.prod(shape), shape
    tile = math.prod(SQUARE) * jnp.dtype(dtype).itemsize
    own = tiles * tile + 4 * sum(map(math.prod, floats))
    fitting = min(MOST_WARPGROUPS, (SHARED_MEMORY - constants * tile) // own)
    rule, options = min(warpgroups, fitting), range(1, fitting + 1)
    warpgroups = choose(f"{name} warpgroups", (total, own // tile, width), rule, options)
    blocks = min(multiprocessors(), pl.cdiv(total, warpgroups))

    def every_warpgroup(constants_ref, *refs):
        warpgroup = lax.axis_index("warpgroup")
        first = lax.axis_index("block") * warpgroups + warpgroup

        def scoped(pool, shared, numbers, barriers, arrived):
            @pl.when(warpgroup == 0)
            def _():
                for i in range(constants):
                    plgpu.copy_gmem_to_smem(constants_ref.at[i], shared.at[i], arrived)

            if constants:
                plgpu.barrier_wait(arrived)

            steps = lax.div(total - first + blocks * warpgroups - 1, blocks * warpgroups)

            def chunk(step):
                index = first + step * (blocks * warpgroups)
                n, bh = lax.rem(index, num_chunks), lax.div(index, num_chunks)
                return lax.div(bh, num_heads), lax.rem(bh, num_heads), n

            def one_chunk(step, _):
                body(
                    Turn(step, chunk(step), chunk(step + 1), step == steps - 1),
                    anew(pool.at[warpgroup], step),
                    anew(shared, step) if constants else None,
                    {name: _own(barriers[name], warpgroup, n) for name, n in arrivals.items()},
                    *(array.at[warpgroup] for array in numbers),
                    *refs,
                )
                # The next chunk's tiles go where threads may still read, and copies to memory too.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()

            lax.fori_loop(0, steps, one_chunk, None)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((warpgroups, tiles, *SQUARE), dtype),
            plgpu.SMEM((constants, *SQUARE), dtype) if constants else None,
            [plgpu.SMEM((warpgroups, *shape), jnp.float32) for shape in floats],
            {name: _barriers(warpgroups, n) for name, n in arrivals.items()},
            plgpu.Barrier(num_arrivals=max(constants, 1)),
            collective_axes="warpgroup",
        )

    return kernel(
        name,
        every_warpgroup,
        *outputs,
        grid={"block": blocks},
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
    )


def _barriers(warpgroups, arrivals):
    count, copies = arrivals if isinstance(arrivals, tuple) else (1, arrivals)
    return plgpu.Barrier(num_arrivals=copies, num_barriers=warpgroups * count)


def _own(barriers, warpgroup, arrivals):
    """A warpgroup's barrier of a name; of several, the function that gives them by number."""
    if isinstance(arrivals, tuple):
        return lambda number: barriers.at[warpgroup * arrivals[0] + number]
    return barriers.at[warpgroup]
