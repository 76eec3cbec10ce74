"""The smallest corpus and run, for the tests of this folder and the processes they start."""

import dataclasses
import random
from pathlib import Path

from gsa_jax.layers import GatedSlotAttentionConfig, SoftmaxAttentionConfig
from gsa_jax.models import ModelConfig
from gsa_jax.training import DataConfig, OptimizerConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=16,
    num_layers=2,
    mixers=("softmax",),
    mlp_size=32,
    gsa=GatedSlotAttentionConfig(num_heads=2, num_slots=8),
    softmax=SoftmaxAttentionConfig(num_heads=2),
)


def write_corpus(folder: Path) -> Path:
    """Forty text files of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(("slot", "gate", "key", "value")) for _ in range(60)))
    return folder


def run_config(folder: Path, name: str = "run", **changes) -> TrainConfig:
    """A run of 12 steps in `folder / name` on the corpus in `folder / "corpus"`, which is written if need be."""
    corpus = folder / "corpus"
    config = TrainConfig(
        MODEL,
        data=DataConfig(path=str(corpus if corpus.exists() else write_corpus(corpus)), validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        run_dir=str(folder / name),
        steps=12,
        batch_size=4,
        length=32,
        log_every=2,
        eval_every=6,
        eval_batches=2,
        checkpoint_every=4,
        tensorboard=False,
    )
    return dataclasses.replace(config, **changes)
