"""Whether a function is the same program each time: tracing bakes in what it draws or remembers.

A function that calls `np.random`, counts its calls, or keeps an array of its last call is traced
once, and what it drew then is a constant of the program: calibration would be of that one draw.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sqjax.program.subprograms import source_of
from sqjax.program.trace import StandIn, nothing, trace

_ADVICE = (
    "a program is traced once, so what fn draws (np.random, random), counts or remembers is the "
    "same for ever after. Pass it as an argument: a jax.random key, or the array, in the batch"
)


class NotRepeatableError(ValueError):
    """A function is another program each time it is called."""


class Repeated:
    """A function that is traced, and may be traced again to see whether it is the same program.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.program.repeatable import Repeated
        >>> repeated = Repeated(lambda p, x: x @ p, jnp.ones((2, 3)), (jnp.ones((4, 2)),))
        >>> len(repeated.traced.jaxpr.eqns)
        1
        >>> repeated.check()
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        args: tuple[Any, ...],
        of_params: StandIn = nothing,
        of_args: StandIn = nothing,
    ):
        self._fn = fn
        self._rest: tuple[Any, ...] = params, args, {}, of_params, of_args
        self._alive: list[weakref.ref[Any]] = []
        # Every draw moves the generator on: its state tells of a draw without a second trace.
        before = _state_of_numpy()
        self.traced, _ = trace(self._watched, *self._rest)
        self._draws = before != _state_of_numpy()

    def _watched(self, *args: Any) -> Any:
        # A tracer dies with its trace. One that lives on is kept by fn, which may read it when it
        # is called again; the reference is weak, so that it is not this list that keeps it alive.
        tracers = filter(_is_tracer, jax.tree.leaves(args))
        self._alive += map(weakref.ref, tracers)
        return self._fn(*args)

    def check(self) -> None:
        """Traces once more, where the program holds numbers that may have been drawn.

        Raises:
            NotRepeatableError: the two programs differ; names the line of the first difference.
        """
        if self._draws:
            raise NotRepeatableError(
                f"fn draws from np.random while it runs: {_ADVICE}"
            )
        # Most programs hold nothing that may have been drawn. They are spared the second trace,
        # which takes seconds for a large model.
        first = self.traced.jaxpr
        kept = any(ref() is not None for ref in self._alive)
        if not kept and not _may_be_drawn(first):
            return
        second = trace(self._fn, *self._rest)[0].jaxpr
        # Under an outer jit its tracers are constants of both programs. A new one is the first
        # trace's.
        if not _tracers_in(second) <= _tracers_in(first):
            raise NotRepeatableError(
                "fn keeps a value of one call and reads it in the next (a leaked tracer): "
                f"{_ADVICE}"
            )
        difference = _difference(first, second)
        if difference is not None:
            raise NotRepeatableError(
                f"fn is another program when it is called again with the same arguments: "
                f"{difference}; {_ADVICE}"
            )


def _is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _tracers_in(program: ClosedJaxpr) -> set[int]:
    """The constants of a program that are tracers, by their identity."""
    return set(map(id, filter(_is_tracer, program.consts)))


def _state_of_numpy() -> tuple[Any, ...]:
    """The state of numpy's global generator. (Python's own is drawn from by type checkers, too.)"""
    name, keys, *rest = np.random.get_state(legacy=True)
    return name, np.asarray(keys).tobytes(), tuple(rest)


def _may_be_drawn(program: ClosedJaxpr) -> bool:
    """Whether a program holds arrays, or numbers with many digits: what may have been drawn."""
    if max(map(np.size, program.consts), default=0) > 1:
        return True
    operands = map(attrgetter("invars"), _everything(program.jaxpr))
    atoms = chain.from_iterable(operands)
    numbers = (atom.val for atom in atoms if isinstance(atom, Literal))
    return any(map(_has_many_digits, numbers))


def _has_many_digits(value: Any) -> bool:
    """Whether a number is none that one would type: 0.5, 1e-5 and -1e9 are typed, 0.3719206 not."""
    number = np.asarray(value)
    if number.size != 1 or not np.issubdtype(number.dtype, np.floating):
        return number.size > 1
    # Five digits, read back in the number's own dtype: the float32 0.1 is 0.100000001 as a Python
    # float, but "1.e-01" gives the same float32 again.
    typed = np.format_float_scientific(number.item(), precision=4)
    return bool(np.isfinite(number) and number.dtype.type(typed) != number)


def _everything(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, those of the programs within it after each one's own."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _within(equation):
            yield from _everything(inner.jaxpr)


def _within(equation: JaxprEqn) -> list[ClosedJaxpr]:
    """The programs among an equation's parameters."""
    found: list[ClosedJaxpr] = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item)
            elif isinstance(item, Jaxpr):
                found.append(ClosedJaxpr(item, ()))
    return found


def _difference(a: ClosedJaxpr, b: ClosedJaxpr) -> str | None:
    """The first difference of two programs, as a text; None if they are the same."""
    first, second = a.jaxpr, b.jaxpr
    # Constants by their variables, so that the line that reads a changed one can be named.
    changed = {
        v
        for v, x, y in zip(first.constvars, a.consts, b.consts, strict=False)
        if not _same(x, y)
    }
    look = partial(_difference_at, changed=changed)
    difference = _first(map(look, first.eqns, second.eqns))
    if difference is not None:
        return difference
    if len(first.eqns) != len(second.eqns):
        return f"it has {len(second.eqns)} equations, and had {len(first.eqns)}"
    return "it returns another constant" if changed else None


def _difference_at(
    ours: JaxprEqn, theirs: JaxprEqn, changed: set[Any]
) -> str | None:
    """The difference of two equations, `changed` being the constants that differ already."""
    where = f"`{ours.primitive.name}` at {source_of(ours)}"
    if ours.primitive.name != theirs.primitive.name:
        return f"{where} was `{theirs.primitive.name}` then"
    for atom, other in zip(ours.invars, theirs.invars, strict=False):
        drawn = not isinstance(atom, Literal) and atom in changed
        if drawn or not _same_literal(atom, other):
            return f"{where} reads another constant"
    return _first(map(_difference, _within(ours), _within(theirs)))


def _first(differences: Iterator[str | None]) -> str | None:
    """The first of some differences, found one by one; None if there are none."""
    return next(filter(None, differences), None)


def _same_literal(a: Any, b: Any) -> bool:
    if not isinstance(a, Literal) or not isinstance(b, Literal):
        return isinstance(a, Literal) == isinstance(b, Literal)
    return _same(a.val, b.val)


def _same(a: Any, b: Any) -> bool:
    """Whether two constants are alike; values that are not known yet are."""
    if a is b or any(map(_is_tracer, (a, b))):
        return True
    if np.shape(a) != np.shape(b):
        return False
    if jax.dtypes.issubdtype(getattr(a, "dtype", int), jax.dtypes.extended):
        return True  # keys of jax.random, whose bits are no array's
    first, second = np.asarray(a), np.asarray(b)
    # NaN is not equal to itself, and is the same constant all the same.
    both_nan = (first != first) & (second != second)
    return bool(np.all((first == second) | both_nan))
