"""The benchmark of the ops: its cases, its accounts, its report, and a run of it."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import pytest
from rich.console import Console

from experiments.benchmarks import ops, peers
from experiments.benchmarks.ops_report import all_rows, as_table, draw, floor_shares, ratios, remarks
from experiments.benchmarks.shapes import GPU_SHAPES, SHAPES, Shape, choose, make_inputs
from experiments.benchmarks.timing import attempt, time_calls
from experiments.provenance import device_name

RECORDED = Path(__file__).parents[2] / "experiments/results/peers-h200/peers.json"


def row(case, by, forward, forward_backward):
    """A row with those milliseconds; a text stands for an error."""
    shape = SHAPES[case]
    passes = {"forward": shape.forward_bytes(2), "forward_backward": shape.forward_backward_bytes(2)}
    times = {
        name: {"bytes": count} | ({"error": ms} if isinstance(ms, str) else {"ms": ms, "temp_mib": 10.0})
        for (name, count), ms in zip(passes.items(), (forward, forward_backward), strict=True)
    }
    return {"case": case, "by": by} | times


@pytest.fixture
def result():
    """What a run on an H200 with recorded peers might give."""
    return {
        "device": "1 x NVIDIA H200",
        "versions": {"jax": "0.12"},
        "dtype": "bfloat16",
        "copy_bytes_per_second": 4e12,
        "peers": peers.read(RECORDED, device="1 x NVIDIA H200", dtype="bfloat16"),
        "rows": [
            row("gsa-512-2k", "pallas", 0.29, 1.32),
            row("gsa-512-8k", "pallas", 0.28, "not enough memory"),
            row("gla-128x256", "pallas", "does not fit: V=256", "does not fit: V=256"),
        ],
    }


def printed(table):
    console = Console(width=180)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_the_cases_hold_the_targets():
    """The table of targets: width 2048 from T = 1024 to 131072, smaller heads, GLA."""
    sizes = {tuple(shape.sizes) for shape in GPU_SHAPES.values()}
    assert sizes >= {(B, T, 4, 512, 512, 64) for B, T in ((32, 1024), (16, 2048), (4, 8192), (1, 32768), (1, 131072))}
    assert sizes >= {(8, 4096, H, D, D, 64) for H, D in ((16, 128), (32, 64), (4, 256))}
    assert sizes >= {(16, 2048, 4, 256, 512), (8, 4096, 16, 128, 128), (8, 4096, 4, 128, 256)}


def test_cases_are_chosen_by_name():
    assert list(choose(["gsa-64", "gla-cpu"])) == ["gsa-64", "gla-cpu"]
    with pytest.raises(ValueError, match="unknown cases: gsa-63; known are gsa-512-1k, .*, gsa-cpu-short"):
        choose(["gsa-64", "gsa-63"])


def test_attention_has_the_same_tokens_and_width():
    for shape in GPU_SHAPES.values():
        B, T, H, D = shape.attention
        assert (B, T, H * D) == (shape.B, shape.T, shape.H * shape.V)
    assert GPU_SHAPES["gsa-512-2k"].attention == (16, 2048, 16, 128)


@pytest.mark.parametrize("shape", [Shape("gsa", 2, 3, 5, 7, 11, 13), Shape("gla", 2, 3, 5, 7, 11)])
def test_bytes_are_those_of_inputs_and_outputs(shape):
    inputs = make_inputs(shape, jnp.bfloat16)
    assert inputs[3].shape[-1] == shape.gates
    given, out = sum(x.nbytes for x in inputs), inputs[2].nbytes
    assert shape.forward_bytes(itemsize=2) == given + out
    assert shape.forward_backward_bytes(itemsize=2) == (given + out) + (given + out) + given


def test_the_floor_of_the_first_case_on_an_h200():
    """At 4.3 TB/s; the project's design page has 0.13 and, with gates in float32, 0.37 ms."""
    shape = GPU_SHAPES["gsa-512-2k"]
    assert shape.forward_bytes(2) / 4.3e9 == pytest.approx(0.129, abs=0.001)
    assert shape.forward_backward_bytes(2) / 4.3e9 == pytest.approx(0.355, abs=0.001)


def test_ratios_and_shares_by_hand():
    ours, theirs = row("gsa-512-2k", "pallas", 0.5, 2.0), row("gsa-512-2k", "fla", 1.5, "not enough memory")
    assert ratios(ours, theirs) == [3.0, None]
    assert ratios(ours, None) == [None, None]
    bytes_moved = GPU_SHAPES["gsa-512-2k"].forward_bytes(2)
    assert floor_shares(theirs, rate=bytes_moved * 1000) == [pytest.approx(1 / 1.5), None]


def test_the_table_compares_with_every_peer_and_marks_recorded_ones(result):
    heading, *lines = printed(as_table(result))[3:]
    assert heading.count("(recorded)") == 3
    first = next(line for line in lines if "pallas" in line)
    ratios_to_peers = ("3.0x / 3.0x", "3.3x / 3.0x", "2.0x / 1.7x")
    assert all(cell in first for cell in ("gsa-512-2k", "0.29", "1.32", *ratios_to_peers, "48% / 29%"))
    assert any("gsa-512-8k" in line and "4.0x / -" in line for line in lines)
    for case in ("gsa-512-2k", "gsa-512-8k", "gla-128x256"):
        assert sum(case in line and "fla (recorded)" in line for line in lines) == 1
    assert not any("gsa-512-32k" in line for line in lines)  # on record, but not among the cases of this run


def test_peers_of_the_same_run_are_not_called_recorded(result):
    del result["peers"]["file"]
    assert {row["by"] for row in all_rows(result)} == {"pallas", "fla", "torch flash", "torch cudnn"}
    assert "measured in this run" in "\n".join(remarks(result))


def test_remarks_say_what_does_not_fit_and_where_the_peers_come_from(result):
    text = "\n".join(remarks(result))
    assert "gsa-512-8k, pallas, forward + backward: not enough memory" in text
    assert text.count("gla-128x256, pallas: does not fit: V=256") == 1
    assert f"recorded in {RECORDED}, on 1 x NVIDIA H200, flash-linear-attention 0.6.0, torch 2.11, triton 3.6" in text
    assert "softmax attention over the same tokens" in text


def test_the_plot_shows_the_cases_that_differ_in_length_alone(result):
    figure = draw(result)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["gsa, H 4, K 512, V 512, M 64; B·T = 32,768", ""]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["fla (recorded)"] == [[2048, 0.87], [8192, 1.12]]
    assert lines["pallas"] == [[2048, 0.29], [8192, 0.28]]
    assert "floor: inputs and outputs copied" in lines


def test_the_recorded_peers_agree_with_the_design_page():
    record = peers.read(RECORDED, device="2 x NVIDIA H200")
    times = {(row["case"], row["by"]): row for row in record["rows"]}
    assert times.keys() <= {(case, by) for case in SHAPES for by in ("fla", "torch flash", "torch cudnn")}
    assert times["gsa-512-2k", "fla"]["forward"]["ms"] == 0.87  # the least of 0.87 to 1.06
    assert times["gla-128", "fla"]["forward_backward"]["ms"] == 6.01
    assert round(times["gsa-512-32k", "torch cudnn"]["forward_backward"]["ms"]) == 28  # the page's "flash"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("1 x NVIDIA H100 80GB HBM3", "bfloat16", "the peers' device is 1 x NVIDIA H200, and here it is 1 x NVIDIA H1"),
        ("1 x NVIDIA H200", "float16", "the peers' dtype is bfloat16, and here it is float16"),
    ],
)
def test_peers_of_another_device_or_dtype_are_refused(device, dtype, message):
    with pytest.raises(ValueError, match=message):
        peers.read(RECORDED, device=device, dtype=dtype)


def test_a_file_without_peers_is_refused(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"peers": None, "rows": []}))
    with pytest.raises(ValueError, match="no numbers of peers"):
        peers.read(file)


def test_peers_compile_once_for_shapes_that_differ_in_batch_and_length(tmp_path):
    """In processes of their own, for the shape that comes first."""
    shapes = [SHAPES[case] for case in ("gsa-512-2k", "gsa-512-8k", "gla-128")]
    peers.side_by_side(functools.partial(touch, tmp_path), shapes)
    assert {file.name for file in tmp_path.iterdir()} == {"gsa-2048", "gla-4096"}


def touch(folder, shape):
    """Leaves a file named after the shape."""
    (folder / f"{shape.op}-{shape.T}").touch()


def test_what_an_implementation_refuses_is_reported():
    def refuse(error):
        raise error

    assert attempt(lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert attempt(lambda: refuse(NotImplementedError("no GPU\nhere"))) == {"error": "does not fit: no GPU"}
    assert attempt(lambda: refuse(KeyError()), Exception) == {"error": "failed: KeyError"}
    with pytest.raises(KeyError):
        attempt(lambda: refuse(KeyError()))


def test_calls_stand_back_to_back_and_are_waited_for_once():
    events = []
    time_calls(lambda: events.append("call"), lambda _: events.append("wait"), repeats=2, seconds=0)
    assert events == ["call", "wait"] * 4  # the warm-up, the count, two measurements


def test_a_quick_run_times_all_implementations_and_writes_json_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "gsa-cpu", SHAPES["gsa-cpu"]._replace(B=1, T=512))
    out = tmp_path / "deep" / "quick.json"
    result = ops.main(ops.Config(quick=True, repeats=1, seconds=0, out=out))
    assert json.loads(out.read_text()) == result
    assert result["device"] == device_name() and result["dtype"] == "float32" and result["peers"] is None
    times = {row["by"]: row["forward_backward"] for row in result["rows"]}
    assert times["scan"]["ms"] > times["chunked"]["ms"] > 0
    assert 0 < times["chunked"]["temp_mib"] < times["scan"]["temp_mib"]
    assert "vs scan" in capsys.readouterr().out
    assert matplotlib.image.imread(out.with_suffix(".png")).std() > 0


def test_a_run_takes_the_peers_of_an_earlier_result(tmp_path, capsys):
    record = {"device": device_name(), "versions": {"fla": "1"}, "dtype": "float32"}
    record["rows"] = [row("gsa-cpu-short", "fla", 1e6, 1e6)]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"peers": record}))
    config = ops.Config(
        cases=("gsa-cpu-short",), implementations=("chunked",), peers=earlier, repeats=1, seconds=0, chunk_size=64
    )
    result = ops.main(config)
    assert result["peers"] == record | {"file": str(earlier)}
    out = capsys.readouterr().out
    assert "fla (recorded)" in out and f"Peers: recorded in {earlier}" in out
