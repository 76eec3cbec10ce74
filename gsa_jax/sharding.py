"""How named axes are split over devices: one table, for parameters and for what flows between them."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "context", "tensor")
"""The axes of a mesh. The last ones get the nearest devices: `tensor` moves most and nothing hides it."""

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""The mesh axes that each named axis is split over; the other axes are not split."""

BATCH = P(RULES["batch"], RULES["length"])
"""How arrays [batch, length] are split."""


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None = None) -> P:
    """How an array of that shape, whose axes have those names, is split over the mesh, by default the one in context.

    An axis is left whole where the mesh lacks one of its axes or the product of their sizes does not divide it.
    """
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape

    def split(name, size):
        axes = RULES.get(name, ())
        parts = math.prod(sizes.get(axis, math.inf) for axis in axes)
        return (axes if len(axes) > 1 else axes[0]) if axes and size % parts == 0 else None

    return P(*(split(name, size) for name, size in zip(names, shape, strict=True)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, which XLA is to split by the names of its axes over the mesh in context (`jax.set_mesh`), if there is one.

    Does nothing where the mesh has one device, or where `jax.shard_map` or explicit axes have settled it.
    """
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape)) if _splits() else x


def without_single_devices(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """`spec` without the mesh's axes of one device."""
    axes = ((axis,) if isinstance(axis, str) else axis or () for axis in spec)
    return P(*(tuple(name for name in names if mesh.shape[name] > 1) for names in axes))


def token_axes() -> tuple[str, ...]:
    """The axes of the mesh in context over whose several devices tokens are split, rows and places in a row; () without
    such a mesh."""
    axes, sizes = RULES["batch"] + RULES["length"], jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes[axis] > 1) if _splits() and set(axes) <= set(sizes) else ()


def _splits() -> bool:
    """Whether there is a mesh in context whose devices XLA spreads the computation over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types)
