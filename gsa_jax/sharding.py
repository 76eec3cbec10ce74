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
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""The mesh axes that each named axis is split over; the other axes are not split."""

GATHERED = "fsdp"
"""The mesh axis that splits, besides, what has an axis "embed": the matrices, which are gathered before they are used.
It takes the first axis that it divides and that no others split, for parts that are whole rows are gathered as they
are, parts of columns transposed first."""

BATCH = P(RULES["batch"], RULES["length"])
"""How arrays [batch, length] are split."""


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None = None) -> P:
    """How an array of that shape, whose axes have those names, is split over the mesh, by default the one in context.

    An axis is left whole where the mesh lacks one of its axes or the product of their sizes does not divide it.
    """
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape

    def parts(axes):
        return math.prod(sizes.get(axis, math.inf) for axis in axes)

    split = [RULES.get(name, ()) for name in names]
    split = [axes if size % parts(axes) == 0 else () for axes, size in zip(split, shape, strict=True)]
    if "embed" in names:
        for i, name in enumerate(names):
            if name and parts(split[i]) == 1 and shape[i] % parts((GATHERED,)) == 0:
                split[i] = (*split[i], GATHERED)
                break
    return P(*(axes if len(axes) > 1 else next(iter(axes), None) for axes in split))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, which XLA is to split by the names of its axes over the mesh in context (`jax.set_mesh`), if there is one.

    Does nothing where the mesh has one device, or where `jax.shard_map` or explicit axes have settled it.
    """
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape)) if _splits() else x


def without_single_devices(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """`spec` without the mesh's axes of one device."""
    return P(*(tuple(name for name in names if mesh.shape[name] > 1) for names in mesh_axes(spec)))


def mesh_axes(spec: P) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of an array."""
    return tuple((axes,) if isinstance(axes, str) else axes or () for axes in spec)


def token_axes() -> tuple[str, ...]:
    """The axes of the mesh in context over whose several devices tokens are split, rows and places in a row; () without
    such a mesh."""
    axes, sizes = RULES["batch"] + RULES["length"], jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes[axis] > 1) if _splits() and set(axes) <= set(sizes) else ()


def _splits() -> bool:
    """Whether there is a mesh in context whose devices XLA spreads the computation over."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types)
