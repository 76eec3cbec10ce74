"""The benchmark of training over the devices of a host: its cases, its report, and a run of it on two CPU devices."""

import dataclasses
import json

import matplotlib.image
import pytest
from rich.console import Console

from experiments.benchmarks import mesh
from gsa_jax.models import count_parameters, preset

TINY = mesh.Config(preset="tiny", batch=2, length=16, long_sequence=64, axes=("fsdp",), repeats=1, seconds=0.01)


@pytest.fixture
def result():
    """What a run on two H200 might give."""
    one = {"mesh": {}, "batch": 8, "length": 2048}
    return {
        "device": "2 x NVIDIA H200",
        "versions": {"jax": "0.12"},
        "settings": {"preset": "gsa-1.3b", "param_dtype": "bfloat16"},
        "rows": [
            one | {"ms": 160.0, "tokens_per_second": 102_400, "mfu": 0.45, "memory_gib": 41.0},
            one | {"mesh": {"fsdp": 2}, "batch": 16, "ms": 200.0, "tokens_per_second": 163_840, "memory_gib": 30.5},
            one | {"mesh": {"tensor": 2}, "batch": 16, "error": "failed: [no] luck"},
            {"mesh": {"context": 2}, "batch": 1, "length": 262_144, "ms": 4000.0, "tokens_per_second": 65_536},
        ],
    }


def lines_of(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def sizes(case):
    return case["mesh"], case["batch"], case["length"]


def test_one_device_is_one_case():
    (case,) = mesh.cases(TINY, devices=1)
    assert sizes(case) == ({}, 2, 16) and case["remat"] == TINY.model.remat


def test_several_devices_have_as_many_tokens_each_along_every_axis():
    config = mesh.Config(batch=8, length=2048, long_sequence=100_000, remat="none", unroll=24)
    *spread, long = mesh.cases(config, devices=4)
    assert [sizes(case) for case in spread] == [
        ({}, 8, 2048),
        ({"data": 4}, 32, 2048),
        ({"fsdp": 4}, 32, 2048),
        ({"context": 4}, 8, 4 * 2048),
        ({"tensor": 4}, 32, 2048),
    ]
    assert all((case["remat"], case["unroll"]) == ("none", 24) for case in spread)
    assert sizes(long) == ({"context": 4}, 1, 100_000) and (long["remat"], long["unroll"]) == ("full", 1)


def test_axes_are_chosen_and_the_long_sequence_left_out():
    chosen = dataclasses.replace(TINY, axes=("tensor", "data"), long_sequence=0)
    assert [case["mesh"] for case in mesh.cases(chosen, devices=2)] == [{}, {"tensor": 2}, {"data": 2}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ("fsdp", "expert")}, "axes must be among data, fsdp, context, tensor, got 'expert'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"long_sequence": -1}, "long_sequence must be at least 0, got -1"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_the_table_compares_with_one_device(result):
    one, fsdp, tensor, long = lines_of(mesh.as_table(result))[3:7]
    assert one == "one device, 8 x 2,048 102,400 1.00 45.0% 41.0"
    assert fsdp == "fsdp=2, 16 x 2,048 163,840 1.60 - 30.5"
    assert tensor == "tensor=2, 16 x 2,048 - - - -"
    assert long == "context=2, 1 x 262,144 65,536 0.64 - -"


def test_the_plot_has_a_bar_for_each_case_that_was_measured(result):
    axes = mesh.draw(result).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [102_400, 163_840, 65_536]
    assert [text.get_text() for text in axes.texts] == ["1.00x, 41 GiB", "1.60x, 30 GiB", "0.64x"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["one device, 8 x 2,048", "fsdp=2, 16 x 2,048", "context=2, 1 x 262,144"]


def test_without_one_device_nothing_is_compared(result):
    result["rows"][0] = {"mesh": {}, "batch": 8, "length": 2048, "error": "not enough memory"}
    one, fsdp, *_ = lines_of(mesh.as_table(result))[3:]
    assert one == "one device, 8 x 2,048 - - - -" and fsdp == "fsdp=2, 16 x 2,048 163,840 - - 30.5"
    assert [text.get_text() for text in mesh.draw(result).axes[0].texts] == ["30 GiB", ""]


def test_a_case_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def measure(function, *arguments, mesh=None, **options):
        if mesh is None:  # the process that tells the devices
            return {"device": "2 x H200", "num_devices": 2, "versions": {"jax": "0.12"}}
        if mesh.fsdp > 1:
            raise RuntimeError("no luck\nat all")
        return {"ms": 1.0, "tokens_per_second": 32_000.0}

    monkeypatch.setattr(mesh, "in_process", measure)
    out = tmp_path / "mesh.json"
    result = mesh.main(dataclasses.replace(TINY, out=out))
    assert json.loads(out.read_text()) == result
    assert [row.get("error") for row in result["rows"]] == [None, "failed: no luck", None]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["one device, 2 x 16: 32,000 tokens/s", "fsdp=2, 4 x 16: failed: no luck"]
    assert lines[-1] == lines[1]


def test_one_device_says_what_is_left_out(monkeypatch, capsys):
    facts = {"device": "1 x H200", "num_devices": 1, "versions": {"jax": "0.12"}}
    measured = {"ms": 1.0, "tokens_per_second": 32_000.0}
    answers = iter([facts, measured])
    monkeypatch.setattr(mesh, "in_process", lambda *_, **__: next(answers))
    mesh.main(TINY)
    assert capsys.readouterr().out.startswith("there is one device: no axis to spread over, and no long sequence\n")


def test_a_run_on_two_devices_writes_json_and_a_plot(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")  # for the processes of the cases
    out = tmp_path / "deep" / "mesh.json"
    result = mesh.main(dataclasses.replace(TINY, long_sequence=0, out=out))
    assert json.loads(out.read_text()) == result
    assert result["command"].startswith("python -m experiments.benchmarks.mesh")
    assert result["parameters"] == count_parameters(preset("tiny"))[0]
    assert [sizes(row) for row in result["rows"]] == [({}, 2, 16), ({"fsdp": 2}, 4, 16)]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["length"] / (row["ms"] / 1000))
    assert matplotlib.image.imread(out.with_suffix(".png")).std() > 0
    first, second, *_ = capfd.readouterr().out.splitlines()
    assert first.startswith("one device, 2 x 16: imports ") and first.endswith(" tokens/s")
    assert second.startswith("fsdp=2, 4 x 16: imports ") and second.endswith(" tokens/s")
