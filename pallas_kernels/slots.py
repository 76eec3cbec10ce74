"""Reads of a memory by its rows, as in Gated Slot Attention's softmax: a kernel's frame, slots in blocks of 64."""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels import columns, decays, tiles
from pallas_kernels.tiles import SIZE

STAGES = 3
"""of the loops over channels"""


class Block(NamedTuple):
    """64 slots and their scratch tiles, by the tiles' numbers."""

    slots: pl.Slice
    """which of the slots"""
    write: int
    """the write strengths, then what `decays.Pairs` makes of them"""
    parts: int
    """the log decays"""
    rest: int
    """their second part, or what `decays.Pairs` leaves there"""
    beside: int
    """what comes with the gates; the first block's is where the scores will be"""


class Scratch(NamedTuple):
    """Scratch tiles, by their numbers. Those of the loop over channels come first and are also the levels'."""

    leaving: range
    """those of the loop's last stage: results leave by them when the loop is over"""
    scores: int
    blocks: list
    total: int


def scratch(num_slots):
    """The `Scratch` of a kernel for so many slots, a multiple of 64."""
    first, *others = ranges(num_slots)
    in_stage = 3 + len(others)
    ring = STAGES * in_stage
    scores, write, parts, rest, total = range(ring, ring + 5)
    blocks = [Block(first, write, parts, rest, scores)]
    for slots in others:
        blocks.append(Block(slots, *range(total, total + 4)))
        total += 4
    return Scratch(range(ring - in_stage, ring), scores, blocks, total)


class Chunk(NamedTuple):
    """What `row_read` hands on, of one chunk and head."""

    here: tuple
    """(b, tokens, h)"""
    blocks: list[Block]
    pairs: list[decays.Pairs]
    """of every block"""
    products: tuple[jax.Array, list[jax.Array]]
    """x_i·y_j [64, 64] and, for every block, the states' rows times x_i [64, 64], float32 in registers"""
    scores: jax.Ref
    """a tile for the scores of the pairs"""
    beside: list[jax.Ref]
    """for every block the tile of `beside`, until `scores` is filled"""
    leaving: "Leaving"
    gates_done: Callable[[], None]
    """to be called when scores and pairs are not needed any more, all threads having met since"""


class Source(NamedTuple):
    """Where `row_read` has a chunk's `products` from."""

    operands: tuple[jax.Array, ...]
    num_heads: int
    width: int
    """channels that are gone over"""
    in_stage: int
    """tiles that come together"""
    of_chunk: Callable
    """from a chunk, references to the operands, tiles and barriers to what `columns.over_turns` wants of it"""


def multiplied(x, y, states):
    """Products that `row_read` makes: of a chunk's tokens with each other and with the state that enters.

    Args:
      x: [B, T, H, D], two-byte; D is a multiple of 64.
      y: [B, T, G, D].
      states: [B, G, N, M, D], M a multiple of 64.
    """
    num_heads, width = x.shape[2:]
    per_head = num_heads // y.shape[2]
    blocks = ranges(states.shape[3])
    pairs = [(0, 1 + i) for i in range(1 + len(blocks))]

    def of_chunk(chunk, refs, pool, arrived):
        x_ref, y_ref, states_ref = refs
        b, h, n = chunk
        g, tokens = lax.div(h, per_head), pl.ds(n * SIZE, SIZE)
        arrays = [
            lambda channels: x_ref.at[b, tokens, h, channels],
            lambda channels: y_ref.at[b, tokens, g, channels],
            *(lambda channels, block=block: states_ref.at[b, g, n, block, channels] for block in blocks),
        ]
        return columns.inner_products(arrays, pairs, width, pool, STAGES, arrived)

    return Source((x, y, states), num_heads, width, 2 + len(blocks), of_chunk)


def added(products):
    """Products with 64 slots that `key_read` made, [P · 3, B, T, H, 64]: of every part x in two parts, and s."""
    num_parts, num_heads = products.shape[0] // 3, products.shape[3]

    def of_chunk(chunk, refs, pool, arrived):
        b, h, n = chunk
        (products_ref,) = refs
        tokens = pl.ds(n * SIZE, SIZE)
        arrays = [lambda part, i=i: products_ref.at[3 * part + i, b, tokens, h] for i in range(3)]
        return columns.sums(arrays, [(2,), (0, 1)], num_parts, pool, STAGES, arrived)

    return Source((products,), num_heads, 0, 3, of_chunk)


def row_read(name, rest, source, parts, mild, write, *, outputs, beside=None, interpret=None):
    """A kernel that reads a memory, by the products of a chunk's tokens with each other and with the state that enters.

    `rest(chunk, *output_refs)` does with a `Chunk` what else there is to do. The next chunk's tiles are asked for while
    it does so: those of products right away where gates are mild, as the levels of others need them, gates in the end.

    Args:
      source: of the products.
      parts, mild: [P, B, T, G, M] and [B, G, N, M / 64], log decays from `gates.chunk_gates`.
      write: [B, T, G, M] or None for 1 - exp(log decay).
      outputs: their last axes, the others are [B, T, H].
      beside: [B, T, H, M], which comes with the gates, or None.
    """
    num_parts, batch_size, length, num_groups, num_slots = parts.shape
    num_heads, dtype = source.num_heads, parts.dtype
    per_head = num_heads // num_groups
    own = scratch(num_slots)
    optional = [write, beside]

    def body(turn, pool, constants, arrived, *refs):
        refs = list(refs)
        sources = [refs.pop(0) for _ in source.operands]
        levels_ref, mild_ref, parts_ref = (refs.pop(0) for _ in range(3))
        write_refs, beside_refs = ([refs.pop(0)] if array is not None else [] for array in optional)

        def products(chunk):
            return source.of_chunk(chunk, sources, pool, arrived["step"])

        def request_gates(chunk):
            b, h, n = chunk
            g, tokens, barrier = lax.div(h, per_head), pl.ds(n * SIZE, SIZE), arrived["gates"]
            for block in own.blocks:
                for i in range(num_parts):
                    part = parts_ref.at[i, b, tokens, g, block.slots]
                    plgpu.copy_gmem_to_smem(part, pool.at[block.parts + i], barrier)
                for ref in write_refs:
                    plgpu.copy_gmem_to_smem(ref.at[b, tokens, g, block.slots], pool.at[block.write], barrier)
                for ref in beside_refs:
                    plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, block.slots], pool.at[block.beside], barrier)

        pl.when(turn.step == 0)(lambda: request_gates(turn.chunk))
        finish, follow = columns.over_turns(turn, products, early=STAGES - 1)
        b, h, n = turn.chunk
        g = lax.div(h, per_head)
        mild = functools.reduce(operator.and_, [mild_ref[b, g, n, i] > 0 for i in range(len(own.blocks))])
        plgpu.barrier_wait(arrived["gates"])

        def pairs(block):
            parts = [pool.at[block.parts + i] for i in range(num_parts)]
            levels = decays.Levels(levels_ref, parts, pool, 0, arrived)
            write, rest = pool.at[block.write], pool.at[block.rest]
            return decays.Pairs(mild, levels, write, rest, constants, derived=not write_refs)

        def gates_done():
            pl.when(~turn.is_last)(lambda: request_gates(turn.following))
            follow(~mild)

        of_blocks = list(map(pairs, own.blocks))
        xy, *from_state = finish()
        follow(mild)
        chunk = Chunk(
            here=(b, pl.ds(n * SIZE, SIZE), h),
            blocks=own.blocks,
            pairs=of_blocks,
            products=(xy, from_state),
            scores=pool.at[own.scores],
            beside=[pool.at[block.beside] for block in own.blocks],
            leaving=Leaving(own, pool),
            gates_done=gates_done,
        )
        rest(chunk, *refs)

    given = [array for array in optional if array is not None]
    return tiles.chunk_kernel(
        name,
        body,
        *[((batch_size, length, num_heads, size), dtype) for size in outputs],
        shape=(batch_size, num_heads, mild.shape[2]),
        dtype=dtype,
        tiles=own.total,
        constants=1,
        width=source.width,
        arrivals={
            "step": (STAGES, source.in_stage),
            **decays.Levels.ARRIVALS,
            "gates": len(own.blocks) * (num_parts + len(given)),
        },
        interpret=interpret,
    )(decays.constant_tiles(dtype), *source.operands, decays.level_tiles(dtype), mild, parts, *given)


class Leaving:
    """Results on their way to memory, one after another by the same few tiles."""

    def __init__(self, scratch, pool):
        self.tiles = itertools.cycle([pool.at[number] for number in scratch.leaving])
        self.others = len(scratch.leaving) - 1

    def save(self, x, ref):
        """Stores x, from registers."""
        tile = next(self.tiles)
        plgpu.wait_smem_to_gmem(self.others, wait_read_only=True)
        tiles.leave(x, tile, ref)


def ranges(num_slots):
    """The blocks of slots, as indices."""
    return [pl.ds(first, SIZE) for first in range(0, num_slots, SIZE)]
