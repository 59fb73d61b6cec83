"""Running a `Program`, with a look at some of its variables."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sqjax.program.equations import Atom, Body, Equation, Scopes, Var
from sqjax.program.facts import Program
from sqjax.program.marks import (
    Mark,
    array_or_none,
    grown,
    has_shape,
    is_whole,
    joined,
    kept_shape,
    of_any,
    same_kind,
)
from sqjax.program.subprograms import Scan, ShardMap, emit, kept

#: {variable: what to make of its value; with marks, of its value and its mark}.
Probes = Mapping[Var, Callable[..., Any]]
#: The marks of an equation's results, from (equation, operands, results, marks of the operands).
Follow = Callable[
    [Equation, Sequence[Any], Sequence[Any], Sequence[Mark]], Sequence[Mark]
]
#: {variable: what its probe has made of it}.
Seen = dict[Var, Any]
#: What a probe has made of two values of one variable, together.
Together = Callable[[Any, Any], Any]
#: {variable: its value}, in one scope.
Env = dict[Var, Any]


def _summed(a: Any, b: Any) -> Any:
    """The sum of two trees of arrays."""
    return jax.tree.map(jnp.add, a, b)


def evaluate(
    program: Program,
    leaves: Iterable[Any],
    inputs: Iterable[Any],
    probes: Probes,
    marks: Mapping[Var, Mark] | None = None,
    follow: Follow | None = None,
    together: Together = _summed,
) -> tuple[list[Any], Seen]:
    """Runs a program on its leaves and inputs.

    Args:
        program: the program.
        leaves, inputs: the values of its leaves, and of its other inputs.
        probes: what to look at.
        marks, follow: marks of inputs, and how they pass through an equation; probes then see the
            mark of what they look at, too.
        together: what a probe has made of two steps of a while loop, as one. Zeros must change
            nothing: they stand for no step, and for a branch that is not taken.

    Returns:
        What the function returns (flat), and {variable: what its probe made of it}; for a variable
        in bodies that has a leading axis for each of the variable's scopes: one entry a step, one
        for each device along a mesh axis.
        Example: the absmax of 64 channels in a scan over 32 layers has the shape (32, 64). A while
        loop has no such axis, because nobody knows how many steps it takes.
    """
    given = zip(program.inputs, [*leaves, *inputs], strict=True)
    env: Env = {**program.constants, **dict(given)}
    run = _Run(program, probes, follow, together)
    seen = run.equations(program.main, env, dict(marks or {}), ())
    return _read(env, program.results), seen


def _read(env: Env, atoms: Iterable[Atom]) -> list[Any]:
    """The values of operands or results."""
    return [
        env[atom] if isinstance(atom, Var) else atom.value for atom in atoms
    ]


def _marks_of(marks: Mapping[Var, Mark], atoms: Iterable[Atom]) -> list[Mark]:
    """The marks of operands or results."""
    return [
        marks.get(atom) if isinstance(atom, Var) else None for atom in atoms
    ]


class _Run(NamedTuple):
    """A run of a program with its probes."""

    program: Program
    probes: Probes
    follow: Follow | None
    together: Together

    def equations(
        self,
        equations: Sequence[Equation],
        env: Env,
        marks: dict[Var, Mark],
        scopes: Scopes,
        outside: Collection[Var] = (),
    ) -> Seen:
        """Adds what the equations make to `env`; returns what probes here and in bodies see.

        `outside` are the variables of `env` that are looked at elsewhere.
        """
        seen: Seen = {}
        for equation in equations:
            operands = _read(env, equation.inputs)
            if self._is_looked_into(equation):
                results, within = self._through_body(
                    equation, operands, env, marks, scopes
                )
                seen |= within
            else:
                results = self._emitted(equation, operands, marks)
            env.update(zip(equation.outputs, results, strict=True))
        # Probes look once all is computed, because a variable may be an input of this scope.
        for v, look in self.probes.items():
            here = self.program.scopes[v] == scopes and v not in outside
            if here and v in env:
                beside = () if self.follow is None else (marks.get(v),)
                seen[v] = look(env[v], *beside)
        return seen

    def _is_looked_into(self, equation: Equation) -> bool:
        """Whether an equation has bodies to run: loops and branches only if a probe is in them."""
        if not equation.branches:
            return equation.body is not None
        probed = self.probes.keys()
        return any(not probed.isdisjoint(b.own) for b in equation.branches)

    def _emitted(
        self,
        equation: Equation,
        operands: Sequence[Any],
        marks: dict[Var, Mark],
    ) -> list[Any]:
        """The results of an equation as it was; adds their marks."""
        results = emit(equation.origin, *operands)
        if equation.branches:
            call: Any = equation.branches[0].call
            made_here = kept(len(results), call.handed)
            results = [results[i] for i in made_here]
        self._mark_results(equation, operands, results, marks)
        return results

    def _mark_results(
        self,
        equation: Equation,
        operands: Sequence[Any],
        results: Sequence[Any],
        marks: dict[Var, Mark],
    ) -> Sequence[Mark]:
        """Adds the marks of an equation's results, where marks are followed; returns them."""
        if self.follow is None:
            return [None] * len(equation.outputs)
        given = _marks_of(marks, equation.inputs)
        made = self.follow(equation, operands, results, given)
        marks.update(zip(equation.outputs, made, strict=True))
        return made

    def _through_body(
        self,
        equation: Equation,
        operands: Sequence[Any],
        env: Env,
        marks: dict[Var, Mark],
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        """(the results of an equation with bodies, what probes in these see); adds their marks."""
        if equation.name == "cond":
            return self._cond(equation, operands, env, marks, scopes)
        if equation.name == "while":
            return self._while(equation, operands, env, marks, scopes)
        assert equation.body is not None
        body = equation.body
        inside = (*scopes, *body.scopes)
        if isinstance(body.call, ShardMap):
            return self._shard_map(equation, body.call, operands, marks, inside)
        assert isinstance(body.call, Scan)
        if self.follow is None:
            return self._scan(body, body.call, operands, env, inside)
        loop = _MarkedScan.of(self, equation, env, marks, inside)
        return loop.results(operands)

    def _scan(
        self,
        body: Body,
        scan: Scan,
        operands: Sequence[Any],
        env: Env,
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        """A scan without marks: what probes see is stacked, as its ys are."""
        _, first, xs = scan.sort(operands)

        def step(carry, slices):
            # A body reads the outer variables too: a scan's constants are those themselves.
            given = zip(body.inputs, [*carry, *slices], strict=True)
            inner = {**env, **dict(given)}
            seen = self.equations(body.equations, inner, {}, scopes)
            outputs = _read(inner, body.outputs)
            return outputs[: scan.carry], (outputs[scan.carry :], seen)

        carry, (ys, seen) = scan.run(step, first, xs)
        return [*carry, *ys], seen

    def _shard_map(
        self,
        equation: Equation,
        shards: ShardMap,
        operands: Sequence[Any],
        marks: dict[Var, Mark],
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        """A shard_map: what probes see gets an axis for each mesh axis, with its devices."""
        # Only the program's constants come from outside, because all else is an operand of the
        # shard_map. Marks are the same on all devices, or they are left outside.
        assert equation.body is not None
        body = equation.body
        constants = self.program.constants
        given = _marks_of(marks, equation.inputs)
        whole = [
            m
            if has_shape(m) and is_whole(m, shards.sharded_axes(spec))
            else None
            for m, spec in zip(given, shards.in_specs, strict=True)
        ]
        self._mark_results(equation, operands, (), marks)

        def block(*blocks):
            values, known = blocks[: len(operands)], blocks[len(operands) :]
            inner = {**constants, **dict(zip(body.inputs, values, strict=True))}
            within = dict(zip(body.inputs, known, strict=True))
            seen = self.equations(body.equations, inner, within, scopes)
            # A leading axis of size 1 for each mesh axis: the devices' parts are put together along
            # it.
            lead = (1,) * len(shards.sizes)
            of_device = jax.tree.map(lambda x: x.reshape(lead + x.shape), seen)
            return _read(inner, body.outputs), of_device

        out_specs = [*shards.out_specs], PartitionSpec(*shards.sizes)
        in_specs = (*shards.in_specs, *(PartitionSpec() for _ in whole))
        return shards.run(block, in_specs, out_specs, (*operands, *whole))

    def _branch(
        self,
        body: Body,
        env: Env,
        marks: Mapping[Var, Mark],
        scopes: Scopes,
        values: Sequence[Any] = (),
    ) -> tuple[list[Any], list[Mark], Seen]:
        """(what a branch, test or body of a loop returns, its marks, what probes in it see)."""
        inner = {**env, **dict(zip(body.inputs, values, strict=True))}
        within = dict(marks)
        seen = self.equations(
            body.equations, inner, within, scopes, outside=env.keys()
        )
        made = _marks_of(within, body.outputs)
        return _read(inner, body.outputs), made, self._of_device(seen, scopes)

    def _of_device(self, arrays: Any, scopes: Scopes) -> Any:
        """The same arrays, typed as differing from device to device along all mesh axes around.

        What a branch sees may differ where zeros do not, and both must be of one type.
        """
        names = self.program.mesh_axes
        around = [names[scope] for scope in scopes if scope in names]
        if not around:
            return arrays
        # A zero that is typed so, because the numbers of the devices are.
        zero: Any = sum(map(lax.axis_index, around)) * 0
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)

    def _cond(
        self,
        equation: Equation,
        operands: Sequence[Any],
        env: Env,
        marks: dict[Var, Mark],
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        """Only the branch that is taken sees anything."""
        branches = []
        for body in equation.branches:
            branches.append(partial(self._branch, body, env, marks, scopes))
        types = [jax.eval_shape(branch) for branch in branches]
        blank: Seen = {}
        for _, _, seen in types:
            blank |= self._of_device(jax.tree.map(_zeros, seen), scopes)
        of_results = zip(*(made for _, made, _ in types), strict=True)
        common = list(map(of_any, of_results))

        def run(branch):
            outputs, made, seen = branch()
            known = self._of_device(list(map(kept_shape, common, made)), scopes)
            return outputs, known, {**blank, **seen}

        runs = [partial(run, branch) for branch in branches]
        outputs, made, seen = lax.switch(operands[0], runs)
        known = map(joined, made, common)
        marks.update(zip(equation.outputs, known, strict=True))
        return outputs, seen

    def _while(
        self,
        equation: Equation,
        operands: Sequence[Any],
        env: Env,
        marks: dict[Var, Mark],
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        """What is seen goes round with the carry. Marks do not: what is carried has lost its own.

        The test before the first step runs outside of the loop, all others at the end of a step.
        """
        test, body = equation.branches
        loop: Any = body.call
        _, _, first = loop.sort(operands)
        made = self._mark_results(equation, operands, (), marks)
        marks.update(zip(test.inputs, made, strict=True))
        marks.update(zip(body.inputs, made, strict=True))

        def after(program, values):
            outputs, _, seen = self._branch(program, env, marks, scopes, values)
            return outputs, seen

        def step(state):
            _, values, before = state
            values, seen = after(body, values)
            [goes_on], of_test = after(test, values)
            seen |= of_test
            total = {v: self.together(before[v], seen[v]) for v in seen}
            return goes_on, values, total

        _, in_body = jax.eval_shape(partial(after, body), first)
        [goes_on], of_test = after(test, first)
        nothing = self._of_device(jax.tree.map(_zeros, in_body), scopes)
        start = {**nothing, **of_test}
        _, last, seen = lax.while_loop(
            lambda state: state[0], step, (goes_on, first, start)
        )
        return last, seen


def _zeros(like: Any) -> jax.Array:
    """What a probe has seen that has seen nothing."""
    return jnp.zeros(like.shape, like.dtype)


class _MarkedScan(NamedTuple):
    """A scan whose body follows marks too.

    What is carried from step to step keeps its marks: (batch, tokens, 1) of the activations that
    layer after layer computes. But if the scan runs over the marked axis itself (over the tokens,
    say), each step is marked by its own slices alone, and what it carries by nothing.

    Attributes:
        run: the run that it is part of.
        equation, scan: the scan.
        env, marks: what the body sees of the outside; the marks of the results are added.
        scopes: of the body.
        carried, of_xs: the marks of what is carried, and of what the scan runs over.
        over_marks: whether it runs over a marked axis.
    """

    run: _Run
    equation: Equation
    scan: Scan
    env: Env
    marks: dict[Var, Mark]
    scopes: Scopes
    carried: list[Mark]
    of_xs: list[Mark]
    over_marks: bool

    @classmethod
    def of(
        cls,
        run: _Run,
        equation: Equation,
        env: Env,
        marks: dict[Var, Mark],
        scopes: Scopes,
    ) -> "_MarkedScan":
        """The scan of an equation, with the marks of its operands."""
        assert equation.body is not None
        scan: Any = equation.body.call
        _, of_first, of_xs = scan.sort(_marks_of(marks, equation.inputs))
        over_marks = any(has_shape(m) and m.shape[0] > 1 for m in of_xs)
        carried = [None] * len(of_first) if over_marks else of_first
        return cls(
            run, equation, scan, env, marks, scopes, carried, of_xs, over_marks
        )

    def results(self, operands: Sequence[Any]) -> tuple[list[Any], Seen]:
        """(the results of the scan, what probes in its body see)."""
        _, first, xs = self.scan.sort(operands)
        slices = [list(xs), [self._sliced(mark) for mark in self.of_xs]]
        loop = self._settled(first, slices)

        def step(carry, slices):
            (values, made), ys = loop._step(carry, slices)
            kept = list(map(kept_shape, loop.carried, made))
            return [values, kept], ys

        start = [list(first), list(map(array_or_none, loop.carried))]
        (carry, kept), (ys, seen, of_ys) = self.scan.run(step, start, slices)
        of_carry = list(map(joined, kept, loop.carried))
        made = zip(self.equation.outputs, [*of_carry, *of_ys], strict=True)
        self.marks.update(made)
        return [*carry, *ys], seen

    def _sliced(self, mark: Mark) -> Mark:
        """A mark of what is sliced, one for each step."""
        if not has_shape(mark):
            return None
        return jnp.broadcast_to(mark, (self.scan.length, *mark.shape[1:]))

    def _step(self, carry: Any, slices: Any) -> tuple[Any, Any]:
        """One step: ((values, marks) carried on, (values, what is seen, marks) of its slices)."""
        assert self.equation.body is not None
        body, count = self.equation.body, self.scan.carry
        (values, of_values), (parts, of_parts) = carry, slices
        inner = {
            **self.env,
            **dict(zip(body.inputs, [*values, *parts], strict=True)),
        }
        static = [*self.carried, *self.of_xs]
        known = map(joined, [*of_values, *of_parts], static)
        within = {**self.marks, **dict(zip(body.inputs, known, strict=True))}
        seen = self.run.equations(body.equations, inner, within, self.scopes)
        outputs = _read(inner, body.outputs)
        made = _marks_of(within, body.outputs)
        after = outputs[:count], made[:count]
        return after, (outputs[count:], seen, made[count:])

    def _settled(self, first: Sequence[Any], slices: Any) -> "_MarkedScan":
        """The same once the shapes of the carried marks grow no further from step to step."""
        if self.over_marks or not self.scan.length:
            return self
        start = [list(first), list(map(array_or_none, self.carried))]
        one = jax.tree.map(lambda x: x[0], slices)
        (_, after), _ = jax.eval_shape(self._step, start, one)
        carried = list(map(grown, self.carried, after))
        if all(map(same_kind, carried, self.carried)):
            return self
        return self._replace(carried=carried)._settled(first, slices)
