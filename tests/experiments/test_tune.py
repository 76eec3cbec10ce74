"""The tuning of the kernels' sizes: what it tries, what it takes, and what it writes."""

import json
from pathlib import Path

import jax
import pytest

from experiments.benchmarks import tune
from pallas_kernels.sizes import Choice


class Lowered:
    """Stands for a program with these sizes, which compiles unless it takes too many warpgroups."""

    def __init__(self, sizes):
        self.sizes = sizes

    def compile(self):
        if self.sizes["read warpgroups 8"] == 4:
            raise jax.errors.JaxRuntimeError("too many registers")
        return self


@pytest.fixture
def milliseconds(monkeypatch):
    """What a program takes, by its sizes; with two segments the read has another shape."""
    options = {"segments 8": (1, 2), "read warpgroups 8": (1, 2, 4), "read warpgroups 16": (1, 2)}

    def lower(shape, dtype, taken):
        sizes = {"segments 8": 1, "read warpgroups 8": 1} | taken
        if sizes["segments 8"] == 2:
            sizes = {"read warpgroups 16": 2} | sizes
        return Lowered(sizes), {name: Choice(size, options[name]) for name, size in sizes.items()}

    costs = {}
    monkeypatch.setattr(tune, "lower", lower)
    monkeypatch.setattr(
        tune, "timer", lambda *_: lambda program: 1.0 + sum(costs.get(item, 0) for item in program.sizes.items())
    )
    return costs


def run(tmp_path, *cases):
    config = tune.Config(cases=cases or ("gsa-64",), table=tmp_path / "sizes.json")
    written = tune.main(config)
    assert not config.table.exists() or json.loads(config.table.read_text()) == written
    return written


def test_what_is_faster_is_written_and_what_it_leads_to_is_tried(tmp_path, milliseconds, capsys):
    milliseconds |= {("segments 8", 2): -0.2, ("read warpgroups 16", 1): -0.1, ("read warpgroups 8", 2): 0.5}
    assert run(tmp_path) == {"cpu": {"segments 8": 2, "read warpgroups 16": 1}}
    said = capsys.readouterr().out
    assert "cpu: 3 sizes, of which 2 are now others" in said
    assert "gsa-64: segments 8: 1: 1000.000 ms, 2: 800.000 ms; was 1, is 2" in said.splitlines()
    assert (
        "gsa-64: read warpgroups 8: 1: 1000.000 ms, 2: 1500.000 ms, 4: does not compile; stays 1" in said.splitlines()
    )


def test_a_gain_within_the_noise_is_none(tmp_path, milliseconds):
    milliseconds |= {("segments 8", 2): -0.01}
    assert run(tmp_path) == {} and not (tmp_path / "sizes.json").exists()


def test_a_size_is_tried_once_and_the_table_keeps_what_it_had(tmp_path, milliseconds):
    (tmp_path / "sizes.json").write_text('{"cpu": {"other": 3}, "gpu": {"segments 8": 4}}')
    milliseconds |= {("read warpgroups 8", 2): -0.5}
    expected = {"cpu": {"other": 3, "read warpgroups 8": 2}, "gpu": {"segments 8": 4}}
    assert run(tmp_path, "gsa-64", "gsa-128") == expected


def test_luck_does_not_count(tmp_path, milliseconds, monkeypatch):
    once = {2}

    def seconds(program):
        lucky = {program.sizes["segments 8"]} & once
        once.difference_update(lucky)
        return 0.5 if lucky else 1.0

    monkeypatch.setattr(tune, "timer", lambda *_: seconds)
    assert run(tmp_path) == {} and not once


def test_what_is_found_for_one_case_is_in_use_for_the_next(tmp_path, milliseconds, monkeypatch, capsys):
    milliseconds |= {("segments 8", 2): -0.5}
    lower, taken_by = tune.lower, []
    monkeypatch.setattr(
        tune, "lower", lambda shape, dtype, taken: taken_by.append((shape.K, taken)) or lower(shape, dtype, taken)
    )
    assert run(tmp_path, "gsa-64", "gsa-128") == {"cpu": {"segments 8": 2}}
    assert [taken["segments 8"] for key_size, taken in taken_by if key_size == 128] == [2]
    assert "gsa-128" not in capsys.readouterr().out


def test_only_the_compiler_may_refuse(tmp_path, milliseconds, monkeypatch):
    def compile_first_only(self):
        return self if self.sizes["segments 8"] == 1 else 1 / 0

    monkeypatch.setattr(Lowered, "compile", compile_first_only)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("gsa-63",)}, "unknown cases: gsa-63; known are"),
        ({"gain": -1.0}, "gain must be"),
        ({"table": Path("/proc/sizes.json")}, "table: .* can't be written"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tune.main(tune.Config(**changes))


def test_without_a_hopper_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="need a Hopper GPU"):
        tune.main(tune.Config(cases=("gsa-64",), table=tmp_path / "sizes.json"))
