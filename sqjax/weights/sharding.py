"""Where a quantized tree lives on a mesh: from the shardings of the float tree to those of values and scales."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sqjax._shapes import mesh_axes
from sqjax._trees import PyTree, named_leaves
from sqjax.weights.quant_weight import Outliers, QuantWeight, is_quantized


def shardings(qparams: PyTree, of_float: PyTree) -> PyTree:
    """The shardings of a quantized tree, given those of the float tree: every device keeps the block that it had.

    The values of a weight are cut along the axes along which the float leaf was; so are its scales
    where they have more than one entry, `smoothing` along the contracted axes, and static scales
    along the batch axes.

    Args:
        qparams: what `quantize` returned (or `jax.eval_shape` of it).
        of_float: for every leaf of the float tree its NamedSharding or PartitionSpec; None: one
            copy on every device.

    Returns:
        The tree of `qparams` with a NamedSharding (or PartitionSpec, or None) for every array: for
        `jax.device_put`, or for the `out_shardings` of a jitted `quantize`.

    Raises:
        ValueError: the trees differ; a spec does not fit its leaf, or cuts an axis that its mesh
            does not divide; names the leaf.

    Example:
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
    if names != paths:
        odd = sorted(set(paths).symmetric_difference(names))
        raise ValueError(
            f"shardings: expected one for every leaf of the float tree; the trees differ at {odd[:5]}"
        )
    found = [_of_leaf(x, s, path) for path, x, s in zip(paths, leaves, specs, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, found)


def weight_specs(weight: QuantWeight, spec: PartitionSpec, where: str) -> QuantWeight:
    """The `QuantWeight` of the PartitionSpecs of a weight's arrays, given that of the float leaf.

    Raises:
        ValueError: the spec is longer than the leaf's rank; names the leaf `where`.
    """
    tensor, entries = weight.tensor, list(spec)
    if len(entries) > tensor.ndim:
        raise ValueError(
            f"{where}: expected a spec of at most {tensor.ndim} entries for its shape, got {spec}"
        )
    entries += [None] * (tensor.ndim - len(entries))
    stored = [entries[tensor.axes.index(a)] for a in range(tensor.ndim)]

    def cut(x: Any) -> Any:
        """Scales are cut along the axes on which they have more than one entry."""
        if x is None:
            return None
        return PartitionSpec(
            *(entry if size > 1 else None for entry, size in zip(stored, x.shape, strict=True))
        )

    first, last = (
        stored[: weight.ndim - weight.contracted],
        stored[weight.ndim - weight.contracted :],
    )
    values = replace(
        tensor,
        values=PartitionSpec(*stored),
        scale=cut(tensor.scale),
        zero=cut(tensor.zero),
        group_scale=cut(tensor.group_scale),
    )
    batch = (weight.outliers.channels.ndim - 1) if weight.outliers is not None else 0
    return replace(
        weight,
        tensor=values,
        input_scale=None
        if weight.input_scale is None
        else PartitionSpec(*first[: weight.input_scale.ndim]),
        smoothing=None
        if weight.smoothing is None
        else PartitionSpec(*first[: weight.smoothing.ndim - len(last)], *last),
        outliers=None
        if weight.outliers is None
        else Outliers(PartitionSpec(*first[:batch], None), PartitionSpec(*first, None)),
    )


def _is_sharding(x: Any) -> bool:
    return x is None or isinstance(x, NamedSharding | PartitionSpec)


def _of_leaf(leaf: Any, sharding: Any, path: str) -> Any:
    if not _is_sharding(sharding):
        raise ValueError(
            f"{path}: expected a NamedSharding, a PartitionSpec or None, got {type(sharding).__name__}"
        )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    spec = PartitionSpec() if spec is None else spec
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{path}: expected a spec of at most {len(leaf.shape)} entries for {leaf.shape}, got {spec}"
        )
    if isinstance(sharding, NamedSharding):
        _check_divides(leaf.shape, sharding, path)
    if not isinstance(leaf, QuantWeight):
        return sharding
    specs = weight_specs(leaf, spec, path)
    if isinstance(sharding, NamedSharding):
        check_groups(leaf, specs, sharding.mesh.shape, path)
        return jax.tree.map(lambda found: sharding.update(spec=found), specs)
    return specs


def _check_divides(shape: Sequence[int], sharding: NamedSharding, path: str) -> None:
    for axis, (size, entry) in enumerate(zip(shape, sharding.spec, strict=False)):
        devices = 1
        for name in mesh_axes(entry):
            devices *= sharding.mesh.shape[name]
        if size % devices:
            raise ValueError(
                f"{path}: its axis {axis} of size {size} can not be cut into {devices} blocks by {entry}"
            )


def check_groups(
    leaf: QuantWeight, specs: QuantWeight, sizes: Mapping[str, int], path: str
) -> None:
    """Raises ValueError if a device's block would begin inside a group.

    Args:
        leaf: the whole weight.
        specs: those of its arrays, from `weight_specs`.
        sizes: {mesh axis: how many devices}.
        path: the leaf's name in errors.
    """
    devices = math.prod(sizes[name] for name in mesh_axes(specs.tensor.values[-1]))
    length, group = leaf.tensor.values.shape[-1], leaf.tensor.group
    block = length // devices
    if group is not None and group < length and devices > 1 and block % group:
        fitting = [g for g in (16, 32, 64, 128, 256) if block % g == 0] or [block]
        raise ValueError(
            f"{path}: its {length} contracted channels can not be cut into {devices} blocks of whole groups of "
            f"{group}; choose a group size that divides {block}: {', '.join(map(str, fitting))}"
        )
