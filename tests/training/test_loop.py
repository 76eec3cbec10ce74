import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gsa_jax.ops import pallas
from gsa_jax.training import (
    ConfigError,
    DataConfig,
    DataError,
    MeshConfig,
    NonFiniteError,
    OptimizerConfig,
    load_model,
    loop,
    read_metrics,
    train,
)
from tests.training.tiny import MODEL, run_config

KERNELS = dataclasses.replace(MODEL, mixers=("gsa",), implementation="pallas")

# Trains, and kills itself with signal 9 before its 11th step, two steps after a checkpoint.
KILLED_RUN = """
import itertools, os, pathlib, signal, sys
from gsa_jax.training import TrainConfig, loop
count, put_batch = itertools.count(1), loop.put_batch

def put_or_die(batch, mesh):
    if "target_bytes" not in batch and next(count) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return put_batch(batch, mesh)

loop.put_batch = put_or_die
loop.train(TrainConfig.from_json(pathlib.Path(sys.argv[1]).read_text()))
"""


def curves(run_dir):
    """The metrics without the time that they took."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(run_dir)]


def parameters(run_dir):
    return jax.tree.leaves(nnx.state(load_model(run_dir)[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def finished(folder):
    """An unbroken run and its summary."""
    config = run_config(folder, "unbroken", tensorboard=True)
    return config, train(config)


def same_run(config, finished_config):
    assert curves(config.run_dir) == curves(finished_config.run_dir)
    for mine, other in zip(parameters(config.run_dir), parameters(finished_config.run_dir), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_run_learns_and_leaves_everything_in_its_folder(finished, capsys):
    config, summary = finished
    lines = read_metrics(config.run_dir)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [6, 12]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["validation_bits_per_byte"] < lines[2]["validation_bits_per_byte"]
    assert summary.step == 12 and summary.metrics == lines[-1] and summary.interrupted is None
    assert {path.name for path in summary.run_dir.iterdir()} == {
        "checkpoints", "config.json", "curve.png", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (summary.run_dir / "checkpoints").iterdir()} == {"8", "12"}


def test_the_model_of_a_run_has_the_validation_loss_that_was_written_down(finished):
    config, summary = finished
    model, stored, step = load_model(config.run_dir)
    assert stored == config and step == 12
    nll = count = 0
    for i, batch in enumerate(loop.validation_batches(config.data, batch_size=4, length=32)):
        if i < config.eval_batches:
            logits, _ = model(batch["inputs"], segment_ids=batch["segment_ids"])
            mask = batch["segment_ids"] > 0
            nll -= np.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0][mask].sum()
            count += mask.sum()
    assert nll / count == pytest.approx(summary.metrics["validation_loss"], rel=1e-5)


def test_killed_and_resumed_gives_the_same_numbers_to_the_bit(folder):
    unbroken = run_config(folder, "unbroken-gsa", model=dataclasses.replace(MODEL, mixers=("gsa",)))
    expected = train(unbroken)
    config = dataclasses.replace(unbroken, run_dir=str(folder / "killed"))
    (folder / "killed.json").write_text(config.to_json())
    command = [sys.executable, "-c", KILLED_RUN, str(folder / "killed.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert curves(config.run_dir)[-1]["step"] == 10
    summary = train(config, resume=True)
    assert summary.metrics["loss"] == expected.metrics["loss"]
    same_run(config, unbroken)


def test_sigterm_saves_and_ends_the_run_cleanly(folder, finished, monkeypatch):
    config = dataclasses.replace(finished[0], run_dir=str(folder / "terminated"))
    put_batch, calls = loop.put_batch, iter(range(100))

    def put_and_signal(batch, mesh):
        if "target_bytes" not in batch and next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put_and_signal)
        summary = train(config)
    assert summary.interrupted == "SIGTERM" and summary.step == summary.metrics["step"] == 7
    assert load_model(config.run_dir)[2] == 7
    assert train(config, resume=True).interrupted is None
    for mine, other in zip(parameters(config.run_dir), parameters(finished[0].run_dir), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.fixture
def default_interrupt():
    """SIGINT raises KeyboardInterrupt, also where the tests were started with SIGINT ignored, as in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_as_always(default_interrupt):
    before = signal.getsignal(signal.SIGINT)
    with loop._stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_finished_run_can_be_resumed_and_prolonged(folder, finished):
    config = run_config(folder, "prolonged", steps=2, optimizer=OptimizerConfig())
    first = train(config)
    assert train(config, resume=True).metrics == first.metrics
    assert train(dataclasses.replace(config, steps=4), resume=True).step == 4
    with pytest.raises(ConfigError, match="steps=3: the run has come to step 4"):
        train(dataclasses.replace(config, steps=3), resume=True)
    assert json.loads((Path(config.run_dir) / "config.json").read_text())["steps"] == 4
    assert [line["step"] for line in read_metrics(config.run_dir)] == [2, 4]


def test_a_run_that_ended_without_an_evaluation_is_evaluated_when_it_is_resumed(folder, finished):
    config = run_config(folder, "unvalidated", steps=2)
    expected = train(config).metrics["validation_loss"]
    for lines in ('{"step": 2, "loss": 5.0}\n', ""):
        (Path(config.run_dir) / "metrics.jsonl").write_text(lines)
        assert train(config, resume=True).metrics["validation_loss"] == expected
    with pytest.raises(ConfigError, match="steps=1: the run has come to step 2"):
        (Path(config.run_dir) / "metrics.jsonl").unlink()
        train(dataclasses.replace(config, steps=1), resume=True)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(folder, finished):
    config = run_config(folder, "robbed", steps=2, checkpoint_every=1)
    train(config)
    lines = read_metrics(config.run_dir)
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    with pytest.raises(ConfigError, match="the metrics reach step 2, and there is no checkpoint to go on from"):
        train(config, resume=True)
    assert read_metrics(config.run_dir) == lines


def test_a_run_that_met_a_bad_document_goes_on_without_it(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": "slot gate " * 5})] * 19
    corpus.write_text("\n".join(lines))
    data = DataConfig(path=str(corpus), validation_fraction=0.3)
    config = run_config(tmp_path, data=data, steps=2)
    train(config)
    corpus.write_text("\n".join(["{broken", *lines[1:9], "{broken", *lines[10:]]))
    longer = dataclasses.replace(config, steps=6)
    with pytest.raises(DataError, match="line 1.*--skip-bad leaves such documents out"):
        train(longer, resume=True)
    skipping = dataclasses.replace(longer, data=dataclasses.replace(data, skip_bad=True))
    assert train(skipping, resume=True).step == 6


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(tmp_path, capsys):
    config = run_config(tmp_path, steps=2)
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "config.json").write_text(config.to_json())
    assert train(config, resume=True).step == 2
    assert capsys.readouterr().out.splitlines()[0].endswith(", resumed at step 0")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder, finished):
    optimizer = OptimizerConfig(learning_rate=1e38, warmup_steps=2, final_fraction=1.0)
    config = dataclasses.replace(finished[0], run_dir=str(folder / "nan"), optimizer=optimizer, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="step 2: the loss is .* the last checkpoint is that of step 1"):
        train(config)
    assert all(np.isfinite(x).all() for x in parameters(config.run_dir))
    assert load_model(config.run_dir)[2] == 1


def test_an_existing_folder_is_not_overwritten(finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished[1].run_dir.rglob("*")}
    with pytest.raises(ConfigError, match="run_dir='.*unbroken': not empty, and is not overwritten; resume it or"):
        train(finished[0])
    assert before == {path: path.stat().st_mtime_ns for path in finished[1].run_dir.rglob("*")}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(dataclasses.replace(finished[0], run_dir=str(tmp_path)))


def test_only_a_run_can_be_resumed_and_only_as_it_was(finished, tmp_path):
    config = finished[0]
    with pytest.raises(ConfigError, match="there is no run to resume"):
        train(dataclasses.replace(config, run_dir=str(tmp_path / "none")), resume=True)
    for change, message in [
        ({"model": dataclasses.replace(MODEL, num_layers=4)}, "model.num_layers is 2 there and 4 here"),
        ({"length": 64}, "length is 32 there and 64 here"),
        ({"data": dataclasses.replace(config.data, validation_fraction=0.5)}, "data.validation_fraction is 0.2 there"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(config, **change), resume=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": DataConfig(path="/no/such/corpus")}, DataError, "no such file"),
        ({"length": 10**6}, DataError, "expected at least length=1000000"),
        ({"model": dataclasses.replace(MODEL, vocab_size=256)}, ConfigError, "vocab_size=256: expected at least 257"),
        ({"data": DataConfig(path=__file__, streams=2)}, DataError, "data.streams=2: expected at most one .* 1 doc"),
        (
            {"data": DataConfig(path=__file__, validation_fraction=1e-9)},
            DataError,
            "validation_fraction=1e-09: .* no te",
        ),
        ({"mesh": MeshConfig(data=64), "batch_size": 64}, ConfigError, "data=64"),
        ({"model": dataclasses.replace(MODEL, hidden_size=15)}, ConfigError, "model: .*hidden_size=15"),
        ({"model": KERNELS}, ConfigError, "model: implementation='pallas': .* need a Hopper GPU, .* device is 'cpu'"),
    ],
)
def test_the_users_mistakes_leave_no_folder_behind(folder, change, error, message):
    config = dataclasses.replace(run_config(folder, "mistake"), **change)
    with pytest.raises(error, match=message):
        train(config)
    assert not os.path.exists(config.run_dir)


def test_a_corpus_without_text_says_so(tmp_path):
    (tmp_path / "empty.txt").touch()
    config = run_config(tmp_path, data=DataConfig(path=str(tmp_path / "empty.txt")))
    with pytest.raises(DataError, match=r"data.path='.*empty.txt': there is no text in it, expected some"):
        train(config)


def test_a_folder_that_cannot_be_written_is_named(folder):
    config = dataclasses.replace(run_config(folder, "nowhere"), run_dir="/proc/run")
    with pytest.raises(ConfigError, match=r"run_dir='/proc/run': can't be written \(.*\), expected a folder that can"):
        train(config)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float32", "must be bfloat16 or float16, got float32"), ("bfloat16", "multiple of 64, got K=8")],
)
def test_kernels_that_do_not_fit_the_model_leave_no_folder_behind(folder, monkeypatch, dtype, message):
    monkeypatch.setattr(pallas, "_call_misfit", lambda chunk_size: None)  # as on a Hopper GPU
    config = run_config(folder, "kernels", model=KERNELS, dtype=dtype)
    with pytest.raises(ConfigError, match=f"model: implementation='pallas': .*{message}"):
        train(config)
    assert not os.path.exists(config.run_dir)


def test_skipped_documents_are_reported(tmp_path):
    lines = [json.dumps({"text": "slot gate " * 5})] * 9
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, "{broken", *lines]))
    data = DataConfig(path=str(tmp_path / "corpus.jsonl"), skip_bad=True, validation_fraction=0.3)
    (message,) = train(run_config(tmp_path, data=data)).skipped
    assert "corpus.jsonl, line 10: expected a JSON object" in message
