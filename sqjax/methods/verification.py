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

#: Largest relative error to accept of a right fold, by the coarsest precision of the program. In half precision
#: rounding hides wrong folds: trust `calibrate`'s bitwise proof there.
TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}


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
        before, after: two parameter trees, for example before and after `smooth` (or `quantize`, with a tolerance of
            its own: quantized leaves are accepted).
        tolerance: the largest error to accept. By default that of a right fold in the coarsest precision that `fn`
            computes in: 1e-4 in float32.

    Returns:
        The largest relative error: max |after - before| / max |before| over the outputs.

    Raises:
        ValueError: an output differs by more than the tolerance, or is not finite where it was; names the output.

    Example:
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
        traced, _ = trace(fn, before, inputs, {}, weight_type, tensor_type)
        dtypes = {str(getattr(aval, "dtype", "")) for aval in Program(traced).avals}
        tolerance = max(
            [TOLERANCES[d] for d in dtypes if d in TOLERANCES], default=TOLERANCES["float32"]
        )
    worst = 0.0
    for path, a, b in zip(paths, expected, got, strict=True):
        error = _relative_error(_as_real(a), _as_real(b))
        worst = max(worst, error)
        if not error <= tolerance:
            raise ValueError(
                f"verify: output {path or '(the array itself)'} differs by {error:.3g} > {tolerance:.3g}"
            )
    return worst


def _as_real(x: Any) -> np.ndarray:
    """In float64; complex numbers as pairs."""
    x = np.asarray(x)
    return (
        np.stack([x.real, x.imag]).astype(np.float64)
        if np.iscomplexobj(x)
        else x.astype(np.float64)
    )


def _relative_error(expected: np.ndarray, got: np.ndarray) -> float:
    finite = np.isfinite(expected)
    if (
        not np.array_equal(expected[~finite], got[~finite], equal_nan=True)
        or not np.isfinite(got[finite]).all()
    ):
        return float("inf")
    difference = np.max(np.abs(got - expected), where=finite, initial=0.0)
    return float(
        difference
        / max(np.max(np.abs(expected), where=finite, initial=0.0), np.finfo(np.float32).tiny)
    )
