"""The commands and all pieces of code in the README run, those of benchmarks and installations for GPUs not here."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

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


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_option_of_a_command_is_one_of_its_script(monkeypatch, capsys):
    for command in commands():
        _, _, script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        options = re.findall(r"--[\w.-]+", capsys.readouterr().out)
        assert {word for word in arguments if word.startswith("--")} <= set(options), command


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


def test_real_pretraining(tmp_path):
    """The command with a corpus, a tokenizer and a preset of a paper's size, on a smaller model."""
    (command,) = (command for command in commands() if "gsa-340m" in command)
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": f"slot {i} gate"}) for i in range(200)]
    (tmp_path / "corpus/words.jsonl").write_text("\n".join(lines))
    words = ["</s>", "slot", "gate", *map(str, range(200))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="slot")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    finished = run([sys.executable, *shlex.split(command)[1:], *SMALL_RUN, "--length", "32"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "validation bits per byte" in finished.stdout and "A sample, after 'def '" in finished.stdout
