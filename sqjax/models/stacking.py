"""A decoder's layers in two forms: apart, named "0", "1", ...; or one stack, every array with an axis of layers."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sqjax._trees import named_leaves
from sqjax.weights.quant_weight import Outliers, is_quantized

#: What one layer holds: the names by which a stack is known.
PARTS = {"input_layernorm", "mlp", "post_attention_layernorm", "self_attn"}


def stack_layers(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a `Model` with all layers in one stack: ``model/layers/mlp/up_proj/kernel``, (layers, in, out).

    A `Model` runs either form as it is. It scans a stack without a cache, so that the program and the time to compile
    it do not grow with the number of layers; `sqjax.calibrate` and what follows see one site of so many matrices, and
    give every layer scales of its own. For decoding layers are faster apart: see `unstack_layers`. Parameters may be
    float or quantized, or stored by `fuse`; a stack is returned as it is.

    Raises:
        ValueError: the layers have other names, or are not all alike in dtypes, shapes and quantization.

    Example:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, stack_layers
        >>> model = Model(LlamaConfig(32, 8, 16, 3, 2, 1, 4))
        >>> stack_layers(model.init(jax.random.key(0)))["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
        (3, 8, 16)
    """
    layers = _layers_of(params)
    if is_stacked(layers):
        return params
    rows = [layers[str(i)] for i in range(len(layers))]
    for i, row in enumerate(rows):
        _check_alike(rows[0], row, i)
    return _with_layers(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))


def unstack_layers(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a `Model` with its layers apart, as `load` gives them: what `stack_layers` undoes.

    A matmul can not read its weight out of a stack: on every step the layer's slice would be copied. So `generate`
    takes a stack apart on every call, and holds a second copy of the layers while it runs. To decode often, or where
    memory is short, do it once and drop the stack: ``params = unstack_layers(params)``. Layers that are apart are
    returned as they are.

    Raises:
        ValueError: the layers have other names, or their arrays are not one stack.

    Example:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, stack_layers, unstack_layers
        >>> model = Model(LlamaConfig(32, 8, 16, 3, 2, 1, 4))
        >>> params = stack_layers(model.init(jax.random.key(0)))
        >>> sorted(unstack_layers(params)["model"]["layers"])
        ['0', '1', '2']
    """
    layers = _layers_of(params)
    return (
        _with_layers(params, _apart(layers, stack_size(layers))) if is_stacked(layers) else params
    )


def is_stacked(layers: Mapping[str, Any]) -> bool:
    """Whether what stands under ``model/layers`` is one stack.

    Raises:
        ValueError: it is neither that nor layers apart.
    """
    names = set(layers)
    if names == PARTS:
        return True
    if names and names == {str(i) for i in range(len(names))}:
        return False
    raise ValueError(
        f"model/layers: expected layers apart, named '0', '1', ... without a gap, or one stack of {sorted(PARTS)}, "
        f"got {sorted(names)}"
    )


def check_layers(layers: Mapping[str, Any], count: int) -> bool:
    """As `is_stacked`, for a model of so many layers.

    Raises:
        ValueError: also if there are more or fewer of them.
    """
    stacked = is_stacked(layers)
    got = stack_size(layers) if stacked else len(layers)
    if got != count:
        raise ValueError(
            f"model/layers: expected {count} layers (config.num_layers), got {got}"
            f"{' in a stack' if stacked else ''}; are they another model's?"
        )
    return stacked


def stack_size(layers: Mapping[str, Any]) -> int:
    """The number of layers in a stack.

    Raises:
        ValueError: an array has another rank or another number of layers than it should; names the leaf.
    """
    paths, leaves, _ = named_leaves(layers, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        axes = ("layers", "in", "out") if path.endswith("kernel") else ("layers", "channels")
        size = leaves[0].shape[0] if leaves[0].ndim else 0
        first = not is_quantized(leaf) or leaf.tensor.axes[0] == 0
        if leaf.ndim != len(axes) or leaf.shape[0] != size or not first:
            raise ValueError(
                f"model/layers/{path}: expected shape ({', '.join(axes)}), stored layers first and as many of them as "
                f"in model/layers/{paths[0]} {leaves[0].shape}, got {leaf.shape}; make stacks with stack_layers(params)"
            )
    return size


def layer_of(layers: Any, i: int) -> Any:
    """Layer i of a stack, every array of it a slice."""
    return jax.tree.map(partial(_of_leaf, i), layers, is_leaf=is_quantized)


@partial(jax.jit, static_argnames="count")
def _apart(layers: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {str(i): layer_of(layers, i) for i in range(count)}


def _of_leaf(i: int, leaf: Any) -> Any:
    def own(x: Any, rank: int) -> Any:
        """Its part of an array with `rank` axes after that of layers, which may be missing, or of one entry for all."""
        if x is None or x.ndim == rank:
            return x
        return jax.lax.index_in_dim(x, i if x.shape[0] > 1 else 0, 0, keepdims=False)

    rank = leaf.ndim - 1
    if not is_quantized(leaf):
        return own(leaf, rank)
    parts = {
        name: own(getattr(leaf.tensor, name), rank)
        for name in ("values", "scale", "zero", "group_scale")
    }
    outliers = leaf.outliers
    return replace(
        leaf,
        tensor=replace(leaf.tensor, **parts),
        input_scale=own(leaf.input_scale, 0),
        smoothing=own(leaf.smoothing, leaf.contracted),
        outliers=None
        if outliers is None
        else Outliers(own(outliers.channels, 1), own(outliers.weight, rank)),
    )


def _layers_of(params: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(params.get("model"), Mapping) or not isinstance(
        params["model"].get("layers"), Mapping
    ):
        raise ValueError(
            f"params: expected a Model's tree, with model/layers in it, got one of {sorted(params)}"
        )
    return params["model"]["layers"]


def _with_layers(params: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    return {**params, "model": {**params["model"], "layers": layers}}


def _check_alike(first: Any, row: Any, i: int) -> None:
    """Raises ValueError naming the first leaf that can not be stacked on that of layer 0."""
    expected, got = (
        dict(zip(*named_leaves(x, is_leaf=is_quantized)[:2], strict=True)) for x in (first, row)
    )
    for path in [*expected, *(got.keys() - expected.keys())]:
        texts = [_text(leaves[path]) if path in leaves else "nothing" for leaves in (expected, got)]
        if texts[0] != texts[1]:
            raise ValueError(
                f"model/layers/{i}/{path}: expected what layer 0 has, {texts[0]}, got {texts[1]}; only layers that are "
                "alike make a stack: stack the float parameters, then calibrate and quantize the stack"
            )


def _text(leaf: Any) -> str:
    """All that must be alike in a stack."""
    arrays = ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in jax.tree.leaves(leaf))
    return f"{arrays} in {jax.tree.structure(leaf)}" if is_quantized(leaf) else arrays
