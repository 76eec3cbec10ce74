"""The code in docs/own_loop.md runs."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

from gsa_jax.models import PRESETS
from gsa_jax.training import TrainConfig, load_model, train
from tests.training.tiny import MODEL

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/own_loop.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """With a smaller model under the name of the one in the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(MODEL, mixers=("gsa",)))


def test_with_flax_and_optax(capsys):
    exec(compile(BLOCKS[0], "own_loop.md", "exec"), {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_over_a_mesh_with_checkpoints_it_leaves_a_run(capsys):
    exec(compile(BLOCKS[1], "own_loop.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]
    assert load_model("runs/own")[2] == 3
    config = TrainConfig.read(Path("runs/own/config.json"))
    summary = train(dataclasses.replace(config, steps=4, eval_batches=1), resume=True)
    assert summary.step == 4 and os.path.exists("runs/own/curve.png")
