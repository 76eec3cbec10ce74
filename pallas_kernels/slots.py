"""What the kernels that read Gated Slot Attention's memories share: slots in blocks of 64, their tiles and gates."""

import functools
import operator
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels import decays
from pallas_kernels.tiles import SIZE

STAGES = 3
"""steps in flight of the first loop over channels: a tile of queries, one of tokens and one of each block's state"""


class Block(NamedTuple):
    """64 slots and their scratch tiles, by the tiles' numbers."""

    slots: pl.Slice
    """which of the slots"""
    write: int
    """the write strengths, then what `decays.Pairs` makes of them"""
    parts: int
    """the first part of the log decays, then what reads the state"""
    rest: int
    """the second part, or what rounding takes from `write`"""
    p: int
    """the softmax; the first block's lies where its scores come later"""


class Scratch(NamedTuple):
    """Scratch tiles of a kernel, by their numbers."""

    ring: int
    """tiles of the second loop over channels, the first ones; the first loop takes one more"""
    out: int
    """results leave by this tile and by the next one"""
    scores: int
    blocks: list[Block]
    total: int


def scratch(num_slots):
    """The `Scratch` of a kernel for so many slots, a multiple of 64."""
    first, *others = ranges(num_slots)
    ring = STAGES * (3 + len(others)) - 1
    out, write, scores, parts, rest, total = range(ring, ring + 6)
    blocks = [Block(first, write, parts, rest, scores)]
    for slots in others:
        blocks.append(Block(slots, *range(total, total + 4)))
        total += 4
    return Scratch(ring, out, scores, blocks, total)


def request_gates(scratch, pool, parts_ref, write_refs, here, arrived):
    """Asks for the log decays and, if there is a reference to them, the write strengths of `here`: (b, tokens, g)."""
    for block in scratch.blocks:
        for i in range(parts_ref.shape[0]):
            plgpu.copy_gmem_to_smem(parts_ref.at[i, *here, block.slots], pool.at[block.parts + i], arrived["gates"])
        for ref in write_refs:
            plgpu.copy_gmem_to_smem(ref.at[*here, block.slots], pool.at[block.write], arrived["gates"])


def pairs(scratch, pool, num_parts, levels_ref, mild_ref, chunk, constants, arrived, *, derived):
    """`decays.Pairs` of every block, once what `request_gates` asked for has arrived; `chunk` is (b, g, n)."""
    mild = functools.reduce(operator.and_, [mild_ref[*chunk, i] > 0 for i in range(len(scratch.blocks))])
    plgpu.barrier_wait(arrived["gates"])

    def of_block(block):
        parts = [pool.at[block.parts + i] for i in range(num_parts)]
        levels = decays.Levels(levels_ref, parts, pool, 0 + mild_ref[*chunk, 0], arrived)
        write, rest = pool.at[block.write], pool.at[block.rest]
        return decays.Pairs(mild, levels, write, constants, derived=derived, rest=rest)

    return list(map(of_block, scratch.blocks))


def ranges(num_slots):
    """The blocks of slots, as indices."""
    return [pl.ds(first, SIZE) for first in range(0, num_slots, SIZE)]
