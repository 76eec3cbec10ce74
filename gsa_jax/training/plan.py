"""What a mesh costs before there is one: where every array lies, what each axis moves in a step, how long that takes.

Nothing is allocated and no device is needed. The rules of thumb behind the numbers stand in docs/sharding.md.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from gsa_jax.layers.checks import check_numbers
from gsa_jax.models import LanguageModel, ModelConfig, abstract_model, count_parameters
from gsa_jax.sharding import MESH_AXES, axes_by_dimension
from gsa_jax.training.config import ConfigError, MeshConfig, TrainConfig
from gsa_jax.training.optimizer import make_optimizer
from gsa_jax.training.sharding import shardings
from gsa_jax.training.step import abstract_state


@dataclass(frozen=True)
class Hardware:
    """GPUs and their links, an NVIDIA H200 cluster by default."""

    node: int = 8
    """GPUs that NVLink joins"""
    nvlink: float = 450e9
    """bytes per second that a GPU sends inside its node"""
    network: float = 50e9
    """bytes per second that a GPU sends to other nodes"""
    flops: float = 400e12
    """bfloat16 operations per second that a GPU reaches in training: 40% of an H200's peak"""
    memory: float = 130e9
    """bytes of a GPU's memory that can be filled"""

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class Placed:
    """An array of the training state and how it lies on the mesh."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    split: str
    """the mesh axes of each of its axes, as in "- fsdp tensor"; "" for an array that every device has whole"""
    bytes_per_device: int


@dataclass(frozen=True)
class Plan:
    """What a step of a run costs each device."""

    mesh: MeshConfig
    accumulation: int
    state: int
    """bytes of parameters, moments and gradients"""
    activations: int
    """bytes kept for the backward pass, about"""
    sent: dict[str, float]
    """bytes sent in a step along each axis of more than one device"""
    seconds: dict[str, float]
    """how long that takes on the axis' link"""
    compute: float
    """seconds of arithmetic in a step"""

    @property
    def memory(self) -> int:
        """Bytes of a device that are filled."""
        return self.state + self.activations

    @property
    def step(self) -> float:
        """Seconds of a step in which gathering parameters and summing gradients (data, fsdp) hide behind arithmetic, as
        far as they are shorter, while what lies on the path of an activation (tensor, context) does not."""
        hidden = self.seconds.get("data", 0) + self.seconds.get("fsdp", 0)
        return max(self.compute, hidden) + self.seconds.get("tensor", 0) + self.seconds.get("context", 0)


def placement(config: TrainConfig) -> list[Placed]:
    """Every array of the training state: parameters and the optimizer's state, by name."""
    mesh = _abstract_mesh(config.mesh)
    state = abstract_state(config.model, make_optimizer(config.optimizer, config.steps), mesh)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = [" x ".join(axes) or "-" for axes in axes_by_dimension(leaf.sharding.spec)]
        split = " ".join(spec) if set(spec) - {"-"} else ""
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append(Placed(name, leaf.shape, leaf.dtype.name, split, size))
    return rows


def plan(config: TrainConfig, hardware: Hardware) -> Plan:
    """The costs of a run's step on that hardware, in bfloat16.

    Where `config.accumulation` is None a batch has as few parts as keep the activations in memory; the parts that it
    asks for may take more than there is.

    Raises:
      ConfigError: parts are not asked for, and the batch can't be cut into some that fit into memory.
    """
    sizes = dataclasses.asdict(config.mesh)
    rows = config.batch_size // (sizes["data"] * sizes["fsdp"])
    tokens = rows * config.length // sizes["context"]
    weights = _weights(config.model, config.mesh)
    state = sum(weight.elements / weight.fsdp for weight in weights) * 16  # float32: itself, two moments, a gradient
    per_token = _kept_per_token(config.model, config.mesh)
    choices = [config.accumulation] if config.accumulation else [k for k in range(1, rows + 1) if rows % k == 0]
    for k in choices:
        if config.accumulation or state + tokens / k * per_token <= hardware.memory:
            break
    else:
        raise ConfigError(
            f"mesh: {describe(config.mesh)} needs {state / 1e9:.0f} GB for the state and, row by row, "
            f"{tokens / k * per_token / 1e9:.0f} GB for activations, expected at most {hardware.memory / 1e9:.0f} GB"
        )
    sent = _sent(config, weights, rows, tokens, k)
    seconds = {axis: size / _bandwidth(axis, sizes, hardware) for axis, size in sent.items()}
    devices = math.prod(sizes.values())
    operations = _operations_per_token(config.model, config.length) * config.batch_size * config.length
    compute = operations / devices / hardware.flops
    return Plan(config.mesh, k, round(state), round(tokens / k * per_token), sent, seconds, compute)


def best_plans(config: TrainConfig, devices: int, hardware: Hardware) -> list[Plan]:
    """The plans of all meshes of that many devices that the run can use and fits into, the shortest step first.

    Of steps that take equally long the one whose links are less busy comes first.
    """
    plans = []
    for sizes in _factorizations(devices, len(MESH_AXES)):
        try:
            mesh = MeshConfig(*sizes)
            plans.append(plan(dataclasses.replace(config, mesh=mesh), hardware))
        except ConfigError:
            continue
    plans = [plan for plan in plans if plan.memory <= hardware.memory]
    return sorted(plans, key=lambda plan: (round(plan.step, 4), sum(plan.seconds.values())))


def describe(mesh: MeshConfig) -> str:
    """A mesh in words: "fsdp=64, tensor=8"."""
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if size > 1}
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "one device"


@dataclass(frozen=True)
class _Weight:
    """A parameter as the collectives see it."""

    elements: float
    """of what a device holds once it is gathered along fsdp"""
    fsdp: int
    """parts that it is split into along fsdp"""
    itemsize: int
    """bytes of an element on its way: those of the computation, but for the head, which is float32 there"""
    gathers: int
    """how often it is gathered for a part of the batch"""


def _weights(config: ModelConfig, mesh: MeshConfig) -> list[_Weight]:
    weights = []
    for name, (shape, spec) in _parameters(config, mesh).items():
        fsdp = mesh.fsdp if "fsdp" in sum(spec, ()) else 1
        tensor = mesh.tensor if "tensor" in sum(spec, ()) else 1
        uses = 2 if name.startswith("blocks") or config.tie_embeddings and name.startswith("embedding") else 1
        weights.append(_Weight(math.prod(shape) / tensor, fsdp, 4 if name.startswith("head") else 2, uses))
    return weights


@functools.cache
def _parameters(config: ModelConfig, mesh: MeshConfig) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """(shape, mesh axes of each axis) of every parameter, by name."""
    variables = nnx.to_flat_state(_parameter_state(config))
    placed = shardings(dict(variables), _abstract_mesh(mesh))
    return {
        "/".join(map(str, path)): (variable.shape, axes_by_dimension(jax.tree.leaves(placed[path])[0].spec))
        for path, variable in variables
    }


_count_parameters = functools.cache(count_parameters)


@functools.cache
def _parameter_state(config: ModelConfig) -> nnx.State:
    return nnx.state(abstract_model(config))


def _sent(config: TrainConfig, weights: list[_Weight], rows: int, tokens: int, parts: int) -> dict[str, float]:
    """Bytes that a device sends in a step along each axis: rings, as (p - 1) / p of what is gathered or scattered."""
    model, mesh = config.model, config.mesh
    layers, width = model.num_layers, model.hidden_size
    gathered = sum(w.elements * w.itemsize * w.gathers for w in weights if w.fsdp > 1)
    scattered = sum(w.elements * w.itemsize for w in weights if w.fsdp > 1)
    summed = 2 * sum(w.elements * w.itemsize / w.fsdp for w in weights)
    passes = 6 if model.remat == "full" else 4  # two sums of activations a layer, forward and backward
    exchanged = _exchanged_per_row(model, mesh, config.length) * rows * (2 if model.remat == "none" else 3)
    sent = {
        "data": parts * summed,
        "fsdp": parts * (gathered + scattered),
        "tensor": 2 * tokens * width * 2 * (layers * passes + 2),
        "context": parts * summed + exchanged * mesh.context,
    }
    sizes = dataclasses.asdict(mesh)
    return {axis: size * (1 - 1 / sizes[axis]) for axis, size in sent.items() if sizes[axis] > 1}


def _exchanged_per_row(config: ModelConfig, mesh: MeshConfig, length: int) -> float:
    """Bytes that a device adds to what all devices of the axis `context` gather of a row: the states of its tokens, or
    for softmax attention their keys and values."""
    return _state_bytes(config, length // mesh.context) / mesh.tensor


@functools.cache
def _state_bytes(config: ModelConfig, length: int) -> int:
    states = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).init_state(1, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(states))


def _kept_per_token(config: ModelConfig, mesh: MeshConfig) -> float:
    """Bytes that the backward pass finds of a token, about: the residual stream before each layer and, unless they are
    computed again, the outputs of the layer's matrices."""
    kept = config.num_layers * config.hidden_size
    for name, (shape, spec) in _parameters(config, mesh).items():
        if config.remat != "full" and name.startswith("blocks") and len(shape) == 3:
            kept += shape[0] * shape[2] / (mesh.tensor if "tensor" in spec[2] else 1)
    return 2 * kept


def _operations_per_token(config: ModelConfig, length: int) -> float:
    """Six for each parameter that a token is multiplied with, eight in blocks that are computed again, and those of
    softmax attention with the half of the tokens, or of the window, that a token sees on average."""
    _, multiplied = _count_parameters(config)
    again = 4 / 3 if config.remat == "full" else 1
    head = config.vocab_size * config.hidden_size
    seen = min(length / 2, config.softmax.window or length)
    num_softmax = config.mixers.count("softmax") * config.num_layers // len(config.mixers)
    return 6 * (head + again * (multiplied - head)) + again * num_softmax * 12 * seen * config.hidden_size


def _bandwidth(axis: str, sizes: dict[str, int], hardware: Hardware) -> float:
    """Of the link that neighbours along an axis share: NVLink if all devices along it are of one node."""
    inside = MESH_AXES[MESH_AXES.index(axis) :]
    return hardware.nvlink if math.prod(sizes[name] for name in inside) <= hardware.node else hardware.network


def _abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    return AbstractMesh(tuple(getattr(mesh, name) for name in MESH_AXES), MESH_AXES)


def _factorizations(number: int, count: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered product of `count` factors."""
    if count == 1:
        return [(number,)]
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [(n, *rest) for n in divisors for rest in _factorizations(number // n, count - 1)]
