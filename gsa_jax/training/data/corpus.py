"""Corpora: random-access collections of documents, split into training and validation by a fixed hash.

A corpus is made of files of one kind: plain text (a file is a document), JSON lines (a line is a document) or Parquet
(a row is a document). Every record of every file has a name, its file's path relative to the corpus root and its row
number, and the hash of that name alone says whether it is held out for validation.
"""

import functools
import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

STDLIB = "stdlib"
"""The path that stands for the default corpus, the running Python's own standard-library sources."""

SPLITS = ("train", "validation", "all")

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


class DataError(ValueError):
    """A corpus or tokenizer that cannot be used as asked: the message says where, what came and what was expected."""


def open_corpus(
    path: str,
    split: str = "train",
    *,
    text_field: str = "text",
    skip_bad: bool = False,
    validation_fraction: float = 0.05,
) -> "Corpus":
    """Opens one split of the documents at `path`.

    A corpus that is one plain-text file is one document, so it is not hashed but cut in two at a line's end: its last
    `validation_fraction` is the validation split.

    Args:
      path: "stdlib", or a .txt, .py, .jsonl or .parquet file, a glob of such files ("**" for any depth), or a directory
        that is searched for them at any depth. All files must be of one kind.
      split: "train", "validation" (about `validation_fraction` of the documents, held out by a hash of their names,
        whatever the order of the files and whatever the machine) or "all".
      text_field: the JSON field or Parquet column that holds the text.
      skip_bad: leave out documents that cannot be read, and count them, instead of raising `DataError`.
      validation_fraction: in [0, 1).

    Raises:
      DataError: a missing path, an unknown extension, files of several kinds, a missing Parquet column, an empty split.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: expected a number in [0, 1)")
    files = _open_files(path, text_field)
    if len(files) == 1 and isinstance(files[0], _TextFile) and split != "all" and validation_fraction > 0:
        part = _TextPart(files[0].name, files[0].path, split, validation_fraction)
        return Corpus(path, [part], [np.zeros(1, np.int64)], skip_bad)

    found = [file.rows() for file in files]
    kept = [_select(file.name, rows, split, validation_fraction) for file, rows in zip(files, found, strict=True)]
    if not sum(map(len, found)):
        raise DataError(f"path={path!r}: the corpus is empty, no document in {len(files)} file(s)")
    if not sum(map(len, kept)):
        raise DataError(
            f"path={path!r}: the {split} split is empty, as none of the {sum(map(len, found))} documents falls into it "
            f"at validation_fraction={validation_fraction}; expected more documents or another fraction"
        )
    return Corpus(path, files, kept, skip_bad)


class Corpus:
    """Documents by index, read when asked for: a grain data source, safe to read from several threads."""

    def __init__(self, path: str, files: list, rows: list[np.ndarray], skip_bad: bool = False):
        """Collects, for each of `files`, the documents at its `rows` (int64 [n])."""
        self.path = path
        self._files = files
        self._file = np.repeat(np.arange(len(files), dtype=np.int32), [len(r) for r in rows])
        self._row = np.concatenate(rows)
        self._skip_bad = skip_bad
        self._skipped: dict[tuple[int, int], str] = {}

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> str | None:
        """The text of a document; None for a bad one under skip_bad.

        Raises:
          DataError: the document cannot be read, and not skip_bad; names the file and the 1-based line or row.
        """
        file, row = int(self._file[index]), int(self._row[index])
        try:
            return self._files[file].read(row)
        except DataError as error:
            if not self._skip_bad:
                raise DataError(f"{error}; --skip-bad leaves such documents out, also of a run to --resume") from error
            self._skipped[file, row] = str(error)
            return None

    def __iter__(self) -> Iterator[str]:
        """All documents in order, the skipped ones left out."""
        texts = (self[index] for index in range(len(self)))
        return (text for text in texts if text is not None)

    def name(self, index: int) -> str:
        """The name of a document: its file's path relative to the corpus root and, unless it is plain text, ":row"."""
        file = self._files[self._file[index]]
        return file.name if isinstance(file, _TextFile) else f"{file.name}:{self._row[index] + 1}"

    @property
    def skipped(self) -> list[str]:
        """The messages of the bad documents met and skipped so far, each document once."""
        return list(self._skipped.values())


def _select(name: str, rows: np.ndarray, split: str, fraction: float) -> np.ndarray:
    """The rows of the file `name` that belong to `split`.

    SHAKE-128 yields as many bytes as wanted from the name, four a row: a row's draw depends on name and row alone.
    """
    if split == "all" or not len(rows):
        return rows
    digest = hashlib.shake_128(name.encode("utf-8", "surrogateescape")).digest(4 * (int(rows[-1]) + 1))
    held_out = np.frombuffer(digest, "<u4")[rows] < fraction * 2**32
    return rows[held_out if split == "validation" else ~held_out]


# Finding files


def _open_files(path: str, text_field: str) -> list:
    """The files of a corpus, in the order of their names."""
    if path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [file for file in root.rglob("*.py") if _NOT_STDLIB.isdisjoint(file.relative_to(root).parts)]
    else:
        root, found = _find_files(path)
    named = sorted((file.relative_to(root).as_posix(), file) for file in found)
    unknown = [name for name, file in named if file.suffix not in _READERS]
    if unknown:
        raise DataError(f"path={path!r}: {unknown[0]!r} has an unknown extension, expected {', '.join(_READERS)}")
    if not named:
        raise DataError(f"path={path!r}: the corpus is empty, expected files ending in {', '.join(_READERS)}")
    readers = {_READERS[file.suffix] for _, file in named}
    if len(readers) > 1:
        suffixes = ", ".join(sorted({file.suffix for _, file in named}))
        raise DataError(f"path={path!r}: files of several kinds ({suffixes}), expected one; name it by a glob")
    reader = readers.pop()
    return [reader(name, file) if reader is _TextFile else reader(name, file, text_field) for name, file in named]


def _find_files(path: str) -> tuple[Path, list[Path]]:
    """The root of a corpus and the files below it."""
    root = Path(path).expanduser()
    if root.is_file():
        return root.parent, [root]
    if root.is_dir():
        return root, [file for file in root.rglob("*") if file.suffix in _READERS and file.is_file()]
    if glob.has_magic(path):
        found = {Path(name) for name in glob.glob(str(root), recursive=True)}  # some of two "**" come several times
        while glob.has_magic(str(root)):
            root = root.parent
        return root, [file for file in found if file.is_file()]
    raise DataError(f"path={path!r}: no such file or directory, expected one, a glob or {STDLIB!r}")


# One class a kind of file: rows() gives the numbers of its records, read(row) the text of one, or raises DataError.


class _TextFile:
    """A plain-text file: one document."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def rows(self) -> np.ndarray:
        return np.zeros(1, np.int64)

    def read(self, row: int) -> str:
        try:
            return self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.path}, line {line}: expected UTF-8 text, got {error}") from None


class _TextPart(_TextFile):
    """The training or the validation part of the only text file of a corpus."""

    def __init__(self, name: str, path: Path, split: str, fraction: float):
        super().__init__(name, path)
        self._split, self._fraction = split, fraction

    def read(self, row: int) -> str:
        text = super().read(row)
        end = round(len(text) * (1 - self._fraction))
        cut = text.rfind("\n", 0, end) + 1 or end
        return text[:cut] if self._split == "train" else text[cut:]


class _JsonLines:
    """A file of JSON objects, one a line: a line is a document, blank lines are none."""

    def __init__(self, name: str, path: Path, field: str):
        self.name, self.path, self._field = name, path, field
        self._starts = _line_starts(path)

    def rows(self) -> np.ndarray:
        sizes = np.diff(self._starts)
        rows = np.flatnonzero(sizes > 1)
        with open(self.path, "rb") as file:
            blank = [row for row in np.flatnonzero(sizes == 2) if _read(file, self._starts[row], 1) == b"\r"]
        return np.setdiff1d(rows, blank)

    def read(self, row: int) -> str:
        start, end = self._starts[row : row + 2]
        with open(self.path, "rb") as file:
            line = _read(file, start, end - start - 1)
        where = f"{self.path}, line {row + 1}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: expected UTF-8 text, got {error}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: expected a JSON object, got a broken line ({error}): {line[:80]!r}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        if self._field not in record:
            raise DataError(f"{where}: no field {self._field!r}, the line has {_listed(record)}")
        return _checked_text(record[self._field], f"{where}, field {self._field!r}")


def _read(file, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _line_starts(path: Path) -> np.ndarray:
    """Where the lines of a file start, int64 [lines + 1]: line i is bytes [starts[i], starts[i + 1] - 1)."""
    size, starts = 0, [np.zeros(1, np.int64)]
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1))
            size += len(chunk)
    starts = np.concatenate(starts)
    return starts if starts[-1] == size else np.append(starts, size + 1)


class _ParquetFile:
    """A Parquet file: a row is a document; a row group is read at a time and the last few are kept."""

    def __init__(self, name: str, path: Path, column: str):
        self.name, self.path, self._column = name, path, column
        metadata = _read_parquet(path).metadata
        columns = metadata.schema.to_arrow_schema().names
        if column not in columns:
            raise DataError(f"{path}: no column {column!r}, the file has {_listed(columns)}")
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def rows(self) -> np.ndarray:
        return np.arange(self._starts[-1])

    def read(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        where = f"{self.path}, row {row + 1}, column {self._column!r}"
        try:
            text = _row_group(self.path, group, self._column)[row - int(self._starts[group])].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: expected UTF-8 text, got {error}") from None
        return _checked_text(text, where)


def _read_parquet(path: Path):
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow, `pip install pyarrow`") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{path}: expected a Parquet file, got {error}") from None


@functools.lru_cache(maxsize=8)
def _row_group(path: Path, group: int, column: str):
    with _read_parquet(path) as file:
        return file.read_row_group(group, columns=[column])[column]


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise DataError(f"{where}: expected valid Unicode, got {error}") from None
    return text


def _listed(names) -> str:
    return ", ".join(map(repr, names)) or "none"


_READERS = {".txt": _TextFile, ".py": _TextFile, ".jsonl": _JsonLines, ".parquet": _ParquetFile}
