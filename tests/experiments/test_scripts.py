"""The scripts' help, and their answers to mistakes."""

import runpy
import sys

import jax
import pytest

from experiments.command_line import user_errors

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`python -m experiments.SCRIPT ARGUMENTS` in this process and an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(f"experiments.{script}", run_name="__main__", alter_sys=True)
        return exit_.value.code, *capsys.readouterr()

    return run


SCRIPTS = ["language_model", "generate", "evaluate", "mqar", "plan"]
BENCHMARKS = ["ops", "errors", "model", "mesh", "step", "peers", "tune"]


@pytest.mark.parametrize(
    "script",
    [*SCRIPTS, *(f"benchmarks.{name}" for name in BENCHMARKS)],
)
def test_help_reads_well(script, run):
    code, stdout, _ = run(script, "--help")
    assert code == 0
    assert f"usage: python -m experiments.{script} [-h]" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["language_model", "--preset", "gsa-9b"], "--preset gsa-9b: unknown, expected one of tiny"),
        (["language_model", "--data", "/nowhere.txt"], "/nowhere.txt"),
        (["language_model", "--mesh.data", "2"], "XLA_FLAGS=--xla_force_host_platform_device_count=2 makes"),
        (["language_model", "--mesh.data", "0"], "data must be at least 1, got 0"),
        (["language_model", "--optimizer.b2", "1"], "b2=1.0: expected less than 1"),
        (["language_model", "--model.gsa.num-kv-heads", "-2"], "num_kv_heads must be at least 1, got -2"),
        (["language_model", "--model.gsa.num-heads", "3"], "heads=3"),
        (["language_model", "--model.implementation", "pallas"], "pallas': the kernels need a Hopper GPU"),
        (["language_model", "--resume"], "there is no run to resume"),
        (["language_model", "--model.mixers", "gsa", "slots"], "mixers must be among gsa"),
        (["generate", "/nowhere"], "/nowhere"),
        (["generate", "/nowhere", "--num-tokens", "0"], "num_tokens must be at least 1, got 0"),
        (["generate", "/nowhere", "--prompt", "\udcff"], "prompt must be UTF-8, got '\\udcff'"),
        (["language_model", "--prompt", "\udcff"], "prompt must be UTF-8, got '\\udcff'"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere", "--max-batches", "0"], "max_batches must be at least 1, got 0"),
        (["mqar", "--vocab-size", "0"], "vocab_size must be at least 1, got 0"),
        (["benchmarks.ops", "--cases", "gsa-63"], "unknown cases: gsa-63; known are gsa-512-1k, gsa-512-2k"),
        (["benchmarks.ops", "--peers", "/nowhere.json", "--quick"], "/nowhere.json"),
        (["benchmarks.ops", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["benchmarks.ops", "--chunk-size", "48"], "chunk_size must be a power of two or None, got 48"),
        (["benchmarks.step", "--batches", "4", "-1"], "batches must be at least 1, got (4, -1)"),
        (["benchmarks.model", "--decode-batches", "0"], "decode_batches must be at least 1, got (0,)"),
        (["benchmarks.model", "--cases", "8by2048"], "cases: got '8by2048', expected rows x tokens, such as 8x2048"),
        (["benchmarks.model", "--preset", "gsa-9b"], "preset must be one of tiny"),
        (["benchmarks.model", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["benchmarks.mesh", "--axes", "expert"], "axes must be among data, fsdp, context, tensor, got"),
        (["benchmarks.mesh", "--preset", "gsa-9b"], "preset must be one of tiny"),
        (
            ["plan", "--preset", "gsa-7b", "--mesh.tensor", "3"],
            "model.gsa.num_heads=8: expected a multiple of",
        ),
        (
            ["plan", "--preset", "gsa-7b", "--length", "2050", "--mesh.context", "4"],
            "length=2050: expected a multiple",
        ),
        (["plan", "--preset", "gsa-7b", "--mesh.data", "3"], "batch_size=1024: expected a multiple of"),
        (["plan", "--gpus", "8", "--mesh.data", "8"], "gpus=(8,): expected no mesh beside them, got data=8"),
        (["plan", "--gpus", "0"], "gpus must be at least 1, got (0,)"),
        (["benchmarks.step", "--out", "/dev/null/step.json"], "out: /dev/null/step.json can't be written"),
        (["benchmarks.ops", "--out", "/dev/null/ops.json"], "out: /dev/null/ops.json can't be written"),
        (["benchmarks.model", "--out", "/dev/null/model.json"], "out: /dev/null/model.json can't be written"),
        (["benchmarks.mesh", "--out", "/dev/null/mesh.json"], "out: /dev/null/mesh.json can't be written"),
        (["mqar", "--out", "/dev/null/mqar"], "out: /dev/null/mqar can't be made"),
        (["language_model", "--skip-bad", "--steps", "0"], "steps=0: expected at least 1"),
        (["language_model", "--run-dir", ""], "run_dir='': expected the name of a folder"),
        (["benchmarks.peers", "gsa-63"], "unknown cases: gsa-63; known are gsa-512-1k, gsa-512-2k"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, run, tmp_path):
    code, _, stderr = run(*arguments)
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.", "INTERNAL: a bug"])
def test_out_of_memory_ends_in_one_line_and_exit_code_1(message, capsys):
    error = jax.errors.JaxRuntimeError(f"{message}\n\nand much more")
    with pytest.raises((SystemExit, jax.errors.JaxRuntimeError)) as stop, user_errors(less_memory="a shorter length"):
        raise error
    if "INTERNAL" in message:
        assert stop.value is error
        return
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the device has not enough memory ({message})") and line.endswith(
        "; a shorter length"
    )
