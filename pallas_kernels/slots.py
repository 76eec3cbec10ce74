"""Where the kernels that read Gated Slot Attention's memories keep 64 slots each: blocks of slots, tiles of scratch."""

from typing import NamedTuple

import jax.experimental.pallas as pl

from pallas_kernels.tiles import SIZE

STAGES = 3
"""steps in flight of the first loop over channels: a tile of queries, one of tokens and one of each block's state"""


class Block(NamedTuple):
    """Scratch tiles of 64 slots, by their numbers."""

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


def scratch(num_blocks):
    """The `Scratch` of a kernel for so many blocks of slots."""
    ring = STAGES * (2 + num_blocks) - 1
    out, write, scores, parts, rest, total = range(ring, ring + 6)
    blocks = [Block(write, parts, rest, scores)]
    for _ in range(1, num_blocks):
        blocks.append(Block(*range(total, total + 4)))
        total += 4
    return Scratch(ring, out, scores, blocks, total)


def ranges(num_slots):
    """The blocks of slots, as indices."""
    return [pl.ds(first, SIZE) for first in range(0, num_slots, SIZE)]
