"""Corpora: what they read, what they hold out, and what they say when they cannot."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax.training.data import DataError, open_corpus


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_parquet(path, columns, row_group_size=3):
    pa.parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def names(path, split, **options):
    corpus = open_corpus(str(path), split, **options)
    return [corpus.name(index) for index in range(len(corpus))]


# Reading


def test_text_directory_is_recursive_and_sorted(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\nü".encode())
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    corpus = open_corpus(str(tmp_path), "all")
    assert names(tmp_path, "all") == ["a/c.txt", "a/z.txt", "b.txt"]
    assert list(corpus) == ["a/c.txt\r\nü", "a/z.txt\r\nü", "b.txt\r\nü"]
    assert names(tmp_path / "*" / "*.txt", "all") == ["a/c.txt", "a/z.txt"]
    assert names(tmp_path / "**" / "**" / "*.txt", "all") == ["a/c.txt", "a/z.txt", "b.txt"]
    assert names(tmp_path / "**" / "*.txt", "all") == ["a/c.txt", "a/z.txt", "b.txt"]


def test_jsonl_of_other_systems(tmp_path):
    """A byte order mark, and lines that end as on Windows."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert list(open_corpus(str(path), "all")) == ["one", "two"]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=6), newline=st.booleans(), blank=st.integers(0, 3))
def test_jsonl_returns_its_documents(tmp_path_factory, texts, newline, blank):
    lines = [json.dumps({"text": text}) for text in texts]
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text(("\n" * (blank + 1)).join(lines) + "\n" * newline)
    assert list(open_corpus(str(path), "all")) == texts


def test_jsonl_field_and_names(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"], field="body")
    assert list(open_corpus(path, "all", text_field="body")) == ["x", "y"]
    assert names(path, "all", text_field="body") == ["a.jsonl:1", "a.jsonl:2"]


def test_parquet(tmp_path):
    texts = [f"row {i} ü" for i in range(10)]
    write_parquet(tmp_path / "a.parquet", {"id": list(range(10)), "text": texts})
    write_parquet(tmp_path / "b.parquet", {"id": [1], "text": ["last"]})
    corpus = open_corpus(str(tmp_path), "all")
    assert list(corpus) == [*texts, "last"]
    assert [corpus[i] for i in (7, 10, 0)] == [texts[7], "last", texts[0]]
    assert corpus.name(10) == "b.parquet:1"


def test_stdlib_leaves_out_tests_and_packages():
    found = names("stdlib", "all")
    assert {"abc.py", "json/decoder.py"} <= set(found)
    assert not [name for name in found if {"site-packages", "test", "tests", "idlelib"} & set(name.split("/"))]
    assert found == sorted(found)


# Splitting


def test_split_is_a_partition_of_about_the_right_size(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", map(str, range(4000)))
    for fraction in (0.05, 0.3):
        train, held_out = (set(names(path, split, validation_fraction=fraction)) for split in ("train", "validation"))
        assert not train & held_out
        assert train | held_out == set(names(path, "all"))
        assert len(held_out) / 4000 == pytest.approx(fraction, abs=0.02)
    assert len(names(path, "train", validation_fraction=0.0)) == 4000


def test_stdlib_split_is_about_the_right_size():
    assert 0.02 < len(names("stdlib", "validation")) / len(names("stdlib", "all")) < 0.08


def test_split_depends_on_names_alone(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("a")
    before = names(tmp_path, "validation", validation_fraction=0.2)
    assert [name for name in before if int(name[:-4]) < 20] == ["1.txt", "5.txt"], "fixed for good, on every machine"
    for i in range(60, 90):
        (tmp_path / f"{i}.txt").write_text("b")
    after = names(tmp_path, "validation", validation_fraction=0.2)
    assert [name for name in after if int(name[:-4]) < 60] == before

    lines = write_jsonl(tmp_path / "a.jsonl", "x" * 50)
    held_out = [3, 5, 12, 15, 16, 17, 22, 45, 49]
    assert names(lines, "validation", validation_fraction=0.2) == [f"a.jsonl:{row}" for row in held_out]
    longer = names(write_jsonl(tmp_path / "a.jsonl", "y" * 80), "validation", validation_fraction=0.2)
    assert longer[: len(held_out)] == [f"a.jsonl:{row}" for row in held_out] and len(longer) > len(held_out)


def test_the_only_text_file_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    (train,), (held_out,) = (open_corpus(str(tmp_path / "a.txt"), split) for split in ("train", "validation"))
    assert train + held_out == text and train.endswith("\n")
    assert len(held_out) / len(text) == pytest.approx(0.05, abs=0.01)
    assert list(open_corpus(str(tmp_path / "a.txt"), "all")) == [text]


# Bad input


def test_paths_that_cannot_be_opened(tmp_path):
    for path, message in {
        "nowhere": r"nowhere': no such file or directory, expected one, a glob or 'stdlib'",
        "*.txt": r"\*\.txt': the corpus is empty, expected files ending in \.txt",
        "": r"the corpus is empty, expected files",
    }.items():
        with pytest.raises(DataError, match=message):
            open_corpus(str(tmp_path / path))
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"'a\.csv' has an unknown extension, expected \.txt, \.py, \.jsonl, \.parquet"):
        open_corpus(str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl': the corpus is empty, no document in 1 file"):
        open_corpus(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"files of several kinds \(\.jsonl, \.txt\)"):
        open_corpus(str(tmp_path))


def test_arguments_are_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(DataError, match="split='test': expected one of train, validation, all"):
        open_corpus(path, "test")
    with pytest.raises(DataError, match=r"validation_fraction=1: expected a number in \[0, 1\)"):
        open_corpus(path, validation_fraction=1)
    with pytest.raises(DataError, match=r"a\.jsonl': the validation split is empty, as none of the 2 documents"):
        open_corpus(path, "validation", validation_fraction=0.0)


BAD_LINES = {
    b'{"text": "a"': r"bad\.jsonl, line 3: expected a JSON object, got a broken line",
    b'["text"]': r"bad\.jsonl, line 3: expected a JSON object, got list",
    b'{"body": "a", "id": 1}': r"bad\.jsonl, line 3: no field 'text', the line has 'body', 'id'",
    b'{"text": 3}': r"bad\.jsonl, line 3, field 'text': expected a string, got int",
    b'{"text": "\xff"}': r"bad\.jsonl, line 3: expected UTF-8 text, got 'utf-8' codec can't decode byte 0xff",
    b'{"text": "\\ud800"}': r"bad\.jsonl, line 3, field 'text': expected valid Unicode",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_jsonl_lines_are_named_or_skipped(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    corpus = open_corpus(str(path), "all")
    assert (corpus[0], corpus[2]) == ("first", "last")
    with pytest.raises(DataError, match=BAD_LINES[line]):
        corpus[1]

    corpus = open_corpus(str(path), "all", skip_bad=True)
    assert list(corpus) == list(corpus) == ["first", "last"]
    assert len(corpus.skipped) == 1


def test_bad_text_files_are_named_or_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(DataError, match=r"b\.txt, line 2: expected UTF-8 text"):
        list(open_corpus(str(tmp_path), "all"))
    corpus = open_corpus(str(tmp_path), "all", skip_bad=True)
    assert list(corpus) == ["fine"] and len(corpus.skipped) == 1


def test_bad_parquet_is_named_or_skipped(tmp_path):
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.parquet: expected a Parquet file"):
        open_corpus(str(tmp_path / "junk.parquet"))
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["x", None]})
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text', the file has 'id', 'body'"):
        open_corpus(path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2, column 'body': expected a string, got NoneType"):
        list(open_corpus(path, "all", text_field="body"))
    corpus = open_corpus(path, "all", text_field="body", skip_bad=True)
    assert list(corpus) == ["x"] and len(corpus.skipped) == 1
