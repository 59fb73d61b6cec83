"""A decoder's layers in two forms: apart, named "0", "1", ...; or in one stack.

In a stack every array has a leading axis of layers: two kernels (8, 16) become one (2, 8, 16).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sqjax._arguments import check_mapping
from sqjax._trees import named_leaves
from sqjax.weights.quant_weight import is_quantized

#: What every layer holds, beside its norms: the names by which a stack is known.
LAYER_PARTS = {"mlp", "self_attn"}


def stack_layers(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a `Model` with all layers in one stack.

    ``model/layers/mlp/up_proj/kernel`` is then (layers, in, out). A `Model` runs either form as
    it is. It scans a stack without a cache, so that the program and the time to compile it do not
    grow with the number of layers; `sqjax.calibrate` and what follows see one site of so many
    matrices, and give every layer scales of its own. For decoding layers are faster apart: see
    `unstack_layers`. Parameters may be float or quantized, or stored by `fuse`; a stack is
    returned as it is.

    Raises:
        ValueError: the layers have other names, or are not all alike in dtypes, shapes and
            quantization.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, stack_layers
        >>> model = Model(LlamaConfig(32, 8, 16, 3, 2, 1, 4))
        >>> params = stack_layers(model.init(jax.random.key(0)))
        >>> params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
        (3, 8, 16)
    """
    layers = _layers_of(params)
    if is_stacked(layers):
        return params
    rows = [layers[str(i)] for i in range(len(layers))]
    # Checked here, because an error of jnp.stack would name no leaf.
    for i, row in enumerate(rows):
        _check_alike(rows[0], row, i)
    # Quantized weights too: codes, scales and all other arrays get the axis of layers in front.
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return _with_layers(params, stack)


def unstack_layers(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a `Model` with its layers apart, as `load` gives them.

    A matmul can not read its weight out of a stack: on every step the layer's slice would be
    copied. So `generate` takes a stack apart on every call, and holds a second copy of the layers
    while it runs. To decode often, or where memory is short, do it once and drop the stack:
    ``params = unstack_layers(params)``. Layers that are apart are returned as they are.

    Raises:
        ValueError: the layers have other names, or their arrays are not one stack.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, stack_layers, unstack_layers
        >>> model = Model(LlamaConfig(32, 8, 16, 3, 2, 1, 4))
        >>> params = stack_layers(model.init(jax.random.key(0)))
        >>> sorted(unstack_layers(params)["model"]["layers"])
        ['0', '1', '2']
    """
    layers = _layers_of(params)
    if not is_stacked(layers):
        return params
    return _with_layers(params, _apart(layers, stack_size(layers)))


def is_stacked(layers: Mapping[str, Any]) -> bool:
    """Whether what stands under ``model/layers`` is one stack.

    Raises:
        ValueError: it is neither that nor layers apart.
    """
    names = set(layers)
    if names >= LAYER_PARTS and not any(map(str.isdecimal, names)):
        return True
    numbers = set(map(str, range(len(names))))
    if names and names == numbers:
        return False
    raise ValueError(
        "model/layers: expected layers apart, named '0', '1', ... without a gap, or one stack of "
        f"{sorted(LAYER_PARTS)} and norms, got {sorted(names)}"
    )


def check_layers(layers: Mapping[str, Any], count: int) -> bool:
    """As `is_stacked`, for a model of so many layers.

    Raises:
        ValueError: also if there are more or fewer of them.
    """
    stacked = is_stacked(layers)
    got = stack_size(layers) if stacked else len(layers)
    if got != count:
        form = " in a stack" if stacked else ""
        raise ValueError(
            f"model/layers: expected {count} layers (config.num_layers), got {got}{form}; "
            "are they another model's?"
        )
    return stacked


def stack_size(layers: Mapping[str, Any]) -> int:
    """The number of layers in a stack.

    Raises:
        ValueError: an array has another rank or another number of layers than it should; names
            the leaf.
    """
    paths, leaves, _ = named_leaves(layers, is_leaf=is_quantized)
    first = leaves[0]
    size = first.shape[0] if first.ndim else 0
    for path, leaf in zip(paths, leaves, strict=True):
        axes = _axes_of(path, leaf.ndim)
        # A quantized weight may store its axes in another order, of which layers must be first.
        layers_first = not is_quantized(leaf) or leaf.tensor.axes[0] == 0
        if leaf.ndim != len(axes) or leaf.shape[0] != size or not layers_first:
            raise ValueError(
                f"model/layers/{path}: expected shape ({', '.join(axes)}), stored layers first and "
                f"as many of them as in model/layers/{paths[0]} {first.shape}, got {leaf.shape}; "
                "make stacks with stack_layers(params)"
            )
    return size


def _axes_of(path: str, ndim: int) -> tuple[str, ...]:
    """The axes that a leaf of a stack must have."""
    if path.endswith("kernel"):
        experts = ("experts",) if "experts/" in path else ()
        return ("layers", *experts, "in", "out")
    # The norms of queries and keys may have a gain for each head.
    by_head = path.startswith(("self_attn/q_norm/", "self_attn/k_norm/"))
    heads = ("heads",) if by_head and ndim == 3 else ()
    return ("layers", *heads, "channels")


def layer_of(layers: Any, i: int) -> Any:
    """Layer i of a stack, every array of it a slice."""
    return jax.tree.map(
        partial(_layer_of_leaf, i), layers, is_leaf=is_quantized
    )


# Jitted, because a slice by itself is a compiled program, and a model has hundreds of them.
@partial(jax.jit, static_argnames="count")
def _apart(layers: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {str(i): layer_of(layers, i) for i in range(count)}


def _layer_of_leaf(i: int, leaf: Any) -> Any:
    """Layer i of one leaf, a float array or a quantized weight."""
    rank = leaf.ndim - 1  # of the leaf in one layer
    if not is_quantized(leaf):
        return _slice(i, rank, leaf)
    return leaf.with_tensor(
        jax.tree.map(partial(_slice, i, rank), leaf.tensor),
        input_scale=partial(_slice, i, 0),
        smoothing=partial(_slice, i, leaf.contracted),
        channels=partial(_slice, i, 1),
        outlier_weight=partial(_slice, i, rank),
    )


def _slice(i: int, rank: int, x: Any) -> Any:
    """What layer i has of an array that has `rank` axes in one layer.

    With rank 2, (3, 8, 4) gives the entry i, (8, 4). What all layers share is either stored once,
    (1, 8, 4), which gives that entry, or has no axis of layers, (8, 4), and is returned as it is.
    """
    if x.ndim == rank:
        return x
    entry = i if x.shape[0] > 1 else 0
    return jax.lax.index_in_dim(x, entry, axis=0, keepdims=False)


def _layers_of(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands under ``model/layers``.

    Raises:
        ValueError: nothing does.
    """
    check_mapping(params, "layers", "the parameters of a Model")
    model = params.get("model")
    layers = model.get("layers") if isinstance(model, Mapping) else None
    if not isinstance(layers, Mapping):
        raise ValueError(
            f"params: expected a Model's tree, with model/layers in it, got one of {sorted(params)}"
        )
    return layers


def _with_layers(params: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    return {**params, "model": {**params["model"], "layers": layers}}


def _check_alike(first: Any, row: Any, i: int) -> None:
    """Raises ValueError naming the first leaf of layer i that differs in kind from layer 0's."""
    expected, got = _described(first), _described(row)
    only_in_row = got.keys() - expected.keys()
    for path in [*expected, *only_in_row]:
        want, have = expected.get(path, "nothing"), got.get(path, "nothing")
        if want != have:
            raise ValueError(
                f"model/layers/{i}/{path}: expected what layer 0 has, {want}, got {have}; only "
                "layers that are alike make a stack: stack the float parameters, then calibrate "
                "and quantize the stack. A model whose float layers differ, because experts are in "
                "some only, stays apart"
            )


def _described(layer: Any) -> dict[str, str]:
    """{path of a leaf: all that must be alike in a stack, such as "float32[8, 4]"}."""
    texts = {}
    paths, leaves, _ = named_leaves(layer, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        arrays = [
            f"{x.dtype.name}{list(x.shape)}" for x in jax.tree.leaves(leaf)
        ]
        text = ", ".join(arrays)
        # A quantized weight's tree structure tells its format, its group size and its axes.
        texts[path] = (
            f"{text} in {jax.tree.structure(leaf)}"
            if is_quantized(leaf)
            else text
        )
    return texts
