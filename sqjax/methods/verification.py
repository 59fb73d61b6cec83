"""`verify`: does a function return the same on two parameter trees?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._arguments import check_function, expect
from sqjax._shapes import entries_at
from sqjax._trees import PyTree, is_float, named_leaves
from sqjax.calibration.analysis import described
from sqjax.program.facts import Program
from sqjax.program.repeatable import Repeated
from sqjax.program.trace import Traced, is_array, trace
from sqjax.runtime.quantized import quantized
from sqjax.weights.qtensor import tensor_type
from sqjax.weights.quant_weight import is_quantized, weight_type

#: Largest relative error to accept of a right fold, by the coarsest precision of the program. In
#: half precision rounding hides wrong folds: trust `calibrate`'s bitwise proof there.
TOLERANCES = {
    "float64": 1e-5,
    "float32": 1e-4,
    "bfloat16": 1e-1,
    "float16": 2e-2,
}

#: Below it an output counts as zeros.
TINY = float(np.finfo(np.float32).tiny)


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
            1e-5 in float64. Half precision may differ by more, if the same program in float32 says
            that `after` is about as near to it as `before`.

    Returns:
        The largest error of an output: max |after - before| / max |before|. What is far larger than
        the rest and the same in both (the -1e9 of a mask or of a padded vocabulary) is left out of
        that maximum. Of an output of integers, the share that differs.

    Raises:
        ValueError: an output differs by more than the tolerance, or is not finite where it was; it
            names the output. After `smooth` alone this means that the fold is wrong for these
            inputs: please report that. After `quantize` it means that the scheme loses more than
            you allow. Or `fn` is another program each time it is called, fails on these
            arguments (in another order, or in a list), or returns nothing that could differ: no
            array, no rows, or floats that are all 0, NaN or infinite.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params, x = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}, jnp.array([[1.0, 16.0]])
        >>> smoothed = sq.smooth(params, sq.calibrate(fn, params, [x]), 0.5)
        >>> sq.verify(fn, params, smoothed, x) < 1e-6
        True
    """
    check_function(fn, "verify", "(fn, before, after, *inputs)")
    is_number = isinstance(tolerance, Real | np.ndarray | jax.Array | None)
    expect(is_number, "verify: tolerance=", "a number", tolerance)
    with _told("before", inputs):
        repeated = Repeated(fn, before, inputs, weight_type, tensor_type)
    repeated.check()
    run = jax.jit(lambda params: quantized(fn)(params, *inputs))
    paths, expected, _ = named_leaves(run(before))
    if not sum(map(np.size, expected)):
        raise ValueError(
            "verify: fn returns no array, or only empty ones, so there is nothing to compare; "
            "return what it computes, of inputs that have rows"
        )
    _check_says_something(expected)
    with _told("after", inputs):
        after_outputs = run(after)
    _, got, _ = named_leaves(after_outputs)
    coarse = _coarsest(repeated.traced)
    allowed = TOLERANCES[coarse] if tolerance is None else tolerance

    found = map(_error, expected, got)
    errors = dict(zip(paths, found, strict=True))
    # Not "error > tolerance": NaN is no small error.
    wrong = [path for path, error in errors.items() if not error <= allowed]
    advice = ""
    if wrong and tolerance is None:
        exact = _in_float32(fn, before, inputs, coarse)
        was, now = _worst(exact, expected), _worst(exact, got)
        # A right fold rounds other numbers, but none more coarsely.
        if 0 < now <= 2 * was:
            wrong = []
        advice = _advice(after, coarse, was, now)
    if wrong:
        path = wrong[0]
        raise ValueError(
            f"verify: output {path or '(the array itself)'} differs by "
            f"{errors[path]:.3g} > {allowed:.3g}{advice}"
        )
    return max(errors.values(), default=0.0)


@contextmanager
def _told(tree: str, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Says of what fails inside on which arguments fn was called, and in which order they come.

    Raises:
        ValueError: whatever fn raises, a TypeError of a list for an array, say.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"verify: fn({tree}, *inputs) failed on inputs of shapes {described(inputs)}; the "
            "order is verify(fn, before, after, *inputs), with the inputs one by one, as fn takes "
            f"them (not in a list). {type(error).__name__}: {error}"
        ) from error


def _advice(after: PyTree, coarse: str, was: float, now: float) -> str:
    """What to do about a difference.

    A quantized tree needs a tolerance of its own. `was` and `now` are the errors beside a run in
    float32; 0 where there is none.
    """
    leaves = jax.tree.leaves(after, is_leaf=is_quantized)
    if any(map(is_quantized, leaves)):
        return (
            f", what a fold may differ by in {coarse}; but these parameters are quantized: say how "
            "much they may lose, verify(..., tolerance=0.05). For the error site by site quantize "
            "one at a time: {path: verify(fn, params, quantize(params, stats, {path: scheme}), "
            "*inputs, tolerance=1.0) for path in ...}"
        )
    allowed = f", what a right fold may differ by in {coarse}"
    if not now:
        return allowed
    return (
        f"{allowed}; beside the same program in float32 it is off by {now:.3g}, and was by "
        f"{was:.3g} before: more than rounding"
    )


def _check_says_something(outputs: Sequence[Any]) -> None:
    """Raises ValueError if floats are returned, and all of them are 0, NaN or infinite: they are so
    with wrong parameters, too.
    """
    floats = list(filter(is_float, outputs))
    if floats and not any(map(_holds_a_number, floats)):
        raise ValueError(
            "verify: every number that fn returns is 0, NaN or infinite, so there is nothing to "
            "compare; pass inputs like those that the model sees"
        )


def _holds_a_number(x: Any) -> bool:
    x = np.asarray(x, np.float32)
    return bool(np.any(np.isfinite(x) & (x != 0)))


#: What `reduce_precision` rounds to, by the bits of its mantissa.
_ROUNDED = {7: "bfloat16", 10: "float16"}


def _coarsest(traced: Traced) -> str:
    """The coarsest precision that a program computes in anywhere."""
    program = Program(traced)
    dtypes = {str(getattr(aval, "dtype", "")) for aval in program.avals}
    mantissas = [e.params.get("mantissa_bits") for e in program.equations]
    dtypes.update(entries_at(_ROUNDED, _ROUNDED.keys() & mantissas))
    known = [dtype for dtype in TOLERANCES if dtype in dtypes]
    return max(known, key=TOLERANCES.__getitem__, default="float32")


def _worst(expected: list[Any] | None, got: list[Any]) -> float:
    """The largest error of the outputs; 0 if there is nothing to compare them with."""
    return max(map(_error, expected or [], got), default=0.0)


def _in_float32(
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    coarse: str,
) -> list[Any] | None:
    """What a program in half precision returns in float32; None if it is not to be had so.

    Where `fn` itself casts to half precision it is not, nor of quantized parameters.
    """
    if coarse not in ("bfloat16", "float16"):
        return None

    def wide(x: Any) -> Any:
        half = is_array(x) and x.dtype in (jnp.bfloat16, jnp.float16)
        return jnp.asarray(x, jnp.float32) if half else x

    if not all(map(is_array, jax.tree.leaves(params))):
        return None
    widened, arguments = jax.tree.map(wide, (params, inputs))
    try:
        traced, _ = trace(fn, widened, arguments, {})
        if _coarsest(traced) in ("bfloat16", "float16"):
            return None
        return jax.tree.leaves(jax.jit(fn)(widened, *arguments))
    except (TypeError, ValueError):  # fn takes no other dtypes
        return None


def _error(expected: Any, got: Any) -> float:
    """How far one output is from another, relative to the size of the first."""
    if np.shape(expected) != np.shape(got):
        raise ValueError(
            f"verify: an output has the shape {np.shape(expected)} with the parameters before, and "
            f"{np.shape(got)} with those after: these are parameters of another model"
        )
    if not jnp.issubdtype(jnp.asarray(expected).dtype, jnp.inexact):
        return float(np.mean(np.asarray(expected) != np.asarray(got)))
    return _relative_error(_as_float64(expected), _as_float64(got))


def _as_float64(x: Any) -> np.ndarray:
    """An output in float64; complex numbers as pairs."""
    x = np.asarray(x)
    if np.iscomplexobj(x):
        x = np.stack([x.real, x.imag])
    return x.astype(np.float64)


def _relative_error(expected: np.ndarray, got: np.ndarray) -> float:
    """max |got - expected| / max |expected|; infinity where one is finite and the other is not.

    The scale is that of the whole output, because single elements near 0 have large relative errors
    for no reason. But it is the scale of what matters: see `_apart`.
    """
    finite = np.isfinite(expected)
    same_elsewhere = np.array_equal(
        expected[~finite], got[~finite], equal_nan=True
    )
    if not same_elsewhere or not np.isfinite(got[finite]).all():
        return float("inf")
    size = np.abs(expected[finite])
    difference = np.abs(got[finite] - expected[finite])
    apart = _apart(size, difference)
    parts = ((size[chosen], difference[chosen]) for chosen in (~apart, apart))
    # An output of zeros has no size: any difference is a large error, none is 0.
    return max(
        float(d.max(initial=0) / max(s.max(initial=0), TINY)) for s, d in parts
    )


def _apart(size: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The elements that are no measure for the others, because they are far larger.

    These are constants of the program, like the -1e9 of a mask: more than 100 times the typical
    element and the same in both runs. Or more than 10,000 times, and above 10,000 at all. The
    typical one is the median of the sizes that occur, each counted once, because a constant may
    fill most of an output.
    """
    step = max(1, -(-size.size // 100_000))
    occurring = np.unique(size[::step])
    occurring = occurring[occurring > 0]
    if not occurring.size:
        return np.zeros(size.shape, bool)
    typical = float(np.median(occurring))
    constant = (size > 100 * typical) & (difference == 0)
    return constant | (size > max(1e4 * typical, 1e4))
