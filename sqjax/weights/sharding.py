"""Where a quantized tree lives on a mesh, given the shardings of the float tree."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sqjax._shapes import mesh_axes
from sqjax._trees import PyTree, named_leaves
from sqjax.weights.layout import group_sizes_for
from sqjax.weights.quant_weight import QuantWeight, is_quantized


def shardings(qparams: PyTree, of_float: PyTree) -> PyTree:
    """The shardings of a quantized tree: every device keeps the block of a leaf that it had.

    The values of a weight are cut along the axes along which the float leaf was; so are its scales
    where they have more than one entry, `smoothing` along the contracted axes, and static scales
    along the batch axes.

    Args:
        qparams: what `quantize` returned (or `jax.eval_shape` of it).
        of_float: for every leaf of the float tree its NamedSharding or PartitionSpec; None: one
            copy on every device. Of flax's boxed leaves, what `nn.get_partition_spec` or
            `nn.get_sharding` gives.

    Returns:
        The tree of `qparams` with a NamedSharding (or PartitionSpec, or None) for every array: for
        `jax.device_put`, or for the `out_shardings` of a jitted `quantize`.

    Raises:
        ValueError: the trees differ; a spec does not fit its leaf, or cuts an axis that its mesh
            does not divide; names the leaf.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from jax.sharding import PartitionSpec as P
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.ones((2, 4))}, jnp.ones((1, 2))
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> found = sq.shardings(qparams, {"w": P(None, "model")})["w"].tensor
        >>> found.values, found.scale
        (P('model', None), P('model', None))
    """
    paths, leaves, treedef = named_leaves(qparams, is_leaf=is_quantized)
    names, specs, _ = named_leaves(of_float, is_leaf=_is_sharding)
    # By name, because keys 2 and 10 come in another order than "2" and "10".
    given = dict(zip(names, specs, strict=True))
    own_names = [_name_of_box(path, given) for path in paths]
    odd = sorted(set(own_names).symmetric_difference(names))
    if odd:
        raise ValueError(
            "shardings: expected one for every leaf of the float tree; the trees differ at "
            f"{odd[:5]}"
        )
    found = []
    for path, name, x in zip(paths, own_names, leaves, strict=True):
        found.append(_of_leaf(x, given[name], path))
    return jax.tree_util.tree_unflatten(treedef, found)


def _name_of_box(path: str, names: Container[str]) -> str:
    """The name under which a leaf's sharding is given: its own, or that of flax's box around it.

    `nn.get_partition_spec` says of the box "kernel" how its leaf "kernel/value" is sharded.
    """
    box = path.removesuffix("/value")
    return box if path not in names and box in names else path


def weight_specs(
    weight: QuantWeight, spec: PartitionSpec, where: str
) -> QuantWeight:
    """The `QuantWeight` of the PartitionSpecs of a weight's arrays, given that of the float leaf.

    Raises:
        ValueError: the spec is longer than the leaf's rank; names the leaf `where`.
    """
    tensor = weight.tensor
    stored = tensor.as_stored(_entries(spec, tensor.shape, where))
    first = tensor.ndim - weight.contracted
    outer, inner = stored[:first], stored[first:]

    def of_scales(scales: Any) -> PartitionSpec:
        """Scales are sharded along the axes on which they have more than one entry."""
        sizes = zip(stored, scales.shape, strict=True)
        return PartitionSpec(
            *[entry if size > 1 else None for entry, size in sizes]
        )

    def of_matrices(x: Any, *own: Any) -> PartitionSpec:
        """The axes of a stack come first, as in the values; then those of each matrix's array."""
        return PartitionSpec(*outer[: x.ndim - len(own)], *own)

    specs = replace(tensor.map_scales(of_scales), values=PartitionSpec(*stored))
    # A device needs all outlier channels of its matrices, because x is indexed with them.
    return weight.with_tensor(
        specs,
        input_scale=of_matrices,
        smoothing=lambda x: of_matrices(x, *inner),
        channels=lambda x: of_matrices(x, None),
        outlier_weight=lambda x: of_matrices(x, None),
    )


def explicit_shardings(
    weight: QuantWeight, sharding: NamedSharding
) -> QuantWeight:
    """The `QuantWeight` of the NamedShardings of a weight's arrays, given that of the float leaf.

    An axis that its mesh axes do not divide is not sharded: 3 groups on 2 devices.

    Args:
        weight: the weight, or its shapes.
        sharding: of the float leaf.
    """
    specs = weight_specs(weight, sharding.spec, "weight")

    def fitting(x: Any, spec: PartitionSpec) -> NamedSharding:
        pairs = zip(x.shape, _entries(spec, x.shape, "weight"), strict=True)
        kept = [
            None if size % _blocks(entry, sharding.mesh.shape) else entry
            for size, entry in pairs
        ]
        return sharding.update(spec=PartitionSpec(*kept))

    return jax.tree.map(fitting, weight, specs)


def _entries(spec: PartitionSpec, shape: Sequence[int], path: str) -> list[Any]:
    """A spec's entry for every axis: P("model") for an array of rank 2 has "model" and None.

    Raises:
        ValueError: the spec has more entries than there are axes.
    """
    missing = len(shape) - len(spec)
    if missing < 0:
        raise ValueError(
            f"{path}: expected a spec of at most {len(shape)} entries for {shape}, got {spec}"
        )
    return [*spec, *[None] * missing]


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, NamedSharding | PartitionSpec)


def _of_leaf(leaf: Any, sharding: Any, path: str) -> Any:
    """The sharding (or spec) of a leaf; for a quantized one a `QuantWeight` of such."""
    if not _is_sharding(sharding):
        raise ValueError(
            f"{path}: expected a NamedSharding, a PartitionSpec or None, got "
            f"{type(sharding).__name__}"
        )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    spec = PartitionSpec() if spec is None else spec
    entries = _entries(spec, leaf.shape, path)
    if isinstance(sharding, NamedSharding):
        _check_divides(leaf.shape, entries, sharding.mesh.shape, path)
    if not isinstance(leaf, QuantWeight):
        return sharding
    specs = weight_specs(leaf, spec, path)
    if isinstance(sharding, NamedSharding):
        check_groups(leaf, specs, sharding.mesh.shape, path)
        return jax.tree.map(lambda found: sharding.update(spec=found), specs)
    return specs


def _blocks(entry: Any, sizes: Mapping[str, int]) -> int:
    """Into how many blocks an entry of a spec cuts its axis, on a mesh of these sizes."""
    return math.prod(sizes[name] for name in mesh_axes(entry))


def _check_divides(
    shape: Sequence[int],
    entries: Sequence[Any],
    sizes: Mapping[str, int],
    path: str,
) -> None:
    """Raises ValueError if an axis of the leaf can not be cut into equal blocks."""
    pairs = zip(shape, entries, strict=True)
    for axis, (size, entry) in enumerate(pairs):
        devices = _blocks(entry, sizes)
        if size % devices:
            raise ValueError(
                f"{path}: its axis {axis} of size {size} can not be sharded into {devices} blocks "
                f"by {entry}"
            )


def check_groups(
    leaf: QuantWeight, specs: QuantWeight, sizes: Mapping[str, int], path: str
) -> None:
    """Raises ValueError if a device's block would begin inside a group.

    1024 channels on 4 devices are blocks of 256: whole groups of 64, but not of 96.

    Args:
        leaf: the whole weight.
        specs: those of its arrays, from `weight_specs`.
        sizes: {mesh axis: how many devices}.
        path: the leaf's name in errors.
    """
    devices = _blocks(specs.tensor.values[-1], sizes)
    length = leaf.tensor.values.shape[-1]
    block = length // devices
    # Without groups any channel may be the first of a block.
    group = leaf.tensor.group or 1
    several = devices > 1 and group < length
    if several and block % group:
        raise ValueError(
            f"{path}: its {length} contracted channels can not be sharded into {devices} blocks of "
            f"whole groups of {group}; choose a group size that divides {block}: "
            f"{group_sizes_for(block)}"
        )


def check_rotation(
    leaf: QuantWeight, specs: QuantWeight, sizes: Mapping[str, int], path: str
) -> None:
    """Raises ValueError if the channels of a device would be no whole blocks of a rotation.

    1536 channels on 4 devices are 384 for each: whole blocks of 128, but not of 256, nor of 1536.
    Where a compiler shards arrays as it likes, it moves what a block needs; in a shard_map nothing
    moves.

    Args:
        leaf: the whole weight.
        specs: those of its arrays, from `weight_specs`.
        sizes: {mesh axis: how many devices}.
        path: the leaf's name in errors.
    """
    if leaf.rotation is None:
        return
    first = leaf.ndim - leaf.contracted
    channels = leaf.tensor.values.shape[first:]
    entries = tuple(specs.tensor.values)[first:]
    # How many channels of the flattened ones lie together on a device.
    together = 1
    for size, entry in reversed([*zip(channels, entries, strict=True)]):
        devices = _blocks(entry, sizes)
        together *= size // devices
        if devices > 1 and together % leaf.rotation:
            raise ValueError(
                f"{path}: is rotated in blocks of {leaf.rotation} of its {math.prod(channels)} "
                f"channels, and {devices} devices would have {together} of these together; choose "
                f"a rotation that divides {together}, shard the outputs, or give this site a "
                "scheme without one"
            )
