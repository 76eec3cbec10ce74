"""What the kernels that read Gated Slot Attention's memories share: slots in blocks of 64, their tiles and gates."""

import functools
import itertools
import operator
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels import decays
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
    p: int
    """the softmax, before the scores of the first block"""


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


class Leaving:
    """Results on their way to memory, one after another by the same few tiles."""

    def __init__(self, scratch, pool):
        self.tiles = itertools.cycle([pool.at[number] for number in scratch.leaving])
        self.others = len(scratch.leaving) - 1

    def save(self, x, ref):
        """Stores x, from registers."""
        tile = next(self.tiles)
        plgpu.wait_smem_to_gmem(self.others, wait_read_only=True)
        tile[...] = x.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, ref)


def ranges(num_slots):
    """The blocks of slots, as indices."""
    return [pl.ds(first, SIZE) for first in range(0, num_slots, SIZE)]
