"""`Program`: what is known of the variables of a traced function."""

import math
from collections import ChainMap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import filterfalse
from operator import attrgetter
from typing import Any, TypeGuard

import jax
import numpy as np

from sqjax._shapes import Shape
from sqjax.program.build import build
from sqjax.program.entries import Entry, entries
from sqjax.program.equations import (
    Atom,
    Equation,
    Var,
    all_equations,
    variables_in,
)
from sqjax.program.known_values import KnownValues, is_mask
from sqjax.program.primitives import (
    ADDITIONS,
    KEEP_JOINED,
    MULTIPLES,
    PICKS,
    SCALINGS,
)
from sqjax.program.trace import Traced
from sqjax.program.views import VIEWS, Joined, View

#: Notes what is known of one result of an equation.
_Fact = Callable[[Equation, Var], None]


class Program:
    """What is known of the variables of a traced function: which are leaves, seen how, read where.

    A body is a world of its own: what flows in and out of it, at every step or on every device,
    carries no scale. Only the slices or blocks of leaves are leaves inside too, with one scale
    vector a step, or for each device along a mesh axis that shards them all.

    Attributes:
        main, inputs, results, avals, scopes, lengths, mesh_axes, outputs, constants: see
            `FlatProgram`.
        whole: {path: variable} of the parameter leaves, as fn is given them.
        leaves: {variable: path} of the parameter leaves, of their slices and blocks in bodies, and
            of `offsets`.
        roots: {variable: what it is} of the other variables that no equation makes.
        offsets: {variable: c} of variables c + leaf (Gemma's 1 + w) that stand for the leaf: it has
            no other reader.
        barred: {variable: why it can carry no scale}.
        maker, readers: {variable: equation that makes it}, {variable: equations that read it}.
        from_leaves: variables computed from leaves and literals alone; leaves that captured arrays
            mask or multiply.
        steady: variables that no input of fn has a part in: made of leaves, literals and captured
            arrays.
        picked: {variable: what picked it from a leaf by an index}: rows of an embedding, a layer of
            a stack.
        scanned: {variable of a body: the variable computed from leaves of which it is a slice or
            block}.
        views: {variable: View} of the variables that are a leaf, seen through
            `sqjax.program.views`.
        joined: {variable: Joined} of the variables that are leaves, concatenated.
        sums: {variable: View} of the variables that are a leaf, seen through views, plus or minus
            what is computed from other leaves: w + a @ b (LoRA) is a view of w here.
        seen: `views` and `sums` together.
        leaf_views: the same for `leaves`: how a variable's axes are the leaf's.
    """

    def __init__(self, traced: Traced):
        flat = build(traced)
        self.main = flat.main
        self.inputs, self.results = flat.inputs, flat.results
        self.avals, self.scopes = flat.avals, flat.scopes
        self.lengths, self.mesh_axes = flat.lengths, flat.mesh_axes
        self.outputs, self.constants = flat.outputs, flat.constants
        # The leaves come first among the inputs; the others are fn's own.
        self.whole = dict(zip(traced.paths, self.inputs, strict=False))
        self.leaves = dict(flat.leaves)
        self.roots = dict(flat.roots)
        self.offsets: dict[Var, float] = {}
        self.barred: dict[Var, str] = {}
        self.maker: dict[Var, Equation] = {}
        self.readers: dict[Var, list[Equation]] = {}
        # A captured number is as good as a literal.
        numbers = filterfalse(self.shape, self.constants)
        self.from_leaves: set[Var] = {*self.leaves, *numbers}
        self.steady: set[Var] = {*self.leaves, *self.constants}
        self.picked: dict[Var, Equation] = {}
        self.scanned: dict[Var, Var] = {}
        self.views: dict[Var, View] = {}
        self.joined: dict[Var, Joined] = {}
        self.sums: dict[Var, View] = {}
        self.seen: Mapping[Any, View] = ChainMap(self.views, self.sums)
        self.leaf_views: dict[Var, View] = {}
        self._known = KnownValues(self.avals, self.constants)
        # {view: what it is a view, slice or block of}; of these the slices and blocks of leaves.
        self._seen_from: dict[Var, Var] = {}
        self._whole: dict[Var, Var] = {}
        self._begin()
        self._visit(self.main)
        for equation in self.equations:
            for v in set(equation.read):
                self.readers.setdefault(v, []).append(equation)
        for part, whole in self._whole.items():
            self._bar_unless_read_there(
                part, whole, flat.slices[whole, self.scopes[part]]
            )
        for equation in self.equations:
            if equation.name == "add":
                self._note_offset(equation)

    @property
    def equations(self) -> Iterator[Equation]:
        """All equations, those of a body before the one that runs it."""
        return all_equations(self.main)

    def _begin(self) -> None:
        """What is known of the leaves before any equation."""
        for v, path in self.leaves.items():
            self.leaf_views[v] = View.of(path, self.shape(v))
        # Tables of integers are leaves, but nothing scales them.
        for v in filter(self.is_float, self.leaves):
            self.views[v] = self.leaf_views[v]

    # In order of execution, because what is known of a result follows from what is known of the
    # operands.

    def _visit(self, equations: Sequence[Equation]) -> None:
        for equation in equations:
            self.maker.update(dict.fromkeys(equation.outputs, equation))
            for entry in entries(equation):
                self._enter(entry)
            for body in equation.bodies:
                self._visit(body.equations)
            for y in equation.outputs:
                # What leaves a body is no view and no known number: it differs from step to step.
                if equation.branches:
                    self._pass_origin(equation.variables, y)
                elif equation.body is None:
                    self._pass_on(equation, y)

    def _enter(self, entry: Entry) -> None:
        """Slices and blocks of leaves are leaves in a body."""
        outer, inner = entry.outer, entry.inner
        self._known.note(inner, self._known.of(outer))
        if outer in self.steady:
            self.steady.add(inner)
        if not self.is_of_leaves(outer):
            return
        self.from_leaves.add(inner)
        self.scanned[inner] = outer
        view = entry.view(self.seen[outer]) if outer in self.seen else None
        if view is None:
            return
        # A slice of a sum is a sum of slices. It is no leaf: only one of its terms is.
        if outer in self.sums:
            self.sums[inner] = view
            return
        self.views[inner] = view
        # Whether the leaf is read outside the body too is only known once all equations are
        # visited: `_bar_unless_read_there` asks that of what is noted here.
        if view.leaf_axes is not None:
            self._whole[inner] = self._seen_from[inner] = outer
            self._stands_for_leaf(inner, view)
            self.roots.pop(inner, None)

    def _stands_for_leaf(self, var: Var, view: View) -> None:
        self.leaves[var], self.leaf_views[var] = view.path, view

    def _pass_on(self, equation: Equation, y: Var) -> None:
        """What is known of one result of an equation without a body."""
        self._pass_origin(equation.behind(y), y)
        self._known.pass_on(equation, y)
        # In this order: a view of what has been picked is picked too.
        facts: tuple[tuple[Container[str], _Fact], ...] = (
            (PICKS, self._pick),
            (("concatenate",), self._join),
            (KEEP_JOINED, self._pass_joined),
            (VIEWS, self._pass_view),
            (ADDITIONS, self._add),
        )
        for names, pass_on in facts:
            if equation.name in names:
                pass_on(equation, y)

    def _pick(self, equation: Equation, y: Var) -> None:
        """What an index picks of something that is made of leaves."""
        if self.is_of_leaves(equation.inputs[0]):
            self.picked[y] = equation

    def _pass_origin(self, sources: Sequence[Var], y: Var) -> None:
        """What a result is made of: of leaves, or at least of no input."""
        # Also where there are no sources at all: an iota is the same for every batch.
        if self.steady.issuperset(sources):
            self.steady.add(y)
        # A number beside leaves changes nothing; a number alone counts, but no array of literals,
        # because a state that begins with zeros is an activation.
        decide = list(filterfalse(self._is_number, sources)) or sources
        of_leaves = self.from_leaves.issuperset(decide)
        counts = of_leaves if decide else self._is_single(y)
        if counts:
            self.from_leaves.add(y)

    def _join(self, equation: Equation, y: Var) -> None:
        """Views of leaves that are concatenated stay themselves."""
        if not self.views.keys() >= set(equation.inputs):
            return
        views = tuple(self.views[x] for x in equation.variables)
        # One matrix of a stack may be another one on every device.
        if not any(map(attrgetter("fixed"), views)):
            self.joined[y] = Joined(equation.params["dimension"], views)

    def _pass_joined(self, equation: Equation, y: Var) -> None:
        """A cast or a transpose of concatenated leaves changes each alike."""
        [first] = equation.inputs
        if not isinstance(first, Var) or first not in self.joined:
            return
        axis, views = self.joined[first]
        if equation.name == "transpose":
            # Axis i of the result is the old axis permutation[i], so the old axis stands at its
            # index.
            axis = equation.params["permutation"].index(axis)
        rule = VIEWS[equation.name]
        # These rules look at no shapes, so none are given.
        changed = (rule(view, equation.params, (), ()) for view in views)
        self.joined[y] = Joined(axis, tuple(filter(None, changed)))

    def _seen(self, equation: Equation, y: Var) -> tuple[Atom | None, Shape]:
        """(the operand of which a result may be a view, the shape of a gain that multiplies it; ()
        of none). It is the only operand, but for a number, a mask or a gain.
        """
        if equation.name not in SCALINGS:
            sources = equation.behind(y)
            return (sources[0] if len(sources) == 1 else None), ()
        divides = equation.name == "div"
        for x, factor in self._factors(equation):
            masks = not divides and self._is_mask(factor, x)
            if masks or self._is_number(factor):
                return x, ()
            if self._is_gain(factor, x):
                return x, self.shape(factor)
        return None, ()

    def _factors(self, equation: Equation) -> list[tuple[Atom, Atom]]:
        """(operand, what it is multiplied with), as far as the operand can be a leaf.

        A selection multiplies its one case that is not zero with its condition.
        """
        if equation.name == "select_n":
            condition, *cases = equation.inputs
            cases = list(filterfalse(self.is_zero, cases))
            return [(cases[0], condition)] if len(cases) == 1 else []
        positions = MULTIPLES[equation.name]
        x = equation.inputs
        return [(x[position], x[1 - position]) for position in positions]

    def _is_gain(self, atom: Atom, x: Atom) -> bool:
        """Whether an operand of fewer elements than a leaf x, and no part of x, is of no input.

        Example: in w * g of (16, 12) and (1, 12) g is one, and norm(w) in w / norm(w), too.
        """
        is_smaller = math.prod(self.shape(atom)) < math.prod(self.shape(x))
        part_of = {self.path_of(atom)} - {None}
        is_part = self.path_of(x) in part_of
        return is_smaller and atom in self.steady and not is_part

    def _is_mask(self, atom: Atom, x: Atom) -> bool:
        """Whether an operand that x has no part in says which elements of a leaf x are zeros."""
        return (
            is_mask(self._known.of(atom))
            and atom in self.steady
            and self.path_of(x) not in self.leaves_behind(*variables_in([atom]))
        )

    def _is_number(self, atom: Atom) -> bool:
        """Whether an operand is one number, known by its value or made of leaves and literals."""
        known = self._known.number(atom) is not None
        return known or (self._is_single(atom) and self.is_of_leaves(atom))

    def _is_single(self, atom: Atom) -> bool:
        return math.prod(self.shape(atom)) == 1

    def _pass_view(self, equation: Equation, y: Var) -> None:
        """A view of a leaf, or of a sum, is that; one of what was picked from a leaf is picked."""
        x, gain = self._seen(equation, y)
        if not isinstance(x, Var):
            return
        if x in self.picked:
            self.picked[y] = self.picked[x]
        if x not in self.seen or not self.is_float(y):
            return
        rule = VIEWS[equation.name]
        old, new = self.shape(x), self.shape(y)
        view = rule(self.seen[x], equation.params, old, new)
        if view is not None:
            # (w + a @ b).T is w.T + (a @ b).T: of a sum it is a sum.
            views = self.sums if x in self.sums else self.views
            beside = set(equation.behind(y)) - {x}
            is_normed = view.path in self.leaves_behind(*beside)
            normed = replace(view, normed=view.normed | is_normed)
            views[y] = normed.varying_as(gain)
            self._seen_from[y] = x
            self.from_leaves.add(y)  # though a captured array may mask it

    def _add(self, equation: Equation, y: Var) -> None:
        """A leaf, or such a sum, plus or minus an array that is computed from leaves.

        That array must be no leaf itself, because of two leaves neither is the weight.
        """
        for leaf, other in (equation.inputs, equation.inputs[::-1]):
            is_leaf = other in self.seen or other in self.joined
            if leaf not in self.seen or is_leaf or not self.is_of_leaves(other):
                continue
            if self.shape(leaf) == self.shape(y):  # it is not repeated
                self.sums[y] = self.seen[leaf]

    # Once all equations are known, because these facts depend on every reader of a variable.

    def _bar_unless_read_there(
        self, part: Var, whole: Var, parts: Sequence[Var]
    ) -> None:
        """Bars a slice or block of a leaf that is read outside its bodies too.

        Outside, the whole leaf would need one scale, in the bodies it has one for each step or
        device.

        `parts` has an entry for each body of the family that is given it.
        """
        # Each body that is given the whole leaf is one reader of it; a reader more is outside.
        *before, last = self.chain(whole)
        if not self.read_once(before) or self._reads(last) != len(parts):
            body = (
                "shard_map"
                if self.scopes[part][-1] in self.mesh_axes
                else "scan"
            )
            self.barred[part] = (
                f"{self.leaves[part]} is read outside this {body} too"
            )

    def _note_offset(self, equation: Equation) -> None:
        """c + w stands for the leaf w if w has no other reader: w' = (c + w) / s - c scales it."""
        [y] = equation.outputs
        # Either operand may be the number: c + w, and w + c.
        for leaf, other in (equation.inputs, equation.inputs[::-1]):
            number = self._known.number(other)
            if number is None or not number.any():
                continue  # 0 + w is w, with any number of readers
            is_broadcast = self.shape(leaf) != self.shape(y)
            if is_broadcast or not self._is_leaf_read_once(leaf):
                continue
            view = self.views[leaf]
            offset = float(number.item())
            self._stands_for_leaf(y, view)
            self.offsets[y] = offset
            # A leaf is made by no equation, so that a walk up the program ends at the sum.
            del self.maker[y]
            passed = [*self.chain(leaf), y]
            dtypes = [self.avals[v].dtype for v in passed]
            problem = _why_too_coarse(equation, view.path, offset, dtypes)
            if problem is not None:
                self.barred[y] = problem

    # Questions that rules ask.

    def _is_leaf_read_once(self, atom: Atom) -> TypeGuard[Var]:
        """Whether an operand is a whole leaf which nothing else reads, nor another view of it."""
        if self._is_view(atom):
            view = self.views[atom]
            is_whole = view.leaf_axes is not None and not view.scaled
            return is_whole and self.read_once(self.chain(atom))
        return False

    def chain(self, var: Var) -> list[Var]:
        """The variables from a leaf to a view of it."""
        chain = [var]
        while chain[0] in self._seen_from:
            chain.insert(0, self._seen_from[chain[0]])
        return chain

    def read_once(self, variables: Sequence[Var]) -> bool:
        """Whether each of these variables is read at one place only."""
        return max(map(self._reads, variables), default=0) <= 1

    def _reads(self, var: Var) -> int:
        """How many operands, and results of fn or of bodies, a variable is."""
        readers = self.readers.get(var, [])
        by_equations = sum(equation.read.count(var) for equation in readers)
        return by_equations + (var in self.outputs)

    def is_zero(self, atom: Atom) -> bool:
        """Whether an operand is known to hold only zeros."""
        number = self._known.number(atom)
        return number is not None and not number.any()

    def is_scale_free(self, atom: Atom) -> bool:
        """Whether an operand is known to be the same at any scale: 0 everywhere, or infinite."""
        number = self._known.number(atom)
        return number is not None and bool(
            np.all((number == 0) | np.isinf(number))
        )

    def touching(self, *variables: Var) -> list[Equation]:
        """The equations in which any of these variables stands: its maker, then its readers."""
        found: list[Equation] = []
        for var in variables:
            found += filter(None, [self.maker.get(var)])
            found += self.readers.get(var, [])
        # Each once, though it may read several of the variables.
        by_id = dict(zip(map(id, found), found, strict=True))
        return list(by_id.values())

    def is_of_leaves(self, atom: Atom) -> TypeGuard[Var]:
        """Whether an operand is computed from leaves and literals alone."""
        return atom in self.from_leaves

    def is_activation(self, atom: Atom) -> TypeGuard[Var]:
        """Whether an operand is computed from the inputs of fn, too."""
        return isinstance(atom, Var) and atom not in self.from_leaves

    def path_of(self, atom: Atom) -> str | None:
        """The leaf that an operand is, seen through `seen`; None if it is none."""
        return self.seen[atom].path if atom in self.seen else None

    def _is_view(self, atom: Atom) -> TypeGuard[Var]:
        return atom in self.views

    def leaves_behind(self, *variables: Var) -> set[str]:
        """The paths of the leaves that these variables are computed from."""
        paths: set[str] = set()
        seen: set[Var] = set()
        waiting = list(variables)
        while waiting:
            v = waiting.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.leaves:
                paths.add(self.leaves[v])
            elif v in self.scanned:
                waiting.append(self.scanned[v])
            elif v in self.maker:
                waiting += self.maker[v].behind(v)
        return paths

    def _type(self, atom: Atom) -> Any:
        """What has the shape and the dtype of an operand or result."""
        return self.avals[atom] if isinstance(atom, Var) else atom.value

    def shape(self, atom: Atom) -> tuple[int, ...]:
        """The shape of an operand or result."""
        return tuple(self._type(atom).shape)

    def is_float(self, atom: Atom) -> bool:
        """Whether an operand holds floats; float8 does not count: it has too few exponents."""
        dtype = self._type(atom).dtype
        is_floating = jax.numpy.issubdtype(dtype, jax.numpy.floating)
        return is_floating and dtype.itemsize > 1

    def is_scalable(self, atom: Atom) -> bool:
        """Whether an operand may carry a scale: floats, and complex numbers."""
        dtype = self._type(atom).dtype
        is_complex = jax.numpy.issubdtype(dtype, jax.numpy.complexfloating)
        return is_complex or self.is_float(atom)


def _why_too_coarse(
    equation: Equation, path: str, offset: float, dtypes: Sequence[np.dtype]
) -> str | None:
    """Why c + w of these dtypes can not be rescaled without loss; None if it can.

    w' = (c + w) / s - c must hold the bits of (c + w) / s. The proof rounds c + w to multiples of
    2^-8, so that the subtraction is exact in float32; c must be such a multiple too. Example: 1 + w
    in float32 passes, 1 + w in bfloat16 and 0.1 + w do not.
    """
    # A cast to bfloat16 between leaf and sum loses the same bits as a sum in bfloat16.
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
    if narrow.itemsize < 4:
        return (
            f"{equation} computes {offset:g} + {path}, in {narrow} too coarse to rescale: "
            "keep this leaf, and that sum, in float32"
        )
    # Multiples of 2^-8 up to 2^8 take 16 bits, and float32 has 24: room for the leaf's own bits.
    if abs(offset) > 256 or not (offset * 256).is_integer():
        return f"{equation} adds {offset:g}, with which a sum can not be rescaled exactly"
    return None
