"""A program for a process with eight devices: the loss, its gradient and the collectives of a model on some meshes.

Takes meshes as JSON, such as [{"data": 8}], and prints, as JSON, for each the loss, how far the gradients are from
those of one device at most, and its collectives as {"all-gather fsdp f32[2]": 18}: what it is, over which axes, of how
many arrays of which dtype and number of axes.
"""

import collections
import dataclasses
import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.layers import GatedSlotAttentionConfig
from gsa_jax.models import abstract_model
from gsa_jax.training import MeshConfig, init_params, make_mesh, put_batch, shardings
from gsa_jax.training.step import loss_sum
from tests.helpers import rel_err
from tests.training.tiny import MODEL

SIZE = {"hidden_size": 16, "mlp_size": 32, "vocab_size": 264, "num_layers": 2}
"""Two layers, so that a collective of the body of the loop over layers differs from one of all layers at once."""
CONFIG = dataclasses.replace(
    MODEL, mixers=("gsa",), implementation="scan", gsa=GatedSlotAttentionConfig(num_heads=4, num_slots=4), **SIZE
)

_COLLECTIVE = re.compile(
    r" = (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def run(config: MeshConfig) -> tuple[float, nnx.State, dict[str, int]]:
    """The loss, its gradient and the collectives of the compiled program."""
    mesh = make_mesh(config)
    params = init_params(CONFIG, seed=0)
    placed = shardings(params, mesh)
    params = jax.device_put(params, placed)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 17), dtype=np.int32)
    segment_ids = np.arange(16)[None] // np.arange(3, 11)[:, None] + 1
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids.astype(np.int32)}
    graphdef, _ = nnx.split(abstract_model(CONFIG, dtype=jnp.float32))
    gradient = jax.value_and_grad(functools.partial(loss_sum, graphdef), has_aux=True)
    with jax.set_mesh(mesh):
        batch = put_batch(batch, mesh)
        whole = NamedSharding(mesh, P())
        program = jax.jit(gradient, out_shardings=((whole, whole), placed)).lower(params, batch).compile()
    (loss, _), gradient = program(params, batch)
    return float(loss), jax.device_get(gradient), collectives(program.as_text(), mesh)


def collectives(hlo: str, mesh: Mesh) -> dict[str, int]:
    """How many arrays go through each kind of collective, by the mesh's axes; scalars are left out."""
    found = collections.Counter()
    for line in hlo.splitlines():
        if match := _COLLECTIVE.search(re.sub(r"/\*.*?\*/", "", line)):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            axes = "+".join(_axes(line, mesh))
            found.update(f"{match[2]} {axes} {dtype}[{shape.count(',') + 1}]" for dtype, shape in shapes if shape)
    return dict(sorted(found.items()))


def _axes(line: str, mesh: Mesh) -> list[str]:
    """The mesh axes along which the first group of devices of a collective lies."""
    coordinates = [np.argwhere(_ids(mesh) == device)[0] for device in _first_group(line)]
    return [
        name for name, along in zip(mesh.axis_names, zip(*coordinates, strict=True), strict=True) if len({*along}) > 1
    ]


def _ids(mesh: Mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.id)(mesh.devices)


def _first_group(line: str) -> list[int]:
    """The devices of a collective's first group, in any of the three ways in which HLO writes groups."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(number) for number in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in match.groups())
        return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)[0].tolist()
    match = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    along = re.findall(r"'(\w+)'", match[2])
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()


def main(meshes: list[dict[str, int]]) -> list[dict]:
    """What the module's docstring says."""
    loss, gradient, _ = run(MeshConfig())
    results = []
    for sizes in meshes:
        sharded_loss, sharded, found = run(MeshConfig(**sizes))
        errors = jax.tree.map(rel_err, sharded, gradient)
        results.append(
            {"loss": sharded_loss / loss - 1, "gradient": max(jax.tree.leaves(errors)), "collectives": found}
        )
    return results


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
