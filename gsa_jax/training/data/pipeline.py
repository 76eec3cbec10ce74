"""From a corpus to batches of token ids: shuffled, sharded, packed into rows, resumable, all by grain.

A document's ids are [sep] + tokens + [sep]; inputs are ids[:-1] and targets ids[1:], packed side by side. So a target
is always the token after its input, at a row's border too, and never one of another document. A document that does not
fit into a row goes on in the next.

A batch is a dict of int32 arrays [batch, length]:

    inputs, targets   token ids
    segment_ids       which document of its row a position belongs to, from 1; 0 is padding
    target_bytes      evaluation only: UTF-8 bytes that the target stands for, 0 for separators
    positions         evaluation only: index of the input in its document, 0 for the opening separator

Bits per byte of an evaluation set are the total loss in nats / ln 2 / the sum of all target_bytes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Annotated

import grain
import numpy as np
import tyro

from gsa_jax.layers.checks import check_numbers
from gsa_jax.training.data.corpus import STDLIB, Corpus, DataError, open_corpus
from gsa_jax.training.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

_READ_THREADS = 4
_DOCUMENTS_AHEAD = 8
_BATCHES_AHEAD = 2
_ROWS_SHUFFLED = 1024
"""Rows among which the order is random: neighbours in a long document don't land in one batch."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What text to train on, and how it becomes tokens."""

    path: Annotated[str, tyro.conf.arg(aliases=("--data",))] = STDLIB
    """Text, JSONL or Parquet files: a file, a directory or a glob; "stdlib" is Python's own standard library."""
    tokenizer: str = "byte"
    """The tokenizer: "byte", or the path of a Hugging Face tokenizer.json."""
    text_field: str = "text"
    """The JSONL field or Parquet column that holds the text."""
    skip_bad: Annotated[bool, tyro.conf.arg(aliases=("--skip-bad",))] = False
    """Skip and count documents that cannot be read, instead of stopping."""
    validation_fraction: float = 0.05
    """The fraction of the documents held out for validation, chosen by a fixed hash of their names."""
    streams: int = 1
    """Streams that documents are dealt to, best one a host; the order of the data depends on them, not on the hosts."""

    def __post_init__(self):
        check_numbers(self, "validation_fraction")

    def open(self, split: str) -> Corpus:
        """Opens the split "train", "validation" or "all"; see `open_corpus`."""
        return open_corpus(
            self.path,
            split,
            text_field=self.text_field,
            skip_bad=self.skip_bad,
            validation_fraction=self.validation_fraction,
        )


def training_batches(
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    seed: int,
    num_epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    corpus: Corpus | None = None,
) -> grain.DatasetIterator[Batch]:
    """Shuffled batches of the training split, each epoch in an order of its own.

    The iterator's `get_state()` is a small dict that survives JSON; `set_state(state)` on an iterator made with the
    same arguments goes on with exactly the batches that would have come.

    Args:
      config: the corpus and the tokenizer.
      batch_size: rows of a batch, on this shard.
      length: tokens of a row.
      seed: of the order of the documents, >= 0.
      num_epochs: passes over the corpus, None for ever; the last batch of the last pass is padded with empty rows.
      shard_index, shard_count: which of how many disjoint parts of every epoch to read (jax.process_index(), count).
      corpus: the opened training split, for those who want to read its `skipped` later; by default opened here.

    Raises:
      DataError: as `open_corpus` and `load_tokenizer`; a corpus shorter than one row or with fewer documents than
        shards. The iterator raises it too, at a document that cannot be read.
    """
    _check_arguments(batch_size=batch_size, length=length, shard_index=shard_index, shard_count=shard_count)
    corpus = corpus or config.open("train")
    tokenizer = load_tokenizer(config.tokenizer)
    _check_size(corpus, tokenizer, length, shard_count)
    documents = grain.MapDataset.source(corpus).seed(seed).shuffle()[shard_index::shard_count]
    ahead = min(_DOCUMENTS_AHEAD, len(documents))  # a corpus of one long text need not be in memory many times
    documents = documents.repeat(num_epochs).map(functools.partial(_training_document, tokenizer))
    rows = _pack(documents, length, _TRAINING_FIELDS, ahead=ahead)
    rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=_ROWS_SHUFFLED, seed=seed)
    return iter(_read_ahead(_batch(rows, batch_size)))


def validation_batches(
    config: DataConfig,
    *,
    batch_size: int,
    length: int,
    shard_index: int = 0,
    shard_count: int = 1,
    corpus: Corpus | None = None,
) -> grain.DatasetIterator[Batch]:
    """One pass over the validation split, rows in a fixed random order, the last batch padded with empty rows.

    All shards get the same number of batches: each packs the whole split and takes its part of every global batch. The
    arguments and errors are those of `training_batches`.
    """
    _check_arguments(batch_size=batch_size, length=length, shard_index=shard_index, shard_count=shard_count)
    documents = _evaluation_documents(config, corpus or config.open("validation"))
    rows = _pack(documents, length, _EVALUATION_FIELDS)
    rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=_ROWS_SHUFFLED, seed=0)
    shard = slice(shard_index * batch_size, (shard_index + 1) * batch_size)
    batches = _batch(rows, batch_size * shard_count)
    return iter(_read_ahead(batches.map(lambda batch: {name: values[shard] for name, values in batch.items()})))


def evaluation_stream(
    config: DataConfig, *, batch_size: int, length: int, split: str = "all", corpus: Corpus | None = None
) -> Iterator[Batch]:
    """Batches for evaluation with state carried over windows, so that a document may be longer than a window.

    Row i of a batch goes on where row i of the batch before ended. Where `positions[i, 0] > 0` it continues a document,
    and the state after that row must go in; elsewhere it starts afresh. Within a row `segment_ids` separates the
    documents, as always. Every document of the split comes once; rows that run out of documents are padding.

    The arguments and errors are those of `training_batches`.
    """
    _check_arguments(batch_size=batch_size, length=length)
    documents = _evaluation_documents(config, corpus or config.open(split))
    lanes = [_pack(documents[lane::batch_size], length, _EVALUATION_FIELDS, ahead=0) for lane in range(batch_size)]
    padding = dict.fromkeys((*_EVALUATION_FIELDS, "segment_ids"), np.zeros(length, np.int32))
    rows_of_batches = itertools.zip_longest(*lanes, fillvalue=padding)
    return ({name: np.stack([row[name] for row in rows]) for name in padding} for rows in rows_of_batches)


def _check_arguments(*, batch_size: int, length: int, shard_index: int = 0, shard_count: int = 1) -> None:
    if batch_size < 1 or length < 1:
        raise DataError(f"batch_size={batch_size}, length={length}: expected both to be at least 1")
    if not 0 <= shard_index < shard_count:
        raise DataError(f"shard_index={shard_index}: expected 0 <= shard_index < shard_count={shard_count}")


def _check_size(corpus: Corpus, tokenizer: Tokenizer, length: int, shard_count: int) -> None:
    """Refuses a corpus that cannot fill one row, or gives some shard nothing at all; reads as far as needed."""
    if len(corpus) < shard_count:
        raise DataError(f"path={corpus.path!r}: {len(corpus)} documents, expected at least shard_count={shard_count}")
    tokens = 0
    for text in corpus:
        tokens += len(tokenizer.encode(text)) + 1
        if tokens >= length:
            return
    skipped = f" ({len(corpus.skipped)} bad documents skipped, first: {corpus.skipped[0]})" if corpus.skipped else ""
    raise DataError(
        f"path={corpus.path!r}: the training split has {tokens} tokens, expected at least length={length}{skipped}"
    )


# Documents

_TRAINING_FIELDS = ("inputs", "targets")
_EVALUATION_FIELDS = (*_TRAINING_FIELDS, "target_bytes", "positions")


def _training_document(tokenizer: Tokenizer, text: str) -> dict[str, np.ndarray]:
    ids = np.pad(tokenizer.encode(text), 1, constant_values=tokenizer.separator)
    return {"inputs": ids[:-1], "targets": ids[1:]}


def _evaluation_document(tokenizer: Tokenizer, text: str) -> dict[str, np.ndarray]:
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    ids = np.pad(ids, 1, constant_values=tokenizer.separator)
    positions = np.arange(len(ids) - 1, dtype=np.int32)
    return {"inputs": ids[:-1], "targets": ids[1:], "target_bytes": np.pad(num_bytes, (0, 1)), "positions": positions}


def _evaluation_documents(config: DataConfig, corpus: Corpus) -> grain.MapDataset:
    tokenizer = load_tokenizer(config.tokenizer)
    return grain.MapDataset.source(corpus).map(functools.partial(_evaluation_document, tokenizer))


# Rows and batches


def _pack(
    documents: grain.MapDataset, length: int, fields: tuple[str, ...], *, ahead: int = _DOCUMENTS_AHEAD
) -> grain.IterDataset:
    """Packs documents into rows of `length`, reading `ahead` of them in threads (in order: the rows do not change)."""
    read_options = grain.ReadOptions(num_threads=min(ahead, _READ_THREADS), prefetch_buffer_size=ahead)
    packed = grain.experimental.ConcatThenSplitIterDataset(
        documents.to_iter_dataset(read_options), length_struct=dict.fromkeys(fields, length)
    )

    def to_row(packed_row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: packed_row[name] for name in fields} | {"segment_ids": packed_row["inputs_segment_ids"]}

    return _JsonState(packed).map(to_row)


def _batch(rows: grain.IterDataset, batch_size: int) -> grain.IterDataset:
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, batch_fn=pad)


def _read_ahead(batches: grain.IterDataset) -> grain.IterDataset:
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD)


class _JsonState(grain.IterDataset):
    """The parent dataset, with iterator states that survive JSON.

    JSON makes lists of tuples, and grain's packing (to 0.2.18 at least) takes a state's empty slice [-1, -1] for a rest
    of a document unless it is a tuple: restored from a checkpoint, it would drop a document without a word.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonStateIterator(iter(self._parent))


class _JsonStateIterator(grain.DatasetIterator):
    def __next__(self):
        return next(self._parent)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(_tuples(state))


def _tuples(state):
    """A state with every list turned into a tuple."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list | tuple) else state
