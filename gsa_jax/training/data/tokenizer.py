"""Tokenizers: text to token ids and back, with an exact account of the bytes behind every token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gsa_jax.training.data.corpus import DataError

SEPARATOR_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<eos>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<EOS_TOKEN>",
    "<|eos|>",
    "[EOS]",
    "[SEP]",
)
"""What tokenizer files call the end of a text, in the order in which they are tried."""


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer. Text never encodes to the separator."""

    vocab_size: int
    separator: int

    def encode(self, text: str) -> np.ndarray:
        """The token ids of a text, int32 [n], without separators."""
        ...

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of a text and how many of its UTF-8 bytes each stands for, both int32 [n].

        The counts of a text that has tokens sum to its length in UTF-8, so that bits per byte are exact.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids [n]; separators are left out."""
        ...


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer "byte", or that of a Hugging Face `tokenizer.json` (or of the directory that holds one).

    Raises:
      DataError: no such file, not a tokenizer, or one without a separator.
    """
    return ByteTokenizer() if name_or_path == "byte" else FileTokenizer(name_or_path)


def decode_after(tokenizer: Tokenizer, before: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids` where it goes on after that of the ids `before`: some tokenizers leave out the space that a
    text begins with."""
    return tokenizer.decode(np.concatenate([before, ids]))[len(tokenizer.decode(before)) :]


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255; 256 separates documents."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[ids < self.separator].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`. Its end-of-text token separates documents, and adds nothing else to them."""

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer as HuggingFaceTokenizer
        except ImportError as error:
            raise DataError(f"tokenizer={path!r} needs tokenizers, `pip install tokenizers`") from error
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise DataError(f"tokenizer={path!r}: no such file, expected 'byte' or the path of a tokenizer.json")
        try:
            tokenizer = HuggingFaceTokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exceptions
            raise DataError(f"tokenizer={path!r}: expected a Hugging Face tokenizer.json, got {error}") from None
        vocabulary = tokenizer.get_vocab()
        separator = next((vocabulary[name] for name in SEPARATOR_NAMES if name in vocabulary), None)
        if separator is None:
            raise DataError(f"tokenizer={path!r}: no end-of-text token, expected one of {', '.join(SEPARATOR_NAMES)}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that spells a special token gets its letters
        self._tokenizer = tokenizer
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = separator

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        # Token i stands for what lies between the ends of tokens i - 1 and i, so nothing is counted twice or left out.
        ends = np.maximum.accumulate([end for _, end in encoding.offsets])
        ends[-1] = len(text)
        num_bytes = np.diff(_byte_offsets(text)[ends], prepend=0)
        return np.asarray(encoding.ids, np.int32), num_bytes.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return self._tokenizer.decode(ids[ids != self.separator].tolist(), skip_special_tokens=False)


def _byte_offsets(text: str) -> np.ndarray:
    """Where each character of a text starts in UTF-8, and where the last one ends: int64 [characters + 1]."""
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + sum((code_points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(widths)])
