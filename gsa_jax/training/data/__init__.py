"""Text in, batches of token ids out: corpora, tokenizers and the input pipeline."""

from gsa_jax.training.data.corpus import STDLIB, Corpus, DataError, open_corpus
from gsa_jax.training.data.pipeline import (
    Batch,
    DataConfig,
    evaluation_stream,
    training_batches,
    validation_batches,
)
from gsa_jax.training.data.streams import HostBatches
from gsa_jax.training.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, decode_after, load_tokenizer

__all__ = [
    "STDLIB",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "DataError",
    "FileTokenizer",
    "HostBatches",
    "Tokenizer",
    "decode_after",
    "evaluation_stream",
    "load_tokenizer",
    "open_corpus",
    "training_batches",
    "validation_batches",
]
