"""Where the arrays of a run lie: the mesh, the parameters and the batch."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.sharding import BATCH, MESH_AXES, partition_spec
from gsa_jax.training.config import ConfigError, MeshConfig
from gsa_jax.training.hosts import rows_of_host


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of those sizes, with the axes `gsa_jax.sharding.MESH_AXES`, over the devices of all hosts.

    On a single host sizes of 1 take one device, however many there are.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = tuple(getattr(config, name) for name in MESH_AXES)
    size, devices = math.prod(sizes), jax.devices()
    wanted = {len(devices)} if jax.process_count() > 1 else {len(devices), 1}
    if size not in wanted:
        named = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        trial = f"; XLA_FLAGS=--xla_force_host_platform_device_count={size} makes as many of a CPU, for a try"
        raise ConfigError(
            f"mesh: {named} make {size} devices, expected {len(devices)}, which is what there is"
            + (", or 1" if len(wanted) > 1 else "")
            + (trial if devices[0].platform == "cpu" else "")
        )
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 4, devices=devices[:size])


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is an nnx variable (a leaf, for `jax.tree.map(..., is_leaf=is_variable)`)."""
    return isinstance(node, nnx.Variable)


def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a parameter's axes, without the leading axis along which layers are stacked, if there is one."""
    return variable.get_metadata()["axes"]


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every array of `tree` (arrays or ShapeDtypeStructs), in the same structure.

    Variables, and so parameters and whatever optax made in their shape, are split by `gsa_jax.sharding.RULES`; an axis
    that its mesh axis does not divide is left whole, and so is everything else.
    """

    def of_node(node):
        spec = _spec(node, mesh) if is_variable(node) else P()
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), node)

    return jax.tree.map(of_node, tree, is_leaf=is_variable)


def _spec(variable: nnx.Variable, mesh: Mesh | AbstractMesh) -> P:
    names = axes(variable)
    stacked = (None,) * (len(variable.shape) - len(names))
    return partition_spec((*stacked, *names), variable.shape, mesh)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, arrays [rows, length], as global arrays [batch, length] on the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    _, hosts = rows_of_host(mesh)

    def put(array):
        rows, length = array.shape
        return jax.make_array_from_process_local_data(sharding, array, (rows * hosts, length))

    return {name: put(array) for name, array in batch.items()}
