"""Which program multiplies a quantized weight: XLA's, or a kernel of sqjax for NVIDIA GPUs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._names import first_matches
from sqjax._trees import PyTree, named_leaves
from sqjax.numerics.dots import DimensionNumbers
from sqjax.numerics.formats import INT4, container
from sqjax.weights.quant_weight import QuantWeight, is_quantized

#: The kernel's blocks have so many channels, and outputs.
_BLOCK = 128


def with_kernel(qparams: PyTree, kernel: str | Mapping[str, str]) -> PyTree:
    """The tree with another program for its matmuls: XLA's own, or `sqjax.mosaic.matmul`.

    What is computed stays the same, up to the rounding that `sqjax.mosaic.matmul` tells of. By
    default all is XLA's, and nothing else in sqjax chooses a kernel.

    "pallas" is for GPUs of the Hopper family (H100, H200); compiled for a CPU or a TPU, such a
    weight is multiplied by XLA all the same. It is the kernel's program for x @ W; derivatives, h @
    W.T, convolutions and ragged matmuls stay XLA's. XLA can not split a kernel among devices by
    itself: on more than one, call the function in `jax.shard_map`. `jax.export` takes one platform
    at a time, and no size that is left open. A file does not hold the choice.

    int4 values are stored two to a byte, as the kernel reads them: a CPU takes longer over them.
    "xla" stores them as `quantize` does.

    Args:
        qparams: what `quantize` returned.
        kernel: "xla" or "pallas" for all quantized weights, or {pattern of their paths: kernel}.
            The first pattern that is found wins; a weight that none matches stays as it is.

    Returns:
        A tree with the same paths.

    Raises:
        ValueError: the kernel has no program for a weight: it takes int8 and e4m3 with one scale
            for an output and activations of the same format, and int8 or int4 (in groups of one
            length, a multiple of 128) with float activations; channels in multiples of 128. Or a
            pattern is found nowhere; another kernel is asked for; jax 0.10.
        ValueError: when the function is called, if activations that stay float are not bfloat16, if
            outputs are no multiple of 128, for a batch of matrices, or for a size that
            `jax.export` leaves open.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.ones((256, 128))}, jnp.ones((3, 256))
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> sq.with_kernel(qparams, {"w": "xla"})["w"].kernel is None
        True
        >>> sq.with_kernel(qparams, "cuda")
        Traceback (most recent call last):
        ValueError: kernel: expected 'xla' or 'pallas', got 'cuda'
    """
    by_pattern = kernel if isinstance(kernel, Mapping) else {"": kernel}
    for choice in by_pattern.values():
        is_known = choice in ("xla", "pallas")
        expect(is_known, "kernel", "'xla' or 'pallas'", choice)
    paths, leaves, treedef = named_leaves(qparams, is_leaf=is_quantized)
    weights = [
        path
        for path, leaf in zip(paths, leaves, strict=True)
        if is_quantized(leaf)
    ]
    expect(bool(weights), "with_kernel", "what `quantize` returned", qparams)
    chosen = first_matches(by_pattern, weights, "with_kernel pattern")
    kernel_of = {
        path: by_pattern[name]
        for path, name in chosen.items()
        if name is not None
    }
    _check_formats(
        {
            path: leaf
            for path, leaf in zip(paths, leaves, strict=True)
            if kernel_of.get(path) == "pallas"
        }
    )

    def changed(path: str, leaf: Any) -> Any:
        if kernel_of.get(path) == "pallas":
            tensor = leaf.tensor.stored_as(jnp.int4)
            return replace(leaf, tensor=tensor, kernel="pallas")
        if kernel_of.get(path) == "xla" and leaf.kernel is not None:
            tensor = leaf.tensor.stored_as(container(INT4))
            return replace(leaf, tensor=tensor, kernel=None)
        return leaf

    return treedef.unflatten(map(changed, paths, leaves))


def _check_formats(weights: Mapping[str, QuantWeight]) -> None:
    """Checks that the kernel "pallas" has a program for these weights, by their paths.

    Raises:
        ValueError: it has none for some of them, or with this jax.
    """
    if weights and jax.__version_info__ < (0, 11):
        raise ValueError(
            f"{min(weights)}: the kernel 'pallas' needs jax 0.11 or later, got {jax.__version__}"
        )
    problems = {path: _wrong_format(weight) for path, weight in weights.items()}
    refused = [path for path, problem in problems.items() if problem]
    if refused:
        first, *others = refused
        named = ", ".join(others[:3])
        if others[3:]:
            named += f" and {len(others) - 3} more"
        more = f" (also {named})" if others else ""
        _refuse(first, problems[first], more)


def _refuse(path: str, problem: str | None, others: str = "") -> None:
    if problem is not None:
        raise ValueError(
            f"{path}: the kernel 'pallas' takes {problem}; give this weight{others} the kernel "
            "'xla'"
        )


def _wrong_format(weight: QuantWeight) -> str | None:
    """What the kernel takes in place of the weight's format, or None if it takes that."""
    tensor, in_float = weight.tensor, weight.activations is None
    first = tensor.ndim - weight.contracted
    channels = math.prod(tensor.values.shape[first:])
    groups = math.prod(tensor.scale.shape[first:])
    weights, activations = tensor.fmt.name, weight.activation_format
    if weights == "int4" and not in_float:
        return f"int4 weights with float activations, got {activations} ones"
    if weights == "e5m2" or (weights == "e4m3" and in_float):
        return "float8 weights as e4m3 with e4m3 activations, got other ones"
    if not in_float and weights != activations:
        return f"weights and activations of one format, got {weights} and {activations}"
    if tensor.group_scale is not None:
        return "groups with float32 scales, got integer ones"
    if groups > 1 and not in_float:
        return f"one scale for an output, got {groups}"
    length = channels if groups == 1 else tensor.group or channels
    # A last group may be shorter: 768 channels in groups of 512.
    if channels % _BLOCK or channels != groups * length or length % _BLOCK:
        return (
            f"channels, and those of a group, in multiples of {_BLOCK}, and groups of one length, "
            f"got {channels} channels in groups of {length}"
        )
    return None


def check_call(
    x: Array, weight: QuantWeight, dimensions: DimensionNumbers, where: str
) -> None:
    """Checks that the kernel which a weight asks for has a program for this product.

    Raises:
        ValueError: activations that stay float are not bfloat16; the outputs are no multiple of
            128; there is a batch of matrices; `jax.export` leaves a size of x open.
    """
    if weight.kernel is None:
        return
    _, (_, batch) = dimensions
    values = weight.tensor.values
    outputs = math.prod(values.shape[: values.ndim - weight.contracted])
    open_sizes = [size for size in x.shape if not isinstance(size, int)]
    problem = None
    if open_sizes:
        problem = f"sizes that are known as it is exported, got {open_sizes[0]}"
    elif weight.activations is None and x.dtype != jnp.bfloat16:
        problem = f"bfloat16 activations, got {x.dtype.name}"
    elif batch:
        problem = "one matrix, got a batch of them"
    elif outputs % _BLOCK:
        problem = f"outputs in multiples of {_BLOCK}, got {outputs}"
    _refuse(where, problem)
