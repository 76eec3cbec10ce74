"""What the scripts make of a run: its report and its evaluation."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate, generate, language_model
from experiments.bigram import bigram_bits_per_byte
from gsa_jax.generation import SamplingConfig
from gsa_jax.generation import generate as draw
from gsa_jax.training import DataError, load_model, loop, train
from gsa_jax.training.data import ByteTokenizer, decode_after
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


def test_windows_of_any_length_give_the_same_bits(finished, tmp_path):
    """The state is carried over from one to the next."""
    _, summary, _ = finished
    (tmp_path / "text.txt").write_text("slot gate key value " * 20)
    found = []
    for length in (16, 100, 512):
        out = tmp_path / f"{length}.json"
        arguments = {"data": str(tmp_path / "text.txt"), "length": length, "batch_size": 1, "out": out}
        evaluate.main(evaluate.Arguments(summary.run_dir, **arguments))
        found.append(json.loads(out.read_text())["bits_per_byte"])
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


@pytest.mark.parametrize("trained_with", [False, True])
def test_bad_documents_are_left_out_only_where_asked(finished, tmp_path, trained_with):
    config, summary, _ = finished
    run = tmp_path / "run"
    shutil.copytree(summary.run_dir, run)
    data = dataclasses.replace(config.data, skip_bad=trained_with)
    (run / "config.json").write_text(dataclasses.replace(config, data=data).to_json())
    (tmp_path / "bad.jsonl").write_text('{"text": "slot gate"}\n[1]\n')
    with pytest.raises(DataError, match="bad.jsonl, line 2: .*; --skip-bad leaves such documents out"):
        evaluate.main(evaluate.Arguments(run, data=str(tmp_path / "bad.jsonl")))
    evaluate.main(evaluate.Arguments(run, data=str(tmp_path / "bad.jsonl"), skip_bad=True))


def test_generate_prints_what_the_model_draws_with_the_seed_and_sampling_asked_for(finished, capsys):
    _, summary, _ = finished
    model, config, _ = load_model(summary.run_dir)
    sampling = SamplingConfig(temperature=0.7, top_k=50)
    generate.main(generate.Arguments(summary.run_dir, "slot", 9, seed=3, block_size=4, sampling=sampling))
    tokenizer = ByteTokenizer()
    prompt = np.concatenate([[tokenizer.separator], tokenizer.encode("slot")])
    ids = draw(model, prompt[None], 9, sampling=sampling, key=jax.random.key(3))[0]
    assert capsys.readouterr().out == "slot" + decode_after(tokenizer, prompt, ids) + "\n"
