"""Kernels that read one activation, stored as one: q/k/v and gate/up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._arguments import check_mapping
from sqjax.weights.quant_weight import QuantWeight

#: The Dense layers of a block that read the same activation, so that one matmul can serve them.
FUSED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_name(names: Sequence[str]) -> str:
    """The name under which several layers are stored as one."""
    return "+".join(names)


def fuse(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a `Model` with q/k/v, and gate/up, stored as one kernel each.

    The model computes the same function with fewer matmuls.

    The last step before inference, after `quantize`: the names that rules and alphas go by are
    gone afterwards. Only what is quantized alike (or is all float) and reads one scale of
    activations is stored as one; the rest stays as it is. Not for use under jit: the scales are
    compared.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, fuse
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> params = fuse(model.init(jax.random.key(0)))
        >>> {name: x["kernel"].shape for name, x in params["model"]["layers"]["0"]["mlp"].items()}
        {'down_proj': (16, 8), 'gate_proj+up_proj': (8, 32)}
    """
    check_mapping(params, "fuse", "the parameters of a Model")
    # From the leaves up: a module's children are done before its own layers are looked at.
    fused = {}
    for name, value in params.items():
        fused[name] = fuse(value) if isinstance(value, Mapping) else value
    for names in FUSED_TOGETHER:
        fused = _with_one_layer(fused, names)
    return fused


def _with_one_layer(
    module: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The module's parameters with the layers `names` stored as one.

    As they are if the module has not all of these layers, or they can not be one.
    """
    layers: list[Any] = list(map(module.get, names))
    have_kernels = all(
        isinstance(layer, Mapping) and "kernel" in layer for layer in layers
    )
    if not have_kernels or not _can_be_one(layers):
        return module
    others = {
        name: value for name, value in module.items() if name not in names
    }
    one = {}
    for leaf in layers[0]:
        one[leaf] = _joined([layer[leaf] for layer in layers])
    return {**others, fused_name(names): one}


def _can_be_one(layers: Sequence[Any]) -> bool:
    """Whether layers hold the same leaves, quantized alike, for the same quantized activation."""
    first = layers[0]
    for layer in layers[1:]:
        if set(layer) != set(first):  # one has a bias, another has none
            return False
        if not _are_alike(layer["kernel"], first["kernel"]):
            return False
    return True


def _are_alike(kernel: Any, other: Any) -> bool:
    """Whether two kernels are float of one dtype, or quantized alike for the same activation."""
    if type(kernel) is not type(other):
        return False
    if not isinstance(kernel, QuantWeight):
        return kernel.dtype == other.dtype
    # A tree's structure holds the static fields: it differs where formats or group sizes do.
    structures = {jax.tree.structure(kernel), jax.tree.structure(other)}
    return len(structures) == 1 and _quantize_alike(kernel, other)


def _quantize_alike(kernel: QuantWeight, other: QuantWeight) -> bool:
    """Whether two kernels ask for the same quantized activation.

    They do if its scale, its smoothing and its outlier channels are equal. One matmul quantizes
    its activation once, so layers that ask for different ones stay apart.
    """
    of_kernel, of_other = _of_activation(kernel), _of_activation(other)
    # array_equal is False for arrays of different shapes.
    return all(map(np.array_equal, of_kernel, of_other))


def _of_activation(kernel: QuantWeight) -> list[Any]:
    """The arrays of a quantized kernel that say how the activation that it meets is quantized."""
    channels = None if kernel.outliers is None else kernel.outliers.channels
    return jax.tree.leaves((kernel.input_scale, kernel.smoothing, channels))


def _joined(leaves: Sequence[Any]) -> Any:
    """Kernels, or biases, joined along their outputs: (8, 16) and (8, 4) become (8, 20)."""
    if isinstance(leaves[0], QuantWeight):
        return _joined_weights(leaves)
    return jnp.concatenate(leaves, axis=-1)


def _joined_weights(weights: Sequence[QuantWeight]) -> QuantWeight:
    """Quantized kernels one after the other along their outputs, which are stored last but one.

    Codes of (16, 8) and (4, 8), (outputs, inputs), become (20, 8), and their scales of (16, 1)
    and (4, 1) become (20, 1). Where all outputs share one scale, (1, 1), it is repeated first for
    each of them, because the other kernel's outputs have another.
    """
    outputs = [weight.tensor.values.shape[:-1] for weight in weights]

    def by_output(*parts: Any) -> Any:
        repeated = []
        for part, lead in zip(parts, outputs, strict=True):
            repeated.append(jnp.broadcast_to(part, (*lead, part.shape[-1])))
        return jnp.concatenate(repeated, axis=-2)

    first = weights[0]
    tensor = jax.tree.map(by_output, *map(attrgetter("tensor"), weights))
    if first.outliers is None:
        return replace(first, tensor=tensor)
    # Outlier channels are those of the activation, so they are the same for all kernels.
    rows = by_output(*map(attrgetter("outliers.weight"), weights))
    return replace(
        first, tensor=tensor, outliers=first.outliers._replace(weight=rows)
    )
