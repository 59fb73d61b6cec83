"""Kernels that read one activation, stored as one: q/k/v and gate/up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.weights.quant_weight import QuantWeight

#: The layers of a decoder that are stored as one, if they can be.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_name(names: Sequence[str]) -> str:
    """The name under which several layers are stored as one."""
    return "+".join(names)


def fuse(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a `Model` with q/k/v, and gate/up, stored as one kernel each: the same function, fewer matmuls.

    The last step before inference, after `quantize`: the names that rules and alphas go by are gone afterwards. Only
    what is quantized alike (or is all float) and reads one scale of activations is stored as one; the rest stays as it
    is. Not for use under jit: the scales are compared.

    Example:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, fuse
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> params = fuse(model.init(jax.random.key(0)))
        >>> {name: x["kernel"].shape for name, x in params["model"]["layers"]["0"]["mlp"].items()}
        {'down_proj': (16, 8), 'gate_proj+up_proj': (8, 32)}
    """
    changed = {name: fuse(x) if isinstance(x, Mapping) else x for name, x in params.items()}
    for names in TOGETHER:
        layers = [layer for name in names if "kernel" in (layer := changed.get(name, {}))]
        if len(layers) == len(names) and _alike(layers):
            changed = {name: x for name, x in changed.items() if name not in names}
            changed[fused_name(names)] = {
                key: _joined([layer[key] for layer in layers]) for key in layers[0]
            }
    return changed


def _alike(layers: Sequence[Any]) -> bool:
    """Whether layers hold the same kinds of leaves, quantized alike, for the same activation."""
    kernels = [layer["kernel"] for layer in layers]
    if any(
        set(layer) != set(layers[0]) or type(layer["kernel"]) is not type(kernels[0])
        for layer in layers
    ):
        return False
    if not isinstance(kernels[0], QuantWeight):
        return all(kernel.dtype == kernels[0].dtype for kernel in kernels)
    if len({jax.tree.structure(kernel) for kernel in kernels}) > 1:
        return False
    shared = [jax.tree.leaves(_of_activation(kernel)) for kernel in kernels]
    return all(
        x.shape == y.shape and np.array_equal(x, y)
        for own in shared
        for x, y in zip(shared[0], own, strict=True)
    )


def _of_activation(kernel: QuantWeight) -> Any:
    """What a quantized kernel holds of the activation that it meets."""
    channels = None if kernel.outliers is None else kernel.outliers.channels
    return kernel.input_scale, kernel.smoothing, channels


def _joined(leaves: Sequence[Any]) -> Any:
    """Kernels, or biases, one after the other along their outputs."""
    if not isinstance(leaves[0], QuantWeight):
        return jnp.concatenate(leaves, axis=-1)

    def by_output(parts: Sequence[Any]) -> Any:
        if parts[0] is None:
            return None
        sizes = [
            leaf.tensor.values.shape[:-1] for leaf in leaves
        ]  # one scale for all outputs is repeated
        every = [
            jnp.broadcast_to(x, (*size, x.shape[-1])) for x, size in zip(parts, sizes, strict=True)
        ]
        return jnp.concatenate(every, axis=-2)

    fields = ("values", "scale", "zero", "group_scale")
    parts = {name: by_output([getattr(leaf.tensor, name) for leaf in leaves]) for name in fields}
    outliers = leaves[0].outliers
    if outliers is not None:
        outliers = outliers._replace(weight=by_output([leaf.outliers.weight for leaf in leaves]))
    return replace(leaves[0], tensor=replace(leaves[0].tensor, **parts), outliers=outliers)
