"""The pipeline: nothing lost, nothing mixed, the same again after a restart."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax.training.data import (
    ByteTokenizer,
    DataConfig,
    DataError,
    evaluation_stream,
    pipeline,
    training_batches,
    validation_batches,
)

SEPARATOR = ByteTokenizer.separator
TEXTS = [f"document {i} " + "ab" * (7 * i % 31) for i in range(40)]


def make_config(directory, texts, **options) -> DataConfig:
    path = Path(directory) / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(path=str(path), **({"validation_fraction": 0.0} | options))


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, TEXTS)


@pytest.fixture
def rows_in_order(monkeypatch):
    """Rows as they are packed, so that documents can be read off them; a test below checks the shuffle."""
    monkeypatch.setattr(pipeline, "_ROWS_SHUFFLED", 1)


def check_layout(batch, batch_size, length):
    """Shapes and dtypes; segments count up from 1 without gaps; padding is all zero and only at a row's end."""
    assert {"inputs", "targets", "segment_ids"} <= set(batch)
    for values in batch.values():
        assert values.shape == (batch_size, length) and values.dtype == np.int32
    for row in batch["segment_ids"]:
        used = row[row > 0]
        assert np.all(row[: len(used)] > 0)
        if len(used):
            assert used[0] == 1 and set(np.diff(used)) <= {0, 1}
    for values in batch.values():
        assert not np.any(values[batch["segment_ids"] == 0])


def texts_of_rows(rows) -> list[str]:
    """The documents in consecutive rows (inputs, targets, segment_ids), after checking targets and separators."""
    documents = []
    for inputs, targets, segment_ids in rows:
        for segment in range(1, segment_ids.max() + 1):
            here = segment_ids == segment
            if inputs[here][0] == SEPARATOR:
                documents.append(([], []))
            documents[-1][0].extend(inputs[here])
            documents[-1][1].extend(targets[here])
    for inputs, targets in documents:
        assert inputs[1:] == targets[:-1]
        assert inputs[0] == targets[-1] == SEPARATOR and inputs.count(SEPARATOR) == 1
    return [ByteTokenizer().decode(inputs) for inputs, _ in documents]


def texts_of(batches) -> list[str]:
    fields = ("inputs", "targets", "segment_ids")
    return texts_of_rows(row for batch in batches for row in zip(*(batch[name] for name in fields), strict=True))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    batch_size=st.integers(1, 4),
    length=st.integers(1, 20),
)
def test_packing_is_lossless(texts, batch_size, length):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_ROWS_SHUFFLED", 1)
        config = make_config(directory, [*texts, "x" * length])
        batches = list(training_batches(config, batch_size=batch_size, length=length, seed=0, num_epochs=1))
        streamed = list(evaluation_stream(config, batch_size=batch_size, length=length))
    for batch in (*batches, *streamed):
        check_layout(batch, batch_size, length)
    tokens = sum(len(text.encode()) + 1 for text in (*texts, "x" * length))
    assert sum((batch["segment_ids"] > 0).sum() for batch in batches) == tokens
    assert len(batches) == -(-tokens // (batch_size * length)), "no row is cut short but the last"
    assert sorted(texts_of(batches)) == sorted([*texts, "x" * length])


def test_each_epoch_has_an_order_of_its_own(config, rows_in_order):
    order = texts_of(training_batches(config, batch_size=2, length=16, seed=3, num_epochs=2))
    first, second = order[: len(TEXTS)], order[len(TEXTS) :]
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second and first != TEXTS


def test_a_seed_fixes_the_order(config, rows_in_order):
    def run(seed):
        return list(training_batches(config, batch_size=2, length=32, seed=seed, num_epochs=1))

    assert_same(run(5), run(5))
    assert texts_of(run(5)) != texts_of(run(6))


@pytest.mark.parametrize("shard_count", [2, 3])
def test_shards_are_disjoint_and_complete(config, shard_count, rows_in_order):
    options = {"batch_size": 2, "length": 16, "seed": 1, "num_epochs": 2, "shard_count": shard_count}
    shards = [texts_of(training_batches(config, shard_index=i, **options)) for i in range(shard_count)]
    assert sorted(sum(shards, [])) == sorted(TEXTS * 2)
    assert sorted(sum((shard[: len(shard) // 2] for shard in shards), [])) == sorted(TEXTS), "one epoch is a partition"


@pytest.mark.parametrize("make", [training_batches, validation_batches])
def test_rows_are_shuffled(config, monkeypatch, make):
    options = {"batch_size": 1, "length": 8, "corpus": config.open("all")}
    options |= {"seed": 0, "num_epochs": 1} if make is training_batches else {}

    def rows():
        return [tuple(batch["inputs"][0]) for batch in make(config, **options)]

    shuffled = rows()
    monkeypatch.setattr(pipeline, "_ROWS_SHUFFLED", 1)
    assert sorted(shuffled) == sorted(rows()) and shuffled != rows()


def test_training_goes_on_for_ever_by_default(config):
    batches = training_batches(config, batch_size=4, length=64, seed=0)
    taken = [next(batches) for _ in range(60)]
    assert all(np.all(batch["segment_ids"] > 0) for batch in taken)


# Documents of 15 and 7 bytes make 16 and 8 tokens: rows of 8 end where documents end, the case without a remainder.
@pytest.mark.parametrize("texts", [TEXTS[:12], ["a" * 15, "b" * 7, "c" * 7, "d" * 23]], ids=["ragged", "aligned"])
@pytest.mark.parametrize("make", [training_batches, validation_batches])
def test_resuming_anywhere_gives_the_same_rest(tmp_path, make, texts):
    config = make_config(tmp_path, ["x", *texts], skip_bad=True)
    with open(config.path, "a") as file:
        file.write('{"broken\n')
    options = {"batch_size": 2, "length": 8}
    if make is training_batches:
        options |= {"seed": 0, "num_epochs": 2}
    else:
        options |= {"corpus": config.open("all")}
    batches = make(config, **options)
    states, expected = [json.dumps(batches.get_state())], []
    for batch in batches:
        expected.append(batch)
        states.append(json.dumps(batches.get_state()))
    assert max(map(len, states)) < 1000
    restored = make(config, **options)
    for done, state in enumerate(states):
        restored.set_state(json.loads(state))
        assert restored.get_state() is not None
        assert_same(list(restored), expected[done:])


def test_validation_is_one_pass_in_order_with_every_byte_counted(tmp_path, rows_in_order):
    config = make_config(tmp_path, [f"{text} ü" for text in TEXTS], validation_fraction=0.4)
    held_out = list(config.open("validation"))
    batches = list(validation_batches(config, batch_size=3, length=16))
    for batch in batches:
        check_layout(batch, 3, 16)
    assert texts_of(batches) == held_out and 0 < len(held_out) < len(TEXTS)
    assert sum(batch["target_bytes"].sum() for batch in batches) == sum(len(text.encode()) for text in held_out)
    for batch in batches:
        assert not np.any(batch["target_bytes"][batch["targets"] == SEPARATOR])
    assert_same(list(validation_batches(config, batch_size=3, length=16)), batches)


def test_validation_shards_split_every_global_batch(config):
    corpus = config.open("all")
    whole = list(validation_batches(config, batch_size=6, length=16, corpus=corpus))
    shards = [
        list(validation_batches(config, batch_size=2, length=16, corpus=corpus, shard_index=i, shard_count=3))
        for i in range(3)
    ]
    parts_of_batches = zip(*shards, strict=True)
    joined = [{name: np.concatenate([part[name] for part in parts]) for name in whole[0]} for parts in parts_of_batches]
    assert_same(joined, whole)


def test_evaluation_stream_continues_rows(config):
    batches = list(evaluation_stream(config, batch_size=3, length=8))
    assert sum(batch["target_bytes"].sum() for batch in batches) == sum(map(len, TEXTS))
    fields = ("inputs", "targets", "segment_ids", "positions")
    for lane in range(3):
        rows = [tuple(batch[name][lane] for name in fields) for batch in batches]
        assert texts_of_rows(row[:3] for row in rows) == TEXTS[lane::3]
        following = None
        for inputs, targets, segment_ids, positions in rows:
            if positions[0] > 0:
                assert (inputs[0], positions[0]) == following
            used = np.count_nonzero(segment_ids)
            if used:
                following = (targets[used - 1], positions[used - 1] + 1)
            np.testing.assert_array_equal(
                (inputs == SEPARATOR) & (segment_ids > 0), (positions == 0) & (segment_ids > 0)
            )


def test_more_rows_than_documents(tmp_path):
    config = make_config(tmp_path, ["abc", "d"])
    batches = list(evaluation_stream(config, batch_size=4, length=3))
    assert len(batches) == 2
    assert not np.any(batches[0]["segment_ids"][2:])


def test_stdlib_is_the_default():
    batch = next(training_batches(DataConfig(), batch_size=4, length=256, seed=0))
    check_layout(batch, 4, 256)
    assert np.all(batch["segment_ids"] > 0)


def test_a_file_tokenizer_reaches_the_batches(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "document": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = make_config(tmp_path, ["document  ü", "document"], tokenizer=str(tmp_path / "tokenizer.json"))
    (batch,) = evaluation_stream(config, batch_size=2, length=4)
    assert batch["inputs"].tolist() == [[1, 2, 0, 0], [1, 2, 0, 0]]
    assert batch["targets"].tolist() == [[2, 0, 1, 0], [2, 1, 0, 0]]
    assert batch["target_bytes"].tolist() == [[8, 4, 0, 0], [8, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


# Bad input


def test_a_short_corpus_names_both_numbers(tmp_path, rows_in_order):
    config = make_config(tmp_path, ["ab", "cd"])
    with pytest.raises(DataError, match=r"corpus\.jsonl': the training split has 6 tokens, expected at least length=7"):
        training_batches(config, batch_size=1, length=7, seed=0)
    assert next(training_batches(config, batch_size=1, length=6, seed=0))["inputs"].shape == (1, 6)


def test_arguments_are_checked(config):
    with pytest.raises(DataError, match="40 documents, expected at least shard_count=41"):
        training_batches(config, batch_size=1, length=8, seed=0, shard_count=41)
    with pytest.raises(DataError, match="shard_index=2: expected 0 <= shard_index < shard_count=2"):
        training_batches(config, batch_size=1, length=8, seed=0, shard_index=2, shard_count=2)
    with pytest.raises(DataError, match="batch_size=0, length=8: expected both to be at least 1"):
        validation_batches(config, batch_size=0, length=8)
    with pytest.raises(DataError, match=r"nowhere': no such file"):
        evaluation_stream(DataConfig(path="nowhere"), batch_size=1, length=8)


def test_a_stream_is_the_least():
    with pytest.raises(ValueError, match="streams must be at least 1, got 0"):
        DataConfig(streams=0)


def test_a_bad_line_stops_with_its_own_message_or_is_skipped_and_counted(tmp_path, rows_in_order):
    path = Path(make_config(tmp_path, TEXTS).path)
    path.write_text(path.read_text() + '{"text": \n')
    config = DataConfig(path=str(path), validation_fraction=0.0)
    options = {"batch_size": 2, "length": 16, "num_epochs": 1}
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 41: expected a JSON object, got a broken line"):
        list(training_batches(config, seed=0, **options))
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 41: expected a JSON object, got a broken line"):
        list(evaluation_stream(config, batch_size=2, length=16))

    config = DataConfig(path=str(path), validation_fraction=0.0, skip_bad=True)
    corpus = config.open("train")
    batches = training_batches(config, seed=0, corpus=corpus, **options | {"num_epochs": 2})
    assert sorted(texts_of(batches)) == sorted(TEXTS * 2)
    assert len(corpus.skipped) == 1 and "line 41" in corpus.skipped[0]


def test_a_corpus_of_bad_lines_alone_is_refused(tmp_path):
    config = make_config(tmp_path, TEXTS, skip_bad=True, text_field="body")
    with pytest.raises(
        DataError, match=r"has 0 tokens, expected at least length=8 \(40 bad .* line 1: no field 'body'"
    ):
        training_batches(config, batch_size=1, length=8, seed=0)
