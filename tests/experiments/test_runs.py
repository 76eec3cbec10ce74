"""What the scripts make of a run: its report and its evaluation."""

import json

import numpy as np
import pytest

from experiments import evaluate, language_model
from experiments.bigram import bigram_bits_per_byte
from gsa_jax.training import loop, train
from gsa_jax.training.data import ByteTokenizer
from tests.training.tiny import run_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, its summary and the parts of batches that it was evaluated on."""
    config = run_config(tmp_path_factory.mktemp("runs"), steps=2, accumulation=2)
    put_batch, evaluated_on = loop.put_batch, []

    def put_and_note(batch, mesh):
        if "target_bytes" in batch:
            evaluated_on.append(batch)
        return put_batch(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", put_and_note)
        return config, train(config), evaluated_on


def batch(*texts):
    """Documents as one batch, a row each, padded."""
    rows = [np.pad(ByteTokenizer().encode(text), 1, constant_values=ByteTokenizer.separator) for text in texts]
    length = max(map(len, rows)) - 1
    tokens = np.stack([np.pad(row, (0, length + 1 - len(row))) for row in rows])
    real = np.arange(length) < np.asarray([[len(row) - 1] for row in rows])
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": real.astype(np.int32)}


def test_bigram_against_a_count_by_hand():
    start_a, a_b, b_end = (1 + 1) / (2 + 257), (1 + 1) / (2 + 257), (2 + 1) / (2 + 257)
    expected = -np.log2(start_a * a_b * b_end) / 2
    assert bigram_bits_per_byte([batch("aab", "b")], [batch("ab")]) == pytest.approx(expected)


def test_the_bigram_model_is_scored_on_the_tokens_of_the_evaluation(finished, monkeypatch, capsys):
    config, summary, evaluated_on = finished
    scored_on = []

    def noted(train, held_out):
        scored_on.extend(held_out)
        return bigram_bits_per_byte(train, scored_on)

    monkeypatch.setattr(language_model, "bigram_bits_per_byte", noted)
    language_model.report(config, summary)
    assert len(scored_on) == config.eval_batches and len(evaluated_on) == config.eval_batches * config.accumulation
    for name in ("inputs", "targets", "segment_ids"):
        scored, evaluated = (
            np.concatenate([batch[name] for batch in batches]) for batches in (scored_on, evaluated_on)
        )
        np.testing.assert_array_equal(scored, evaluated)
    assert "a byte bigram model's" in capsys.readouterr().out


def test_an_evaluation_says_where_it_comes_from(finished):
    config, summary, _ = finished
    evaluate.main(evaluate.Arguments(summary.run_dir, batch_size=2))
    results = json.loads((summary.run_dir / "evaluation.json").read_text())
    assert {"device", "versions", "command", "date"} <= results.keys()
    assert results["step"] == 2 and results["window"] == config.length and results["bits_per_byte"] > 0


def test_a_part_of_an_evaluation_is_saved_where_asked(finished, tmp_path):
    _, summary, _ = finished
    kept = summary.run_dir / "evaluation.json"
    before = kept.read_text() if kept.exists() else None
    for out in (None, tmp_path / "part.json"):
        evaluate.main(evaluate.Arguments(summary.run_dir, batch_size=2, max_batches=1, out=out))
    assert json.loads((tmp_path / "part.json").read_text())["max_batches"] == 1
    assert (kept.read_text() if kept.exists() else None) == before


def test_a_text_without_a_byte_is_refused(finished, tmp_path):
    _, summary, _ = finished
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="data: there is no text in it, expected at least one byte"):
        evaluate.main(evaluate.Arguments(summary.run_dir, data=str(tmp_path / "empty.txt")))
