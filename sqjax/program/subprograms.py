"""What an equation runs: the programs in calls, scans, shard_maps ..., alike on every JAX."""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec

from sqjax._shapes import mesh_axes

#: Primitives that only call an inner program, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Scan(NamedTuple):
    """A scan: step(consts, carry, slices of xs) -> (carry, slices of ys), run `length` times.

    What every step hands through unchanged is no result of it. A carry that stays what it was is a
    constant; ys that are the slices of an operand are that operand. So a stack of layers that
    `nnx.scan` takes in and gives back is only read.

    Attributes:
        program: one step, without what it hands through.
        consts, carry: how many of its operands are of these kinds.
        length: the number of steps.
        options: the other arguments of `lax.scan`.
        order: which operand of the equation is consts, carry, xs, in this order.
        handed: {result of the equation: operand of the equation} of what is handed through.
    """

    program: ClosedJaxpr
    consts: int
    carry: int
    length: int
    options: dict[str, Any]
    order: tuple[int, ...]
    handed: dict[int, int]

    def given(self, operands: Sequence[Any]) -> list[Any]:
        """The equation's operands in the order of `program`: consts, carry, xs."""
        return [operands[i] for i in self.order]

    def results(
        self, operands: Sequence[Any], made: Sequence[Any]
    ) -> list[Any]:
        """All results of the equation, given its operands and what the steps have made."""
        return with_handed(operands, made, self.handed)

    def sort(
        self, operands: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """(consts, carry, xs) among a scan's operands, which are in the order of `program`."""
        split = self.consts + self.carry
        return (
            list(operands[: self.consts]),
            list(operands[self.consts : split]),
            list(operands[split:]),
        )

    def own(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The operands that the scan reads itself: all but the constants."""
        return operands[self.consts :]

    def run(
        self, step: Callable[..., Any], carry: Sequence[Any], xs: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        """(the last carry, ys) of another step, run as often and in the same order."""
        return lax.scan(
            step, list(carry), xs, length=self.length, **self.options
        )


class ShardMap(NamedTuple):
    """A shard_map: `block` runs once on every device, on blocks of the operands.

    Attributes:
        block: what runs on a device.
        sizes: {name of a mesh axis: its number of devices} of the mesh axes that the map runs over.
        in_specs, out_specs: how operands and results are cut into blocks.
        options: the other arguments of `jax.shard_map`.
    """

    program: ClosedJaxpr
    sizes: dict[str, int]
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    options: dict[str, Any]

    def run(
        self,
        block: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        operands: Sequence[Any],
    ) -> Any:
        """Another block on the same devices."""
        return jax.shard_map(
            block, in_specs=in_specs, out_specs=out_specs, **self.options
        )(*operands)

    def own(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The operands that the shard_map reads itself: all."""
        return operands

    def sharded_axes(self, spec: PartitionSpec) -> dict[int, tuple[str, ...]]:
        """{axis of an array: the mesh axes that shard it, major first}.

        Example: {1: ("model",)} for P(None, "model").
        """
        return {
            axis: tuple(names)
            for axis, names in enumerate(map(mesh_axes, spec))
            if names
        }


def inner_program(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The program that a call-like equation runs, or None; an `unstack` (jax 0.12) runs slices."""
    if equation.primitive.name == "unstack":
        return _unstacked(equation)
    name = CALLS.get(equation.primitive.name)
    return None if name is None else program_in(equation, equation.params[name])


def _unstacked(equation: JaxprEqn) -> ClosedJaxpr:
    # As the slices that older versions of jax trace in its place, for which all rules exist.
    axis = equation.params["axis"]
    stack: Any = equation.invars[0].aval

    def slices(x):
        return [
            lax.squeeze(lax.slice_in_dim(x, i, i + 1, axis=axis), [axis])
            for i in range(stack.shape[axis])
        ]

    program = jax.make_jaxpr(slices)(
        jax.ShapeDtypeStruct(stack.shape, stack.dtype)
    )
    # The slices were traced here just now: they get the line of the user's program.
    equations = [
        e.replace(source_info=equation.source_info) for e in program.eqns
    ]
    return ClosedJaxpr(program.jaxpr.replace(eqns=equations), program.consts)


def plain(value: Any) -> Any:
    """An equation's parameter with Python's integers in place of numpy's.

    jnp.pad and vmap leave such there, and they print and compare in another way.
    """
    if isinstance(value, np.integer):
        return int(value)
    if not isinstance(value, tuple):
        return value
    items = list(map(plain, value))
    # A NamedTuple, as a gather's dimension numbers.
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return tuple(items)


def scan_in(equation: JaxprEqn) -> Scan | None:
    """What a scan runs, or None if the equation is none."""
    if equation.primitive.name != "scan":
        return None
    params = equation.params
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    options = {name: params[name] for name in ("reverse", "unroll")}
    program = program_in(equation, params["jaxpr"])
    handed = _handed_by_steps(program, consts, carry)
    count = len(equation.invars)
    fixed = [handed[result] for result in handed if result < carry]
    changing = [i for i in range(consts, consts + carry) if i not in fixed]
    xs = range(consts + carry, count)
    order = (*range(consts), *fixed, *changing, *xs)
    return Scan(
        only_made(program, order, handed),
        consts + len(fixed),
        len(changing),
        params["length"],
        options,
        order,
        handed,
    )


def _handed_by_steps(
    step: ClosedJaxpr, consts: int, carry: int
) -> dict[int, int]:
    """{result: operand} of what all steps of a scan hand through, given one step.

    A carry must come back at its own place, ys must be the slices of one of the xs.
    """
    handed = {}
    for result, operand in handed_through(step).items():
        # With one constant w, a carry (a, b) and slices x a step has the operands (w, a, b, x) and
        # the results (a, b, y): result 0 is handed through if it is operand 1. A y that is w at
        # every step is no operand of the scan, but a stack of copies.
        is_carry = result < carry
        same_carry = operand == consts + result
        same_slices = operand >= consts + carry
        if same_carry if is_carry else same_slices:
            handed[result] = operand
    return handed


def shard_map_in(equation: JaxprEqn) -> ShardMap | None:
    """What a shard_map runs, or None if the equation is none."""
    if equation.primitive.name != "shard_map":
        return None
    params = equation.params
    # Not all manual axes: a map within another one runs over its own axes only.
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    sizes = {name: size for name, size in mesh.shape.items() if name in manual}
    options = {
        "mesh": mesh,
        "axis_names": set(manual),
        "check_vma": params["check_vma"],
    }
    block = program_in(equation, params["jaxpr"])
    return ShardMap(
        block,
        sizes,
        tuple(params["in_specs"]),
        tuple(params["out_specs"]),
        options,
    )


class While(NamedTuple):
    """A while loop: body(carry) runs as long as test(carry) holds.

    Attributes:
        test, body: programs of their own constants and of the carry, with what is handed through
            among it; the body returns the rest only.
        of_test, of_body: how many constants each has: these are the first operands.
        handed: {position in the carry: operand of the equation} of what the body leaves as it is.
    """

    test: ClosedJaxpr
    body: ClosedJaxpr
    of_test: int
    of_body: int
    handed: dict[int, int]

    def sort(
        self, operands: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """(constants of the test, constants of the body, what changes) among its operands."""
        of_test, rest = operands[: self.of_test], operands[self.of_test :]
        of_body, carry = rest[: self.of_body], rest[self.of_body :]
        changing = [carry[i] for i in kept(len(carry), self.handed)]
        return list(of_test), list(of_body), changing

    def own(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The operands that the loop reads itself: what it changes from step to step."""
        _, _, changing = self.sort(operands)
        return changing

    def carry(
        self, operands: Sequence[Any], changing: Sequence[Any]
    ) -> list[Any]:
        """The whole carry, given the operands and what changes."""
        return with_handed(operands, changing, self.handed)


def while_in(equation: JaxprEqn) -> While:
    """What a while loop runs."""
    params = equation.params
    test = program_in(equation, params["cond_jaxpr"])
    body = program_in(equation, params["body_jaxpr"])
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    handed = {}
    for result, operand in handed_through(body).items():
        # The equation has the operands (test's constants, body's constants, carry), the body all
        # but the first of these; so an operand of the body stands `of_test` further in the
        # equation.
        if operand == of_body + result:
            handed[result] = of_test + operand
    order = range(len(body.in_avals))
    return While(test, only_made(body, order, handed), of_test, of_body, handed)


class Cond(NamedTuple):
    """A cond or switch: of its branches one runs, on the operands after the index.

    Attributes:
        branches: programs, without what all of them hand through.
        handed: {result: operand of the equation} of that.
    """

    branches: tuple[ClosedJaxpr, ...]
    handed: dict[int, int]

    def own(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The operands that the cond reads itself: the index of the branch."""
        return operands[:1]

    def results(
        self, operands: Sequence[Any], made: Sequence[Any]
    ) -> list[Any]:
        """All results of the equation, given its operands and what the branches have made."""
        return with_handed(operands, made, self.handed)


def cond_in(equation: JaxprEqn) -> Cond:
    """What a cond or switch chooses from."""
    branches = [program_in(equation, b) for b in equation.params["branches"]]
    # Any branch may be the one that runs, so only what all of them hand through is known.
    by_all = set.intersection(
        *(set(handed_through(branch).items()) for branch in branches)
    )
    # The first operand of the equation is the index, which no branch is given.
    handed = {result: 1 + operand for result, operand in by_all}
    order = range(len(equation.invars) - 1)
    made = tuple(only_made(branch, order, handed) for branch in branches)
    return Cond(made, handed)


def handed_through(program: ClosedJaxpr) -> dict[int, int]:
    """{result: operand} of the results of a program that are one of its operands as it is.

    Also through calls and loops in it. Example: f(a, b) = (jit(lambda x: x)(a), b + 1) has {0: 0}.
    """
    jaxpr = program.jaxpr
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        for result, operand in passed_on(equation).items():
            given = equation.invars[operand]
            if not isinstance(given, Literal) and given in source:
                source[equation.outvars[result]] = source[given]
    found = {}
    for i, v in enumerate(jaxpr.outvars):
        if not isinstance(v, Literal) and v in source:
            found[i] = source[v]
    return found


def passed_on(equation: JaxprEqn) -> dict[int, int]:
    """{result: operand} of the results of a call, loop or branch that are an operand as it is."""
    if (inner := inner_program(equation)) is not None:
        return handed_through(inner)
    of_kind: dict[str, Callable[[JaxprEqn], Any]] = {
        "scan": scan_in,
        "while": while_in,
        "cond": cond_in,
    }
    find = of_kind.get(equation.primitive.name)
    return {} if find is None else find(equation).handed


def only_made(
    program: ClosedJaxpr, order: Sequence[int], handed: Container[int]
) -> ClosedJaxpr:
    """A program with its operands in another order, and without some of its results."""
    jaxpr = program.jaxpr
    invars = [jaxpr.invars[i] for i in order]
    outvars = [jaxpr.outvars[i] for i in kept(len(jaxpr.outvars), handed)]
    # The debug names are those of the old operands and results, which are others now.
    reduced = jaxpr.replace(
        invars=invars,
        outvars=outvars,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return ClosedJaxpr(reduced, program.consts)


def kept(count: int, handed: Container[int]) -> list[int]:
    """The positions, of so many, that are not handed through."""
    return [i for i in range(count) if i not in handed]


def with_handed(
    operands: Sequence[Any], made: Sequence[Any], handed: Mapping[int, int]
) -> list[Any]:
    """What is made, with the operands that are handed through where they belong among it."""
    rest = iter(made)
    together = []
    for i in range(len(made) + len(handed)):
        together.append(operands[handed[i]] if i in handed else next(rest))
    return together


def program_in(equation: JaxprEqn, jaxpr: Any) -> ClosedJaxpr:
    """A jaxpr among an equation's parameters.

    jax traces library functions such as jnp.take once, and their equations know no line of the
    user's program; those get the line of the call.
    """
    inner: Jaxpr = jaxpr
    consts: Sequence[Any] = ()
    if isinstance(jaxpr, ClosedJaxpr):
        inner, consts = jaxpr.jaxpr, jaxpr.consts
    equations = []
    for own in inner.eqns:
        if not source_of(own):
            own = own.replace(source_info=equation.source_info)
        equations.append(own)
    return ClosedJaxpr(inner.replace(eqns=equations), consts)


def emit(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """The results of the equation itself, on other operands."""
    # Some primitives are bound with functions in place of the jaxprs that an equation shows.
    params = equation.primitive.get_bind_params(equation.params)
    # In its own context: on a mesh that an `auto_axes` or a shard_map around it has changed.
    with equation.ctx.manager:
        return listed(equation, equation.primitive.bind(*operands, **params))


def listed(equation: JaxprEqn, results: Any) -> list[Any]:
    """The results of an equation as a list; primitives with one result return it bare."""
    return results if equation.primitive.multiple_results else [results]


#: Libraries of layers: a line of theirs says less than the line of the user that called them.
LIBRARIES = ("flax", "haiku", "equinox", "haliax", "einops", "penzai")
_NOT_THE_USERS = (*LIBRARIES, "jax", "jaxtyping", "beartype")


def source_of(equation: JaxprEqn) -> str:
    """Where the user's program made this equation: "file:line (function)".

    Of frames in libraries of layers the one that called these is named, with theirs behind it: a
    Dense of a user's module is "model.py:12 (__call__), in flax/linen/linear.py:700 (__call__)".
    """
    summary = source_info_util.summarize(equation.source_info)
    within = _library_of(summary)
    if within is None:
        return summary
    traceback: Any = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if f"{os.sep}sqjax{os.sep}program{os.sep}" in frame.file_name:
            break  # what follows called the library's caller from outside: no line of the model
        if _library_of(frame.file_name) is None:
            inner = summary[summary.rindex(f"{os.sep}{within}{os.sep}") + 1 :]
            place = f"{frame.file_name}:{frame.line_num}"
            return f"{place} ({frame.function_name}), in {inner}"
    return summary


def _library_of(file: str) -> str | None:
    """The library of layers that a file is of."""
    for name in _NOT_THE_USERS:
        if f"site-packages{os.sep}{name}{os.sep}" in file:
            return name
    return None
