"""`site_errors`: how much of each matmul's output quantization loses, each taken by itself.

The function runs once in float. Where it multiplies an activation with a leaf, the quantized leaf
multiplies the same activation, by the rules by which `quantized` runs. So no site's error has a
part in another's, and the sum of squares says which sites a scheme is wrong for.

What the float array and the quantized one give at a meeting is compared at once, and the float
result goes on (`sqjax.methods.beside`). The comparisons are named values of the program
(`jax.ad_checkpoint.checkpoint_name`), so that a second walk can take them out of loops, branches
and devices, as it takes statistics for `calibrate`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax._arguments import check_function
from sqjax._trees import PyTree, named_leaves
from sqjax.calibration.analysis import described
from sqjax.methods.beside import Beside, Meeting, leaves_beside
from sqjax.program.equations import Var
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.registry import Special
from sqjax.program.trace import array_leaves, trace
from sqjax.program.walk import run
from sqjax.weights.convolution import clipped_pixels
from sqjax.weights.dot_general import clipped_rows, clipped_values
from sqjax.weights.quant_weight import check_float, is_quantized


class SiteError(NamedTuple):
    """What quantizing one site loses.

    Attributes:
        snr_db: 10 log10 of sum (X W)^2 over sum (X W - what the quantized leaf gives)^2, in
            decibels: 20 more are an error 10 times smaller. Infinity where nothing is lost, NaN
            where X W is all zeros (no token came by).
        clipped: the share of the activation's values beyond a static scale's range; 0 where the
            scale is computed at run time.
    """

    snr_db: float
    clipped: float


def site_errors(
    fn: Callable[..., Any], params: PyTree, qparams: PyTree, batch: Any
) -> dict[str, SiteError]:
    """The error of every quantized leaf's output, each from the float program's own activation.

    For a site with the activation X and the float leaf W, X W is compared with what the quantized
    leaf computes from the same X. A leaf that is read several times, or is a stack of layers or
    experts, has one error for all of that. Leaves that `fn` concatenates before one matmul have
    that matmul's error. An embedding's error is that of the rows that were looked up. In a
    shard_map the products are those of each device.

    Args:
        fn: fn(params, *batch), as for `calibrate`.
        params: the float tree that was quantized: after `smooth`, the smoothed one.
        qparams: what `quantize` made of it.
        batch: one argument, or a tuple of fn's arguments after params.

    Returns:
        {path: (snr_db, clipped)} of the quantized leaves that `fn` multiplies or looks up.

    Raises:
        ValueError: qparams has no quantized leaf; the trees have other paths, or differ in a leaf
            that is not quantized (params were not smoothed, and qparams were); `fn` fails on the
            batch; a quantized weight meets a primitive that has no rule.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.array([[1.0, 0.3], [-0.2, 0.5]])}, jnp.array([[1.0, 16.0]])
        >>> stats = sq.calibrate(fn, params, [x])
        >>> errors = sq.site_errors(fn, params, sq.quantize(params, stats, sq.W8A8_O3), 2 * x)
        >>> errors["w"].clipped, 0 < errors["w"].snr_db < 10
        (0.5, True)
    """
    return Comparison.of(fn, params, qparams, batch).errors(
        params, qparams, batch
    )


# A program that compares --------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A function with the comparisons in it, compiled once for trees and batches of one kind.

    Attributes:
        sums: sums(leaves of both trees, inputs) is {paths of leaves: the four sums of `_compared`}.
        names: {the name of a comparison: the paths of its leaves}.
    """

    sums: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Array]]
    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, fn: Callable[..., Any], params: PyTree, qparams: PyTree, batch: Any
    ) -> "Comparison":
        """Traces the comparisons.

        Raises:
            ValueError: as `site_errors`.
        """
        check_function(fn, "site_errors", "(fn, params, qparams, batch)")
        _check_quantized(params, qparams)
        names: dict[str, tuple[str, ...]] = {}

        def compared(trees, *args):
            return _outputs(fn, trees, args, names)

        # As one function of both trees, because the comparisons read both.
        args = _arguments(batch)
        traced, _ = trace(compared, (params, qparams), args, {})
        program = Program(traced)
        measures: dict[Var, Callable[[Array], Any]] = {
            v: lambda x: x for v in _named(program, names)
        }

        def sums(leaves, inputs):
            _, seen = evaluate(program, leaves, inputs, measures)
            return {
                name: _all_steps(seen[v])
                for v, name in _named(program, names).items()
                if v in seen
            }

        return cls(jax.jit(sums), names)

    def errors(
        self, params: PyTree, qparams: PyTree, batch: Any
    ) -> dict[str, SiteError]:
        """`site_errors` of trees and a batch of the same kind."""
        _check_same_floats(params, qparams)
        leaves = jax.tree.leaves((params, qparams))
        inputs = array_leaves(_arguments(batch))
        # In float64 from here on, because many small sums are added.
        found = jax.device_get(self.sums(leaves, inputs))
        totals: dict[str, np.ndarray] = {}
        for name, sums in found.items():
            for path in self.names[name]:
                before = totals.get(path, np.zeros(4))
                totals[path] = before + np.asarray(sums, np.float64)
        return {path: _error(*totals[path].tolist()) for path in sorted(totals)}


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _outputs(
    fn: Callable[..., Any],
    trees: tuple[PyTree, PyTree],
    args: tuple[Any, ...],
    names: dict[str, tuple[str, ...]],
) -> Any:
    """fn(params, *args) on the pairs of leaves; names each comparison on its way."""
    params, qparams = trees
    try:
        traced, inputs = trace(fn, params, args, {})
    # Whatever fn raises: a TypeError of two arguments for one, a shape that does not fit, ...
    except Exception as error:
        raise ValueError(
            "site_errors: fn(params, *batch) failed on inputs of shapes "
            f"{described(args)}. {type(error).__name__}: {error}"
        ) from error
    _, floats, _ = named_leaves(params)
    paths, coded, _ = named_leaves(qparams, is_leaf=is_quantized)
    if paths != traced.paths:
        other = sorted({*paths} ^ {*traced.paths})[:1]
        raise ValueError(
            f"site_errors: {other[0]} is in one tree only; pass the float tree that was quantized, "
            "and what quantize made of it"
        )
    _check_shapes(paths, floats, coded)
    # What stayed float is the same in both trees (`_check_same_floats`), and needs no pair.
    leaves = leaves_beside(paths, floats, [coded])
    return run(traced.jaxpr, [*leaves, *inputs], _Comparing(names))


def _named(program: Program, names: Mapping[str, Any]) -> dict[Var, str]:
    """{variable: the name of the comparison that it is}."""
    found = {}
    for equation in program.equations:
        name = str(equation.params.get("name"))
        if equation.name == "name" and name in names:
            found[equation.outputs[0]] = name
    return found


def _all_steps(x: Array) -> Array:
    """The sums over all steps of loops, and over devices, which may count one token twice.

    Every sum is then too large by the same factor, which the ratios do not see.
    """
    return x.reshape(-1, x.shape[-1]).sum(0)


def _error(
    signal: float, noise: float, clipped: float, values: float
) -> SiteError:
    """The ratio of signal to noise in decibels, and the share of values that are clipped."""
    # Rows that are looked up meet no activation: nothing is clipped of nothing.
    share = clipped / values if values else 0.0
    if not signal:
        return SiteError(math.nan, share)
    if not noise:
        return SiteError(math.inf, share)
    return SiteError(10 * math.log10(signal / noise), share)


# Comparisons --------------------------------------------------------------------------------------


class _Comparing(Beside):
    """The walk that compares the two products where a pair of leaves meets an activation.

    `names` is filled with the comparisons: {name: paths}.
    """

    def __init__(self, names: dict[str, tuple[str, ...]]):
        super().__init__()
        self._names = names

    def meeting(self, met: Meeting) -> Array:
        """The float result of a product, which from here on hangs on a comparison."""
        clip = _CLIPPED[met.equation.primitive.name]
        [coded], [other] = met.operands, met.results
        leaves = list(met.leaves)
        clipped, values = clip(met.equation, coded, leaves)
        sums = _compared(met.exact, other, clipped, values)
        name = f"{_PREFIX}{len(self._names)}"
        self._names[name] = met.paths
        named = checkpoint_name(sums, name)
        # Both cases are the result. But what nothing reads is dropped from a program.
        return lax.select(named[0] >= 0, met.exact, met.exact)


#: What the names of comparisons begin with.
_PREFIX = "sqjax.site_errors "


def _compared(exact: Any, other: Any, clipped: Array, values: Any) -> Array:
    """(sum exact^2, sum (exact - other)^2, clipped values, values), float32.

    Example: the outputs 3 and 4 for which the quantized weight gives 3 and 5, of an activation of
    10 values one of which was clipped: (25, 1, 1, 10).
    """
    wanted, got = exact.astype(jnp.float32), other.astype(jnp.float32)
    signal = jnp.sum(jnp.square(wanted))
    noise = jnp.sum(jnp.square(wanted - got))
    # Times 1, because in a shard_map all four must vary over the same devices.
    one = signal * 0 + 1
    return jnp.stack([signal, noise, clipped * one, values * one])


# What is clipped ----------------------------------------------------------------------------------


def _of_dot(
    equation: JaxprEqn, operands: Sequence[Any], leaves: Sequence[Special]
) -> tuple[Array, int]:
    """(how many values of a matmul's activation are clipped, how many there are)."""
    lhs, rhs = operands
    (l_axes, r_axes), (l_batch, r_batch) = equation.params["dimension_numbers"]
    dimensions = (l_axes, r_axes), (l_batch, r_batch)
    x = lhs
    if isinstance(lhs, Special):
        x, dimensions = rhs, ((r_axes, l_axes), (r_batch, l_batch))
    count = partial(clipped_values, x, dimensions=dimensions)
    return _mean_of(count, leaves), x.size


def _of_ragged_dot(
    equation: JaxprEqn, operands: Sequence[Any], leaves: Sequence[Special]
) -> tuple[Array, int]:
    x, _, group_sizes = operands
    count = partial(clipped_rows, x, group_sizes=group_sizes)
    return _mean_of(count, leaves), x.size


def _of_convolution(
    equation: JaxprEqn, operands: Sequence[Any], leaves: Sequence[Special]
) -> tuple[Array, int]:
    x, _ = operands
    count = partial(clipped_pixels, x, params=equation.params)
    return _mean_of(count, leaves), x.size


def _of_rows(
    equation: JaxprEqn, operands: Sequence[Any], leaves: Sequence[Special]
) -> tuple[Array, int]:
    """Rows of an embedding are looked up by indices, which nothing clips."""
    return jnp.zeros((), jnp.float32), 0


def _mean_of(count: Callable[..., Array], leaves: Sequence[Special]) -> Array:
    """How many values are clipped; of concatenated leaves, each with its scale, the mean."""
    counts = [count(weight=leaf.value) for leaf in leaves]
    return sum(counts[1:], counts[0]) / len(counts)


#: {primitive of a product or look-up: what it clips}.
_CLIPPED = {
    "dot_general": _of_dot,
    "ragged_dot_general": _of_ragged_dot,
    "conv_general_dilated": _of_convolution,
    "gather": _of_rows,
}

# Checks -------------------------------------------------------------------------------------------


def _check_quantized(params: PyTree, qparams: PyTree) -> None:
    """Raises ValueError unless one tree is float, and the other has quantized leaves."""
    check_float(params, "site_errors: params")
    leaves = jax.tree.leaves(qparams, is_leaf=is_quantized)
    if not any(map(is_quantized, leaves)):
        raise ValueError(
            "site_errors: expected qparams with quantized leaves, as sqjax.quantize gives them, "
            "got none; the order is site_errors(fn, params, qparams, batch)"
        )


def _check_shapes(
    paths: Sequence[str], floats: Sequence[Any], coded: Sequence[Any]
) -> None:
    """Raises ValueError unless every leaf has the shape that it has in the other tree."""
    for path, exact, other in zip(paths, floats, coded, strict=True):
        if exact.shape != other.shape:
            raise ValueError(
                f"site_errors: {path} has the shape {exact.shape} in params, and {other.shape} in "
                "qparams; pass the float tree that was quantized, and what quantize made of it"
            )


def _check_same_floats(params: PyTree, qparams: PyTree) -> None:
    """Raises ValueError unless the leaves that stayed float are the same in both trees."""
    _, floats, _ = named_leaves(params)
    paths, coded, _ = named_leaves(qparams, is_leaf=is_quantized)
    for path, exact, other in zip(paths, floats, coded, strict=True):
        if is_quantized(other) or exact is other:
            continue
        if not np.array_equal(exact, other):
            raise ValueError(
                f"site_errors: {path} is another array in params than in qparams; pass the tree "
                "that was quantized: after smooth, the smoothed one"
            )
