"""The simplest language model of bytes: what any trained one must beat."""

import numpy as np

START = 256
"""What stands before a document's first byte."""
MAX_BYTES = 64 * 2**20
"""Text that is enough to fit 257 x 257 numbers."""


def bigram_bits_per_byte(train, held_out, *, max_bytes=MAX_BYTES):
    """Bits per byte of `held_out` under a byte bigram model of `train`, both iterables of documents (str).

    P(b | a) = (count(a, b) + 1) / (count(a) + 256), counted over the first `max_bytes` bytes of each.
    """
    counts = _pair_counts(train, max_bytes)
    log_probability = np.log2((counts + 1) / (counts.sum(axis=1, keepdims=True) + 256))
    pairs = _pair_counts(held_out, max_bytes)
    return float(-(pairs * log_probability).sum() / pairs.sum())


def _pair_counts(documents, max_bytes):
    """How often byte b follows a, [257, 256]; row `START` counts the documents' first bytes."""
    counts, num_bytes = np.zeros((START + 1, 256)), 0
    for document in documents:
        if num_bytes >= max_bytes:
            break
        text = np.frombuffer(document.encode(), np.uint8).astype(np.int64)
        before = np.concatenate([[START], text[:-1]])[: len(text)]
        counts += np.bincount(before * 256 + text, minlength=counts.size).reshape(counts.shape)
        num_bytes += len(text)
    return counts
