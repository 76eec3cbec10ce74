"""The scripts' answers to mistakes."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["language_model", "--preset", "gsa-9b"], "--preset gsa-9b: unknown, expected one of tiny"),
        (["language_model", "--data", "/nowhere.txt"], "/nowhere.txt"),
        (["language_model", "--mesh.data", "2"], "mesh: data=2"),
        (["language_model", "--mesh.data", "0"], "data must be at least 1, got 0"),
        (["language_model", "--model.gsa.num-kv-heads", "-2"], "num_kv_heads must be at least 1, got -2"),
        (["language_model", "--model.gsa.num-heads", "3"], "heads=3"),
        (["language_model", "--resume"], "there is no run to resume"),
        (["language_model", "--model.mixers", "gsa", "slots"], "mixers must be among gsa"),
        (["generate", "/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere", "--max-batches", "0"], "max_batches must be at least 1, got 0"),
        (["mqar", "--vocab-size", "0"], "vocab_size must be at least 1, got 0"),
        (["benchmarks.ops", "--cases", "gsa-63"], "unknown cases: gsa-63; known are gsa-512-1k, gsa-512-2k"),
        (["benchmarks.ops", "--peers", "/nowhere.json", "--quick"], "/nowhere.json"),
        (["benchmarks.model", "--cases", "8by2048"], "cases: got '8by2048', expected rows x tokens, such as 8x2048"),
        (["benchmarks.model", "--preset", "gsa-9b"], "preset must be one of tiny"),
        (["benchmarks.model", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (
            ["plan", "--preset", "gsa-7b", "--mesh.tensor", "3"],
            "model.gsa.num_heads=8: expected a multiple of",
        ),
        (
            ["plan", "--preset", "gsa-7b", "--length", "2050", "--mesh.context", "4"],
            "length=2050: expected a multiple",
        ),
        (["plan", "--preset", "gsa-7b", "--mesh.data", "3"], "batch_size=1024: expected a multiple of"),
        (["plan", "--gpus", "0"], "gpus=(0,): expected numbers of at least 1"),
        (["benchmarks.peers", "gsa-63"], "unknown cases: gsa-63; known are gsa-512-1k, gsa-512-2k"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, tmp_path):
    command = [sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:]]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "runs").exists()
