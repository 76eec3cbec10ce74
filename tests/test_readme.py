"""Every command and every piece of code in the README runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL_RUN = shlex.split(
    "--model.hidden-size 32 --model.num-layers 1 --steps 2 --length 1024 --batch-size 4 --eval-batches 1"
)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The README's shell commands that start a script, wherever they stand."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    inline = [" ".join(text.split()) for text in re.findall(r"`(python -m experiments[^`]*)`", README)]
    return [line for line in lines if line.startswith("python -m experiments")] + inline


def run(command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_installation_and_test_commands_are_those_of_ci():
    """.ci/run executes them in a fresh environment."""
    ci = (ROOT / ".ci/run").read_text()
    assert 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]"' in README
    assert '-e ".[dev]"' in ci
    assert "python -m pytest -n auto" in blocks("bash")[2]
    assert "python -m pytest -n auto" in ci


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_script_has_a_test_below():
    scripts = {re.search(r"experiments\.[\w.]+", command)[0] for command in commands()}
    assert scripts == {
        "experiments.language_model",
        "experiments.generate",
        "experiments.evaluate",
        "experiments.benchmarks.ops",
        "experiments.benchmarks.errors",
        "experiments.benchmarks.model",
        "experiments.benchmarks.step",
        "experiments.benchmarks.mesh",
        "experiments.mqar",
        "experiments.plan",
    }


def test_train_generate_evaluate_resume(tmp_path):
    """The walk through the README, on a smaller model: the same commands with settings that make them quick."""
    train, generate, evaluate, resume = (shlex.split(command)[1:] for command in commands()[:4])
    python = [sys.executable, "-W", "error::DeprecationWarning:experiments"]
    few = ["--max-batches", "2", "--out", "runs/tiny/evaluation.json"]
    for command, small in [(train, SMALL_RUN), (generate, ["--num-tokens", "8"]), (evaluate, few)]:
        finished = run([*python, *command, *small], tmp_path)
        assert finished.returncode == 0, finished.stderr
        if command is train:
            assert "a byte bigram model's" in finished.stdout
            assert "A sample, after 'def '" in finished.stdout
    finished = run([*python, *[word.replace("2000", "3") for word in resume]], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "runs/tiny/curve.png").stat().st_size > 10_000
    assert (tmp_path / "runs/tiny/evaluation.png").stat().st_size > 10_000
