"""`quantized(fn)`: the same function on a tree whose weights are quantized."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from sqjax._trees import named_leaves
from sqjax.program.bodies import Bodies, body_rules
from sqjax.program.gathers import rows_last
from sqjax.program.primitives import COPIES, RESHARDINGS
from sqjax.program.subprograms import emit, shard_map_in, source_of
from sqjax.program.trace import trace
from sqjax.program.walk import Leaf, Rules, walk
from sqjax.runtime import cache_rules as caches
from sqjax.runtime.cache_rules import barrier, cache_leaf, is_cache
from sqjax.weights.dot_general import quantized_dot_general, quantized_ragged_dot
from sqjax.weights.qtensor import is_tensor, tensor_type
from sqjax.weights.quant_weight import Outliers, QuantWeight, is_quantized, weight_type
from sqjax.weights.sharding import check_groups, weight_specs


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, able to run on parameters that `quantize` has changed.

    quantized(fn)(qparams, *args, **kwargs) is fn(params, *args, **kwargs) in which every matmul with a quantized weight
    runs int8 x int8 -> int32; everything else is re-emitted as it was. Arguments may hold arrays that `quantize_cache`
    has quantized, and are returned so. On float trees it is `fn` itself. Wrap it in
    jax.jit: outside, every call traces `fn` anew. The same `fn` gives the same wrapper, so jit keeps its cache; the
    last 256 functions are remembered. Where a quantized weight itself flows into a function with a custom derivative,
    that derivative is lost; the matmul's own is straight-through (in a scan, jax keeps that for first derivatives and
    for jacfwd of jacfwd only).

    Raises:
        ValueError: when called, if a quantized weight meets a primitive that has no rule; names the primitive, the
            leaf and the line that made it.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[1.0, 2.0]]
    """
    try:
        return _cached(fn)
    except TypeError:  # an fn that can not be hashed
        return _wrap(fn)


def _wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(params, *args, **kwargs):
        paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
        names, arguments, _ = named_leaves((args, kwargs), is_leaf=is_tensor)
        if not any(map(is_quantized, leaves)) and not any(map(is_tensor, arguments)):
            return fn(params, *args, **kwargs)
        traced, inputs = trace(fn, params, args, kwargs, weight_type, tensor_type)
        values = [
            Leaf(path, x) if is_quantized(x) else x for path, x in zip(paths, leaves, strict=True)
        ]
        held = [
            cache_leaf(name, x) for name, x in zip(names, arguments, strict=True) if is_tensor(x)
        ][::-1]
        values += [held.pop() if is_tensor(x) else x for x in inputs]
        outputs = _no_leaves(walk(traced.jaxpr.jaxpr, traced.jaxpr.consts, values, RULES))
        return jax.tree_util.tree_unflatten(
            traced.treedef, [x.value if is_cache(x) else x for x in outputs]
        )

    return run


_cached = functools.lru_cache(maxsize=256)(_wrap)


def _laid_out(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, run where the compiler cuts arrays as it likes; its result is cut as the equation's.

    For meshes with explicit axes: the rule's own steps would each have to say how their results are cut.
    """

    @functools.wraps(rule)
    def run(equation, *operands):
        result: Any = equation.outvars[0].aval
        if AxisType.Explicit not in result.sharding.mesh.axis_types:
            return rule(equation, *operands)
        return jax.sharding.auto_axes(
            functools.partial(rule, equation), out_sharding=result.sharding
        )(*operands)

    return run


def _refuse(equation: JaxprEqn, *operands: Any) -> Any:
    if any(map(is_cache, operands)):
        return caches.refuse(equation, *operands)
    leaf = next(x for x in operands if isinstance(x, Leaf))
    raise ValueError(
        f"{leaf.path}: quantized, but `{equation.primitive.name}` at {source_of(equation)} has no rule for quantized "
        f"values; keep this leaf in float with a rule of None: quantize(params, stats, {{{leaf.path!r}: None, ...}})"
    )


def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array:
    """int8 x int8 -> int32, with the weight on either side."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
    if isinstance(lhs, Leaf) and isinstance(rhs, Leaf):
        return _refuse(equation, lhs, rhs)
    if isinstance(rhs, Leaf):
        dimensions = ((lhs_axes, rhs_axes), (lhs_batch, rhs_batch))
        out = quantized_dot_general(lhs, rhs.value, dimensions, rhs.path)
    else:
        dimensions = ((rhs_axes, lhs_axes), (rhs_batch, lhs_batch))
        out = quantized_dot_general(rhs, lhs.value, dimensions, lhs.path)
        first, weight_axes = len(lhs_batch), lhs.value.ndim - len(lhs_axes) - len(lhs_batch)
        out = jnp.moveaxis(out, range(-weight_axes, 0), range(first, first + weight_axes))
    result: Any = equation.outvars[0].aval
    return out.astype(result.dtype)


def _ragged_dot(equation: JaxprEqn, lhs: Any, rhs: Any, group_sizes: Any) -> Array:
    """Rows that meet one matrix of a stack each, int8 x int8 -> int32."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ())) and tuple(
        numbers.lhs_ragged_dimensions
    ) == (0,)
    if isinstance(lhs, Leaf) or not plain:
        return _refuse(equation, lhs, rhs, group_sizes)
    result: Any = equation.outvars[0].aval
    return quantized_ragged_dot(lhs, rhs.value, group_sizes, rhs.path).astype(result.dtype)


def _transpose(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    tensor = leaf.value.tensor.transpose(equation.params["permutation"])
    return Leaf(leaf.path, replace(leaf.value, tensor=tensor))


def _convert(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return _refuse(equation, leaf)
    return Leaf(
        leaf.path, replace(leaf.value, tensor=replace(leaf.value.tensor, dtype=jnp.dtype(dtype)))
    )


def _copy(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    return leaf


def _slice(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """Part of the outputs, or of a stack of matrices; never part of the contracted channels."""
    params, weight = equation.params, leaf.value
    strides = params["strides"] or (1,) * weight.ndim
    cuts = [
        slice(*cut)
        for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    tensor = weight.tensor.slice(cuts)
    of_stored = {stored: cut for stored, cut in zip(weight.tensor.axes, cuts, strict=True)}
    first = weight.ndim - weight.contracted
    uncut = [
        len(range(n)[of_stored[first + i]]) == n
        for i, n in enumerate(weight.tensor.values.shape[first:])
    ]
    if tensor is None or not all(uncut):
        return _refuse(equation, leaf)

    def of_stack(x: Any, own: int) -> Any:
        """An array that begins with the axes of the stack, and ends with `own` others."""
        return None if x is None else x[tuple(of_stored[a] for a in range(x.ndim - own))]

    return Leaf(
        leaf.path,
        replace(
            weight,
            tensor=tensor,
            input_scale=of_stack(weight.input_scale, 0),
            smoothing=of_stack(weight.smoothing, weight.contracted),
            outliers=None
            if weight.outliers is None
            else Outliers(*(of_stack(x, 1) for x in weight.outliers)),
        ),
    )


def _reshape(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """reshape, squeeze, and the broadcast_in_dim that only adds axes of size 1."""
    result: Any = equation.outvars[0].aval
    params, shape, weight = equation.params, result.shape, leaf.value
    permuting = equation.primitive.name == "reshape" and params["dimensions"] is not None
    repeating = math.prod(shape) != math.prod(weight.shape)
    moving = list(kept := params.get("broadcast_dimensions", ())) != sorted(kept)
    tensor = None if permuting or repeating or moving else weight.tensor.reshape(shape)
    own = math.prod(weight.tensor.values.shape[weight.ndim - weight.contracted :])
    stack = _reshaped_stack(weight, shape)
    if tensor is None or stack is None:
        return _refuse(equation, leaf)
    contracted = _trailing(tensor.values.shape, own)
    if math.prod(tensor.values.shape[tensor.ndim - contracted :]) != own:
        return _refuse(equation, leaf)
    outliers, smoothing, scales = weight.outliers, weight.smoothing, weight.input_scale
    if outliers is not None:
        count = outliers.channels.shape[-1]
        outer = tensor.values.shape[: tensor.ndim - contracted]
        outliers = Outliers(
            outliers.channels.reshape(*stack, count), outliers.weight.reshape(*outer, count)
        )
    if smoothing is not None:
        smoothing = smoothing.reshape(*stack, *tensor.values.shape[tensor.ndim - contracted :])
    scales = None if scales is None else scales.reshape(stack if scales.ndim else ())
    changes = {
        "input_scale": scales,
        "smoothing": smoothing,
        "contracted": contracted,
        "outliers": outliers,
    }
    return Leaf(leaf.path, replace(weight, tensor=tensor, **changes))


def _reshaped_stack(weight: QuantWeight, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The stack's axes, after a reshape to `shape`, of what has one entry for each matrix; () if there is but one.

    None if the reshape does more to a stack of several than to add or to remove axes of size 1, which are stored first.
    """
    ranks = [0]
    ranks += [] if weight.input_scale is None else [weight.input_scale.ndim]
    ranks += [] if weight.smoothing is None else [weight.smoothing.ndim - weight.contracted]
    ranks += [] if weight.outliers is None else [weight.outliers.channels.ndim - 1]
    several = [n for n in weight.tensor.values.shape[: max(ranks)] if n != 1]
    if not several:
        return ()
    same = [n for n in weight.shape if n != 1] == [n for n in shape if n != 1]
    return (*(1 for n in shape if n == 1), *several) if same else None


def _trailing(shape: tuple[int, ...], product: int) -> int:
    """How many of the last axes hold so many elements: the fewest that do."""
    count = 1
    while math.prod(shape[len(shape) - count :]) < product:
        count += 1
    return count


def _gather(equation: JaxprEqn, leaf: Any, indices: Any) -> Array:
    """Rows of a quantized embedding: narrow rows are gathered, and only they are dequantized."""
    if not isinstance(leaf, Leaf) or isinstance(indices, Leaf):
        return _refuse(equation, leaf, indices)
    tensor, numbers = leaf.value.tensor, equation.params["dimension_numbers"]
    tensor.check(leaf.path)
    whole_rows = tuple(equation.params["slice_sizes"]) == (1, *tensor.shape[1:])
    stored_as_seen = tensor.axes == tuple(range(tensor.ndim))
    placed = tuple(numbers.start_index_map) == (0,) and rows_last(numbers, indices.ndim)
    # What rows out of range are filled with is divided by `smoothing` below, as the rows are.
    fill = equation.params["fill_value"]
    fill_stays = leaf.value.smoothing is None or fill is None or fill == 0 or not np.isfinite(fill)
    if not (whole_rows and stored_as_seen and placed and fill_stays):
        return _refuse(equation, leaf, indices)

    def rows(x: Any, fill: int | None = None) -> Any:
        if x is None:
            return None
        x = jnp.broadcast_to(x, (*tensor.shape[:1], *x.shape[1:]))
        params = {**equation.params, "slice_sizes": (1, *x.shape[1:])}
        return equation.primitive.bind(
            x, indices, **(params if fill is None else {**params, "fill_value": fill})
        )

    # Rows out of range are 1 times the fill value: integers have no NaN, jnp.take's usual one.
    scale, zero, group_scale = rows(tensor.scale), rows(tensor.zero, 0), rows(tensor.group_scale, 1)
    found = replace(
        tensor,
        values=rows(tensor.values, 1),
        scale=scale,
        zero=zero,
        group_scale=group_scale,
        order=(),
    )
    x = found.codes().astype(jnp.float32) * found.spread(found.scale)
    if (outliers := leaf.value.outliers) is not None:  # whose quantized weights are 0
        flat = x.reshape(*x.shape[: x.ndim - tensor.ndim + 1], -1)
        x = (
            flat.at[..., outliers.channels]
            .set(rows(outliers.weight).astype(jnp.float32))
            .reshape(x.shape)
        )
    if (smoothing := leaf.value.smoothing) is not None:  # the tensor holds s * W
        x = x / smoothing.reshape((1,) * (x.ndim - smoothing.ndim) + smoothing.shape)
    return x.astype(tensor.dtype)


def _pvary(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """The same values on every device, said to differ."""
    return jax.tree.map(lambda x: emit(equation, x), leaf)


def _per_step(equation: JaxprEqn, x: Leaf, length: int) -> Leaf:
    """A leaf whose every array has the steps as its first axis."""
    if is_cache(x):
        scale = jnp.broadcast_to(x.value.scale, (length, *x.value.scale.shape[1:]))
        return Leaf(x.path, replace(x.value, scale=scale))
    if x.value.tensor.axes[0] != 0 or x.value.tensor.scale.shape[0] == 0:
        return _refuse(equation, x)
    tensor = x.value.tensor

    def every(part: Any) -> Any:
        return None if part is None else jnp.broadcast_to(part, (length, *part.shape[1:]))

    parts = {name: every(getattr(tensor, name)) for name in ("scale", "zero", "group_scale")}
    return Leaf(x.path, replace(x.value, tensor=replace(tensor, **parts)))


def _no_leaves(values: list[Any]) -> list[Any]:
    if escaped := [x.path for x in values if isinstance(x, Leaf) and not is_cache(x)]:
        raise ValueError(
            f"{escaped[0]}: fn returns this quantized leaf; keep it in float with a rule of None"
        )
    return values


def _carried(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """What a loop carries: no quantized weight."""
    if moved := [x for x in operands if isinstance(x, Leaf) and not is_cache(x)]:
        return _refuse(equation, *moved)
    return operands


def _cut(equation: JaxprEqn, leaf: Leaf, spec: PartitionSpec) -> Leaf:
    """The specs of a leaf's arrays in a shard_map."""
    if is_cache(leaf):
        return caches.refuse(equation, leaf)
    if (
        leaf.value.outliers is not None
    ):  # the positions of outlier channels are those of the whole leaf
        return _refuse(equation, leaf)
    specs, shards = weight_specs(leaf.value, spec, leaf.path), shard_map_in(equation)
    check_groups(leaf.value, specs, {} if shards is None else shards.sizes, leaf.path)
    return Leaf(leaf.path, specs)


def _either(name: str, of_weights: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for quantized weights, or where a quantized argument is met, the one for these."""
    of_caches = caches.CACHE_RULES.get(name, caches.refuse)
    return lambda equation, *operands: (of_caches if any(map(is_cache, operands)) else of_weights)(
        equation, *operands
    )


_WEIGHT_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot,
    "transpose": _transpose,
    "convert_element_type": _convert,
    **dict.fromkeys((*COPIES, *RESHARDINGS), _copy),
    "optimization_barrier": barrier,
    **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim"), _reshape),
    "slice": _slice,
    "gather": _gather,
    "ragged_dot_general": _ragged_dot,
    "pvary": _pvary,
}
_BOTH = {
    name: _either(name, _WEIGHT_RULES.get(name, _refuse))
    for name in {**_WEIGHT_RULES, **caches.CACHE_RULES}
}
RULES: Rules = Rules(
    {
        **_BOTH,
        **{
            name: _laid_out(_BOTH[name]) for name in ("dot_general", "gather", "ragged_dot_general")
        },
        **body_rules(lambda: RULES, Bodies(_per_step, _cut, _carried, _no_leaves)),
    },
    _refuse,
)
