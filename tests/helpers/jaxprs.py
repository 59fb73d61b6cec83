"""What a traced program holds, calls and branches included: its matmuls, its casts, its largest float values."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Dot(NamedTuple):
    """A `dot_general`: the dtypes of its operands and result by name, and their shapes."""

    lhs: str
    rhs: str
    out: str
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def dtypes(self) -> tuple[str, str, str]:
        return self.lhs, self.rhs, self.out


#: The dtypes of a matmul that runs on the integer units.
INT8_DOT = ("int8", "int8", "int32")


def programs(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr]:
    """The program and every program inside it."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    yield jaxpr
    chosen = _platform_choices(jaxpr)
    for equation in jaxpr.eqns:
        inside = list(_programs_among(equation.params.values()))
        if equation.primitive.name == "cond" and equation.invars[0] in chosen:
            inside = [inside[chosen[equation.invars[0]]]]
        for inner in inside:
            yield from programs(inner)


def _platform_choices(jaxpr: Jaxpr) -> dict[Any, int]:
    """{the index that `lax.platform_dependent` chooses a branch by: the branch of a CPU}."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "platform_index":
            platforms = equation.params["platforms"]
            is_ours = [p is None or "cpu" in p for p in platforms]
            found[equation.outvars[0]] = is_ours.index(True)
    return found


def _programs_among(values: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in values:
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs_among(value)


def equations(jaxpr: Jaxpr | ClosedJaxpr) -> list[JaxprEqn]:
    """Every equation of every program inside."""
    return [equation for program in programs(jaxpr) for equation in program.eqns]


def dots(jaxpr: Jaxpr | ClosedJaxpr) -> list[Dot]:
    """Every matmul."""
    found = []
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            avals = [v.aval for v in (*equation.invars, *equation.outvars)]
            found.append(Dot(*(a.dtype.name for a in avals), tuple(tuple(a.shape) for a in avals)))
    return found


def widened(jaxpr: Jaxpr | ClosedJaxpr, larger_than: int) -> list[tuple[str, tuple[int, ...]]]:
    """(new dtype, shape) of every cast of an int8 array of more than `larger_than` elements."""
    casts = [e for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
    return [
        (str(jnp.dtype(e.params["new_dtype"])), tuple(e.invars[0].aval.shape))
        for e in casts
        if e.invars[0].aval.dtype == jnp.int8 and math.prod(e.invars[0].aval.shape) > larger_than
    ]


def largest_float(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """The number of elements of the largest float value that the program is given or makes."""
    sizes = [0]
    for program in programs(jaxpr):
        made = [v for equation in program.eqns for v in equation.outvars]
        avals = [v.aval for v in (*program.invars, *program.constvars, *made)]
        sizes += [math.prod(a.shape) for a in avals if jnp.issubdtype(a.dtype, jnp.floating)]
    return max(sizes)


def of(fn: Any, *args: Any, **kwargs: Any) -> ClosedJaxpr:
    """The program of fn(*args, **kwargs)."""
    return jax.make_jaxpr(fn)(*args, **kwargs)
