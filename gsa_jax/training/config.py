"""What sets a training run: frozen dataclasses, their JSON form, and the recipe of every preset."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import ModelConfig, count_parameters, preset
from gsa_jax.training.data import DataConfig


class ConfigError(ValueError):
    """Settings that cannot be trained as asked: the message names the field, its value and what was expected."""


def _check(holds: bool, got: str, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{got}: expected {expected}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: linear warm-up, cosine decay, gradients clipped by their global norm."""

    learning_rate: float = 3e-4
    """peak learning rate, reached at the last step of the warm-up"""
    warmup_steps: int = 0
    """steps of linear warm-up; a shorter run ends within it"""
    final_fraction: float = 0.1
    """learning rate of the last step, as a fraction of the peak"""
    weight_decay: float = 0.01
    """decoupled weight decay of the matrices; norms, biases and other vectors have none"""
    b1: float = 0.9
    """decay of the first moment"""
    b2: float = 0.95
    """decay of the second moment"""
    epsilon: float = 1e-8
    """AdamW's epsilon"""
    clip: float = 1.0
    """largest global norm of a gradient; inf for no clipping"""

    def __post_init__(self):
        check_numbers(self, "warmup_steps", "final_fraction", "weight_decay", "b1", "b2", may_be_infinite=("clip",))
        for name in ("b1", "b2"):
            _check(getattr(self, name) < 1, f"{name}={getattr(self, name)}", "less than 1")
        _check(self.final_fraction <= 1, f"final_fraction={self.final_fraction}", "at most 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices, or 1 to use one device."""

    data: int = 1
    """replicas of the parameters, each with its rows of the batch"""
    fsdp: int = 1
    """parts of the batch and also of the parameters"""
    tensor: int = 1
    """parts of the heads, of the MLP and of the vocabulary"""
    context: int = 1
    """parts of the sequence"""

    def __post_init__(self):
        check_numbers(self)


TOKENS_AT_ONCE = 2**14
"""Tokens that a device computes at a time unless a run says otherwise: 8 rows of 2048, with which gsa-1.3b took 28 GiB
of an H200, all in bfloat16."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig
    """the model"""
    data: DataConfig = DataConfig()
    """the text"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """the optimizer"""
    mesh: MeshConfig = MeshConfig()
    """the devices"""
    run_dir: str = "runs/language_model"
    """folder of the run: config.json, checkpoints/, metrics.jsonl, tensorboard/, curve.png"""
    steps: int = 1000
    """optimizer steps of the whole run"""
    batch_size: int = 16
    """sequences of a step, over all hosts and devices"""
    length: int = 256
    """tokens of a sequence"""
    accumulation: int | None = None
    """parts a batch is computed in, to save memory; None: so few that a device has 16,384 tokens or a row at a time"""
    seed: int = 0
    """of the initial parameters and of the order of the documents"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the computation; auto: bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32 in any case"""
    log_every: int = 10
    """steps between two lines of metrics"""
    eval_every: int = 200
    """steps between two evaluations on the validation split; one more comes at the end"""
    eval_batches: int | None = None
    """batches of an evaluation, of batch_size sequences each; None for the whole validation split"""
    checkpoint_every: int = 200
    """steps between two checkpoints; one more is saved at the end and on SIGTERM or SIGINT"""
    keep: int = 2
    """checkpoints kept, the newest ones"""
    tensorboard: bool = True
    """write TensorBoard curves too"""

    def __post_init__(self):
        _check(self.run_dir != "", "run_dir=''", "the name of a folder")
        for name in ("steps", "batch_size", "length", "log_every", "eval_every", "checkpoint_every", "keep"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        for name in ("accumulation", "eval_batches"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name}={value}", "at least 1")
        _check(0 <= self.seed < 2**32, f"seed={self.seed}", "at least 0 and less than 2^32")
        rows = (self.accumulation or 1) * self.mesh.data * self.mesh.fsdp
        _check(
            self.batch_size % rows == 0,
            f"batch_size={self.batch_size}",
            f"a multiple of {'accumulation x ' if self.accumulation else ''}mesh.data x mesh.fsdp = {rows}",
        )
        _check(
            self.length % self.mesh.context == 0,
            f"length={self.length}",
            f"a multiple of mesh.context={self.mesh.context}",
        )
        for name, parts in _split_over_tensor(self.model):
            _check(parts % self.mesh.tensor == 0, f"{name}={parts}", f"a multiple of mesh.tensor={self.mesh.tensor}")

    @property
    def parts(self) -> int:
        """Parts that a batch is computed in: `accumulation`, or what None stands for."""
        if self.accumulation:
            return self.accumulation
        rows = self.batch_size // (self.mesh.data * self.mesh.fsdp)
        at_once = max(1, TOKENS_AT_ONCE // (self.length // self.mesh.context))
        return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= at_once)

    def to_json(self) -> str:
        """The settings as JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, file: Path) -> None:
        """Writes the settings for `read` in one go, so that nobody finds half of them; makes the folder."""
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.write_text(self.to_json())
        new.replace(file)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The settings that `to_json` wrote; what is left out takes its default.

        Raises:
          ConfigError: not JSON, a field this version does not know, or a value of another type than its field's.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config: expected JSON, got {error}") from error
        if not isinstance(values, dict) or "model" not in values:
            raise ConfigError(f"config: expected an object with the field 'model', got {text[:80]!r}")
        return _build(cls, values, "config")

    @classmethod
    def read(cls, file: Path) -> "TrainConfig":
        """The settings in a file that `to_json` filled; raises a ConfigError that names the file if it can't."""
        try:
            return cls.from_json(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """Where the JSON of two configs differs: "model.num_layers" -> "model.num_layers is 4 there and 6 here"."""
    old, new = dict(_flat(there)), dict(_flat(here))
    return {
        name: f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
        for name in old | new
        if old.get(name) != new.get(name)
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _split_over_tensor(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name, size) of all that the axis `tensor` must divide: the heads of the mixers and the MLP's width."""
    for mixer in dict.fromkeys(model.mixers):
        config = getattr(model, mixer)
        if mixer == "hgrn2":
            yield "model.hidden_size / model.hgrn2.expand_ratio", model.hidden_size // config.expand_ratio
        for name in ("num_heads", "num_kv_heads"):
            if (heads := getattr(config, name, None)) is not None:
                yield f"model.{mixer}.{name}", heads
    yield "model.mlp_size", model.resolved_mlp_size


def _build(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the annotated type `kind`: dataclasses of dataclasses, plain values and tuples of them."""
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise ConfigError(f"{where}: unknown field {unknown[0]!r}, expected some of {', '.join(hints)}")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    built = tuple(value) if isinstance(value, list) else value
    try:
        return check_type(built, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise ConfigError(f"{where}: expected {name}, got {value!r}") from error


def recipe(name: str) -> TrainConfig:
    """The model preset `name` and how to train it.

    The tiny ones learn bytes in minutes on a CPU. The others follow the papers (arXiv 2409.07146, 2312.06635): rows of
    2048 tokens, batches of 0.5M tokens below a billion parameters and 2M above, 0.5B and 1B tokens of warm-up to 3e-4,
    cosine to 3e-5, weight decay 0.01, clip 1.0, 10B and 100B tokens in all. On any mesh a device computes 8 rows at a
    time: on one, a batch of 2M tokens is 128 parts, on 64 it is 2.

    Raises:
      ValueError: an unknown preset; the message lists the known ones.
    """
    model = preset(name)
    size, _ = count_parameters(model)
    if size < 1e8:
        optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=50)
        return TrainConfig(model, optimizer=optimizer, run_dir=f"runs/{name}", steps=800, batch_size=8, eval_batches=32)
    large = size > 1e9
    return TrainConfig(
        model,
        optimizer=OptimizerConfig(warmup_steps=500 if large else 1000),
        run_dir=f"runs/{name}",
        steps=50_000 if large else 20_000,
        batch_size=1024 if large else 256,
        length=2048,
        eval_every=1000,
        eval_batches=1 if large else 4,
        checkpoint_every=1000,
    )
