"""The end-to-end benchmark: its report, and a run of it on the tiny model."""

import json
import time
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from experiments.benchmarks import model, peers
from experiments.benchmarks.model_report import as_table, draw, remarks
from experiments.provenance import device_name
from gsa_jax.models import count_parameters, preset
from tests.training.tiny import FAST_COMPILE

RECORDED = Path(__file__).parents[2] / "experiments/results/peers-h200/model.json"


@pytest.fixture
def result():
    """What a run on an H200 with a recorded peer might give."""
    settings = {"preset": "gsa-1.3b", "param_dtype": "bfloat16", "implementation": None}
    return {
        "device": "1 x NVIDIA H200",
        "versions": {"jax": "0.12"},
        "settings": settings,
        "peers": peers.read(RECORDED, device="1 x NVIDIA H200"),
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
    for row in peers.read(RECORDED)["training"]:
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


def test_a_run_of_the_tiny_model_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    for name, value in FAST_COMPILE.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "deep" / "tiny.json"
    start = time.time()
    result = model.main(
        model.Config(
            preset="tiny",
            cases=("2x16",),
            param_dtype="bfloat16",
            decode_batches=(2,),
            prompt=4,
            decode_blocks=1,
            repeats=1,
            seconds=0.01,
            out=out,
        )
    )
    seconds = time.time() - start
    assert json.loads(out.read_text()) == result
    assert result["device"] == device_name() and result["settings"]["param_dtype"] == "bfloat16"
    assert result["parameters"] == count_parameters(preset("tiny"))[0]
    (training,), (decoding,) = result["training"], result["decoding"]
    assert training["tokens_per_second"] == pytest.approx(2 * 16 / (training["ms"] / 1000))
    assert 0 < training["ms"] / 1000 < training["first_step_seconds"] < seconds
    assert 0 < decoding["ms"] / 1000 < seconds
    assert matplotlib.image.imread(out.with_suffix(".png")).std() > 0
    assert "2 x 16" in capsys.readouterr().out


def test_what_the_process_of_a_case_raises_comes_back():
    with pytest.raises(ValueError, match="could not convert"):
        model.in_process(float, "no number")
