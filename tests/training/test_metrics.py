import json
from types import SimpleNamespace

import matplotlib.image
import pytest

from gsa_jax.models import count_parameters, preset
from gsa_jax.training import plot_curves, read_metrics, speed
from gsa_jax.training.metrics import Console, MetricsLog, describe, peak_flops


def write(run_dir, steps, after_step=0, tensorboard=False):
    with MetricsLog(run_dir, after_step=after_step, tensorboard=tensorboard) as log:
        for step in steps:
            log.write(step, {"loss": 1 / step})


def test_a_resumed_log_has_every_step_once(tmp_path):
    write(tmp_path, [2, 4, 6, 8])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, [5, 6, 7], after_step=4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5, 6, 7]
    assert lines[:2] == before[:2]


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], after_step=2)
    assert read_metrics(tmp_path)[-1] == {"step": 3, "loss": 1 / 3}


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "2"}', "\x00"])
def test_a_damaged_line_is_named(tmp_path, line):
    write(tmp_path, [1])
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + line + "\n")
    for read in (read_metrics, lambda folder: write(folder, [2], after_step=1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object with a step, got b"):
            read(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before + line + "\n"


def test_lines_are_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path, after_step=0, tensorboard=False) as log:
        log.write(1, {"loss": 0.1})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_tensorboard_is_written_when_asked_for(tmp_path):
    write(tmp_path / "without", [1, 2])
    write(tmp_path / "with", [1, 2], tensorboard=True)
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert next((tmp_path / "with" / "tensorboard").iterdir()).stat().st_size > 100


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with Console() as console:
        console.start("[not] markup")
        console.step(9, 20, ["loss 2.6"], 62, stays=False)
        console.step(10, 20, ["loss 2.5", "MFU 41.5%"], 61, stays=True)
    assert capsys.readouterr().out.splitlines() == ["[not] markup", "step 10/20 · loss 2.5 · MFU 41.5% · 0:01:01 left"]


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Console() as console:
        for title in ("first", "second"):
            console.start(title)
            console.step(10, 20, ["loss 2.5"], 61, stays=True)
            console.step(20, 20, ["loss 2.4"], 0, stays=False)
    out = capsys.readouterr().out
    assert "\x1b[" in out and "━" in out and "step 20/20 · loss 2.4 · 0:00:00 left" in out
    assert out.count("step 10/20 · loss 2.5 · 0:01:01 left\n") == 2


def test_metrics_for_people():
    values = {"loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 12345.6}
    assert describe(values) == ["loss 2.5000", "12,346 tok/s"]
    values |= {"mfu": 0.415, "validation_loss": 2.0, "validation_bits_per_byte": 3.0}
    assert describe(values) == ["loss 2.5000", "validation 3.0000 bits/byte", "12,346 tok/s", "MFU 41.5%"]


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 990e12),
        ("NVIDIA H200", 990e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_rates_of_known_devices(kind, rate):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == rate


def test_speed_counts_six_operations_a_parameter_of_the_peak_of_all_devices():
    device = SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
    mesh = SimpleNamespace(local_devices=[device], size=4)
    _, multiplied = count_parameters(preset("gsa-340m"))
    expected = {"tokens_per_second": 1e5, "mfu": 6 * multiplied * 1e5 / (4 * 990e12), "memory_gib": 3}
    assert speed(preset("gsa-340m"), mesh, 1e5) == pytest.approx(expected)


def test_devices_that_do_not_tell_have_tokens_per_second_alone():
    device = SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)
    mesh = SimpleNamespace(local_devices=[device], size=1)
    assert speed(preset("tiny"), mesh, 1e3) == {"tokens_per_second": 1e3}


def test_the_plot_is_a_picture_also_without_validation(tmp_path):
    with MetricsLog(tmp_path, after_step=0, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 5 / step} | ({"validation_bits_per_byte": 3 / step} if step > 3 else {}))
    picture = matplotlib.image.imread(plot_curves(tmp_path, references={"byte bigrams": 2.5}))
    assert picture.shape[0] >= 600 and picture.std() > 0.01
    write(tmp_path / "bare", [1])
    assert plot_curves(tmp_path / "bare").stat().st_size > 1000
