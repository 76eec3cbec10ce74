"""The simplest language model of bytes: what any trained one must beat."""

import numpy as np

from gsa_jax.training.data import ByteTokenizer

ENOUGH = 64 * 2**20
"""Tokens that are enough to fit 257 x 257 numbers."""


def bigram_bits_per_byte(train, held_out):
    """Bits per byte of `held_out` under a bigram model of `train`: batches of `gsa_jax.training.data` of byte tokens.

    P(b | a) = (count(a, b) + 1) / (count(a) + 257), counted over the first `ENOUGH` tokens of `train`. As for any other
    model the separators that end documents cost bits and are no bytes.
    """
    counts = _pair_counts(train, ENOUGH)
    log_probability = np.log2((counts + 1) / (counts.sum(axis=1, keepdims=True) + len(counts)))
    pairs = _pair_counts(held_out)
    return float(-(pairs * log_probability).sum() / pairs[:, : ByteTokenizer.separator].sum())


def _pair_counts(batches, enough=np.inf):
    """How often token b follows a, [257, 257]; stops at the batch that makes `enough`."""
    size = ByteTokenizer.vocab_size
    counts = np.zeros((size, size))
    for batch in batches:
        pairs = size * batch["inputs"] + batch["targets"]
        counts += np.bincount(pairs[batch["segment_ids"] > 0], minlength=size**2).reshape(size, size)
        if counts.sum() >= enough:
            break
    return counts
