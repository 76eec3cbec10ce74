"""Where the arrays of a run lie: the mesh, the parameters and the batch."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.sharding import BATCH, MESH_AXES, check_divides, partition_spec
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


def one_device() -> Mesh:
    """A mesh of this host's first device, where `load_model` puts a model.

    Where there are several devices and no mesh is set XLA may have to spread any computation over them, which it can't
    do with kernels: under `jax.set_mesh(one_device())` they are taken.
    """
    return jax.make_mesh((1,) * 4, MESH_AXES, (AxisType.Auto,) * 4, devices=jax.local_devices()[:1])


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is an nnx variable (a leaf, for `jax.tree.map(..., is_leaf=is_variable)`)."""
    return isinstance(node, nnx.Variable)


def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a parameter's axes, without the leading axis along which layers are stacked, if there is one."""
    return variable.get_metadata()["axes"]


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every array of `tree` (arrays or ShapeDtypeStructs), in the same structure.

    Variables, and so parameters and whatever optax made in their shape, are split by `gsa_jax.sharding.RULES`; an axis
    that its mesh axis does not divide is left whole, and so is everything else, what optax made of fewer axes included.
    """

    def of_node(node):
        names = axes(node) if is_variable(node) else ()
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec(names, x.shape, mesh)), node)

    return jax.tree.map(of_node, tree, is_leaf=is_variable)


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    stacked = len(shape) - len(names)
    return partition_spec((*(None,) * stacked, *names), shape, mesh) if names and stacked >= 0 else P()


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, arrays [rows, length], as global arrays [batch, length] on the mesh.

    Raises:
      ValueError: the mesh can't cut an array; the message names it.
    """
    sharding = NamedSharding(mesh, BATCH)
    _, hosts = rows_of_host(mesh)

    def put(name, array):
        rows, length = array.shape
        shape = (rows * hosts, length)
        check_divides(mesh, BATCH, f"batch[{name!r}]", jax.ShapeDtypeStruct(shape, array.dtype))
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: put(name, array) for name, array in batch.items()}
