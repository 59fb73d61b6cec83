"""`verify`: does a function return the same on two parameter trees?"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sqjax._trees import PyTree, named_leaves
from sqjax.program.facts import Program
from sqjax.program.trace import trace
from sqjax.runtime.quantized import quantized
from sqjax.weights.qtensor import tensor_type
from sqjax.weights.quant_weight import weight_type

#: Largest relative error to accept of a right fold, by the coarsest precision of the program. In
#: half precision rounding hides wrong folds: trust `calibrate`'s bitwise proof there.
TOLERANCES = {
    "float64": 1e-5,
    "float32": 1e-4,
    "bfloat16": 1e-1,
    "float16": 2e-2,
}


def verify(
    fn: Callable[..., Any],
    before: PyTree,
    after: PyTree,
    *inputs: Any,
    tolerance: float | None = None,
) -> float:
    """Runs fn(before, *inputs) and fn(after, *inputs), and compares what they return.

    Args:
        fn: fn(params, *inputs).
        before: a parameter tree.
        after: another one, for example what `smooth` made of it (or `quantize`,
            with a tolerance of its own: quantized leaves are accepted).
        inputs: one batch, as `fn` takes it after params.
        tolerance: the largest error to accept. By default that of a right fold in the coarsest
            precision that `fn` computes in: 1e-4 in float32, 1e-1 in bfloat16, 2e-2 in float16,
            1e-5 in float64.

    Returns:
        The largest relative error: max |after - before| / max |before| of an output, of all outputs
            the largest.

    Raises:
        ValueError: an output differs by more than the tolerance, or is not finite where it was; it
            names the output. After `smooth` alone this means that the fold is wrong for these
            inputs: please report that. After `quantize` it means that the scheme loses more than
            you allow.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params, x = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}, jnp.array([[1.0, 16.0]])
        >>> smoothed = sq.smooth(params, sq.calibrate(fn, params, [x]), 0.5)
        >>> sq.verify(fn, params, smoothed, x) < 1e-6
        True
    """
    run = jax.jit(lambda params: quantized(fn)(params, *inputs))
    paths, expected, _ = named_leaves(run(before))
    _, got, _ = named_leaves(run(after))
    if tolerance is None:
        tolerance = _tolerance(fn, before, inputs)

    worst = 0.0
    for path, a, b in zip(paths, expected, got, strict=True):
        error = _relative_error(_as_float64(a), _as_float64(b))
        worst = max(worst, error)
        # Not "error > tolerance": NaN is no small error.
        if not error <= tolerance:
            raise ValueError(
                f"verify: output {path or '(the array itself)'} differs by "
                f"{error:.3g} > {tolerance:.3g}"
            )
    return worst


def _tolerance(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]
) -> float:
    """The tolerance of the coarsest precision that a program computes in anywhere."""
    traced, _ = trace(fn, params, inputs, {}, weight_type, tensor_type)
    dtypes = {str(getattr(aval, "dtype", "")) for aval in Program(traced).avals}
    known = [TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES]
    return max(known, default=TOLERANCES["float32"])


def _as_float64(x: Any) -> np.ndarray:
    """An output in float64; complex numbers as pairs."""
    x = np.asarray(x)
    if np.iscomplexobj(x):
        x = np.stack([x.real, x.imag])
    return x.astype(np.float64)


def _relative_error(expected: np.ndarray, got: np.ndarray) -> float:
    """max |got - expected| / max |expected|; infinity where one is finite and the other is not.

    The scale is that of the whole output, because single elements near 0 have large relative errors
    for no reason.
    """
    finite = np.isfinite(expected)
    same_elsewhere = np.array_equal(
        expected[~finite], got[~finite], equal_nan=True
    )
    if not same_elsewhere or not np.isfinite(got[finite]).all():
        return float("inf")
    difference = np.max(np.abs(got - expected), where=finite, initial=0.0)
    size = np.max(np.abs(expected), where=finite, initial=0.0)
    # An output of zeros has no size: any difference is a large error, none is 0.
    return float(difference / max(size, np.finfo(np.float32).tiny))
