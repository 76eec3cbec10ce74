"""The comparison of rounding errors: its gates, its arithmetic, its remarks, and a run of it."""

import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments.benchmarks import errors, shapes
from experiments.benchmarks.shapes import GATES, Shape, make_inputs

SHAPES = {"slots": Shape("gsa", 1, 70, 2, 16, 32, 16), "linear": Shape("gla", 2, 33, 1, 16, 32)}


@pytest.fixture
def cases(monkeypatch):
    """Names of small shapes of both ops."""
    for name, shape in SHAPES.items():
        monkeypatch.setitem(shapes.SHAPES, name, shape)
    return tuple(SHAPES)


def test_a_run_compares_every_array_with_float64(cases, tmp_path, capsys):
    result = errors.main(errors.Config(cases=cases, gates=("weak", "resets"), out=tmp_path / "errors"))
    assert json.loads((tmp_path / "errors.json").read_text()) == result
    assert matplotlib.image.imread(tmp_path / "errors.png").ndim == 3
    rows = result["rows"]
    by = ("scan", "chunked")
    assert [tuple(row[name] for name in ("case", "gates", "by")) for row in rows] == [
        (case, gates, name) for case in cases for gates in ("weak", "resets") for name in by
    ]
    for row in rows:
        assert list(row["errors"]) == list(errors.ARRAYS[: 6 if row["case"] == "slots" else 5])
        assert all(0 < error < 3e-5 for error in row["errors"].values()), row
    said = capsys.readouterr().out
    assert "linear, chunked: done" in said and "float32, logits times 0.1" in said


def test_an_implementation_that_refuses_says_why(cases, capsys):
    result = errors.main(errors.Config(cases=("linear",), gates=("weak",), implementations=("pallas",)))
    assert "need a Hopper GPU" in result["rows"][0]["error"]
    assert "linear, weak, pallas: does not fit" in capsys.readouterr().out


def test_a_failing_peer_leaves_the_others(cases, monkeypatch, capsys):
    config = errors.Config(cases=("linear",), gates=("weak", "strong"), implementations=("scan",), dtype="float32")
    monkeypatch.setattr(errors, "fla", lambda problem: 1 / 0)
    problem = errors.problem(SHAPES["linear"], config)
    ((_, _, ours), (_, name, theirs)) = errors.compare({"linear": problem}, config, with_fla=True)
    assert name == "fla" and theirs == [{"error": "failed: division by zero"}] * 2
    assert all(row["errors"]["out"] < 1e-5 for row in ours)


def test_an_earlier_run_stands_for_fla(cases, tmp_path):
    def row(case, gates, by, error):
        return {"case": case, "gates": gates, "by": by, "errors": dict.fromkeys(errors.ARRAYS[:5], error)}

    earlier = tmp_path / "earlier.json"
    record = {"device": "an H200", "date": "then", "settings": {"dtype": "float32", "scale": 0.1}}
    rows = [row("linear", "weak", "pallas", 1.0), row("linear", "weak", "fla", 2.0), row("slots", "weak", "fla", 3.0)]
    earlier.write_text(json.dumps(record | {"rows": rows}))
    config = errors.Config(cases=("linear",), gates=("weak",), peers=earlier, out=tmp_path / "errors.json")
    result = errors.main(config)
    assert [row["by"] for row in result["rows"]] == ["scan", "chunked", "fla"]
    assert result["rows"][-1] == rows[1]
    assert (result["peers"]["device"], result["peers"]["date"]) == ("an H200", "then")
    again = errors.main(dataclasses.replace(config, peers=tmp_path / "errors.json"))
    assert again["peers"] == result["peers"] and again["rows"][-1] == rows[1]
    for changes, message in [({"scale": 1.0}, "expected errors with"), ({"gates": ("strong",)}, "no errors of fla")]:
        with pytest.raises(ValueError, match=message):
            errors.main(dataclasses.replace(config, **changes))


def test_without_memory_for_the_definition_the_rows_say_so(cases, monkeypatch, capsys):
    def exhausted(problem):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(errors, "exactly", exhausted)
    result = errors.main(errors.Config(cases=("linear",), gates=("weak",), implementations=("scan",)))
    assert [row["error"] for row in result["rows"]] == ["the definition in float64: not enough memory"]
    assert "linear, weak, scan: the definition in float64: not enough memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cases": ()}, "cases: expected"), ({"gates": ()}, "gates: expected"), ({"cases": ("slots",)}, "unknown cases")],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        errors.main(errors.Config(**changes))


def test_errors_are_relative_to_the_reference():
    found = {"arrays": [np.array([3.0, 4.5]), np.array([1.0])]}
    assert errors.errors(found, [np.array([3.0, 4.0]), np.array([2.0])]) == {"errors": {"out": 0.1, "dq": 0.5}}
    assert errors.errors({"error": "failed"}, []) == {"error": "failed"}


def test_remarks_tell_the_ratio_to_fla():
    def row(by, gates="weak", **found):
        return {"case": "slots", "gates": gates, "by": by, "errors": found}

    rows = [row("pallas", out=1e-3, dq=3e-3), row("pallas", "resets", out=1e-3), row("fla", out=2e-3, dq=2e-3)]
    rows.append(row("fla", "resets", out=float("nan")))
    (line,) = errors.remarks(rows)
    assert line.startswith("errors of pallas over fla's: median 1.00, at most 1.50, at least 5.0e-01; 1 of 3")
    assert errors.remarks(rows[:2]) == []


def test_gates_forget_more_and_more():
    kept = {gates: np.exp(np.asarray(make_inputs(SHAPES["slots"], np.float32, gates=gates)[3])) for gates in GATES}
    assert all((gate >= 0).all() and (gate <= 1).all() for gate in kept.values())
    assert kept["weak"].mean() > 0.9 > kept["ordinary"].mean() > 0.3 > kept["strong"].mean()
    assert ((kept["resets"] == 0).all(-1) | (kept["resets"] > 0.5).all(-1)).all()
    assert (kept["resets"] == 0).any()
