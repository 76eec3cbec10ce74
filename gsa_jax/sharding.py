"""How named axes are split over devices: one table, for parameters and for what flows between them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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

    An axis is split over those of its mesh axes that the mesh has; it is left whole where the product of their sizes
    does not divide it.
    """
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape

    def parts(axes):
        return math.prod(sizes[axis] for axis in axes)

    split = [tuple(axis for axis in RULES.get(name, ()) if axis in sizes) for name in names]
    split = [axes if size % parts(axes) == 0 else () for axes, size in zip(split, shape, strict=True)]
    if "embed" in names and GATHERED in sizes:
        for i, name in enumerate(names):
            if name and parts(split[i]) == 1 and shape[i] % parts((GATHERED,)) == 0:
                split[i] = (*split[i], GATHERED)
                break
    return P(*(axes if len(axes) > 1 else next(iter(axes), None) for axes in split))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, which XLA is to split by the names of its axes over the mesh in context (`jax.set_mesh`), if there is one.

    Does nothing where the mesh has one device, or where `jax.shard_map` has settled it.
    """
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape)) if spreading_mesh() else x


def spreading_mesh() -> AbstractMesh | None:
    """The mesh in context (`jax.set_mesh`), if it has several devices and some of the axes `MESH_AXES`, and XLA spreads
    the computation over them.

    Raises:
      ValueError: some of these axes are Explicit, over which nothing here is spread.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not set(MESH_AXES) & set(mesh.axis_names):
        return None
    kinds = {name: kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.shape[name] > 1}
    explicit = [name for name in MESH_AXES if kinds.get(name) == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"mesh: {', '.join(explicit)} must be Auto, got Explicit, as jax.make_mesh makes axes by default; "
            f"it takes axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def without_single_devices(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """`spec` without the axes that the mesh lacks or has one device along."""
    return P(*(tuple(name for name in names if mesh.shape.get(name, 1) > 1) for names in axes_by_dimension(spec)))


def axes_by_dimension(spec: P) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of an array."""
    return tuple((axes,) if isinstance(axes, str) else axes or () for axes in spec)


def check_divides(mesh: Mesh | AbstractMesh, spec: P, argument: str, arrays) -> None:
    """Raises a ValueError, which names the argument, unless the mesh can cut its arrays as `spec` says."""
    for array in jax.tree.leaves(arrays):
        for axis, (size, names) in enumerate(zip(array.shape, axes_by_dimension(spec), strict=False)):
            if size % math.prod(mesh.shape[name] for name in names):
                sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
                raise ValueError(
                    f"{argument} has shape {list(array.shape)}: axis {axis} must be a multiple of the mesh's {sizes}"
                )


def over_tokens(function: Callable, whole: jax.Array, *, total: bool = False, **tokens: jax.Array) -> Any:
    """`function(whole, *tokens)`, each device of the mesh in context over those of the tokens that it has.

    Every device gets an array `whole`, whose gradient is summed over them once. That is in its dtype, as with other
    parameters; on CPUs the function gets it in float32, for XLA for CPUs aborts when such a sum is in bfloat16.

    Args:
      function: its result is an array [batch, length, ...] like `tokens` or, with `total`, a sum over tokens.
      tokens: arrays [batch, length, ...], by the names that an error may call them by.

    Raises:
      ValueError: the mesh can't cut an array of `tokens`.
    """
    axes, mesh = _token_axes(), jax.sharding.get_abstract_mesh()
    if jax.default_backend() == "cpu":
        whole = whole.astype(jnp.promote_types(whole.dtype, jnp.float32))
    if not axes:
        return function(whole, *tokens.values())
    spec = without_single_devices(BATCH, mesh)
    for name, array in tokens.items():
        check_divides(mesh, spec, name, array)

    def over_own(whole, *tokens):
        result = function(jax.lax.pcast(whole, axes, to="varying"), *tokens)
        return jax.lax.psum(result, axes) if total else result

    # Axes of one device stay out: XLA for GPUs can't sum over those alone where it splits heads by itself.
    in_specs, out_specs = (P(), *(spec for _ in tokens)), P() if total else spec
    return jax.shard_map(over_own, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))(
        whole, *tokens.values()
    )


def _token_axes() -> tuple[str, ...]:
    """The axes of the mesh in context over whose several devices tokens are split, rows and places in a row; () without
    such a mesh."""
    mesh = spreading_mesh()
    sizes = {} if mesh is None else mesh.shape
    return tuple(axis for axis in RULES["batch"] + RULES["length"] if sizes.get(axis, 1) > 1)
