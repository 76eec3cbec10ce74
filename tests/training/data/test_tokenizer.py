"""Tokenizers: text survives the round trip, every byte is counted once, the separator stays apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gsa_jax.training.data import ByteTokenizer, DataError, FileTokenizer, decode_after, load_tokenizer

TEXT = "def f(x):\n    return x  # naïve — 東京 🎉\n" * 3


def save_byte_level(path, special=("<|endoftext|>",)):
    """A byte-level BPE, as GPT-2's: every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


def save_words(path):
    """A word tokenizer that lowers case and knows few words, as BERT's."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "hello": 2, "world": 5}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return FileTokenizer(str(save_byte_level(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


@given(st.text())
def test_byte_round_trip(text):
    tokenizer = ByteTokenizer()
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    assert ids.dtype == num_bytes.dtype == np.int32
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.decode(ids) == text
    assert num_bytes.sum() == len(text.encode())


def test_byte_decode_replaces_broken_characters_and_drops_separators():
    assert ByteTokenizer().decode([256, ord("a"), 0xE2, ord("b"), 256]) == "a\N{REPLACEMENT CHARACTER}b"
    assert ByteTokenizer().decode([]) == ""


@settings(deadline=None)
@given(st.text())
def test_file_round_trip(byte_level, text):
    ids, num_bytes = byte_level.encode_with_bytes(text)
    assert ids.dtype == num_bytes.dtype == np.int32 and ids.shape == num_bytes.shape
    np.testing.assert_array_equal(ids, byte_level.encode(text))
    assert byte_level.decode(ids) == text
    assert num_bytes.sum() == len(text.encode())
    assert np.all(num_bytes >= 0)


def test_file_tokenizer_counts_bytes_where_the_text_is_normalized(tmp_path):
    tokenizer = FileTokenizer(str(save_words(tmp_path / "words.json")))
    ids, num_bytes = tokenizer.encode_with_bytes("Hello  wörld ☃ \n")
    assert ids.tolist() == [2, 5, 0]
    assert num_bytes.tolist() == [5, 8, 6]
    assert tokenizer.encode_with_bytes("   ")[0].size == 0


def test_file_tokenizer_facts(byte_level, tmp_path):
    assert byte_level.separator == 0
    assert 257 < byte_level.vocab_size <= 300
    assert byte_level.encode(TEXT).max() < byte_level.vocab_size
    assert byte_level.encode(TEXT).size > 4, "the truncation that the file asks for must not apply"
    words = FileTokenizer(str(save_words(tmp_path / "words.json")))
    assert (words.separator, words.vocab_size) == (1, 6), "vocab_size covers the highest id, holes or not"


def test_text_cannot_spell_the_separator(byte_level):
    ids = byte_level.encode("a<|endoftext|>b")
    assert byte_level.separator not in ids
    assert byte_level.decode([0, *ids, 0]) == "a<|endoftext|>b"


def test_load_tokenizer(tmp_path):
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    save_byte_level(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).vocab_size == load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size


def test_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json': no such file"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json': expected a Hugging Face tokenizer\.json, got"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"none\.json': no end-of-text token, expected one of </s>"):
        load_tokenizer(str(save_byte_level(tmp_path / "none.json", special=())))


def test_a_continuation_keeps_the_space_it_begins_with(tmp_path):
    words = Tokenizer(models.WordLevel({"</s>": 0, "▁def": 1, "▁main": 2}))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    before, ids = np.array([tokenizer.separator, 1]), [2, 1]
    assert tokenizer.decode(ids) == "main def"  # as SentencePiece's do
    assert decode_after(tokenizer, before, ids) == " main def"
