"""The end-to-end benchmark: its report, and a run of it on the tiny model."""

import dataclasses
import json
import time
from pathlib import Path

import matplotlib.image
import pytest
import tyro
from rich.console import Console

from experiments.benchmarks import model, peers
from experiments.benchmarks.model_report import as_table, describe, draw, remarks
from experiments.provenance import device_name
from gsa_jax.models import count_parameters, preset

RECORDED = Path(__file__).parents[2] / "experiments/results/peers-h200/model.json"


@pytest.fixture
def result():
    """What a run on an H200 with a recorded peer might give."""
    settings = {"preset": "gsa-1.3b", "param_dtype": "bfloat16", "implementation": None}
    return {
        "device": "1 x NVIDIA H200",
        "versions": {"jax": "0.12"},
        "settings": settings,
        "peers": peers.read(RECORDED, "training", device="1 x NVIDIA H200"),
        "training": [
            {"batch": 8, "length": 2048, "ms": 142.2, "tokens_per_second": 115_200, "mfu": 0.5, "memory_gib": 41.0},
            {"batch": 2, "length": 8192, "error": "not enough memory"},
        ],
        "decoding": [{"batch": 16, "prompt": 2048, "ms": 3.0}],
    }


def lines_of(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_training_is_compared_with_the_recorded_peer(result):
    heading, _, measured, failed, *_ = lines_of(as_table(result, "training"))[1:]
    assert "vs fla (recorded)" in heading and "s to first step" not in heading
    assert measured.split() == ["8", "x", "2048", "115,200", "142.20", "50.0%", "41.0", "2.00x"]
    assert failed.split() == ["2", "x", "8192", "-", "-", "-", "-", "-"]


def test_decoding_is_compared_with_the_recorded_peer(result):
    assert lines_of(as_table(result, "decoding"))[3].split() == ["16", "x", "2048", "3.00", "21.00x"]


def test_without_a_peer_nothing_is_compared(result):
    result["peers"] = None
    assert "vs" not in "".join(lines_of(as_table(result, "training")))
    assert [line.get_label() for line in draw(result).axes[0].lines] == ["here"]


def test_remarks_say_what_failed_and_where_the_peer_comes_from(result):
    failed, peer = remarks(result)
    assert failed == "training, 2 x 8192: not enough memory"
    assert peer.startswith(f"fla: recorded in {RECORDED}, on 1 x NVIDIA H200, flash-linear-attention 0.6.0, torch 2.11")


def test_the_plot_shows_both(result):
    axes = draw(result).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "here": [[2048, 115_200]],
        "fla (recorded)": [[2048, 57_600], [4096, 57_000], [16384, 52_400]],
    }
    assert {label.get_text() for label in axes.get_xticklabels()} >= {"8 x 2,048", "1 x 16,384"}


def test_recorded_milliseconds_are_those_of_the_recorded_rates():
    for row in peers.read(RECORDED, "training")["training"]:
        assert row["ms"] == pytest.approx(1000 * row["batch"] * row["length"] / row["tokens_per_second"], rel=1e-3)


def test_settings_replace_those_of_the_preset():
    assert model.Config(preset="gsa-340m").model == preset("gsa-340m")
    changed = model.Config(preset="gsa-340m", implementation="chunked", remat="none").model
    assert (changed.implementation, changed.remat) == ("chunked", "none")


@pytest.mark.parametrize("case", ["8", "0x16", "8x", "8 x 16", "x16", "8x-1"])
def test_cases_are_rows_and_tokens(case):
    assert model.parse("8x2048") == (8, 2048)
    with pytest.raises(ValueError, match="expected rows x tokens, such as 8x2048"):
        model.parse(case)


def test_a_case_is_told_in_a_line(result):
    measured, failed = result["training"]
    assert describe(measured) == "tokens/s 115,200, ms a step 142.20, MFU 50.0%, peak GiB 41.0"
    assert describe(failed) == "not enough memory"


def test_either_part_may_be_left_out():
    config = tyro.cli(model.Config, args=["--cases", "--decode-batches", "1", "4"])
    assert config.cases == () and config.decode_batches == (1, 4)
    config = tyro.cli(model.Config, args=["--cases", "1x16", "--decode-batches"])
    assert config.cases == ("1x16",) and config.decode_batches == ()


TINY = model.Config(
    preset="tiny",
    cases=("2x16",),
    param_dtype="bfloat16",
    decode_batches=(2,),
    prompt=4,
    decode_blocks=1,
    repeats=1,
    seconds=0.01,
)


def test_a_run_of_the_tiny_model_writes_json_and_a_plot(tmp_path, capfd, monkeypatch):
    # In this process: test_mesh_benchmark.py has a run with a process for each case.
    monkeypatch.setattr(model, "in_process", lambda function, *arguments, **options: function(*arguments, **options))
    out = tmp_path / "deep" / "tiny.json"
    start = time.time()
    result = model.main(dataclasses.replace(TINY, out=out))
    seconds = time.time() - start
    assert json.loads(out.read_text()) == result
    assert result["device"] == device_name() and result["settings"]["param_dtype"] == "bfloat16"
    assert result["parameters"] == count_parameters(preset("tiny"))[0]
    (training,), (decoding,) = result["training"], result["decoding"]
    assert training["tokens_per_second"] == pytest.approx(2 * 16 / (training["ms"] / 1000))
    parts = [training[f"{part}_seconds"] for part in ("imports", "device", "init", "compile", "first_step")]
    assert [0, *parts, seconds] == sorted([0, *parts, seconds])
    parts = [decoding[f"{part}_seconds"] for part in ("imports", "device", "init", "first_tokens")]
    assert [0, *parts, seconds] == sorted([0, *parts, seconds])
    assert 0 < training["ms"] / 1000 < seconds and 0 < decoding["ms"] / 1000 < seconds
    assert matplotlib.image.imread(out.with_suffix(".png")).std() > 0
    first, second, *tables = capfd.readouterr().out.splitlines()
    assert first.startswith("training, 2 x 16: imports ") and first.endswith(describe(training))
    assert second.startswith("decoding, 2 x 4: imports ") and second.endswith(describe(decoding))
    assert any("batch x prompt" in line for line in tables)


@pytest.fixture
def measurements(monkeypatch):
    """Stands in for the processes; gathers the cases that are measured, and fails where a text stands for one."""
    measured = []

    def measure(function, *arguments, began=None, **case):
        if began is None:
            return {"device": "1 x NVIDIA H200", "versions": {"jax": "0.12"}, "parameters": 1}
        measured.append(tuple(case.values()))
        if case.get("length") == 13:
            raise RuntimeError("no luck\nat all")
        return {"ms": float(len(measured)), "tokens_per_second": 1.0}

    monkeypatch.setattr(model, "in_process", measure)
    return measured


def test_what_is_measured_is_written_and_printed_before_the_next_case(tmp_path, monkeypatch, capfd, measurements):
    out, written = tmp_path / "result.json", []

    def stopped(file, result, figure, write=model.output.write):
        write(file, result, figure)
        written.append(json.loads(file.read_text())["training"])
        assert "x 16: tokens/s 1, ms a step 1.00\n" in capfd.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(model.output, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.main(dataclasses.replace(TINY, out=out))
    assert written == [[{"batch": 2, "length": 16, "ms": 1.0, "tokens_per_second": 1.0}]]
    assert measurements == [(2, 16)] and out.with_suffix(".png").exists()


def test_a_case_that_fails_does_not_end_the_run(capfd, measurements):
    result = model.main(dataclasses.replace(TINY, cases=("1x13", "2x16")))
    assert result["training"][0] == {"batch": 1, "length": 13, "error": "failed: no luck"}
    assert measurements == [(1, 13), (2, 16), (2, 4)]
    assert capfd.readouterr().out.startswith("training, 1 x 13: failed: no luck\ntraining, 2 x 16: tokens/s")


def test_a_resumed_run_measures_what_is_missing(tmp_path, measurements):
    out = tmp_path / "result.json"
    first = model.main(dataclasses.replace(TINY, cases=("2x16", "1x13"), decode_batches=(), out=out))
    config = dataclasses.replace(TINY, cases=("2x16", "4x16", "1x13"), out=out, resume=True)
    second = model.main(config)
    assert measurements == [(2, 16), (1, 13), (4, 16), (1, 13), (2, 4)]
    assert second["training"][0] == first["training"][0] and len(second["training"]) == 3
    assert json.loads(out.read_text()) == second
    with pytest.raises(ValueError, match=r"resume: .*result.json has the settings .*, and here they are"):
        model.main(dataclasses.replace(config, repeats=2))


def test_there_must_be_something_to_resume():
    with pytest.raises(ValueError, match="resume: there is nothing to go on with"):
        dataclasses.replace(TINY, resume=True)


def test_what_the_process_of_a_case_raises_comes_back():
    with pytest.raises(ValueError, match="could not convert"):
        model.in_process(float, "no number")


def test_peers_of_another_model_and_files_of_other_scripts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the peers' preset is gsa-1.3b, and here it is tiny"):
        peers.read(RECORDED, "training", preset="tiny")
    with pytest.raises(ValueError, match="peers.json has no numbers of peers in 'training'"):
        peers.read(RECORDED.with_name("peers.json"), "training")
    ops = RECORDED.parents[1] / "ops-h200/ops.json"
    with pytest.raises(ValueError, match="resume: .*ops.json has no 'settings', expected a file with settings, "):
        model.measured_before(ops, {})
